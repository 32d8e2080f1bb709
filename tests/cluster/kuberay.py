"""The fields of KubeRay 1.7, from its generated reference; what is of Kubernetes itself is left to its schemas."""

from typing import Annotated, Any, Literal

import jsonschema
import kubernetes_validate
from pydantic import AfterValidator, Field

from pipeline.settings import Settings

KUBERNETES = "1.35"


def validate(resource: dict[str, Any]) -> None:
    """Raises ValueError where Kubernetes would refuse a resource, also for a field that it does not know."""
    try:
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)
    except (jsonschema.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        where = ".".join(map(str, getattr(error, "absolute_path", ())))
        raise ValueError(f"{resource['kind']} {where}: {error.message}") from None


def _pod_template(template: dict[str, Any]) -> dict[str, Any]:
    validate({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "any"}, "template": template})
    return template


def _container(parts: dict[str, Any]) -> dict[str, Any]:
    _pod_template({"spec": {"containers": [{"name": "any", **parts}]}})
    return parts


PodTemplate = Annotated[dict[str, Any], AfterValidator(_pod_template)]
Count = Annotated[int, Field(ge=0)]
Quantities = dict[str, str]


class AuthOptions(Settings):
    mode: Literal["disabled", "token"]
    secretName: str | None = None


class AutoscalerOptions(Settings):
    version: Literal["v1", "v2"] | None = None
    idleTimeoutSeconds: Count | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    image: str | None = None
    imagePullPolicy: str | None = None
    resources: Annotated[dict[str, Any], AfterValidator(lambda it: _container({"resources": it})["resources"])]
    securityContext: Annotated[dict[str, Any], AfterValidator(lambda it: _container({"securityContext": it}) and it)]


class HeadGroup(Settings):
    serviceType: str | None = None
    enableIngress: bool | None = None
    rayStartParams: dict[str, str]
    resources: Quantities | None = None
    labels: dict[str, str] | None = None
    template: PodTemplate


class WorkerGroup(Settings):
    groupName: str
    replicas: Count
    minReplicas: Count
    maxReplicas: Count
    numOfHosts: Count | None = None
    idleTimeoutSeconds: Count | None = None
    priority: int | None = None
    rayStartParams: dict[str, str]
    resources: Quantities | None = None
    labels: dict[str, str] | None = None
    template: PodTemplate


class RayClusterSpec(Settings):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    headServiceAnnotations: dict[str, str] | None = None
    suspend: bool | None = None
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayJobSpec(Settings):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    backoffLimit: Count
    preRunningDeadlineSeconds: Annotated[int, Field(ge=1)]
    activeDeadlineSeconds: Annotated[int, Field(ge=1)]
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Count
    entrypointNumCpus: float | None = None
    suspend: bool | None = None
    metadata: dict[str, str] | None = None
    runtimeEnvYAML: str | None = None
    submitterPodTemplate: PodTemplate
    rayClusterSpec: RayClusterSpec


class RayCronJobSpec(Settings):
    schedule: Annotated[str, Field(pattern=r"^\S+( \S+){4}$")]
    timeZone: Annotated[str, Field(min_length=1)]
    suspend: bool | None = None
    jobTemplate: RayJobSpec


SPECS: dict[str, type[Settings]] = {
    "RayCluster": RayClusterSpec,
    "RayJob": RayJobSpec,
    "RayCronJob": RayCronJobSpec,
}
