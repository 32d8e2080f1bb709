"""What came of disturbed runs: their receipts as they appear, what each fault cost, and the table of it."""

import hashlib
import json
import statistics
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Violation(Exception):
    """A promise that was not kept."""


@dataclass
class Fault:
    """`num_committed`: layers, when it struck. `did`: what it did, in words.

    `seconds_to_next`: until the next layer was committed, None where none was left; `num_replayed`: layers run again.
    """

    kind: str
    run: str
    num_committed: int
    struck: float = field(default_factory=time.time)
    did: str | None = None
    num_replayed: int = 0
    seconds_to_next: float | None = None

    def __str__(self) -> str:
        return f"{self.run}, {self.num_committed} layers committed: {self.kind} ({self.did})"


@dataclass(frozen=True)
class Seen:
    """A receipt as it was found."""

    identity: tuple[int, int]
    when: float
    content: dict[str, Any]


class Receipts(threading.Thread):
    """Looks for receipts all the time, so that one that is written a second time is noticed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(name="receipts", daemon=True)
        self._folder, self._ended = folder, threading.Event()
        self.seen: dict[str, Seen] = {}
        self._again: list[str] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while not self._ended.wait(0.02):
            self._look()
        self._look()

    def _look(self) -> None:
        for file in self._folder.glob("layer-*.json"):
            with suppress(FileNotFoundError):
                status = file.stat()
                identity = (status.st_ino, status.st_mtime_ns)
                if file.name not in self.seen:
                    self.seen[file.name] = Seen(identity, status.st_mtime, json.loads(file.read_text()))
                elif self.seen[file.name].identity != identity:
                    self._again.append(file.name)

    def told(self) -> str:
        attempts = max(seen.content["attempt"] for seen in self.seen.values())
        replayed = [seen.content["num_layers_replayed"] for seen in self.seen.values()]
        again = f"{sum(replayed)} run again, at most {max(replayed)} at once"
        return f"{len(self.seen)} layers in {attempts} attempts, {again}"

    def check(self, keep_entry_every: int, run: str) -> None:
        """Raises Violation where a receipt was written twice, or too many layers were run again."""
        if self._again:
            raise Violation(f"{run}: written twice: {', '.join(sorted(set(self._again)))}")
        for name, seen in self.seen.items():
            if seen.content["num_layers_replayed"] > keep_entry_every:
                raise Violation(f"{run}: {name} says {seen.content['num_layers_replayed']} layers were run again")

    def attribute(self, faults: list[Fault]) -> None:
        """To each fault what it cost: what was committed next, unless another fault came before."""
        for seen in self.seen.values():
            before = [fault for fault in faults if fault.struck < seen.when]
            if before:
                cause = before[-1]
                cause.num_replayed = max(cause.num_replayed, seen.content["num_layers_replayed"])
        for fault in faults:
            after = [seen.when - fault.struck for seen in self.seen.values() if seen.when > fault.struck]
            fault.seconds_to_next = min(after, default=None)


def digests(directory: Path) -> dict[str, str]:
    """Of every file of a finished model."""
    files = sorted((directory / "model").rglob("*"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def table(faults: list[Fault]) -> str:
    """Markdown, a row for each kind."""
    rows = [
        "| fault | how many | runs | layers run again, at most | seconds to the next layer, median |",
        "|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(fault.kind for fault in faults):
        same = [fault for fault in faults if fault.kind == kind]
        taken = [fault.seconds_to_next for fault in same if fault.seconds_to_next is not None]
        seconds = f"{statistics.median(taken):.0f}" if taken else "none was left"
        runs = len({fault.run for fault in same})
        rows.append(f"| {kind} | {len(same)} | {runs} | {max(f.num_replayed for f in same)} | {seconds} |")
    return "\n".join(rows)
