"""A run as a Ray job, as values: one name per run, one live attempt, and no path that means another place."""

from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AfterValidator, BaseModel
from tiny import save_model, save_windows, write_config

from cluster.submission import PATH_KEYS, check_paths, find_attempts, next_id, outcome, run_id, write_document
from pipeline.config import RunConfig
from pipeline.config_file import load_config, read_values
from pipeline.errors import Incomplete, Refusal
from pipeline.settings import UserPath

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = [*sorted(CONFIGS.glob("*.yaml")), CONFIGS / "quickstart" / "run.yaml"]
ABSOLUTE: dict[str, Any] = {
    "model": {"path": "org/name"},
    "calibration": {"source": {"name": "text", "path": ["/shared/a.txt", "s3://bucket/b.txt"]}},
    "evaluation": {"text": "/shared/heldout.txt"},
    "output": {"path": "gs://bucket/runs/one"},
}


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1))
def test_a_run_has_one_name_that_ray_takes(output: str) -> None:
    assert run_id(output) == run_id(output)
    assert set(run_id(output)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert run_id(f"/a{output}x") != run_id(f"/b{output}x")


def test_a_run_is_told_by_its_place_and_not_by_how_it_is_written() -> None:
    assert run_id("/shared/runs/Llama 3.1/") == run_id("/shared/./runs/Llama 3.1")
    assert run_id("/shared/runs/Llama 3.1").startswith("shardprune-llama-3-1-")
    assert run_id("s3://bucket/a/") == run_id("s3://bucket/a") != run_id("s3://bucket/b/a")


@given(st.lists(st.sampled_from(["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"])), st.randoms())
def test_the_next_attempt_has_an_id_that_was_never_used(statuses: list[str], random: Any) -> None:
    run = run_id("/runs/one")
    jobs = [(f"{run}-{index + 1}", status, "") for index, status in enumerate(statuses)]
    others = [(f"{run_id('/runs/two')}-7", "RUNNING", ""), (None, "RUNNING", ""), ("raysubmit_X", "RUNNING", "")]
    shuffled = jobs + others
    random.shuffle(shuffled)
    attempts = find_attempts(run, shuffled)
    assert [attempt.submission_id for attempt in attempts] == [job[0] for job in jobs]
    assert [attempt.is_live for attempt in attempts] == [status in ("PENDING", "RUNNING") for status in statuses]
    assert next_id(run, attempts) == f"{run}-{len(jobs) + 1}"


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_what_is_sent_is_the_same_config_on_another_cluster(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["cluster.num_shards=3"])
    (tmp_path / "sent.yaml").write_text(write_document(config))
    sent = load_config(tmp_path / "sent.yaml", [])
    assert sent.cluster.address == "auto"
    assert sent == config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": "auto"})})


def test_places_that_any_node_can_find_are_taken() -> None:
    check_paths(ABSOLUTE)
    prompts = [{"name": "dataset", "path": "org/texts", "data_files": "en/*.json.gz"}]
    check_paths({**ABSOLUTE, "calibration": {"source": {"name": "selfgen", "prompts": prompts}}})
    files = {"name": "dataset", "path": "json", "data_files": ["/shared/a.json"]}
    check_paths({**ABSOLUTE, "calibration": {"source": {"name": "mix", "parts": [{"weight": 1, "source": files}]}}})


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("model.path", {"model": {"path": "models/8b/final"}}),
        ("model.path", {"model": {"path": "./8b"}}),
        ("model.path", {"model": {"path": "~/8b"}}),
        ("model.path", {"model": {"path": "configs/quickstart"}}),
        ("output.path", {"output": {"path": "runs/one"}}),
        ("evaluation.text", {"evaluation": {"text": "~/heldout.txt"}}),
        ("runtime.spill_path", {"runtime": {"spill_path": "scratch"}}),
        ("calibration.source.path", {"calibration": {"source": {"name": "parquet", "path": "org/name"}}}),
        (
            "calibration.source.data_files",
            {"calibration": {"source": {"name": "dataset", "path": "json", "data_files": "a.json"}}},
        ),
        (
            "calibration.source.parts[1].source.path",
            {"calibration": {"source": {"parts": [{"source": {"path": "/a"}}, {"source": {"path": "b.txt"}}]}}},
        ),
        (
            "calibration.source.prompts[0].path",
            {"calibration": {"source": {"name": "selfgen", "prompts": [{"name": "text", "path": "a.txt"}]}}},
        ),
    ],
)
def test_a_path_that_means_another_place_on_the_cluster_is_refused(key: str, changes: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as refused:
        check_paths({**ABSOLUTE, **changes})
    assert str(refused.value).startswith(f"{key} = ") and "the cluster" in str(refused.value)


def test_home_is_refused_before_it_is_expanded(tmp_path: Path) -> None:
    model, windows = save_model(tmp_path / "model", "llama"), save_windows(tmp_path / "windows.parquet", 4, 16)
    write_config(tmp_path / "run.yaml", model, windows, tmp_path / "out")
    check_paths(read_values(tmp_path / "run.yaml", []))
    with pytest.raises(Refusal, match=r"output\.path = '~/out'"):
        check_paths(read_values(tmp_path / "run.yaml", ["output.path=~/out"]))


def test_every_setting_that_is_a_path_is_checked() -> None:
    paths = set(_path_fields(RunConfig, set()))
    assert {"path", "text", "spill_path", "offload_path"} <= paths <= set(PATH_KEYS)


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        ("SUCCEEDED", 0, None),
        ("FAILED", 2, Refusal),
        ("FAILED", 1, Refusal),
        ("FAILED", 75, Incomplete),
        ("FAILED", -9, Incomplete),
        ("FAILED", 143, Incomplete),
        ("FAILED", None, Incomplete),
        ("STOPPED", None, Incomplete),
    ],
)
def test_a_job_ends_as_its_run_does(status: str, code: int | None, error: type[Exception] | None) -> None:
    if error is None:
        outcome("run-1", status, code, "")
        return
    with pytest.raises(error, match="run-1"):
        outcome("run-1", status, code, "the node died\nand more")


def test_a_job_that_never_started_says_why() -> None:
    with pytest.raises(Incomplete, match="no node has room"):
        outcome("run-1", "FAILED", None, "no node has room\n")


def _path_fields(annotation: Any, seen: set[Any]) -> set[str]:
    """The names of all fields of settings, nested in any way, that are a UserPath."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation in seen:
            return set()
        seen.add(annotation)
        fields = annotation.model_fields.items()
        names = {name for name, field in fields if _is_path(field.annotation) or _marks(field.metadata)}
        return names.union(*(_path_fields(field.annotation, seen) for _, field in fields))
    return set().union(*(_path_fields(part, seen) for part in get_args(annotation)))


def _is_path(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return False
    return _marks(getattr(annotation, "__metadata__", ())) or any(map(_is_path, get_args(annotation)))


def _marks(metadata: Any) -> bool:
    [expands] = [each.func for each in get_args(UserPath)[1:] if isinstance(each, AfterValidator)]
    return any(isinstance(each, AfterValidator) and each.func is expands for each in metadata)
