"""A schedule gives one command for ever: it prunes a model that is new, and does nothing for one that is done."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import Finished, refusal, shardprune, start
from safetensors.torch import load_file, save_file
from tiny import digests, modified_ns, save_model, save_windows, write_config

from pipeline.config_file import load_config
from pipeline.errors import Refusal
from pipeline.models.checkpoint import find_revision

COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    model = save_model(tmp_path / "model", "llama")
    windows = save_windows(tmp_path / "windows.parquet", 4, 16)
    return write_config(tmp_path / "run.yaml", model, windows, tmp_path / "runs" / "tiny-{revision}")


def train_on(model: Path) -> None:
    """The same model with other weights, as the next checkpoint of a training is."""
    tensors = load_file(model / "model.safetensors")
    save_file({key: tensor + 0.01 for key, tensor in tensors.items()}, model / "model.safetensors", {"format": "pt"})


def runs(config: Path) -> set[str]:
    return {path.name for path in (config.parent / "runs").iterdir()}


def succeeds(config: Path, *overrides: str) -> Finished:
    finished = shardprune("run", config, *overrides)
    assert finished.code == 0, finished.err
    return finished


def test_only_a_new_model_is_pruned(config: Path) -> None:
    first = succeeds(config)
    (name,) = runs(config)
    assert name == f"tiny-{find_revision(str(config.parent / 'model')).name}"
    before = modified_ns(config.parent / "runs" / name)
    again = succeeds(config)
    assert modified_ns(config.parent / "runs" / name) == before, "not one file was written"
    assert "nothing to do" in again.out and first.out.endswith(again.out.partition("nothing to do\n")[2])
    train_on(config.parent / "model")
    succeeds(config)
    assert len(runs(config)) == 2
    (other,) = runs(config) - {name}
    assert digests(config.parent / "runs" / name / "model") != digests(config.parent / "runs" / other / "model")
    assert modified_ns(config.parent / "runs" / name) == before


def test_a_finished_run_is_not_mistaken_for_one_with_other_settings(config: Path) -> None:
    succeeds(config)
    assert "pruning.sparsity was 0.5, now 0.6" in refusal("run", config, "pruning.sparsity=0.6")
    (name,) = runs(config)
    assert "nothing to do" not in succeeds(config, "runtime.ram_bytes=1000000000").out
    (config.parent / "runs" / name / "report.md").unlink()
    assert "nothing to do" not in succeeds(config, "runtime.ram_bytes=1000000000").out
    assert "nothing to do" in succeeds(config, "runtime.ram_bytes=1000000000").out


def test_a_killed_run_is_resumed_and_not_taken_for_finished(config: Path) -> None:
    running = start("run", config, dies_at_write=12)
    assert running.wait().code != 0
    assert "nothing to do" not in succeeds(config).out
    assert len(runs(config)) == 1


def test_without_the_revision_in_its_path_a_run_refuses_a_model_that_has_changed(config: Path, tmp_path: Path) -> None:
    out = f"output.path={tmp_path}/out"
    succeeds(config, out)
    before = digests(tmp_path / "out" / "model")
    train_on(config.parent / "model")
    assert "holds another run (model file model.safetensors was" in refusal("run", config, out)
    assert digests(tmp_path / "out" / "model") == before


@pytest.fixture
def hub(config: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a host that has two commits of a model in its cache, as the hub's client keeps it, and no
    network."""
    cached = tmp_path / "hub" / "models--org--tiny"
    (cached / "refs").mkdir(parents=True)
    for commit in COMMITS:
        shutil.copytree(config.parent / "model", cached / "snapshots" / commit)
    (cached / "refs" / "main").write_text(COMMITS[0])
    train_on(cached / "snapshots" / COMMITS[1])
    return {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}


def test_a_model_id_on_the_hub_is_named_after_its_commit(config: Path, hub: dict[str, str], tmp_path: Path) -> None:
    command = [Path(sys.executable).parent / "shardprune", "run", config, "model.path=org/tiny"]
    for expected in ({COMMITS[0]}, {COMMITS[0]}, set(COMMITS)):
        (tmp_path / "hub" / "models--org--tiny" / "refs" / "main").write_text(COMMITS[len(expected) - 1])
        finished = subprocess.run(command, env=hub, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        assert runs(config) == {f"tiny-{commit}" for commit in expected}
    record = (tmp_path / "runs" / f"tiny-{COMMITS[0]}" / "run.yaml").read_text()
    assert f"revision: {COMMITS[0]}" in record


def test_another_host_reads_the_same_commit_from_its_own_cache(config: Path, hub: dict[str, str]) -> None:
    """The driver's folder is not there, and the model's main branch has moved on since."""
    code = (
        "import sys; from pathlib import Path; from pipeline.job import Job;"
        "from pipeline.config_file import load_config;"
        "config = load_config(Path(sys.argv[1]), ['model.path=org/tiny']);"
        "job = Job.model_construct(config=config, source=Path('/elsewhere') / sys.argv[2]);"
        "print(job.open_source().path)"
    )
    command = [sys.executable, "-c", code, config, COMMITS[1]]
    told = subprocess.run(command, env=hub, capture_output=True, text=True)
    assert Path(told.stdout.strip()).name == COMMITS[1], told.stderr


def test_a_generator_on_another_host_reads_the_same_commit_too(hub: dict[str, str]) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from tiny import build_task;"
        "from pipeline.calibration.generator import Generator;"
        "Generator(build_task(Path('/elsewhere') / sys.argv[2], model_path='org/tiny', is_from_hub=True))"
    )
    command = [sys.executable, "-c", code, Path(__file__).parent, COMMITS[1]]
    told = subprocess.run(command, env=hub, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


def test_a_folder_is_another_revision_once_a_file_is(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama", max_shard_size="30KB")
    assert len(list(model.glob("*.safetensors"))) > 1
    name = find_revision(str(model)).name
    moved = shutil.copytree(model, tmp_path / "copy", copy_function=shutil.copy2)
    assert find_revision(str(moved)).name == name
    os.utime(next(moved.glob("*.safetensors")), ns=(1, 1))
    assert find_revision(str(moved)).name != name


def test_what_stands_for_nothing_is_refused(config: Path) -> None:
    with pytest.raises(Refusal, match=r"\{revison\} stands for nothing"):
        load_config(config, ["output.path='runs/{revison}'"])
