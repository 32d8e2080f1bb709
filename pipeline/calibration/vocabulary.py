"""What calibration needs to know of a model's tokens, whether or not it comes with a tokenizer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.calibration.dataset import DatasetSource
from pipeline.calibration.parquet import ParquetSource
from pipeline.calibration.text import TextSource
from pipeline.errors import Refusal


@dataclass(frozen=True)
class Vocabulary:
    """`bos_token` begins and `eos_tokens` end a text, as the checkpoint's generation config or config says."""

    size: int
    tokenizer: PreTrainedTokenizerBase | None
    bos_token: int | None
    eos_tokens: tuple[int, ...]

    def tokenize(self, texts: Sequence[str], source: TextSource | ParquetSource | DatasetSource) -> Iterator[Tensor]:
        """Each text as token ids [T], with the special tokens that the tokenizer adds by itself."""
        if self.tokenizer is None:
            raise Refusal(
                f"calibration.source.name = {source.name!r}: the model has no tokenizer; "
                "give token ids with source.name = 'parquet'"
            )
        for text in texts:
            ids_T = torch.tensor(self.tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
            self.check(ids_T, "the tokenized text")
            yield ids_T

    def check(self, ids: Tensor, origin: str) -> None:
        """Raises Refusal where a token id is outside the model's vocabulary."""
        if not len(ids):
            return
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= self.size:
            wrong = lowest if lowest < 0 else highest
            raise Refusal(
                f"token id {wrong} in {origin}: outside the model's vocabulary of {self.size}; "
                "give token ids made with this model's tokenizer"
            )

    def window_bos(self, asked: Literal["auto"] | bool) -> int | None:
        """The token that each window begins with, if any; auto = where the tokenizer itself begins a text with it."""
        if asked is False:
            return None
        bos = self.tokenizer.bos_token_id if self.tokenizer is not None else None
        if asked == "auto":
            adds_it = self.tokenizer is not None and self.tokenizer("a")["input_ids"][:1] == [bos]
            return int(bos) if bos is not None and adds_it else None
        if bos is None:
            raise Refusal("calibration.bos = true: the tokenizer has no BOS token; set calibration.bos=false")
        return int(bos)

    def says_anything(self, ids_T: Tensor) -> bool:
        """Whether a text has any token that is not a special one."""
        return not self._special_tokens.issuperset(ids_T.tolist())

    def without_end(self, ids_T: Tensor) -> Tensor:
        """A text that can be continued, where the tokenizer ends each one."""
        return ids_T[:-1] if len(ids_T) and int(ids_T[-1]) in self.eos_tokens else ids_T

    def speaking_tokens(self) -> list[int]:
        """All tokens but the special ones; padding of the vocabulary is none."""
        size = min(self.size, len(self.tokenizer)) if self.tokenizer is not None else self.size
        return [token for token in range(size) if token not in self._special_tokens]

    @cached_property
    def _special_tokens(self) -> frozenset[int]:
        known = self.tokenizer.all_special_ids if self.tokenizer is not None else ()
        return frozenset(known) | frozenset(self.eos_tokens)

    def first_token(self) -> int:
        """What a text begins with when nothing is given: BOS, or EOS for models that have no other. Raises Refusal."""
        bos = self.tokenizer.bos_token_id if self.tokenizer is not None else None
        for known in (bos, self.bos_token):
            if known is not None:
                return int(known)
        if self.eos_tokens:
            return self.eos_tokens[0]
        raise Refusal("calibration.source.prompts = 'bos': the model has neither BOS nor EOS token; give a seed corpus")

    @property
    def pad_token(self) -> int:
        """What fills up a row; nothing attends to it."""
        return self.eos_tokens[0] if self.eos_tokens else 0
