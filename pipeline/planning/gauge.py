"""Measures how fast this machine is, by a smoke run of one layer: its real shape, random numbers, the run's own code.

Each rate is of operations as cost.py counts them, so that what is lost on small shapes, copies and choices is in it.
T = tokens, I = input columns, B = windows in a micro-batch, L = tokens in a window, H = hidden size.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import Refusal
from pipeline.files import sha256_of_file, written_whole
from pipeline.groups import Group
from pipeline.layer import prune_group
from pipeline.methods import Method
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.models.checkpoint import open_file
from pipeline.models.outside import Call
from pipeline.models.skeleton import LoadedLayer, Skeleton
from pipeline.numerics.solve import upper_factor
from pipeline.numerics.statistics import Gram
from pipeline.observe import observe, without_inputs
from pipeline.planning.cost import (
    Flops,
    GroupShape,
    LinearShape,
    Passes,
    is_counted,
    of_forwards,
    of_solving,
    of_statistic,
)
from pipeline.planning.rates import NETWORK_OF_CPU, NETWORK_OF_GPU, Rates
from pipeline.planning.scope import Scope
from pipeline.runtime import environment, free_memory, return_memory

_PRODUCT, _REPEATS = 2048, 5
# What would take longer than this many operations is measured on fewer tokens, and groups beyond it are left out.
_MOST_FLOPS = 4e12
_LEAST_SECONDS = 1e-6
# Of what a method does not do.
_NO_MATTER = 1e15


def measure(scope: Scope, skeleton: Skeleton, folder: Path) -> Rates:
    """The rates of this process, files written to a folder of its own below `folder`. Raises Refusal."""
    started = _process_seconds()
    device = torch.device(scope.resolved.device)
    torch.set_num_threads(scope.resolved.threads)
    if device != skeleton.device:
        trusted = scope.config.model.trust_remote_code
        skeleton = Skeleton(skeleton.checkpoint, getattr(torch, scope.resolved.dtype), device, trusted)
    measured = _measure_layer(scope, skeleton, folder)
    # what libraries keep once they have worked belongs to a process that works
    return_memory()
    return Rates(
        source=f"measured on {environment(device.type)['device']} with {scope.resolved.threads} threads, "
        f"a layer of {scope.config.model.path}",
        device="cuda" if device.type == "cuda" else "cpu",
        method=scope.config.pruning.method.name,
        **measured,
        network=NETWORK_OF_GPU if device.type == "cuda" else NETWORK_OF_CPU,
        start_seconds=started,
        base_bytes=_private_bytes(),
        gpu_bytes=free_memory("cuda") if device.type == "cuda" else None,
    )


def _measure_layer(scope: Scope, skeleton: Skeleton, folder: Path) -> dict[str, float]:
    stored, seconds = _random_layer(skeleton), _Stopwatch(skeleton.device)
    layer = skeleton.load_layer(0, stored)
    hidden_BLH, call = _input(scope, skeleton)
    return {
        "product": _measure_product(skeleton.dtype, skeleton.device, seconds),
        "load": scope.traces[0].loaded_bytes / seconds(lambda: skeleton.load_layer(0, stored)),
        "forward": _measure_forward(scope, layer, hidden_BLH, call, seconds),
        "statistic": _measure_statistic(scope, hidden_BLH, seconds),
        **_measure_solving(scope, layer, hidden_BLH, call, seconds),
        **_measure_files(skeleton, stored, folder, seconds),
    }


class _Stopwatch:
    """Seconds that something takes, the median of several times after one that does not count."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, action: Callable[[], object], repeats: int = _REPEATS) -> float:
        taken = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            action()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            taken.append(time.perf_counter() - started)
        return max(statistics.median(taken[1:]), _LEAST_SECONDS)


def _random_layer(skeleton: Skeleton) -> dict[str, Tensor]:
    """Numbers as small as weights are, by checkpoint key."""
    generator, stored = torch.Generator().manual_seed(0), {}
    for key in skeleton.layer_keys[0]:
        entry = skeleton.checkpoint.entries[key]
        numbers = torch.randn(entry.shape, generator=generator) * 0.02
        stored[key] = numbers.to(entry.torch_dtype or torch.float32)
    return stored


