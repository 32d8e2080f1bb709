"""Magnitude pruning: the smallest weights of each matrix go. O = output rows, I = input columns."""

from typing import ClassVar, Literal

from torch import Tensor

from pipeline.methods.pruned import Pruned
from pipeline.numerics.statistics import TokenCount
from pipeline.settings import Settings
from pipeline.sparsity import Budget


class Magnitude(Settings):
    """The baseline of every pruning paper; looks at no data."""

    name: Literal["magnitude"] = "magnitude"
    statistic: ClassVar[type[TokenCount]] = TokenCount

    def prune(self, weight_OI: Tensor, inputs: TokenCount, budget: Budget) -> Pruned:
        return Pruned.masked(weight_OI, budget.keep_per_matrix(weight_OI.abs()))
