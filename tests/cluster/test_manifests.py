"""The files of configs/clusters: every field is known, every command is one of ours, and what must not be is found."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import FOLDER, PINS, RAY, ROOT, check_command, complain, pods

FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
HEAD = "spec.headGroupSpec"
WORKER = "spec.workerGroupSpecs.0"


def load(name: str) -> list[Any]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def of_kind(name: str, kind: str) -> Any:
    return next(document for document in load(name) if document["kind"] == kind)


@pytest.fixture(scope="module")
def run() -> Any:
    """The config that the manifests run."""
    return yaml.safe_load(of_kind("kuberay-setup.yaml", "ConfigMap")["data"]["run.yaml"])


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_wrong_with_a_manifest(name: str, run: Any) -> None:
    complain((FOLDER / name).read_text(), run)


def test_a_cluster_is_the_same_whoever_makes_it() -> None:
    """A config that fits one fits all, and what is mended in one is mended in all."""
    cluster = of_kind("kuberay-cluster.yaml", "RayCluster")["spec"]
    job = of_kind("kuberay-job.yaml", "RayJob")["spec"]
    assert job["rayClusterSpec"] == cluster
    assert of_kind("kuberay-cronjob.yaml", "RayCronJob")["spec"]["jobTemplate"] == job


def test_manifests_refer_to_what_the_others_make() -> None:
    setup = load("kuberay-setup.yaml")
    assert {(each["kind"], each["metadata"]["name"]) for each in setup} == {
        ("ServiceAccount", "shardprune"),
        ("NetworkPolicy", "shardprune"),
        ("ConfigMap", "shardprune"),
    }
    for name in FILES:
        for pod in pods(load(name)):
            assert pod["spec"].get("serviceAccountName", "shardprune") == "shardprune"
            volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", ())}
            assert "config" not in volumes or volumes["config"]["configMap"]["name"] == "shardprune"
    cluster = of_kind("kuberay-cluster.yaml", "RayCluster")["metadata"]["name"]
    (submitter,) = pods(load("cronjob.yaml"))
    (container,) = submitter["spec"]["containers"]
    assert container["command"][-1] == f"http://{cluster}-head-svc:8265"
    token = next(each["valueFrom"]["secretKeyRef"] for each in container["env"] if each["name"] == "RAY_AUTH_TOKEN")
    assert token == {"name": cluster, "key": "auth_token"}, "as the operator names it"


def test_a_schedule_needs_the_revision_in_the_path(run: Any) -> None:
    assert "{revision}" in run["output"]["path"]


@pytest.mark.parametrize(
    ("name", "where", "value", "complaint"),
    [
        ("aws.yaml", "available_node_typs", {}, "available_node_typs"),
        ("aws.yaml", "available_node_types.worker.node_config.InstanceMarketOption", {}, "InstanceMarketOption"),
        ("aws.yaml", "available_node_types.worker.node_config.InstanceMarketOptions", {}, "spot"),
        ("aws.yaml", "available_node_types.head.node_config.SecurityGroupIds", None, "ssh to everybody"),
        ("aws.yaml", "available_node_types.worker.node_config.SubnetId", "subnet", "SubnetIds"),
        ("aws.yaml", "available_node_types.head.node_config.SubnetIds", None, "SubnetIds"),
        ("aws.yaml", "provider.region", "eu-central-1", "AWS_REGION=eu-central-1"),
        (
            "aws.yaml",
            "worker_start_ray_commands.1",
            "RAY_AUTH_MODE=token ray start --block",
            "worker: knows no AWS_REGION",
        ),
        ("aws.yaml", "available_node_types.worker.min_workers", 1, "from none on"),
        ("aws.yaml", "head_start_ray_commands.1", "ray start --head", "token authentication"),
        (
            "aws.yaml",
            "worker_start_ray_commands.1",
            "RAY_AUTH_MODE=token AWS_REGION=us-west-2 ray start --adress=x",
            "--adress",
        ),
        ("aws.yaml", "head_start_ray_commands.1", "ray start --head --dashboard-host=0.0.0.0", "0.0.0.0"),
        ("aws.yaml", "file_mounts", {"/home/ubuntu/.ray/auth_token": "token"}, "where Ray looks"),
        ("aws.yaml", "cluster_name", "0123456789" * 4, "secret"),
        ("aws.yaml", "cluster_name", "YOUR-NAME", "YOUR-NAME"),
        ("aws.yaml", "setup_commands.2", 'pip install "ray[default]==2.59.0"', RAY),
        ("gcp.yaml", "available_node_types.worker.node_config.scheduling.preemptable", True, "preemptable"),
        ("gcp.yaml", "available_node_types.head.node_config.scheduling", {"provisioningModel": "SPOT"}, ""),
        ("gcp.yaml", "auth.ssh_usr", "me", "ssh_usr"),
        ("kuberay-cluster.yaml", "spec.authOptions.mode", "disabled", "token authentication"),
        ("kuberay-cluster.yaml", "spec.authOption", {"mode": "token"}, "authOption"),
        ("kuberay-cluster.yaml", "spec.rayVersion", "2.59.0", "rayVersion"),
        ("kuberay-cluster.yaml", f"{HEAD}.serviceType", "LoadBalancer", "published"),
        ("kuberay-cluster.yaml", f"{HEAD}.rayStartParams", {}, "placed on the head"),
        ("kuberay-cluster.yaml", f"{HEAD}.rayStartParams", {"num-cpus": 0}, "num-cpus"),
        ("kuberay-cluster.yaml", f"{HEAD}.template.spec.hostNetwork", True, "hostNetwork"),
        ("kuberay-cluster.yaml", f"{HEAD}.template.spec.volumes.2.emptyDir.sizeLimit", "8Gi", "/dev/shm"),
        ("kuberay-cluster.yaml", f"{HEAD}.template.spec.contaners", [], "contaners"),
        ("kuberay-cluster.yaml", f"{HEAD}.template.metadata", {"labels": {}}, "network policy"),
        ("kuberay-cluster.yaml", f"{WORKER}.template.spec.containers.0.image", "shardprune:latest", "pinned"),
        (
            "kuberay-cluster.yaml",
            f"{WORKER}.template.spec.containers.0.env.0",
            {"name": "HF_TOKEN", "value": "x"},
            "HF",
        ),
        ("kuberay-cluster.yaml", f"{WORKER}.template.spec.containers.0.securityContext", {}, "privileges"),
        ("kuberay-cluster.yaml", f"{WORKER}.template.spec.securityContext", {}, "root"),
        ("kuberay-cluster.yaml", f"{WORKER}.template.spec.tolerations", [], "tolerate"),
        ("kuberay-cluster.yaml", f"{WORKER}.template.spec.containers.0.resources.limits.cpu", "4", "does not fit"),
        ("kuberay-cluster.yaml", f"{WORKER}.minReplica", 0, "minReplica"),
        ("kuberay-cluster.yaml", f"{WORKER}.maxReplicas", 3, "waits for ever"),
        ("kuberay-job.yaml", "spec.entrypoint", "shardprune prune /config/run.yaml", "no command prune"),
        (
            "kuberay-job.yaml",
            "spec.entrypoint",
            "shardprune run /config/run.yaml cluster.adress=auto",
            "cluster.adress",
        ),
        ("kuberay-job.yaml", "spec.entrypoint", "shardprune run", "config"),
        ("kuberay-job.yaml", "spec.submissionMode", "JobMode", "submissionMode"),
        ("kuberay-job.yaml", "spec.backofLimit", 1, "backofLimit"),
        ("kuberay-cronjob.yaml", "spec.concurrencyPolicy", "Forbid", "concurrencyPolicy"),
        ("kuberay-cronjob.yaml", "spec.schedule", "0 1 * *", "schedule"),
        ("cronjob.yaml", "spec.concurrencyPolicy", "Allow", "one run"),
        ("cronjob.yaml", "spec.jobTemplate.spec.podFailurePolicy.rules.1.onExitCodes.values", [75], "refused"),
        ("cronjob.yaml", "spec.jobTemplate.spec.template.spec.containers.0.command.1", "submt", "submt"),
        ("cronjob.yaml", "spec.jobTemplate.spec.restartPolicy", "Never", "restartPolicy"),
        ("kuberay-setup.yaml", "data.run.yaml", "model: {path: x}", "calibration"),
        ("kuberay-setup.yaml", "spec.ingres", [], "ingres"),
    ],
)
def test_a_broken_manifest_is_found(name: str, where: str, value: Any, complaint: str, run: Any) -> None:
    documents = load(name)
    broken = [_with(document, where, value) for document in documents]
    assert broken != documents
    header = "".join(line for line in (FOLDER / name).read_text().splitlines(keepends=True) if line.startswith("#"))
    with pytest.raises(ValueError) as found:
        complain(header + "\n" + yaml.safe_dump_all(broken), run)
    assert complaint in str(found.value)


def _with(document: Any, where: str, value: Any) -> Any:
    """A copy with another value at a dotted place, taken away if None; the same where there is no such place."""
    key, _, rest = where.partition(".")
    if isinstance(document, list):
        return [
            _with(each, rest, value) if rest and str(index) == key else value if str(index) == key else each
            for index, each in enumerate(document)
        ]
    if where == "data.run.yaml":
        return {**document, "data": {"run.yaml": value}} if document["kind"] == "ConfigMap" else document
    if where == "spec.ingres" and document["kind"] != "NetworkPolicy":
        return document
    if not rest:
        return {**{each: document[each] for each in document if each != key}, **({} if value is None else {key: value})}
    return {**document, key: _with(document[key], rest, value)} if key in document else document


def test_a_wrong_command_in_a_comment_is_found(run: Any) -> None:
    text = (FOLDER / "aws.yaml").read_text()
    with pytest.raises(ValueError, match="clustr"):
        complain(text.replace("cluster.address=auto", "clustr.address=auto"), run)


def test_the_image_has_what_the_package_is_made_of(tmp_path: Path, run: Any) -> None:
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    commands = [line.split() for line in lines if line and not line.startswith(("#", " "))]
    assert ["FROM", f"rayproject/ray:{RAY}-py311-gpu"] in commands and f"'{RAY}'" in "".join(lines)
    assert [words[1] for words in commands if words[0] == "USER"][-1] == "1000"
    assert any(words[0] == "RUN" and "constraints.txt" in " ".join(words) for words in commands)
    copied = {source for words in commands if words[0] == "COPY" for source in words[2:-1]}
    mounted = {path for name in ("aws.yaml", "gcp.yaml") for path in load(name)[0]["file_mounts"].values()}
    assert copied == mounted - {"~/.ray/auth_token"}
    for name in copied:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    assert (tmp_path / "cluster" / "cli.py").is_file() and (tmp_path / "pyproject.toml").is_file()
    check_command("shardprune run /config/run.yaml", run)
    assert PINS["torch"]
