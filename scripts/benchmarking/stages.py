"""Where the time of a run goes, by the calls in shardprune that make up its stages.

Each call is wrapped from here; of every moment of a thread, the innermost stage is charged. The thread that prunes is
told apart from those beside it that read and write. CPU seconds are those of the thread alone: with one thread of torch
they are what a stage costs, on a busy machine too; with several, look at the seconds.
"""

import functools
import importlib
import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# stage: what makes it up, as module:name or module:class.name where it is looked up when it is called
STAGES: dict[str, tuple[str, ...]] = {
    "begin": ("pipeline.worker:ShardWorker.__init__", "pipeline.worker:ShardWorker.enter"),
    "read": ("pipeline.models.skeleton:Skeleton.read_layer",),
    "convert": ("pipeline.models.skeleton:Skeleton.load_layer",),
    "forward, collecting": ("pipeline.worker:ShardWorker._observe", "pipeline.single_pass:SinglePass._observe"),
    "statistic": ("pipeline.numerics.statistics:Gram.observe", "pipeline.numerics.statistics:ColumnSums.observe"),
    "settling": ("pipeline.groups:Group.settle",),
    "stacking": ("pipeline.groups:Group.weight_OI",),
    "scores": ("pipeline.methods.masked:MaskMethod.prune", "pipeline.methods.sparsegpt:SparseGPT.prune"),
    "factorisation": ("pipeline.methods.sparsegpt:upper_factor",),
    "sweep": ("pipeline.methods.sparsegpt:sweep",),
    "choice": ("pipeline.sparsity:Budget.keep_in_columns", "pipeline.sparsity:Budget.keep_per_row"),
    "placing": ("pipeline.layer:put_in_place", "pipeline.layer:_prune_by_rows"),
    "errors": (
        "pipeline.numerics.statistics:Gram.errors",
        "pipeline.numerics.statistics:ColumnSums.errors",
    ),
    "forward, propagating": ("pipeline.worker:ShardWorker._propagate",),
    "keeping an entry": ("pipeline.hidden:Hidden.keep",),
    "writing": ("pipeline.store:save_tensors",),
    "digest": ("pipeline.store:sha256_of_file",),
    "receipts": ("pipeline.store:RunDirectory.commit_layer",),
    "waiting for reads and writes": ("concurrent.futures:Future.result",),
    "finish": ("pipeline.worker:ShardWorker.finish",),
}
OTHER = "other"


class _Clock(threading.local):
    """The stages that a thread is in, and since when the innermost has not been charged."""

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.seconds, self.cpu_seconds = time.perf_counter(), time.thread_time()


class Watch:
    """Seconds and CPU seconds of every stage, apart for the main thread and those beside it.

    `settle` lets a device finish what the main thread has asked of it, before each look at the clock.
    """

    def __init__(self, settle: Callable[[], None] = lambda: None) -> None:
        self._settle = settle
        self._clock, self._lock = _Clock(), threading.Lock()
        self.spent: dict[tuple[bool, str], list[float]] = defaultdict(lambda: [0.0, 0.0])

    @contextmanager
    def within(self, stage: str) -> Iterator[None]:
        self._charge()
        self._clock.stack.append(stage)
        try:
            yield
        finally:
            self._charge()
            self._clock.stack.pop()

    def wrap(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.within(stage):
                return function(*args, **kwargs)

        return wrapped

    def _charge(self) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main:
            self._settle()
        clock, now, cpu_now = self._clock, time.perf_counter(), time.thread_time()
        if clock.stack:
            with self._lock:
                spent = self.spent[is_main, clock.stack[-1]]
                spent[0] += now - clock.seconds
                spent[1] += cpu_now - clock.cpu_seconds
        clock.seconds, clock.cpu_seconds = now, cpu_now


@contextmanager
def watched(file: Path, settle: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Charge everything within the context to its stages, and write what came of it to a file."""
    watch, replaced = Watch(settle), []
    for stage, names in STAGES.items():
        for name in names:
            owner, attribute = _find(name)
            replaced.append((owner, attribute, getattr(owner, attribute)))
            setattr(owner, attribute, watch.wrap(stage, getattr(owner, attribute)))
    with watch.within(OTHER):
        yield
    for owner, attribute, function in replaced:
        setattr(owner, attribute, function)
    told = [{"beside": not is_main, "stage": stage, "spent": spent} for (is_main, stage), spent in watch.spent.items()]
    file.write_text(json.dumps(told))


def _find(name: str) -> tuple[Any, str]:
    module, _, path = name.partition(":")
    *owners, attribute = path.split(".")
    try:
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        getattr(owner, attribute)
    except (ImportError, AttributeError):
        sys.exit(f"scripts/benchmarking/stages.py: {name} is gone; say there what the stage is made of now")
    return owner, attribute
