"""What is the same for all subjects: the model, the windows, the threads; and who the subjects are."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarking.measurement import Failed, Measured, run_measured
from benchmarking.subject import Task

_SCRIPTS = Path(__file__).parent.parent
_SHARDPRUNE, _LINEAR, _RAY = "benchmarking.run_shardprune", ("--granularity", "linear"), ("--address", "local")


@dataclass(frozen=True)
class Subject:
    """`granularity` says which forwards are necessary for it."""

    name: str
    module: str
    words: tuple[str, ...] = ()
    granularity: str = "layer"


SHARDPRUNE = Subject("shardprune", _SHARDPRUNE)
LLM_COMPRESSOR = Subject("llm-compressor", "benchmarking.run_llmcompressor")
SINGLE_PASS = Subject("shardprune, linear", _SHARDPRUNE, _LINEAR, "linear")
PROFILED = (SHARDPRUNE, SINGLE_PASS)
SUBJECTS = (
    *PROFILED,
    Subject("shardprune on Ray", _SHARDPRUNE, _RAY),
    Subject("shardprune on Ray, linear", _SHARDPRUNE, (*_RAY, *_LINEAR), "linear"),
    LLM_COMPRESSOR,
    Subject("textbook", "benchmarking.run_textbook"),
)


@dataclass(frozen=True)
class Shape:
    """A random model and the windows it is pruned on."""

    hidden: int
    aspect: str
    num_layers: int
    num_windows: int
    window_length: int
    dtype: str

    def __str__(self) -> str:
        tokens = f"{self.num_windows} x {self.window_length} tokens"
        return f"{self.hidden}, {self.aspect}, {self.num_layers} layers, {tokens}, {self.dtype}"


@dataclass(frozen=True)
class Conditions:
    """What is the same for all subjects. `pythons`: those of subjects that have an environment of their own."""

    pattern: str
    threads: int
    batch_size: int
    pythons: dict[str, Path]

    def task(self, folder: Path, out: Path, method: str) -> Task:
        """For the model and the windows of a folder."""
        model, windows = folder / "model", folder / "windows.parquet"
        return Task(model, windows, out, method, self.pattern, self.threads, self.batch_size)

    @property
    def environment(self) -> dict[str, str]:
        # the processor alone, for all of them
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        quiet = {
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TRANSFORMERS_VERBOSITY": "error",
            "RAY_ENABLE_AUTO_CONNECT": "0",
        }
        # installed or not, the checkout that this file is of is what is measured
        paths = [_SCRIPTS, _SCRIPTS.parent, os.environ.get("PYTHONPATH")]
        return {**os.environ, **threads, **quiet, "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path)}

    def ask(self, module: str, *words: object) -> str:
        """What a module of this package prints."""
        command = [sys.executable, "-m", module, *map(str, words)]
        return subprocess.run(command, env=self.environment, check=True, stdout=subprocess.PIPE, text=True).stdout

    def rate(self) -> float:
        """FLOP per second of the machine now."""
        return float(self.ask("benchmarking.rate", self.threads))

    def run(self, subject: Subject, task: Task, *words: str) -> Measured:
        """Let a subject do its task, in the folder above its output; one that fails ends the benchmark."""
        python = self.pythons.get(subject.name, sys.executable)
        command = [str(python), "-m", subject.module, *task.words(), *subject.words, *words]
        task.out.parent.mkdir(parents=True, exist_ok=True)
        try:
            return run_measured(command, self.environment, task.out.parent)
        except Failed as failed:
            sys.exit(f"{failed}\n{subject.name} failed")


def make_model(shape: Shape, folder: Path) -> Path:
    """A folder with a `model` and its `windows.parquet` in `folder`, made if it is not there."""
    place = folder / str(shape).replace(", ", "-").replace(" ", "")
    if not place.exists():
        words = {"layers": shape.num_layers, "hidden": shape.hidden, "aspect": shape.aspect, "dtype": shape.dtype}
        words |= {"windows": shape.num_windows, "window-length": shape.window_length}
        command = [sys.executable, _SCRIPTS / "random_model.py", place]
        command += [word for name, value in words.items() for word in (f"--{name}", value)]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return place
