"""Calibration windows: token ids of one length, with where they came from.

N = windows, L = window length in tokens.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.errors import Refusal
from pipeline.files import read_table
from pipeline.storage import Location


@dataclass(frozen=True)
class Windows:
    """Token ids [N, L] (int64) and the name of each window's source."""

    ids_NL: Tensor
    sources: tuple[str, ...]

    def digest(self) -> str:
        """What the fingerprint knows of the calibration data."""
        return digest_ids(self.ids_NL)

    def to_table(self, seed: int) -> pa.Table:
        """One row per window; perplexity and kept are for sources that filter."""
        num_windows = len(self.ids_NL)
        return pa.table(
            {
                "window_index": pa.array(range(num_windows), pa.int32()),
                "input_ids": pa.array(self.ids_NL.tolist(), pa.list_(pa.int32())),
                "source": pa.array(self.sources, pa.string()),
                "seed": pa.array([seed] * num_windows, pa.int64()),
                "perplexity": pa.nulls(num_windows, pa.float64()),
                "kept": pa.array([True] * num_windows, pa.bool_()),
            }
        )


def digest_ids(ids_NL: Tensor) -> str:
    """sha256 of shape and ids."""
    ids = ids_NL.to(torch.int32).contiguous().numpy()
    return hashlib.sha256(repr(ids.shape).encode() + ids.tobytes()).hexdigest()


def read_window_ids(path: Location) -> Tensor:
    """The ids [N, L] that `Windows.to_table` wrote."""
    column = read_table(path, ["input_ids"])["input_ids"].combine_chunks()
    return torch.from_numpy(column.values.to_numpy().astype(np.int64)).view(len(column), -1)


def cut_across(documents: Sequence[Tensor], num_windows: int, window_length: int, seed: int) -> Tensor:
    """`num_windows` windows [N, L] out of all documents joined, no token used twice.

    The joined documents are divided into slots of one length from a random first token; which slots are taken, and in
    which order, is random too. Raises Refusal where the text is too short.
    """
    generator = torch.Generator().manual_seed(seed)
    slots_SL = _slots(torch.cat(list(documents)) if documents else torch.empty(0), window_length, generator)
    if len(slots_SL) < num_windows:
        num_tokens = sum(map(len, documents))
        raise Refusal(
            f"calibration.num_windows = {num_windows}: the text has {num_tokens} tokens, enough for {len(slots_SL)} "
            f"windows of {window_length}; give more text or ask for fewer or shorter windows"
        )
    return slots_SL[torch.randperm(len(slots_SL), generator=generator)[:num_windows]]


def cut_inside(documents: Sequence[Tensor], num_windows: int, window_length: int, seed: int) -> Tensor:
    """The same as `cut_across` with slots that never cross the end of a document; short documents give none."""
    generator = torch.Generator().manual_seed(seed)
    long_enough = [ids_T for ids_T in documents if len(ids_T) >= window_length]
    slots = [_slots(ids_T, window_length, generator) for ids_T in long_enough]
    slots_SL = torch.cat(slots) if slots else torch.empty(0)
    if len(slots_SL) < num_windows:
        raise Refusal(
            f"calibration.num_windows = {num_windows}: of {len(documents)} documents {len(long_enough)} have "
            f"{window_length} tokens or more, enough for {len(slots_SL)} windows inside one document; give more or "
            "longer documents, ask for fewer or shorter windows, or set calibration.windows=across"
        )
    return slots_SL[torch.randperm(len(slots_SL), generator=generator)[:num_windows]]


def _slots(ids_T: Tensor, window_length: int, generator: torch.Generator) -> Tensor:
    """As many consecutive slots [S, L] as there is room for, from a random first token."""
    num_slots = len(ids_T) // window_length
    first = int(torch.randint(len(ids_T) - num_slots * window_length + 1, (1,), generator=generator))
    return ids_T[first : first + num_slots * window_length].view(num_slots, window_length)
