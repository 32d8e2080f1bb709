"""Measures how fast this machine is, by a smoke run of one layer: its real shape, random numbers, the run's own code.

Each rate is of operations as cost.py counts them, so that what is lost on small shapes, copies and choices is in it.
T = tokens, I = input columns, B = windows in a micro-batch, L = tokens in a window, H = hidden size.
"""

import os
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import Incomplete, Refusal
from pipeline.files import sha256_of_file, written_whole
from pipeline.models.checkpoint import open_file
from pipeline.models.outside import Call
from pipeline.models.skeleton import LoadedLayer, Skeleton
from pipeline.planning.cost import Passes, of_forwards, of_statistic
from pipeline.planning.rates import NETWORK_OF_CPU, NETWORK_OF_GPU, Rates
from pipeline.planning.scope import Scope
from pipeline.planning.solving import measure_solving
from pipeline.planning.stopwatch import MOST_FLOPS, Stopwatch
from pipeline.runtime import environment, free_memory, keeping_freed_memory, return_memory

_PRODUCT = 2048


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
    stored, seconds = _random_layer(skeleton), Stopwatch(skeleton.device)
    layer = skeleton.load_layer(0, stored)
    hidden_BLH, call = _input(scope, skeleton)
    return {
        "product": _measure_product(skeleton.dtype, skeleton.device, seconds),
        "load": scope.traces[0].loaded_bytes / seconds(lambda: skeleton.load_layer(0, stored)),
        "forward": _measure_forward(scope, layer, hidden_BLH, call, seconds),
        "statistic": _measure_statistic(scope, hidden_BLH, seconds),
        **measure_solving(scope, layer, hidden_BLH, call, seconds),
        **_measure_files(skeleton, stored, folder, seconds),
    }


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
    most = max(2, int(MOST_FLOPS / (2 * scope.traces[0].shape.num_weights)))
    length, num_windows = min(length, most), min(num_windows, max(1, most // length))
    hidden_BLH = torch.randn(num_windows, length, skeleton.hidden_size).to(skeleton.device, skeleton.dtype)
    return hidden_BLH, skeleton.calls((num_windows, length))[0]


def _measure_product(dtype: torch.dtype, device: torch.device, seconds: Stopwatch) -> float:
    factor = torch.randn(_PRODUCT, _PRODUCT, device=device).to(dtype)
    return 2 * _PRODUCT**3 / seconds(lambda: factor @ factor)


def _measure_forward(scope: Scope, layer: LoadedLayer, hidden_BLH: Tensor, call: Call, seconds: Stopwatch) -> float:
    num_windows, length, _ = hidden_BLH.shape
    flops = of_forwards(scope.traces[0].shape, num_windows * length, length, Passes(is_single=True))
    # forwards that stand before a group hold what they have: the next ones need new memory
    is_single = scope.resolved.granularity == "linear"
    with nullcontext() if is_single else keeping_freed_memory():
        return flops.total / seconds(lambda: layer.run(hidden_BLH, call))


def _measure_statistic(scope: Scope, hidden_BLH: Tensor, seconds: Stopwatch) -> float:
    method, shape = scope.config.pruning.method, scope.traces[0].shape
    num_tokens = hidden_BLH.shape[0] * hidden_BLH.shape[1]
    taken = 0.0
    for group in shape.groups:
        x_TI = torch.randn(num_tokens, group.num_inputs).to(hidden_BLH.device, hidden_BLH.dtype)
        sums = method.statistic.zeros(group.num_inputs, hidden_BLH.device)
        taken += seconds(partial(sums.observe, x_TI))
    return of_statistic(shape, method.statistic, num_tokens).total / taken


def _measure_files(skeleton: Skeleton, stored: dict[str, Tensor], folder: Path, seconds: Stopwatch) -> dict[str, float]:
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
    except (OSError, Incomplete, Refusal) as error:
        # the cause says it without the advice for a run
        reason = error.__cause__ or error
        raise Refusal(f"--calibrate-plan: cannot write to {folder} ({reason}); give another output.path") from None
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
