"""The tensors of a safetensors file, each read straight into memory of its own, and whether they are sound.

A file that is mapped, as the library does it, is in memory a second time while its tensors are copied.
"""

from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import Refusal
from pipeline.faults import reading
from pipeline.models.remote import fill_by_ranges
from pipeline.models.tensor_entry import TensorEntry
from pipeline.storage import Location, ObjectPath

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
}


def read_tensors(file: Location, entries: dict[str, TensorEntry], pinned: bool = False) -> dict[str, Tensor]:
    """Tensors of a file as stored, on the CPU; `pinned`: in memory from which a GPU copies by itself.

    Raises Refusal where the file is another than its header said, or holds a dtype that torch does not have.
    """
    dtypes = {key: _dtype(key, entry) for key, entry in entries.items()}
    flat = {key: torch.empty(each.num_bytes, dtype=torch.uint8, pin_memory=pinned) for key, each in entries.items()}
    memory = {key: memoryview(bytes_of_tensor.numpy().data) for key, bytes_of_tensor in flat.items()}
    if isinstance(file, ObjectPath):
        fill_by_ranges(file, entries, memory)
    else:
        _fill(file, entries, memory)
    return {key: flat[key].view(dtypes[key]).view(entry.shape) for key, entry in entries.items()}


def refuse_non_finite(tensors: dict[str, Tensor], where: str) -> None:
    """Raises Refusal that names the first tensor with NaN or Inf."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise Refusal(f"tensor {key} ({where}): holds NaN or Inf; give a sound checkpoint")


def is_finite(tensor: Tensor) -> bool:
    """NaN is the lowest and the highest where there is any; a mask of what is finite takes ten times as long."""
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def _fill(file: Path, entries: dict[str, TensorEntry], memory: dict[str, memoryview]) -> None:
    try:
        with reading(file), file.open("rb", buffering=0) as opened:
            for key in sorted(entries, key=lambda key: entries[key].start):
                opened.seek(entries[key].start)
                left = memory[key]
                # one call reads two gigabytes at most
                while len(left):
                    num_read = opened.readinto(left)
                    if not num_read:
                        raise Refusal(f"model file {file}: ends within tensor {key}; copy it again")
                    left = left[num_read:]
    except FileNotFoundError:
        raise Refusal(f"model file {file}: is gone; copy it again") from None


def _dtype(key: str, entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in _DTYPES:
        raise Refusal(f"tensor {key}: is stored as {entry.dtype}, which torch does not have; convert it")
    return _DTYPES[entry.dtype]
