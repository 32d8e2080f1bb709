"""The benchmark: its textbook prunes what shardprune prunes, and what it measures is what was spent."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import benchmark
import pytest
import torch
from benchmarking.conditions import PROFILED, Shape
from benchmarking.contest import Contest, Run
from benchmarking.growth import Line, describe_growth, draw_growth
from benchmarking.measurement import Failed, run_measured
from benchmarking.stages import watched
from benchmarking.table import compare
from benchmarking.textbook import prune_model
from safetensors.torch import load_file
from tiny import build_model, random_ids, save_model, save_windows, write_config
from torch import Tensor
from watch import looks

from pipeline.config_file import load_config
from pipeline.local import run_locally, survey_locally
from pipeline.preparation import begin, opened, prepare
from pipeline.runtime import Machine

WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
NUM_WINDOWS, WINDOW_LENGTH, BLOCK_COLUMNS = 24, 32, 128
FIRST = "model.layers.0."
SHAPE = Shape(512, "8b", 4, 64, 512, "float32")
OF_ROUNDS = (("shardprune", 2.0, 3.0, 4.0), ("llm-compressor", 5.0, 6.0, 8.0))
HERE = Machine(num_cores=1, has_cuda=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("wide") / "model", "llama", **WIDE)


def masks_of_shardprune(model: Path, folder: Path, method: str, pattern: str) -> dict[str, Tensor]:
    windows = save_windows(folder / "windows.parquet", NUM_WINDOWS, WINDOW_LENGTH)
    settings = {"pruning.pattern": pattern, "pruning.granularity": "layer"}
    config = write_config(folder / "run.yaml", model, windows, folder / "out", method, **settings)
    prepared = prepare(load_config(config, []), HERE, print)
    with opened(prepared) as (guard, _):
        run_locally(begin(prepared, guard, survey_locally), prepared, lambda receipt: None)
    masks = {}
    for file in (folder / "out" / "model").glob("*.safetensors"):
        masks |= {key: tensor != 0 for key, tensor in load_file(file).items() if key.endswith("_proj.weight")}
    return masks


def masks_of_textbook(method: str, pattern: str) -> dict[str, Tensor]:
    model = build_model("llama", **WIDE)
    kept = None if pattern == "unstructured" else (2, 4)
    prune_model(model, random_ids(NUM_WINDOWS, WINDOW_LENGTH), method, 0.5, kept)
    return {key: tensor != 0 for key, tensor in model.state_dict().items() if key.endswith("_proj.weight")}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_wanda_is_the_same(model: Path, tmp_path: Path, pattern: str) -> None:
    ours, theirs = masks_of_shardprune(model, tmp_path, "wanda", pattern), masks_of_textbook("wanda", pattern)
    assert ours.keys() == theirs.keys() and len(ours) == 14
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def test_sparsegpt_at_2_of_4_is_the_same_but_for_ties(model: Path, tmp_path: Path) -> None:
    ours, theirs = masks_of_shardprune(model, tmp_path, "sparsegpt", "2:4"), masks_of_textbook("sparsegpt", "2:4")
    differs = {key: ours[key] != theirs[key] for key in ours}
    # a choice that the last bit decides, which processors round differently, tells on the rest of its row, and on what
    # all later layers read
    assert sum(int(each_OI.any(dim=1).sum()) for key, each_OI in differs.items() if key.startswith(FIRST)) <= 3
    for key, differs_OI in differs.items():
        assert int(differs_OI.sum()) < 0.05 * differs_OI.numel(), key


def test_sparsegpt_of_the_papers_takes_one_weight_more_in_every_block(model: Path, tmp_path: Path) -> None:
    ours = masks_of_shardprune(model, tmp_path, "sparsegpt", "unstructured")
    theirs = masks_of_textbook("sparsegpt", "unstructured")
    for key in ours:
        counts = [(~keep).unflatten(1, (-1, BLOCK_COLUMNS)).sum(dim=(0, 2)) for keep in (ours[key], theirs[key])]
        assert torch.equal(counts[0] + 1, counts[1]), key
        differs_OI = ours[key] != theirs[key]
        # what it has to make up for tells on the masks of later blocks and layers
        assert int(differs_OI.sum()) < 0.02 * differs_OI.numel(), key
        if key.startswith(FIRST):
            assert int(differs_OI[:, :BLOCK_COLUMNS].sum()) == 1, key


def test_memory_and_cpu_seconds_of_descendants_count(tmp_path: Path) -> None:
    grandchild = "data = bytearray(b'x') * 200_000_000; sum(range(20_000_000))"
    child = (
        "import subprocess, sys, time; from benchmarking.subject import phase\n"
        "with phase('load'): time.sleep(0.2)\n"
        "time.sleep(0.1)\n"
        f"with phase('prune'): subprocess.run([sys.executable, '-c', {grandchild!r}])"
    )
    environment = {**os.environ, "PYTHONPATH": "scripts"}
    measured = run_measured([sys.executable, "-c", child], environment, Path(__file__).parents[1])
    assert 200e6 < measured.peak_bytes_until("prune") < 300e6
    assert 0 < measured.seconds_of("prune") <= measured.seconds_of_phases - 0.3
    assert measured.seconds_of_phases < measured.seconds
    assert 0.1 < measured.cpu_seconds_of("prune") <= measured.cpu_seconds < 2 * measured.seconds


def test_a_subject_that_fails_is_not_measured(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"no such luck\s+exit code 2"):
        run_measured([sys.executable, "-c", "print('no such luck'); exit(2)"], dict(os.environ), tmp_path)


class Looked(subprocess.Popen[bytes]):
    """Ends in its third pause."""

    def __init__(self) -> None:
        super().__init__(["sleep", "60"])
        self.pauses: list[float] = []

    def wait(self, timeout: float | None = None) -> int:
        if timeout is not None:
            self.pauses.append(timeout)
            if len(self.pauses) < 3:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.kill()
        return super().wait()


def test_looking_takes_a_twentieth_and_ends_with_the_process() -> None:
    """The pauses are waits for its end, so that none is slept through."""
    spent = []
    for _ in looks(process := Looked()):
        started = time.monotonic()
        time.sleep(0.005 * (1 + len(spent)))
        spent.append(time.monotonic() - started)
    assert process.returncode == -signal.SIGKILL
    assert len(process.pauses) == 3 and all(
        pause >= max(0.05, 20 * look) for pause, look in zip(process.pauses, spent, strict=True)
    )


def test_a_folder_to_work_in_may_be_relative(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Subjects run in folders of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--work", "."])
    assert benchmark.parse().work == tmp_path


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--growth nowhere/growth.png", "there is no folder"),
        ("--growth growth.doc", "must end with"),
        ("--growth growth.png --hidden 512 1024", "from one --hidden"),
        ("--growth growth.png --aspect 8b 70b", "from one --hidden"),
        ("--growth growth.png --subjects textbook", "leave out --subjects"),
        ("--growth growth.png --out runs.json", "not allowed with"),
        ("--profile --subjects textbook", "leave out other --subjects"),
        ("--out nowhere/runs.json", "there is no folder"),
        ("--out .", "is a folder"),
        ("--work nowhere", "there is no such folder"),
        ("--repeats 0", "--repeats: 0: must be a whole number of at least 1"),
        ("--threads 0", "--threads: 0: must be a whole number of at least 1"),
        ("--hidden 512 250", "--hidden 250: does not make heads"),
    ],
)
def test_what_would_waste_hours_is_refused_at_once(
    words: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words.split()])
    with pytest.raises(SystemExit):
        benchmark.parse()
    assert sentence in capsys.readouterr().err


def test_only_those_that_can_be_profiled_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--profile"])
    assert benchmark.subjects_of(benchmark.parse()) == list(PROFILED)


def test_the_table_has_each_subject_beside_llm_compressor_in_the_same_round() -> None:
    def run(subject: str, round_index: int, seconds: float) -> Run:
        return Run(subject, round_index, seconds, seconds + 1, seconds + 2, 3, 4, 5_000_000, 1e9, 2e9, 4e9)

    rounds = [run(name, index, seconds) for name, *taken in OF_ROUNDS for index, seconds in enumerate(taken)]
    contest = Contest(SHAPE, "wanda", rounds, {name: {"first": 1.0, "all": 0.5} for name, *_ in OF_ROUNDS})
    heads, _, ours, theirs = (line.strip("| ").split(" | ") for line in compare([contest]).splitlines())
    assert len(heads) == len(ours) == len(theirs)
    told = dict(zip(heads, ours, strict=True))
    assert told["pruning s"] == "3.00 (2.00 - 4.00)"
    assert told["s: disk to disk, process"] == "4.00, 5.00"
    assert told["pruning s / floor"] == "0.75 (0.50 - 1.00)"
    assert told["pruning s / llm-compressor"] == "0.50 (0.40 - 0.50)"
    assert told["disk to disk / llm-compressor"] == "0.56 (0.50 - 0.57)"


def test_the_table_of_growth_needs_no_picture(tmp_path: Path) -> None:
    line = Line("wanda", "layers", {1: [1.0], 2: [2.0]}, {1: [1e6], 2: [2e6]})
    assert "| wanda | layers: 2 | 2.00" in describe_growth([line])
    draw_growth([line], Shape(128, "8b", 1, 1, 16, "float32"), tmp_path / "growth.svg")
    assert (tmp_path / "growth.svg").exists()


def test_a_layer_is_measured_without_ray_or_a_gpu(tmp_path: Path) -> None:
    """Every stage has its line, and every way its column."""
    words = "--device cpu --hidden 256 --windows 4 --window-length 64 --methods sparsegpt --patterns 2:4"
    program = (
        "import runpy, sys\n"
        "for name in ('ray', 'cluster', 'datasets', 'requests', 'typer', 'rich', 'zstandard', 'psutil'):\n"
        "    sys.modules[name] = None\n"
        f"sys.argv = ['measure_layer.py', *{words.split()!r}, '--work', {str(tmp_path)!r}]\n"
        "runpy.run_path('scripts/measure_layer.py', run_name='__main__')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(("scripts", ".", os.environ.get("PYTHONPATH", "")))}
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    table = {row[0]: row[1:] for row in rows}
    assert rows[0] == ["sparsegpt 2:4 layer", "sparsegpt 2:4 linear"]
    for stage in ("statistic", "factorisation", "sweep", "errors", "placing", "all stages", "**whole layer**"):
        for cell in table[stage]:
            seconds, floor = cell.split()
            assert float(seconds) > 0 and float(floor.strip("()")) >= 0, stage
    assert float(table["peak host memory, GB"][0]) > 0.1
    assert not list(tmp_path.iterdir())


def test_every_moment_is_charged_to_the_innermost_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {"outer": (f"{__name__}:Slow.outer",), "inner": (f"{__name__}:Slow.inner",)}
    monkeypatch.setattr("benchmarking.stages.STAGES", stages)
    started = time.perf_counter()
    with watched(tmp_path / "stages.json"):
        beside = threading.Thread(target=Slow().inner)
        beside.start()
        Slow().outer()
        beside.join()
    passed = time.perf_counter() - started
    told = json.loads((tmp_path / "stages.json").read_text())
    seconds = {(entry["beside"], entry["stage"]): entry["spent"][0] for entry in told}
    assert seconds.keys() == {(False, "other"), (False, "outer"), (False, "inner"), (True, "inner")}
    assert seconds[False, "outer"] >= 0.2 and seconds[False, "inner"] >= 0.1
    assert sum(spent for (is_beside, _), spent in seconds.items() if not is_beside) <= passed
    assert not hasattr(Slow.outer, "__wrapped__")


class Slow:
    def outer(self) -> None:
        time.sleep(0.1)
        self.inner()
        time.sleep(0.1)

    def inner(self) -> None:
        time.sleep(0.1)
