"""The least that the stages of pruning a layer in bfloat16 can take on a device, by counts and its own rates."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.config import RunConfig
from pipeline.numerics.statistics import Gram
from pipeline.planning.cost import GroupShape, LayerShape, Passes, count, of_solving

DTYPE, FLOAT_BYTES = torch.bfloat16, 4


@dataclass(frozen=True)
class Way:
    """One way to prune a layer."""

    method: str
    pattern: str
    granularity: str


@dataclass(frozen=True)
class DeviceRates:
    """Per second: operations in products of bfloat16 and of float32, bytes of memory, bytes from the host."""

    product: float
    float32_product: float
    memory: float
    link: float

    def __str__(self) -> str:
        products = f"{self.product / 1e12:.2f} TFLOP/s in bfloat16, {self.float32_product / 1e12:.2f} in float32"
        return f"{products}; memory {self.memory / 1e9:.0f} GB/s, from the host {self.link / 1e9:.1f} GB/s"


def name_of(group: GroupShape) -> str:
    return f"solving {group.num_rows} x {group.num_inputs}"


def measure_rates(device: torch.device) -> DeviceRates:
    size, num_bytes = (8192, 2**29) if device.type == "cuda" else (1024, 2**27)
    square, numbers = torch.randn(size, size, device=device), torch.randn(num_bytes // FLOAT_BYTES, device=device)
    other, half = torch.empty_like(numbers), square.to(DTYPE)
    host = torch.empty(numbers.shape, pin_memory=device.type == "cuda")
    return DeviceRates(
        2 * size**3 / seconds_of(lambda: half @ half, device),
        2 * size**3 / seconds_of(lambda: square @ square, device),
        # read and written
        2 * num_bytes / seconds_of(lambda: other.copy_(numbers), device),
        num_bytes / seconds_of(lambda: other.copy_(host, non_blocking=True), device),
    )


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """The median of ten times after two that do not count."""
    taken = []
    for _ in range(12):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[2:])


def floors_of(way: Way, shape: LayerShape, config: RunConfig, rates: DeviceRates) -> dict[str, float]:
    """Seconds by stage."""
    method, calibration = config.pruning.method, config.calibration
    num_tokens, length = calibration.num_windows * calibration.window_length, calibration.window_length
    flops = count(shape, method, num_tokens, length, Passes(is_single=way.granularity == "linear"))
    if way.granularity == "linear":
        forwards = {"forward": flops.propagating + flops.collecting + flops.attention}
    else:
        half = flops.attention / 2
        forwards = {"forward, collecting": flops.collecting + half, "forward, propagating": flops.propagating + half}
    weights, stored = shape.num_weights, shape.num_weights * DTYPE.itemsize
    floors = {name: each / rates.product for name, each in forwards.items()}
    floors |= {"convert": stored / rates.link, "placing": stored / rates.link}
    floors |= {"stacking": (stored + weights * FLOAT_BYTES) / rates.memory}
    if method.statistic is Gram:
        for group in shape.groups:
            solved = of_solving([group], method)
            floors[name_of(group)] = (solved.factorisation + solved.sweep) / rates.float32_product
        in_float32 = {name: getattr(flops, name) for name in ("factorisation", "sweep", "errors")}
        floors |= {name: each / rates.float32_product for name, each in in_float32.items()}
        return floors | {"statistic": flops.statistic / rates.product}
    read = num_tokens * sum(group.num_inputs for group in shape.groups) * DTYPE.itemsize
    # scores are written and read; weights before and after are read for the errors
    moved = {"scores": 2 * FLOAT_BYTES, "choice": FLOAT_BYTES + 1, "errors": 2 * FLOAT_BYTES}
    floors |= {name: each * weights / rates.memory for name, each in moved.items()}
    return floors | {"statistic": read / rates.memory}
