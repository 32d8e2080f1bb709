"""How this process computes: devices, threads, memory, and the versions that stand in a receipt."""

import ctypes
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy
import torch
import transformers

from pipeline.errors import Refusal

T = TypeVar("T")

# Enough tokens for efficient matrix products, few enough that a micro-batch is small beside a layer.
_MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
# mallopt(3): blocks above the first go back as soon as they are freed; the top of the heap once it is above the second.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
# What glibc comes to by itself, and 2048 tokens of 32768 numbers in float32.
_USUAL_BLOCK, _LARGEST_BLOCK = 32 * 2**20, 256 * 2**20
# What glibc keeps at the top of its heap outside `keeping_freed_memory`; within, what may come to it between forwards.
USUALLY_KEPT_BYTES = 2 * _USUAL_BLOCK
_MEMORY_FILES = ("/proc/meminfo", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")


@dataclass(frozen=True)
class Machine:
    """What the workers of a run can count on."""

    num_cores: int
    has_cuda: bool

    @classmethod
    def here(cls) -> "Machine":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(cores, torch.cuda.is_available())


def resolve_device(asked: str, machine: Machine) -> str:
    """cpu or cuda. Raises Refusal where cuda is asked for and not there."""
    if asked == "cuda" and not machine.has_cuda:
        raise Refusal("runtime.device = 'cuda': there is no CUDA device; use auto or cpu")
    return ("cuda" if machine.has_cuda else "cpu") if asked == "auto" else asked


def resolve_micro_batch(asked: int | str, device: str, window_length: int) -> int:
    """Windows per micro-batch, at least one."""
    tokens = _MICRO_BATCH_TOKENS[device] if isinstance(asked, str) else asked
    return max(1, tokens // window_length)


def slow_products(dtype: str, device: str) -> str | None:
    """What to say of a dtype in which the processor here multiplies several times as slowly as in float32."""
    if device != "cpu" or dtype != "bfloat16" or _has_bfloat16_products():
        return None
    return (
        "model.dtype = bfloat16: torch has no fast products of it for the processor here; with model.dtype=float32 "
        "forwards are several times as fast, and take twice the memory or more"
    )


def resolve_ram(asked: int | str, num_sharing: int) -> int:
    """Bytes that the activations of one worker may take in RAM: by default its share of half of what is free."""
    if not isinstance(asked, str):
        return asked
    return free_memory("cpu") // 2 // num_sharing


def resolve_gpu(asked: int | str) -> int:
    """Bytes that hidden states and suspended forwards of one worker may have on its GPU: by default half of what is
    free."""
    return free_memory("cuda") // 2 if isinstance(asked, str) else asked


def free_memory(device: str) -> int:
    """Bytes that this process can still have in the memory of a device."""
    if device != "cuda":
        return _available_memory()
    # what torch has taken from the device and does not use is there for this process
    return int(torch.cuda.mem_get_info()[0]) + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def return_memory() -> None:
    """Give back to the system what has been freed: the C library keeps it otherwise, more with every layer."""
    _tell_libc("malloc_trim", 0)


class KeptMemory:
    """What forwards have freed, kept for the next ones; it goes back, to be kept anew, where it grows.

    glibc does not see that a gap of just its size would do for an aligned block, so that with every forward a little
    more can be taken than is free.
    """

    def __init__(self) -> None:
        self._bytes_before: int | None = None

    def limit(self) -> None:
        """To be called after every forward: give all that is free back where it has become more."""
        now = _anonymous_bytes()
        if self._bytes_before is None:
            self._bytes_before = now
        elif now > self._bytes_before + USUALLY_KEPT_BYTES:
            return_memory()
            self._bytes_before = None


@contextmanager
def keeping_freed_memory() -> Iterator[KeptMemory]:
    """Within the context, what a forward frees is there for the next; after it, all that is free goes back.

    By itself glibc gives large blocks back at once, and the system clears each page of those that it hands out: about a
    tenth of the time of a forward on a CPU. Only the main thread has a heap for blocks above 64 MiB; where a GPU
    computes there is nothing to gain, and nothing is lost. Contexts do not nest.
    """
    _set_thresholds(_LARGEST_BLOCK, 2**31 - 1)
    try:
        yield KeptMemory()
    finally:
        _set_thresholds(_USUAL_BLOCK, USUALLY_KEPT_BYTES)
        return_memory()


def with_memory_kept(micro_batches: Iterable[T]) -> Generator[T, None, None]:
    """Micro-batches one by one, and `keeping_freed_memory` from the first to the last."""
    with keeping_freed_memory() as kept:
        for each in micro_batches:
            yield each
            kept.limit()


def _anonymous_bytes() -> int:
    """What this process has in memory beside pages of files, which come and go by themselves."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    resident, shared = map(int, statm.read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _set_thresholds(mmap: int, trim: int) -> None:
    # an older glibc refuses more than it comes to by itself
    if not _tell_libc("mallopt", _MMAP_THRESHOLD, mmap):
        _tell_libc("mallopt", _MMAP_THRESHOLD, _USUAL_BLOCK)
    _tell_libc("mallopt", _TRIM_THRESHOLD, trim)


def _tell_libc(name: str, *numbers: int) -> int:
    """What a function of the C library answers, 0 where it has none of the name."""
    function = getattr(ctypes.CDLL(None), name, None)
    return 0 if function is None else int(function(*numbers))


def environment(device: str) -> dict[str, str]:
    """What can change the last bits of a result, for receipts."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "device": name,
    }


def _available_memory() -> int:
    """Bytes that new allocations can have, file caches counted as free, within the limit of a container."""
    meminfo, limit, used = (Path(path) for path in _MEMORY_FILES)
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    if limit.exists() and limit.read_text().strip().isdigit():
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return max(0, available)


def _has_bfloat16_products() -> bool:
    # what torch itself asks before it has oneDNN multiply; without oneDNN it has only slow ones of its own
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")
