"""Where a tensor of a checkpoint lies and what it is."""

from dataclasses import dataclass

import torch

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorEntry:
    """`dtype` is the name that safetensors gives it, `start` the position of its first byte in the file."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    start: int

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None for what is not one of the floating-point numbers that models are stored in."""
        return _DTYPES.get(self.dtype)
