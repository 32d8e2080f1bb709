"""What the driver does when workers are lost, with a crew of nobody in the place of workers: no Ray."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import shardprune
from tiny import save_model, save_windows, write_config

from cluster import crew as crews
from cluster import driver
from cluster.crew import Calls, Plan, Task
from cluster.driver import run_on_cluster, survey_on_cluster
from cluster.metrics import RunMetrics
from cluster.session import WorkerLost
from pipeline.config_file import load_config
from pipeline.errors import Incomplete
from pipeline.job import Job, Resolved
from pipeline.lease import LeaseGuard
from pipeline.store import Receipt

NUM_LAYERS = 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The job of a run that is finished."""
    folder = tmp_path_factory.mktemp("run")
    model, windows = save_model(folder / "model", "llama"), save_windows(folder / "windows.parquet", 8, 16)
    config = write_config(folder / "run.yaml", model, windows, folder / "out")
    assert shardprune("run", config).code == 0
    return job_of(config, [])


def job_of(config: Path, overrides: list[str]) -> Job:
    settings = load_config(config, overrides)
    return Job(
        config=settings,
        resolved=Resolved(dtype="float32", device="cpu", threads=1, windows_per_micro_batch=4),
        source=Path(settings.model.path),
        num_layers=NUM_LAYERS,
        measured=(),
        fingerprint="",
        attempt=1,
        guard=LeaseGuard(settings.output.folder, "", 1),
    )


class Nobody:
    """A crew of one team, which answers a call with the layer it is about; `calls` may raise instead."""

    def __init__(self, job: Job, calls: Callable[[str], None] = lambda what: None) -> None:
        self.job, self.waiter, self._calls = job, self, calls

    def call(self, method: str, *arguments: Any) -> list[Any]:
        return [(method, *arguments)]

    def share(self, tasks: list[Task]) -> None:
        for task in tasks:
            plan: Plan = task(self)  # type: ignore[arg-type]
            calls = next(plan, None)
            while calls is not None:
                self._calls(calls.what)
                ((_, layer_index, *_),) = calls.left
                try:
                    calls = plan.send([float(layer_index)])
                except StopIteration:
                    calls = None

    def pause(self, seconds: float) -> None:
        pass

    def close(self) -> None:
        pass


def hire_nobody(monkeypatch: pytest.MonkeyPatch, calls: Callable[[str], None] = lambda what: None) -> None:
    monkeypatch.setattr(driver, "Crew", lambda job, *others: Nobody(job, calls))
    monkeypatch.setattr(driver, "check_head", lambda: None)


def test_a_layer_whose_worker_was_lost_after_its_commit_is_told(
    finished: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Once each, in whatever order."""
    done, path = finished.directory.receipts(), tmp_path / "out"
    config = finished.config.model_copy(
        update={"output": finished.config.output.model_copy(update={"path": str(path)})}
    )
    job = finished.model_copy(update={"config": config, "guard": LeaseGuard(path, "", 1)})

    def commit(receipt: Receipt) -> None:
        name = finished.directory.receipt_file(receipt.layer_index)
        (path / "receipts").mkdir(parents=True, exist_ok=True)
        (path / "receipts" / name.name).write_bytes(name.read_bytes())

    commit(done[0])

    def prune(crew: Nobody, on_layer: Callable[[Receipt], None]) -> None:
        left = [receipt for receipt in done if receipt.layer_index not in job.directory.committed()]
        commit(left[0])
        if len(left) > 1:
            raise WorkerLost("gone before it could answer")
        on_layer(left[0])

    hire_nobody(monkeypatch)
    monkeypatch.setattr(driver, "_prune", prune)
    monkeypatch.setattr(driver, "_finish", lambda crew, prepared: {})
    told: list[int] = []
    prepared: Any = None
    run_on_cluster(
        job, prepared, lambda receipt: told.append(receipt.layer_index), RunMetrics(job, []), lambda text: None
    )
    assert told == [1, 2]


def test_the_head_that_is_lost_with_a_worker_is_an_incomplete_run(
    finished: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(crew: Nobody, on_layer: Callable[[Receipt], None]) -> None:
        raise WorkerLost("gone")

    def check_head() -> None:
        raise Incomplete("the head of the Ray cluster is gone")

    hire_nobody(monkeypatch)
    monkeypatch.setattr(driver, "_prune", lose)
    monkeypatch.setattr(driver, "check_head", check_head)
    told: list[str] = []
    prepared: Any = None
    with pytest.raises(Incomplete, match="head"):
        run_on_cluster(finished, prepared, lambda receipt: None, RunMetrics(finished, []), told.append)
    assert not told, "nothing goes on"


@pytest.mark.parametrize("allocation", ["owl", "alphapruning"])
def test_a_survey_that_gets_on_survives_any_number_of_losses(
    allocation: str, finished: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where activations are needed every loss begins at layer 0 again, and no layer is measured twice."""
    config = finished.config.output.folder.parent / "run.yaml"
    job = job_of(config, [f"pruning.allocation.name={allocation}"])
    asked: list[str] = []
    lost: set[str] = set()

    def calls(what: str) -> None:
        asked.append(what)
        if asked.count(what) == 1:
            lost.add(what)
            raise WorkerLost(f"lost at {what}")

    hire_nobody(monkeypatch, calls)
    told: list[int] = []
    assert survey_on_cluster(job, told.append, lambda text: None) == [0.0, 1.0, 2.0]
    assert told == [0, 1, 2] and len(lost) >= NUM_LAYERS
    assert asked.count("measuring layer 0") == (4 if job.config.pruning.surveys_inputs else 2)


class _Team:
    """A team that is called and has nobody to answer."""

    node_ids: tuple[str, ...] = ()

    def __init__(self, job: Job, index: int, size: int, num_gpus: float) -> None:
        self.size = size

    def room(self) -> list[Any]:
        return ["room"]

    def start(self) -> list[Any]:
        return ["start"]

    def call(self, method: str, *arguments: Any) -> list[Any]:
        return [method]


@pytest.mark.parametrize("is_from_hub", [False, True])
def test_a_download_may_take_as_long_as_it_takes(
    is_from_hub: bool, finished: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is called work is given up after a while."""
    overrides = ["model.path=org/name"] if is_from_hub else []
    job = job_of(finished.config.output.folder.parent / "run.yaml", overrides)
    monkeypatch.setattr(crews, "Team", _Team)
    crew = crews.Crew.__new__(crews.Crew)
    crew.job, crew.team_size, crew._teams, crew._num_gpus = job, 1, {}, 0.0
    hiring = crew.hire(0)
    waited: list[Calls] = []
    with pytest.raises(StopIteration):
        waited.append(next(hiring))  # type: ignore[arg-type]
        while True:
            waited.append(hiring.send([]))  # type: ignore[arg-type]
    assert [(*calls.left, calls.is_work) for calls in waited] == [
        ("room", False),
        *([("fetch", False)] if is_from_hub else []),
        ("start", True),
    ]
