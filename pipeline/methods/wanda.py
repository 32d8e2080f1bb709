"""Wanda: in each output row, the weights with the smallest |weight| x |input| go (Sun et al., 2306.11695, eq. 1).

O = output rows, I = input columns.
"""

from typing import ClassVar, Literal

from torch import Tensor

from pipeline.methods.masked import MaskMethod
from pipeline.numerics.statistics import Columns
from pipeline.sparsity import Budget


class Wanda(MaskMethod):
    """One number per input column is all it needs."""

    name: Literal["wanda"] = "wanda"
    rows_apart: ClassVar[bool] = True

    def score(self, weight_OI: Tensor, inputs: Columns, budget: Budget) -> Tensor:
        return weight_OI.abs().mul_(inputs.norm_I)
