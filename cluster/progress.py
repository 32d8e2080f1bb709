"""What the user sees while it runs: a bar on a terminal, plain lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pipeline.store import Receipt


class RunProgress:
    """Layers done, the error of the last one and the time that remains."""

    def __init__(self, num_layers: int, num_done: int) -> None:
        self._num_layers, self._num_done = num_layers, num_done
        self._first, self._started = num_done, time.monotonic()
        console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("pruning", total=num_layers, completed=num_done)

    def __enter__(self) -> "RunProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def on_layer(self, receipt: Receipt) -> None:
        """One line per committed layer."""
        self._num_done = receipt.layer_index + 1
        per_layer = (time.monotonic() - self._started) / (self._num_done - self._first)
        remaining = per_layer * (self._num_layers - self._num_done)
        num_pruned = sum(linear.num_pruned for linear in receipt.linears)
        num_weights = sum(linear.num_weights for linear in receipt.linears)
        replayed = f", {receipt.num_layers_replayed} layers run again before it" if receipt.num_layers_replayed else ""
        self.tell(
            f"layer {self._num_done}/{self._num_layers}  sparsity {num_pruned / num_weights:.4f}  "
            f"error {receipt.relative_error:.4f}  {receipt.seconds:.1f} s  {_clock(remaining)} to go{replayed}"
        )
        self._bar.update(self._task, completed=self._num_done)

    def tell(self, sentence: str) -> None:
        self._bar.console.print(sentence, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
