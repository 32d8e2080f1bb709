"""Wanda: in each output row, the weights with the smallest |weight| x |input| go (Sun et al., 2306.11695, eq. 1).

O = output rows, I = input columns.
"""

from typing import ClassVar, Literal

from torch import Tensor

from pipeline.methods.pruned import Pruned
from pipeline.numerics.statistics import ColumnSums
from pipeline.settings import Settings
from pipeline.sparsity import Budget


class Wanda(Settings):
    """No weight update; one number per input column is all it needs."""

    name: Literal["wanda"] = "wanda"
    statistic: ClassVar[type[ColumnSums]] = ColumnSums

    def prune(self, weight_OI: Tensor, inputs: ColumnSums, budget: Budget) -> Pruned:
        return Pruned.masked(weight_OI, budget.keep_per_row(weight_OI.abs() * inputs.sum_squares_I.sqrt()))
