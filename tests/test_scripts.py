"""Every script starts and says what it is for; those that run for hours do not waste them."""

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path

import larger_than_memory
import measure_plan
import pytest
import random_checkpoint
import study
import torch
import watch
import yaml
from safetensors.torch import save_file
from tiny import save_windows, write_config

from pipeline.config import EvaluateConfig
from pipeline.config_file import load_config
from pipeline.errors import Refusal
from pipeline.evaluate import Perplexity
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.models.hollow import is_imagined, open_or_imagine

SCRIPTS = [path for path in sorted(Path(__file__).parent.parent.glob("scripts/*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_tells_what_it_measures(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    opening = script.read_text().removeprefix('"""').partition("\n")[0]
    assert opening in capsys.readouterr().out


def stand_in(program: str) -> list[str]:
    """A command of a few lines of Python."""
    return [sys.executable, "-c", f"import json, os, signal, sys; {program}"]


def test_the_plan_is_measured_where_the_runs_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "told.json"
    program = f"json.dump(sys.argv, open({str(told)!r}, 'w')); sys.exit(75)"
    monkeypatch.setattr(measure_plan, "COMMAND", stand_in(program))
    windows = save_windows(tmp_path / "windows.parquet", 2, 16)
    config = write_config(tmp_path / "run.yaml", tmp_path / "model", windows, tmp_path / "elsewhere")
    with pytest.raises(SystemExit) as ended:
        measure_plan.compare(config, [], 1, tmp_path / "compared")
    assert ended.value.code == 75
    assert f"output.path={tmp_path}/compared/plan" in json.loads(told.read_text())


SELFGEN = "{name: selfgen, preset: plain, num_texts: 2}"


@pytest.mark.parametrize(
    "setting",
    [
        f"calibration.source={SELFGEN}",
        f"calibration.source={{name: mix, parts: [{{source: {SELFGEN}}}]}}",
        "pruning.allocation.name=alphapruning",
    ],
)
def test_what_is_not_planned_is_not_measured(
    setting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure_plan, "COMMAND", stand_in("sys.exit(1)"))
    words = ["configs/quickstart/run.yaml", "--set", setting]
    monkeypatch.setattr(sys, "argv", ["measure_plan.py", *words])
    with pytest.raises(SystemExit):
        measure_plan.main()
    assert "no plan holds the time" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "added", "is_same"),
    [
        ("settings", {"model.dtype": "float32"}, False),
        ("settings", {"calibration.num_windows": 4}, False),
        ("methods", {"ria": {"pruning.method": {"name": "ria"}}}, True),
        ("methods", {"wanda": {"pruning.method": {"name": "ria"}}}, False),
    ],
)
def test_results_are_taken_up_where_only_more_is_asked_for(
    key: str, added: dict[str, object], is_same: bool, tmp_path: Path
) -> None:
    values = yaml.safe_load(Path("configs/studies/granularity.yaml").read_text())
    values |= {"settings": {"calibration.num_windows": 64}, "methods": {"wanda": {"pruning.method": {"name": "wanda"}}}}
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    out.mkdir()
    file.write_text(yaml.safe_dump(values))
    study.Study(file, out).check_same()
    values[key] = {**values[key], **added}
    file.write_text(yaml.safe_dump(values))
    if is_same:
        study.Study(file, out).check_same()
    else:
        with pytest.raises(SystemExit, match=f"another {key}"):
            study.Study(file, out).check_same()


def test_a_study_evaluates_in_the_dtype_that_it_prunes_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def evaluated(config: EvaluateConfig, tell: object) -> Perplexity:
        asked.append(config.model.dtype)
        return Perplexity(nll=0.0, num_windows=1, window_length=2, windows_digest="")

    monkeypatch.setattr(study, "evaluate_checkpoint", evaluated)
    pruned = study.Study(Path("configs/studies/methods.yaml"), tmp_path)
    for dtype in ("auto", "float32"):
        config = pruned.config({"name": "text", "path": "t"}, 0, tmp_path / "out", {"model.dtype": dtype})
        assert study.measure(pruned, tmp_path, config) == {"like": 1.0}
    assert asked == ["auto", "float32"]


KILLS_ITSELF = "os.kill(os.getpid(), signal.SIGKILL)"
COMMITS = "os.mkdir('receipts'); open('receipts/layer-00000.json', 'w')"
FINISHES = "os.mkdir('model'); open('model/model.safetensors.index.json', 'w')"
GOES_ON = "signal.pause()"


@pytest.mark.parametrize("kill_after", [None, 1])
def test_only_the_kill_that_was_sent_counts(
    kill_after: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(larger_than_memory, "COMMAND", stand_in(KILLS_ITSELF))
    with pytest.raises(SystemExit, match="exit code -9"):
        larger_than_memory.run(tmp_path / "config.yaml", tmp_path, kill_after)


@pytest.mark.parametrize("program", [FINISHES, f"{FINISHES}; {COMMITS}; {GOES_ON}"])
def test_a_run_that_is_complete_is_not_killed_in_time(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(larger_than_memory, "COMMAND", stand_in(program))
    with pytest.raises(SystemExit, match="was complete before"):
        larger_than_memory.run(tmp_path / "config.yaml", tmp_path, 1)


def test_a_run_is_killed_after_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(larger_than_memory, "COMMAND", stand_in(f"{COMMITS}; {GOES_ON}"))
    assert larger_than_memory.run(tmp_path / "config.yaml", tmp_path, 1).finished_after is None


@pytest.mark.parametrize("override", ["output.path=elsewhere", "output={path: elsewhere}", "model.path=other"])
def test_what_is_watched_stays_where_it_is(override: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="leave them out"):
        larger_than_memory.write_inputs(tmp_path, small(override))


SHAPE = ["--layers", "2", "--kill-after", "1", "--hidden", "128", "--intermediate", "128"]


@pytest.mark.parametrize(
    ("script", "words", "told"),
    [
        ("measure_plan", ["--repeats", "0"], "--repeats: 0: must be a whole number of at least 1"),
        ("measure_plan", ["nowhere.yaml"], "config nowhere.yaml: No such file"),
        ("measure_plan", ["--set", "foo.bar=1"], "foo: unknown key"),
        ("larger_than_memory", ["file"], "file: Not a directory"),
        ("larger_than_memory", ["/proc/none"], "/proc/none: No such file"),
        ("larger_than_memory", ["out", *SHAPE, "--hidden", "250"], "--hidden 250: does not make heads"),
        ("larger_than_memory", ["out", *SHAPE, "--intermediate", "-5"], "--intermediate: -5: must be"),
        ("larger_than_memory", ["out", *SHAPE, "--evaluation-windows", "0"], "--evaluation-windows: 0: must be"),
        ("larger_than_memory", ["out", *SHAPE, "--set", "foo.bar=1"], "foo: unknown key"),
        ("random_model", ["out", "--hidden", "250"], "--hidden 250: does not make heads"),
    ],
)
def test_what_cannot_work_is_a_sentence(
    script: str,
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (path,) = (path for path in SCRIPTS if path.stem == script)
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_a_refused_plan_ends_the_script_and_rates_are_always_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told.json"
    program = f"json.dump(sys.argv, open({str(told)!r}, 'w')); sys.exit(2)"
    monkeypatch.setattr(larger_than_memory, "COMMAND", stand_in(program))
    (tmp_path / "rates.yaml").touch()
    with pytest.raises(SystemExit) as ended:
        larger_than_memory.plan(tmp_path / "config.yaml", tmp_path / "rates.yaml")
    assert ended.value.code == 2 and "--calibrate-plan" in json.loads(told.read_text())


def test_only_weights_that_are_there_settle_the_shape(tmp_path: Path) -> None:
    random_checkpoint.write_shape(tmp_path, 2, 128, 128, 16)
    random_checkpoint.write_shape(tmp_path, 1, 128, 128, 16)
    (tmp_path / "model.safetensors.index.json").touch()
    with pytest.raises(Refusal, match="another shape"):
        random_checkpoint.write_shape(tmp_path, 2, 128, 128, 16)


def test_any_sparsity_may_be_set(tmp_path: Path) -> None:
    config = larger_than_memory.write_inputs(tmp_path, small("pruning.sparsity=0.75", "output.keep_entry_every=1"))
    assert load_config(config, []).pruning.sparsity == 0.75


def small(*overrides: str) -> argparse.Namespace:
    """The smallest model, with a single layer."""
    shape = {"layers": 1, "hidden": 128, "intermediate": 128}
    return argparse.Namespace(**shape, windows=2, window_length=8, evaluation_windows=1, set=list(overrides))


def test_a_linear_has_as_many_zeros_as_its_receipt_says(tmp_path: Path) -> None:
    tensors = {name: torch.ones(4, 4) for name in ("q_proj.weight", "o_proj.weight", "norm.weight")}
    source = checkpoint(tmp_path / "source", tensors)
    tensors["q_proj.weight"][0] = 0
    result = checkpoint(tmp_path / "result", tensors)
    assert not larger_than_memory.faults(source, result, {"q_proj.weight": 4, "o_proj.weight": 0})
    (wrong,) = larger_than_memory.faults(source, result, {"q_proj.weight": 4, "o_proj.weight": 8})
    assert wrong.startswith("o_proj.weight")


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return open_checkpoint(str(folder))


def test_a_short_peak_of_memory_is_not_missed() -> None:
    program = "memory = b'x' * 300_000_000; del memory; print('freed', flush=True); sys.stdin.read()"
    with subprocess.Popen(stand_in(program), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"freed\n"
        assert watch.most_unique_bytes(process.pid) > 300_000_000
        watch.forget_peak(process.pid)
        assert 0 < watch.most_unique_bytes(process.pid) < 100_000_000
        process.communicate()
    assert watch.most_unique_bytes(process.pid) == 0


def test_a_plan_of_a_shape_is_compared_with_runs_of_random_weights(tmp_path: Path) -> None:
    (config,) = (path for path in measure_plan.PLANS.glob("opt*.yaml"))
    small = ["calibration.num_windows=2", "calibration.window_length=8"]
    settings = load_config(config, small)
    overrides = measure_plan.write_inputs(settings, tmp_path)
    source = open_checkpoint(load_config(config, [*small, *overrides]).model.path)
    assert not is_imagined(source)
    assert source.entries.keys() == open_or_imagine(settings.model.path, None, False).entries.keys()
    assert measure_plan.write_inputs(load_config(config, [*small, *overrides]), tmp_path) == []
