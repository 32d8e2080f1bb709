"""Magnitude pruning: the smallest weights of each matrix go. O = output rows, I = input columns."""

from typing import Any, ClassVar, Literal

from torch import Tensor

from pipeline.methods.masked import MaskMethod
from pipeline.numerics.statistics import Statistic, TokenCount
from pipeline.sparsity import Budget


class Magnitude(MaskMethod):
    """The baseline of every pruning paper; looks at no data."""

    name: Literal["magnitude"] = "magnitude"
    scores_from: ClassVar[type[Statistic]] = TokenCount

    def score(self, weight_OI: Tensor, inputs: Any, budget: Budget) -> Tensor:
        return weight_OI.abs()

    def keep(self, weight_OI: Tensor, inputs: Any, budget: Budget) -> Tensor:
        return budget.keep_per_matrix(self.score(weight_OI, inputs, budget))
