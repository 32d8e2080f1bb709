"""What can be wrong with the files of configs/clusters, found without a cloud account or a cluster."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import typer
import yaml
from botocore.loaders import Loader
from botocore.model import ServiceModel
from botocore.validate import ParamValidator
from kuberay import SPECS, validate
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start
from typer.main import get_command

from cluster.cli import app
from pipeline.config import RunConfig
from pipeline.config_file import validate as validate_settings
from pipeline.settings import Settings

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "configs" / "clusters"
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
RAY = PINS["ray"]
# typer brings a click of its own
_UsageError = typer.BadParameter.__bases__[0]
_SECRET = re.compile(r"AKIA[0-9A-Z]{16}|hf_[A-Za-z]{30}|PRIVATE KEY|[0-9a-f]{40}|[A-Za-z0-9+/]{44}")
_FORBIDDEN = {"hostNetwork", "hostPID", "hostIPC", "hostPath", "hostPort", "privileged", "stringData"}


class _Gcp(Settings):
    """The parts of a Compute Engine instance that gcp.yaml uses, by the names of its v1 interface."""

    class Interface(Settings):
        subnetwork: str
        accessConfigs: tuple[dict[str, str], ...] = ()

    class Scheduling(Settings):
        provisioningModel: str
        instanceTerminationAction: str
        onHostMaintenance: str
        automaticRestart: bool

    class Account(Settings):
        email: str
        scopes: list[str]

    class Disk(Settings):
        class Parameters(Settings):
            diskSizeGb: int
            sourceImage: str

        boot: bool
        autoDelete: bool
        type: str
        initializeParams: Parameters

    machineType: str
    tags: dict[str, list[str]]
    networkInterfaces: list[Interface]
    scheduling: Scheduling | None = None
    serviceAccounts: list[Account] | None = None
    disks: list[Disk]


def complain(text: str, run: dict[str, Any]) -> None:
    """Raises ValueError that says what is wrong with a file; `run` is the config that its commands give."""
    documents = [document for document in yaml.safe_load_all(text) if document]
    _check_text(text, documents)
    for command in _commented_commands(text):
        check_command(command, run)
    for document in documents:
        if "provider" in document:
            _check_ray_up(document)
        else:
            _check_resource(document, run)


def check_command(line: str, run: dict[str, Any]) -> None:
    """Raises ValueError where `shardprune ...` is no command, or its overrides do not suit the config."""
    _, name, *arguments = shlex.split(line)
    known = get_command(app).commands
    _need(name in known, f"{line}: there is no command {name}; there are {sorted(known)}")
    try:
        context = known[name].make_context(name, arguments)
    except _UsageError as error:
        raise ValueError(f"{line}: {error}") from None
    validate_settings(RunConfig, yaml.safe_load(yaml.safe_dump(run)), context.params.get("overrides") or [])


def pods(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod template below a node."""
    for each in _below(node):
        if isinstance(each, dict) and "containers" in each.get("spec", {}):
            yield each


def _below(node: Any) -> Iterator[Any]:
    yield node
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        yield from _below(child)


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _check_text(text: str, documents: list[Any]) -> None:
    header = text.partition("\n\n")[0] if "\n\n" in text else text
    header = "\n".join(line for line in text.splitlines() if line.startswith("#")) or header
    values = yaml.safe_dump_all(documents)
    _need("0.0.0.0" not in values, "something is open to everybody: 0.0.0.0")
    _need(not _SECRET.search(values), "what looks like a secret stands in the file")
    for blank in sorted(set(re.findall(r"YOUR-[A-Z-]*[A-Z]", values))):
        _need(blank in header, f"{blank}: the header does not say what it is")


def _commented_commands(text: str) -> list[str]:
    comments = "\n".join(line[1:] for line in text.splitlines() if line.startswith("#")).replace("\\\n", " ")
    return re.findall(r"shardprune (?:run|submit|status|stop|evaluate|calibrate) [^'\n`]*", comments)


