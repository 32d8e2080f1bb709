"""The activations of all windows, those between two decoder layers first: on a GPU, in RAM or in a memory-mapped file.

N = windows, L = tokens in a window, H = hidden size, B = windows in a micro-batch.
"""

import math
import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.lib.format as npy_format
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.config import RuntimeSettings
from pipeline.errors import Incomplete, Refusal
from pipeline.faults import reading, storage_error
from pipeline.files import local_copy, written_whole
from pipeline.runtime import resolve_gpu, resolve_ram
from pipeline.storage import Location

_CPU = torch.device("cpu")
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Room:
    """Where hidden states may lie: on a device up to a size, else in RAM up to a size, else in a file in a folder.

    Each kind of them lies whole in the first place that has room for it.
    """

    ram_bytes: int
    spill_folder: Path
    device: torch.device = _CPU
    device_bytes: int = 0

    @classmethod
    def of(
        cls, settings: RuntimeSettings, default_folder: Location, num_sharing: int = 1, device: torch.device = _CPU
    ) -> "Room":
        """Where the settings name no folder it is the default, for an object store that of temporary files.

        `num_sharing` workers have the memory of this machine among them; `device` is where layers are computed.
        """
        default = default_folder if isinstance(default_folder, Path) else Path(tempfile.gettempdir())
        gpu_bytes = resolve_gpu(settings.gpu_bytes) if device.type == "cuda" else 0
        ram_bytes = resolve_ram(settings.ram_bytes, num_sharing)
        return cls(ram_bytes, Path(settings.spill_path or default), device, gpu_bytes)

    @property
    def bytes_to_compute(self) -> int:
        """What is left of it where layers are computed."""
        return self.device_bytes if self.device.type == "cuda" else self.ram_bytes


def split_windows(num_windows: int, windows_per_micro_batch: int) -> list[slice]:
    """The windows of each micro-batch."""
    starts = range(0, num_windows, windows_per_micro_batch)
    return [slice(start, min(start + windows_per_micro_batch, num_windows)) for start in starts]


class Activations:
    """Hidden states [N, L, H] that are read and overwritten one micro-batch at a time."""

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, micro_batches: list[slice], room: "Room"
    ) -> None:
        self.micro_batches, self.room_left = micro_batches, room
        self._written = [False] * len(micro_batches)
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes <= room.device_bytes:
            self._hidden_NLH = torch.empty(shape, dtype=dtype, device=room.device)
            self.room_left = replace(room, device_bytes=room.device_bytes - num_bytes)
        elif num_bytes <= room.ram_bytes:
            self._hidden_NLH = torch.empty(shape, dtype=dtype)
            self.room_left = replace(room, ram_bytes=room.ram_bytes - num_bytes)
        else:
            self._hidden_NLH = _map_file(shape, dtype, room.spill_folder)

    def beside(self, width: int) -> "Activations":
        """Others of the same windows and dtype, of `width` numbers per token, in the room that these left."""
        num_windows, window_length, _ = self._hidden_NLH.shape
        shape = (num_windows, window_length, width)
        return Activations(shape, self._hidden_NLH.dtype, self.micro_batches, self.room_left)

    @property
    def device(self) -> torch.device:
        """Where they lie; a file is memory too."""
        return self._hidden_NLH.device

    @property
    def num_bytes(self) -> int:
        return self._hidden_NLH.nbytes

    @property
    def complete(self) -> bool:
        """Whether every micro-batch has been written."""
        return all(self._written)

    def has(self, index: int) -> bool:
        """Whether a micro-batch has been written."""
        return self._written[index]

    def read(self, index: int) -> Tensor:
        """Micro-batch [B, L, H]."""
        assert self._written[index], index
        return self._hidden_NLH[self.micro_batches[index]]

    def write(self, index: int, hidden: Tensor) -> None:
        """Micro-batch [B, L, H] or [B x L, H]."""
        here_BLH = self._hidden_NLH[self.micro_batches[index]]
        here_BLH.copy_(hidden.reshape(here_BLH.shape))
        self._written[index] = True

    def save(self, path: Location, indices: range) -> None:
        """Write some consecutive micro-batches to a .npy file, which appears whole or not at all."""
        assert all(self._written[index] for index in indices)
        first, stop = self.micro_batches[indices[0]].start, self.micro_batches[indices[-1]].stop
        with written_whole(path) as temporary, temporary.open("wb") as file:
            # not by np.save, which makes a TypeError of a signal that comes while it writes
            npy_format.write_array_header_1_0(file, self._header(stop - first))
            for index in indices:
                file.write(to_integers(self.read(index)).data)

    def load(self, path: Location, indices: range) -> None:
        """Read what `save` wrote."""
        first, stop = self.micro_batches[indices[0]].start, self.micro_batches[indices[-1]].stop
        with ExitStack() as stack:
            try:
                with reading(path):
                    saved_NLH = np.load(stack.enter_context(local_copy(path)), mmap_mode="r")
            except FileNotFoundError:
                # a worker that was given up for lost got further and needs it no more
                raise Incomplete(f"{path}: is gone; run again to resume") from None
            except Refusal:
                raise
            except (OSError, ValueError, EOFError) as error:
                raise Refusal(f"{path}: is damaged ({error}); delete it and run again") from None
            assert saved_NLH.shape == (stop - first, *self._hidden_NLH.shape[1:]), path
            for index in indices:
                windows = self.micro_batches[index]
                integers = saved_NLH[windows.start - first : windows.stop - first]
                self.write(index, from_integers(integers, self._hidden_NLH.dtype))

    def _header(self, num_windows: int) -> dict[str, object]:
        """Of a .npy file of some windows."""
        integers = np.broadcast_to(to_integers(self._hidden_NLH[:1]), (num_windows, *self._hidden_NLH.shape[1:]))
        return {"descr": npy_format.dtype_to_descr(integers.dtype), "fortran_order": False, "shape": integers.shape}


def to_integers(hidden: Tensor) -> npt.NDArray[np.integer]:
    """Hidden states as integers of the same width: numpy has no bfloat16, and Ray moves arrays without copies."""
    return hidden.cpu().view(_INTEGERS[hidden.element_size()]).numpy()


def from_integers(integers: npt.NDArray[np.integer], dtype: torch.dtype) -> Tensor:
    """The reverse of `to_integers`, in memory of its own."""
    return torch.tensor(integers).view(dtype)


def _map_file(shape: tuple[int, int, int], dtype: torch.dtype, folder: Path) -> Tensor:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # the mapping lives on without its name, and nothing is left behind by a process that is killed
        with tempfile.NamedTemporaryFile(prefix="hidden-", dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
    except OSError as error:
        raise storage_error(folder, error) from error
