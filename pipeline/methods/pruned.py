"""What a method returns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.numerics.masks import masked


@dataclass(frozen=True)
class Pruned:
    """The new weight and the mask (True is kept), both [O, I]; `damping` is what the solver needed, if it has one.

    `change_O`: of each row |(before - after) X|^2, where a solver has it anyway.
    """

    weight_OI: Tensor
    keep_OI: Tensor
    damping: float | None = None
    change_O: Tensor | None = None

    def split(self, num_rows: list[int]) -> "list[Pruned]":
        """That of each of the matrices that are stacked."""
        changes = [None] * len(num_rows) if self.change_O is None else torch.split(self.change_O, num_rows)
        parts = zip(torch.split(self.weight_OI, num_rows), torch.split(self.keep_OI, num_rows), changes, strict=True)
        return [Pruned(weight_rI, keep_rI, self.damping, change_r) for weight_rI, keep_rI, change_r in parts]

    @classmethod
    def masked(cls, weight_OI: Tensor, keep_OI: Tensor) -> "Pruned":
        """Kept weights as they were, the others 0."""
        return cls(masked(weight_OI, keep_OI), keep_OI)
