"""What the user sees while it runs: a bar on a terminal, plain lines elsewhere."""

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pipeline.clock import clock

if TYPE_CHECKING:
    from pipeline.calibration.rows import Row
    from pipeline.store import Receipt


def drop_stdout() -> None:
    """Send what is still printed nowhere: whoever read it has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Console(Console):
    """A console that a reader may leave: the run goes on without display."""

    def on_broken_pipe(self) -> None:
        drop_stdout()


class _Bar:
    """A bar on a terminal, and sentences above it or alone."""

    def __init__(self, what: str, total: int, num_done: int) -> None:
        self._console = _Console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(what, total=total, completed=num_done)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def tell(self, sentence: str) -> None:
        self._console.print(sentence, highlight=False, soft_wrap=True)

    def _show(self, num_done: int) -> None:
        self._bar.update(self._task, completed=num_done)


class GenerationProgress(_Bar):
    """Texts generated, tokens per second and the time that remains."""

    def __init__(self, num_texts: int, num_missing: int) -> None:
        super().__init__("generating", num_texts, num_texts - num_missing)
        self._num_texts, self._num_done = num_texts, num_texts - num_missing
        self._num_new, self._num_tokens = 0, 0
        self._started = time.monotonic()

    def on_rows(self, rows: "list[Row]") -> None:
        """One line per written batch."""
        self._num_done += len(rows)
        self._num_new += len(rows)
        self._num_tokens += sum(len(row.token_ids) - row.num_prompt_tokens for row in rows)
        seconds = time.monotonic() - self._started
        remaining = seconds / self._num_new * (self._num_texts - self._num_done)
        self.tell(
            f"text {self._num_done}/{self._num_texts}  {self._num_tokens} tokens  "
            f"{self._num_tokens / seconds:.0f} tokens/s  {clock(remaining)} to go"
        )
        self._show(self._num_done)


class RunProgress(_Bar):
    """Layers done, the error of the last one and the time that remains."""

    def __init__(self, num_layers: int, receipts: "list[Receipt]") -> None:
        super().__init__("pruning", num_layers, len(receipts))
        self._num_layers = num_layers
        self._environment = receipts[-1].environment if receipts else None
        self._num_done = len(receipts)
        self._finished_at: list[float] = []

    def on_layer(self, receipt: "Receipt") -> None:
        """One line per committed layer, in whatever order they are."""
        self._num_done += 1
        if self._environment not in (None, receipt.environment):
            self.tell(
                f"warning: other layers were pruned with {self._environment}, this one with {receipt.environment}"
            )
        self._environment = receipt.environment
        self._finished_at.append(time.monotonic())
        num_timed = len(self._finished_at) - 1
        per_layer = (self._finished_at[-1] - self._finished_at[0]) / num_timed if num_timed else receipt.seconds
        remaining = per_layer * (self._num_layers - self._num_done)
        num_pruned = sum(linear.num_pruned for linear in receipt.linears)
        num_weights = sum(linear.num_weights for linear in receipt.linears)
        replayed = f", {receipt.num_layers_replayed} layers run again before it" if receipt.num_layers_replayed else ""
        self.tell(
            f"layer {receipt.layer_index + 1}/{self._num_layers}  sparsity {num_pruned / num_weights:.4f}  "
            f"error {receipt.relative_error:.4f}  {receipt.seconds:.1f} s  {clock(remaining)} to go{replayed}"
        )
        self._show(self._num_done)
