"""What a method returns."""

from dataclasses import dataclass

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

    @classmethod
    def masked(cls, weight_OI: Tensor, keep_OI: Tensor) -> "Pruned":
        """Kept weights as they were, the others 0."""
        return cls(masked(weight_OI, keep_OI), keep_OI)
