"""How many windows go through a layer together, where that is to be measured: once, before the first layer of a run.

B = windows in a micro-batch, L = tokens in a window, H = hidden size.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch

from pipeline.config import RunConfig
from pipeline.fingerprint import MICRO_BATCH
from pipeline.job import Resolved
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.skeleton import Skeleton
from pipeline.models.tracing import trace_layers
from pipeline.preparation import Prepared
from pipeline.record import RunRecord
from pipeline.runtime import free_memory, keeping_freed_memory

Measure = Callable[[RunConfig, Resolved], int]

# From few tokens to more than any processor gains by.
_TOKENS = tuple(2**power for power in range(9, 17))
# Less is not worth another size than usual, nor sure: two runs of one config should differ only where it pays.
_LEAST_GAIN = 0.05
_REPEATS, _MOST_SECONDS = 5, 1.0
# Of the memory that is free, what the widest forward that is tried may take.
_MEMORY_SHARE = 4


def settle_micro_batch(prepared: Prepared, measure: Measure, tell: Callable[[str], None]) -> Prepared:
    """With the size that is measured, if one is asked for and no earlier attempt has settled it."""
    config, usual = prepared.config, prepared.resolved.windows_per_micro_batch
    asked = config.runtime.micro_batch_tokens == "measured" and config.pruning.method.statistic.needs_inputs
    if not asked or RunRecord.read(config.output.folder) is not None:
        return prepared
    measured = measure(config, prepared.resolved)
    if measured != usual:
        tell(f"micro-batches of {measured} windows in place of {usual}, which are slower by measurement")
    resolved = prepared.resolved.model_copy(update={"windows_per_micro_batch": measured})
    return replace(prepared, resolved=resolved, identity={**prepared.identity, MICRO_BATCH: measured})


def measure_micro_batch(config: RunConfig, resolved: Resolved) -> int:
    """Windows in a micro-batch that suit the device of this process, by forwards of the first layer.

    As many as usual, unless others take clearly less time for a token.
    """
    torch.set_num_threads(resolved.threads)
    length, device = config.calibration.window_length, torch.device(resolved.device)
    checkpoint = open_checkpoint(config.model.path, config.model.revision)
    skeleton = Skeleton(checkpoint, getattr(torch, resolved.dtype), device, config.model.trust_remote_code)
    of_one_window = max(1, trace_layers(skeleton, length)[0].forward_bytes)
    usual = resolved.windows_per_micro_batch
    most = min(
        config.calibration.num_windows // resolved.num_replicas,
        max(usual, free_memory(resolved.device) // _MEMORY_SHARE // of_one_window),
    )
    layer = skeleton.load_layer(0)

    def seconds(num_windows: int) -> float:
        shape = (num_windows, length)
        hidden_BLH = torch.randn(*shape, skeleton.hidden_size).to(device, skeleton.dtype)
        call = skeleton.calls(shape)[0]
        started = time.perf_counter()
        layer.run(hidden_BLH, call)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - started
        kept.limit()
        return taken

    with keeping_freed_memory() as kept:
        return choose(measure_sizes(sizes(length, usual, most), usual, seconds), usual)


def sizes(window_length: int, usual: int, most: int) -> list[int]:
    """Numbers of windows to try, ascending."""
    tried = {max(1, num_tokens // window_length) for num_tokens in _TOKENS}
    return sorted(size for size in {*tried, usual} if size <= most or size == usual)


def measure_sizes(tried: list[int], usual: int, seconds: Callable[[int], float]) -> dict[int, float]:
    """Of each size, the seconds for one window: the median of some turns, each of which tries all.

    Sizes beyond the usual one end where a forward takes too long to be tried.
    """
    fitting = []
    for size in tried:
        # the first of a size counts for nothing else: memory is new then
        taken = seconds(size)
        fitting.append(size)
        if taken > _MOST_SECONDS and size >= usual:
            break
    turns = [{size: seconds(size) / size for size in fitting} for _ in range(_REPEATS)]
    return {size: median(turn[size] for turn in turns) for size in fitting}


def choose(seconds_by_size: dict[int, float], usual: int) -> int:
    """The size with the least seconds for a window, if that is clearly less than those of the usual one."""
    best = min(seconds_by_size, key=lambda size: seconds_by_size[size])
    return best if seconds_by_size[best] < (1 - _LEAST_GAIN) * seconds_by_size[usual] else usual
