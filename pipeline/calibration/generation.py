"""The texts to be generated: their prompts, and the batches in which they are written.

What a row depends on is settled here: its index gives its prompt and its random numbers, so that neither the number of
generators nor the order of the work changes it, and more texts can be asked for later.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.calibration.rows import Row, RowStore
from pipeline.calibration.selfgen import Engine, Sampling, SelfgenSource
from pipeline.errors import Refusal
from pipeline.settings import Settings
from pipeline.storage import Location

Tokens = tuple[int, ...]

# What rows do not depend on, or what is said of it otherwise.
_APART = {"source", "model_path", "is_from_hub", "trust_remote_code", "pad_token", "engine"}


@dataclass(frozen=True)
class Batch:
    """Prompts that are continued together; fewer than `GenerationTask.batch_size` in the last batch."""

    row_indices: tuple[int, ...]
    prompts: tuple[Tokens, ...]


class GenerationTask(Settings):
    """What a generator needs to know of a run; `model_path` is where the config says that the model is.

    `is_from_hub`: it is a model id there, and the folder `source` has the name of its commit.
    """

    source: Location
    model_path: str
    is_from_hub: bool
    trust_remote_code: bool
    dtype: str
    device: str
    threads: int
    engine: Engine
    sampling: Sampling
    seed: int
    batch_size: int
    pad_token: int
    eos_tokens: Tokens


@dataclass(frozen=True)
class Generation:
    """The texts of one `selfgen` source; `corpora` are the documents its prompts are taken from, as token ids [T]."""

    source: SelfgenSource
    task: GenerationTask
    prompts: "Prompts"
    corpora: tuple[tuple[Tensor, ...], ...]
    store: RowStore

    @property
    def num_missing(self) -> int:
        return self.source.num_texts - len(self.store.existing() & set(range(self.source.num_texts)))

    def missing(self) -> list[Batch]:
        """The batches that have not been written yet.

        After a kill they are those of the first attempt, since only whole batches have been written.
        """
        existing = self.store.existing()
        missing = [index for index in range(self.source.num_texts) if index not in existing]
        return plan_batches({index: self.prompts[index] for index in missing}, self.task.batch_size)

    @cached_property
    def rows(self) -> list[Row]:
        """All texts, once none is missing. Raises Refusal where the model wrote nothing at all."""
        rows = self.store.read(self.source.num_texts)
        if all(row.is_empty for row in rows):
            raise Refusal(
                f"calibration.source: the model ended each of {len(rows)} texts at once; give other prompts, "
                "or a model that continues text"
            )
        return rows

    @cached_property
    def reasons(self) -> list[str | None]:
        """Why each text is dropped, None where it is kept."""
        return self.source.filter.reasons(self.rows)

    def kept_documents(self) -> list[Tensor]:
        """The texts that pass the filter, as token ids [T]."""
        kept = zip(self.rows, self.reasons, strict=True)
        return [torch.from_numpy(row.token_ids.astype(np.int64)) for row, reason in kept if reason is None]


@dataclass(frozen=True)
class Prompts:
    """The prompt of every row, without end: corpora take turns, each in a random order that repeats."""

    corpora: tuple[tuple[Tokens, ...], ...]

    def __getitem__(self, row_index: int) -> Tokens:
        corpus = self.corpora[row_index % len(self.corpora)]
        return corpus[row_index // len(self.corpora) % len(corpus)]

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.corpora).encode()).hexdigest()

    @classmethod
    def from_documents(cls, corpora: Sequence[Sequence[Tensor]], num_tokens: int, seed: int) -> "Prompts":
        """The first tokens of the documents that have as many, in an order drawn by seed.

        Raises Refusal where a corpus has no such document.
        """
        prompts = []
        for index, documents in enumerate(corpora):
            usable = [tuple(ids_T[:num_tokens].tolist()) for ids_T in documents if len(ids_T) >= num_tokens]
            if not usable:
                longest = max(map(len, documents), default=0)
                raise Refusal(
                    f"calibration.source.prompt_tokens = {num_tokens}: no text of the seed corpus has that many tokens "
                    f"(the longest of {len(documents)} has {longest}); give longer texts or ask for shorter prompts"
                )
            generator = torch.Generator().manual_seed(seed + index)
            prompts.append(tuple(usable[i] for i in torch.randperm(len(usable), generator=generator).tolist()))
        return cls(tuple(prompts))


def plan_batches(prompts: dict[int, Tokens], batch_size: int) -> list[Batch]:
    """Rows with prompts of one length together, in the order of their indices."""
    by_length = sorted(prompts, key=lambda index: (len(prompts[index]), index))
    batches = []
    for _, group in groupby(by_length, key=lambda index: len(prompts[index])):
        indices = list(group)
        for start in range(0, len(indices), batch_size):
            chosen = tuple(indices[start : start + batch_size])
            batches.append(Batch(chosen, tuple(prompts[index] for index in chosen)))
    return batches


def seed_of_row(seed: int, row_index: int) -> int:
    """The seed [0, 2**63) of one text of a run."""
    digest = hashlib.sha256(f"{seed}/{row_index}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def identify_rows(task: GenerationTask, model: str, prompts: Prompts) -> dict[str, Any]:
    """Everything that a row depends on; not how many there are, nor what is done with them."""
    return {
        "model": model,
        "prompts": prompts.digest(),
        **task.model_dump(mode="json", exclude=_APART),
        "engine": task.engine.identity,
    }


def rows_folder(folder: Location, identity: dict[str, Any]) -> Location:
    """Rows that depend on other things lie in another folder, so that nothing generated is ever lost or mixed up."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return folder / f"selfgen-{digest[:12]}"
