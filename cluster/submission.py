"""A run as a Ray job, as values: what it is called, which attempt comes next, and what of a config can be sent."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.config import RunConfig
from pipeline.errors import Incomplete, Refusal

LIVE = ("PENDING", "RUNNING")

# every key of a config whose value names a place
PATH_KEYS = ("path", "text", "spill_path", "offload_path", "data_files")
_ON_THE_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FORMATS = ("json", "parquet", "text", "csv")


@dataclass(frozen=True)
class Attempt:
    """One job of a run. `config` is the digest of what was sent."""

    submission_id: str
    number: int
    status: str
    config: str

    @property
    def is_live(self) -> bool:
        return self.status in LIVE


def run_id(output: str) -> str:
    """The name of a run on any cluster: readable, and the same for the same output.path."""
    place = output.rstrip("/") if "://" in output else os.path.abspath(output)
    slug = re.sub(r"[^a-z0-9]+", "-", place.rpartition("/")[2].lower()).strip("-")[:40] or "run"
    return f"shardprune-{slug}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


def find_attempts(run: str, jobs: Iterable[tuple[str | None, str, str]]) -> list[Attempt]:
    """The attempts of a run among the jobs of a cluster, given as (submission id, status, digest), first to last."""
    attempts = []
    for submission_id, status, config in jobs:
        name, _, number = (submission_id or "").rpartition("-")
        if submission_id and name == run and number.isdigit():
            attempts.append(Attempt(submission_id, int(number), status, config))
    return sorted(attempts, key=lambda attempt: attempt.number)


def next_id(run: str, attempts: list[Attempt]) -> str:
    """Ray refuses an id that was used, so every attempt has one of its own."""
    return f"{run}-{1 + max((attempt.number for attempt in attempts), default=0)}"


def write_document(config: RunConfig) -> str:
    """The config as YAML, to be run on the cluster that the job runs in."""
    values = config.model_dump(mode="json")
    return yaml.safe_dump({**values, "cluster": {**values["cluster"], "address": "auto"}}, sort_keys=False)


def digest(document: str) -> str:
    return hashlib.sha256(document.encode()).hexdigest()


def check_paths(values: dict[str, Any]) -> None:
    """Raises Refusal for a path, as the user wrote it, that is another place on the cluster: relative, or below ~.

    Whether an absolute one is there only the cluster can tell, where the run itself looks.
    """
    for key, path, beside in _paths(values, ""):
        if path.startswith("~"):
            raise Refusal(f"{key} = {path!r}: ~ is another folder on the cluster; give the path as its nodes see it")
        if "://" in path or path.startswith("/") or _is_name(key, path, beside):
            continue
        raise Refusal(
            f"{key} = {path!r}: is relative, and means another place on the cluster; "
            "give an absolute path that all its nodes see"
        )


def outcome(submission_id: str, status: str, exit_code: int | None, message: str) -> None:
    """What the end of a job means for whoever waited for it: nothing, Refusal or Incomplete, as in the run itself."""
    if status == "SUCCEEDED":
        return
    if status == "STOPPED":
        raise Incomplete(f"job {submission_id} was stopped; what is committed is kept, submit it again to resume")
    # a shell tells a signal as 128 and more
    if exit_code is None or exit_code == 75 or not 0 < exit_code < 128:
        reason = message.strip().splitlines()[0] if exit_code is None and message.strip() else f"exit code {exit_code}"
        raise Incomplete(f"job {submission_id} ended early ({reason}); submit it again to resume")
    raise Refusal(f"job {submission_id} failed with exit code {exit_code}; the end of its log says why")


def _paths(values: Any, key: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every path of a config, with its dotted key and what stands beside it."""
    if isinstance(values, list | tuple):
        for index, value in enumerate(values):
            yield from _paths(value, f"{key}[{index}]")
    if not isinstance(values, dict):
        return
    for name, value in values.items():
        where = f"{key}.{name}" if key else str(name)
        if name not in PATH_KEYS:
            yield from _paths(value, where)
            continue
        for path in value if isinstance(value, list | tuple) else [value]:
            if isinstance(path, str):
                yield where, path, values


def _is_name(key: str, path: str, beside: dict[str, Any]) -> bool:
    """Whether a path is no place but a name: a model or dataset on the hub, or a format that `data_files` is of.

    What `data_files` names is relative to the dataset where that is on the hub.
    """
    if beside.get("name") != "dataset":
        return key == "model.path" and _is_on_hub(path)
    if key.endswith(".data_files"):
        return _is_on_hub(str(beside.get("path")))
    return path in _FORMATS or _is_on_hub(path)


def _is_on_hub(name: str) -> bool:
    return _ON_THE_HUB.fullmatch(name) is not None and not os.path.exists(name)
