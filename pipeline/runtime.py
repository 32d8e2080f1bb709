"""How this process computes: devices, threads, memory, and the versions that stand in a receipt."""

import os
from pathlib import Path

import numpy
import torch
import transformers

from pipeline.errors import Refusal

# Enough tokens for efficient matrix products, few enough that a micro-batch is small beside a layer.
_MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


def resolve_device(asked: str) -> str:
    """cpu or cuda. Raises Refusal where cuda is asked for and not there."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise Refusal("runtime.device = 'cuda': this machine has no CUDA device; use auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def resolve_micro_batch(asked: int | str, device: str, window_length: int) -> int:
    """Windows per micro-batch, at least one."""
    tokens = _MICRO_BATCH_TOKENS[device] if isinstance(asked, str) else asked
    return max(1, tokens // window_length)


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_ram(asked: int | str) -> int:
    """Bytes that the activations of one worker may take in RAM: by default half of what is free."""
    if not isinstance(asked, str):
        return asked
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def environment(device: str) -> dict[str, str]:
    """What can change the last bits of a result, for receipts."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "device": name,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")