def _input(scope: Scope, skeleton: Skeleton) -> tuple[Tensor, Call]:
    """A micro-batch as it will be, or fewer and shorter windows where that would take too long."""
    num_windows, length = scope.resolved.windows_per_micro_batch, scope.config.calibration.window_length
    num_windows = min(num_windows, scope.config.calibration.num_windows)
    most = max(2, int(_MOST_FLOPS / (2 * scope.traces[0].shape.num_weights)))
    length, num_windows = min(length, most), min(num_windows, max(1, most // length))
    hidden_BLH = torch.randn(num_windows, length, skeleton.hidden_size).to(skeleton.device, skeleton.dtype)
    return hidden_BLH, skeleton.calls((num_windows, length))[0]


def _measure_product(dtype: torch.dtype, device: torch.device, seconds: _Stopwatch) -> float:
    factor = torch.randn(_PRODUCT, _PRODUCT, device=device).to(dtype)
    return 2 * _PRODUCT**3 / seconds(lambda: factor @ factor)


def _measure_forward(scope: Scope, layer: LoadedLayer, hidden_BLH: Tensor, call: Call, seconds: _Stopwatch) -> float:
    num_windows, length, _ = hidden_BLH.shape
    flops = of_forwards(scope.traces[0].shape, num_windows * length, length, Passes(is_single=True))
    return flops.total / seconds(lambda: layer.run(hidden_BLH, call))


def _measure_statistic(scope: Scope, hidden_BLH: Tensor, seconds: _Stopwatch) -> float:
    method, shape = scope.config.pruning.method, scope.traces[0].shape
    num_tokens = hidden_BLH.shape[0] * hidden_BLH.shape[1]
    taken = 0.0
    for group in shape.groups:
        x_TI = torch.randn(num_tokens, group.num_inputs).to(hidden_BLH.device, hidden_BLH.dtype)
        sums = method.statistic.zeros(group.num_inputs, hidden_BLH.device)
        taken += seconds(partial(sums.observe, x_TI))
    return of_statistic(shape, method, num_tokens).total / taken


def _measure_solving(
    scope: Scope, layer: LoadedLayer, hidden_BLH: Tensor, call: Call, seconds: _Stopwatch
) -> dict[str, float]:
    """Of the groups that do not take too long, or else of the cheapest."""
    pruning = scope.config.pruning
    num_tokens = hidden_BLH.shape[0] * hidden_BLH.shape[1]
    if pruning.method.statistic.needs_inputs:
        groups = observe(layer, [(hidden_BLH, call)], pruning.method.statistic, num_tokens)
    else:
        groups = without_inputs(layer, pruning.method.statistic)
    shapes = [_shape(group) for group in groups]
    costs = [of_solving([shape], pruning.method).total for shape in shapes]
    chosen = [index for index, cost in enumerate(costs) if cost <= max(_MOST_FLOPS, min(costs))]
    patterns = {linear.key: pruning.target for linear in layer.linears}
    whole = factoring = errors = 0.0
    for group in (groups[index] for index in chosen):
        whole += seconds(partial(prune_group, layer, group, pruning.method, patterns), 3)
        linear = group.linears[0]
        weight_OI = layer.weight_OI(linear)
        change_O = weight_OI.new_zeros(len(weight_OI)) if _gives_change(pruning.method) else None
        once = seconds(partial(group.statistic.relative_error, weight_OI, weight_OI, change_O), 3)
        errors += once * sum(each.num_outputs for each in group.linears) / linear.num_outputs
        if isinstance(pruning.method, SparseGPT) and isinstance(group.statistic, Gram):
            factoring += seconds(partial(upper_factor, group.statistic.sum_II, pruning.method.damping), 3)
    flops = of_solving([shapes[index] for index in chosen], pruning.method)
    return _rates_of_solving(flops, sum(shapes[index].num_weights for index in chosen), whole, factoring, errors)


def _rates_of_solving(
    flops: Flops, num_weights: int, whole: float, factoring: float, errors: float
) -> dict[str, float]:
    """What is neither factorisation nor errors is the sweep where there is one, else the choice of a mask."""
    rest = max(whole - factoring - errors, _LEAST_SECONDS)
    return {
        "factorisation": flops.factorisation / factoring if factoring else _NO_MATTER,
        "sweep": flops.sweep / rest if flops.sweep else _NO_MATTER,
        "choice": _NO_MATTER if flops.sweep else num_weights / rest,
        "errors": flops.errors / errors if flops.errors else _NO_MATTER,
    }


def _gives_change(method: Method) -> bool:
    return isinstance(method, SparseGPT) and is_counted(method)


def _shape(group: Group) -> GroupShape:
    return GroupShape(tuple(LinearShape(each.num_outputs, each.num_inputs, 0) for each in group.linears))


def _measure_files(
    skeleton: Skeleton, stored: dict[str, Tensor], folder: Path, seconds: _Stopwatch
) -> dict[str, float]:
    """A layer written as it is committed and read back, which is from memory where there is enough of it."""
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    try:
        with tempfile.TemporaryDirectory(prefix="shardprune-", dir=folder) as place:
            file = Path(place) / "layer.safetensors"

            def write() -> None:
                with written_whole(file) as temporary:
                    save_file(stored, temporary)
                    sha256_of_file(temporary)

            written = seconds(write, 3)
            read = seconds(lambda: skeleton.read_layer(0, open_file(file)), 3)
            hashed = seconds(lambda: sha256_of_file(file), 3)
    except OSError as error:
        raise Refusal(f"--calibrate-plan: nothing can be written to {folder} ({error.strerror})") from None
    return {"write": num_bytes / written, "read": num_bytes / read, "hash": num_bytes / hashed}


def _process_seconds() -> float:
    """How long this process has been there: importing libraries and making a model without weights."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - ticks / os.sysconf("SC_CLK_TCK")


def _private_bytes() -> int:
    """What this process has for itself (unique set size)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))