def _check_ray_up(config: dict[str, Any]) -> None:
    prepared = prepare_config(config)
    try:
        validate_config(prepared)
    except Exception as error:
        raise ValueError(str(error).splitlines()[0]) from None
    types = config["available_node_types"]
    head, workers = types[config["head_node_type"]], [types[name] for name in types if name != config["head_node_type"]]
    for node in types.values():
        _check_instance(config["provider"]["type"], node["node_config"])
    _need(not _is_spot(head["node_config"]) and not head["resources"].get("GPU"), "the head is on demand, without GPU")
    for worker in workers:
        _need(_is_spot(worker["node_config"]) and worker["min_workers"] == 0, "workers are spot, from none on")
        _need(0 < worker["max_workers"] <= config["max_workers"], "max_workers of a type exceeds that of the cluster")
    _need(0 < config["idle_timeout_minutes"] <= 15, "idle nodes are given back")
    _check_start(config)
    mounts = config["file_mounts"]
    token = f"/home/{config['auth']['ssh_user']}/.ray/auth_token"
    _need(mounts.get(token) == "~/.ray/auth_token", "every node gets the token in the file where Ray looks for it")
    missing = [path for path in mounts.values() if not path.startswith("~") and not (ROOT / path).exists()]
    _need(not missing, f"file_mounts: no {missing} in the repository")
    versions = set(re.findall(r"ray\[default\]==([\d.]+)", str(config)))
    _need(versions == {RAY}, f"ray=={RAY} is installed, not {versions}")


def _check_instance(provider: str, node: dict[str, Any]) -> None:
    if provider == "gcp":
        _Gcp.model_validate(node)
        return
    _need("SecurityGroupIds" in node, "without SecurityGroupIds Ray makes a group that opens ssh to everybody")
    _need("IamInstanceProfile" in node, "storage is used by an instance profile, not by keys")
    # Ray passes SubnetId over, and takes every public subnet
    _need("SubnetIds" in node and "SubnetId" not in node, "Ray reads nothing but SubnetIds")
    asked = {name: value for name, value in node.items() if name != "SubnetIds"}
    shape = ServiceModel(Loader().load_service_model("ec2", "service-2")).operation_model("RunInstances").input_shape
    report = ParamValidator().validate({**asked, "SubnetId": node["SubnetIds"][0], "MinCount": 1, "MaxCount": 1}, shape)
    _need(not report.has_errors(), report.generate_report())


def _is_spot(node: dict[str, Any]) -> bool:
    market, scheduling = node.get("InstanceMarketOptions", {}), node.get("scheduling", {})
    return market.get("MarketType") == "spot" or scheduling.get("provisioningModel") == "SPOT"


def _check_start(config: dict[str, Any]) -> None:
    for where in ("head", "worker"):
        line = next(line for line in config[f"{where}_start_ray_commands"] if "ray start" in line)
        environment, _, arguments = line.rpartition("ray start ")
        _need("RAY_AUTH_MODE=token" in environment, f"{where}: token authentication is on")
        if config["provider"]["type"] == "aws":
            region = f"AWS_REGION={config['provider']['region']}"
            _need(region in environment and region in str(config["setup_commands"]), f"{where}: knows no {region}")
        try:
            options = ray_start.make_context("start", shlex.split(arguments)).params
        except click.UsageError as error:
            raise ValueError(f"{where}: {error.message}") from None
        if where == "head":
            _need("RAY_enable_autoscaler_v2=1" in environment, "the head runs autoscaler v2")
            _need(options["dashboard_host"] == "127.0.0.1", "the dashboard listens on the loopback only")
            _need((options["num_cpus"], options["num_gpus"]) == (0, 0), "no worker is placed on the head")
            _need(bool(options["autoscaling_config"]), "the head has an autoscaler")


def _check_resource(resource: dict[str, Any], run: dict[str, Any]) -> None:
    kind, spec = resource["kind"], resource.get("spec", {})
    if kind in SPECS:
        _need(resource["apiVersion"] == "ray.io/v1", f"{kind} is of ray.io/v1")
        SPECS[kind].model_validate(spec)
    else:
        validate(resource)
    if kind == "ConfigMap":
        RunConfig.model_validate(yaml.safe_load(resource["data"]["run.yaml"]))
    if kind == "CronJob":
        _check_cron(spec)
    for node in _below(resource):
        if isinstance(node, dict):
            _need(not _FORBIDDEN & node.keys(), f"{_FORBIDDEN & node.keys()}: not here")
            _need(node.get("serviceType", node.get("type")) not in ("LoadBalancer", "NodePort"), "nothing is published")
            _need(kind != "Secret" and "secret" not in node.get("data", {}), "no secret in a manifest")
        if isinstance(node, dict) and "rayVersion" in node:
            _check_cluster(node, run)
        if isinstance(node, dict) and "entrypoint" in node:
            check_command(node["entrypoint"], run)
    for pod in pods(resource):
        _check_pod(pod, run)


