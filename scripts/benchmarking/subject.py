"""What every subject is told, and how it tells what it took. Standard library only, for any environment."""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SPARSITY = 0.5
_MARK = "benchmark phase "


@dataclass(frozen=True)
class Task:
    """Prune the model in a folder to one half on the windows of a Parquet file, and leave it in another folder."""

    model: Path
    windows: Path
    out: Path
    method: str
    pattern: str
    threads: int
    batch_size: int

    def words(self) -> list[str]:
        """As arguments of a command."""
        return [word for name, value in vars(self).items() for word in (f"--{name.replace('_', '-')}", str(value))]


def parse_task(parser: argparse.ArgumentParser) -> tuple[Task, argparse.Namespace]:
    """The task of a subject, and what its parser knows besides."""
    for name in ("model", "windows", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("method", "pattern"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("threads", "batch-size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    return Task(**{name: getattr(arguments, name) for name in Task.__dataclass_fields__}), arguments


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Tell when something began and ended, by the clock that all processes share."""
    start = time.monotonic()
    yield
    print(_MARK + json.dumps({"name": name, "start": start, "stop": time.monotonic()}), flush=True)


def read_phases(output: str) -> dict[str, tuple[float, float]]:
    """When each phase began and ended, from what a subject printed."""
    marks = [json.loads(line.removeprefix(_MARK)) for line in output.splitlines() if line.startswith(_MARK)]
    return {mark["name"]: (mark["start"], mark["stop"]) for mark in marks}