def _check_pod(pod: dict[str, Any], run: dict[str, Any]) -> None:
    spec = pod["spec"]
    _need(pod["metadata"]["labels"].get("app") == "shardprune", "the network policy covers all pods")
    _need(spec.get("securityContext", {}).get("runAsNonRoot") is True, "pods do not run as root")
    volumes = {volume["name"] for volume in spec.get("volumes", ())}
    for container in spec["containers"]:
        name, context = container["name"], container.get("securityContext", {})
        _need(container["image"].endswith(f":0.1.0-ray{RAY}"), f"{name}: the image is pinned, to ray {RAY}")
        _need(context.get("allowPrivilegeEscalation") is False, f"{name}: no privileges are gained")
        _need(context.get("capabilities") == {"drop": ["ALL"]}, f"{name}: no capabilities")
        _need({"cpu", "memory"} <= container["resources"]["limits"].keys(), f"{name}: has limits")
        mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
        _need(mounted <= volumes, f"{name}: mounts {mounted - volumes}, which is no volume")
        for variable in container.get("env", ()):
            is_secret = re.search("TOKEN|KEY|SECRET|PASSWORD", variable["name"])
            _need(not is_secret or "value" not in variable, f"{variable['name']}: comes from a Secret")
        if container.get("command"):
            check_command(shlex.join(container["command"]), run)


def _check_cluster(spec: dict[str, Any], run: dict[str, Any]) -> None:
    head, workers = spec["headGroupSpec"], spec["workerGroupSpecs"]
    _need(spec["rayVersion"] == RAY, f"rayVersion is {RAY}")
    _need(spec["authOptions"]["mode"] == "token", "token authentication is on")
    _need(spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2", "autoscaler v2")
    _need(head["rayStartParams"].get("num-cpus") == "0", "no worker is placed on the head")
    _need(
        "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"], "no GPU for the head"
    )
    cluster = RunConfig.model_validate(run).cluster
    asked, num_asked = cluster.worker, cluster.num_replicas
    for group in (head, *workers):
        _check_object_store(group["template"]["spec"])
    for worker in workers:
        pod = worker["template"]["spec"]
        limits = pod["containers"][0]["resources"]["limits"]
        _need(worker["minReplicas"] == 0, "workers come from none on")
        _need(worker["maxReplicas"] >= num_asked, f"cluster.num_replicas = {num_asked} waits for ever")
        _need(any("spot" in key.lower() or "capacity" in key for key in pod["nodeSelector"]), "workers are spot")
        _need(any("spot" in each.get("key", "") for each in pod["tolerations"]), "workers tolerate spot nodes")
        _need(0 < pod["terminationGracePeriodSeconds"] <= 30, "a spot node does not wait for longer")
        fits = asked.num_gpus == int(limits["nvidia.com/gpu"]) and asked.num_cpus <= int(limits["cpu"])
        _need(fits, f"cluster.worker = {asked} does not fit a worker of {limits}")


def _check_object_store(pod: dict[str, Any]) -> None:
    """Ray makes it of 30 % of the memory; up to 10 GB it does not look whether /dev/shm has as much."""
    (container,) = pod["containers"]
    (name,) = (mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm")
    (volume,) = (volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == name)
    sizes = container["resources"]["limits"]["memory"], volume["sizeLimit"]
    memory, shared = (int(size.removesuffix("Gi")) for size in sizes)
    _need(0.3 * memory < 0.95 * shared, f"30 % of {memory} Gi have no room in {shared} Gi of /dev/shm")


def _check_cron(spec: dict[str, Any]) -> None:
    job = spec["jobTemplate"]["spec"]
    _need(spec["concurrencyPolicy"] == "Forbid", "one run at a time")
    _need({"startingDeadlineSeconds", "successfulJobsHistoryLimit", "failedJobsHistoryLimit"} <= spec.keys(), "bounded")
    final = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    _need(len(spec["schedule"].split()) == 5, "a schedule has five fields")
    _need([each["values"] for each in final] == [[2]], "what is refused is not tried again, everything else is")
    names = {container["name"] for container in job["template"]["spec"]["containers"]}
    _need({each["containerName"] for each in final} <= names, "the exit code is that of the container that submits")
