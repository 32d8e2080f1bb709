"""What methods that only choose a mask have in common: the kept weights stay as they were, or are refitted."""

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from pipeline.methods.pruned import Pruned
from pipeline.numerics.refit import refitted
from pipeline.numerics.statistics import ColumnSums, Gram, Statistic
from pipeline.settings import Settings
from pipeline.sparsity import Budget


class MaskMethod(Settings):
    """A method says in `score` what a weight is worth, and in `keep` which stay: in every row the best, unless it says.

    `refit`: what stays is then solved anew for the least output error, with a damping relative to the mean diagonal of
    the Gram. `scores_from` is what the scores need to know. `rows_apart`: what stays of a row has nothing to do with
    other rows.
    """

    refit: bool = False
    refit_damping: float = Field(0.01, ge=0, le=1)
    scores_from: ClassVar[type[Statistic]] = ColumnSums
    rows_apart: ClassVar[bool] = False
    prunes_blocks: ClassVar[bool] = False
    best_granularity: ClassVar[Literal["layer", "linear"]] = "layer"

    @property
    def statistic(self) -> type[Statistic]:
        return Gram if self.refit else self.scores_from

    @property
    def goes_by_rows(self) -> bool:
        """Whether rows may be given a few at a time: a refit is one solve for all."""
        return self.rows_apart and not self.refit

    def prune(self, weight_OI: Tensor, inputs: Any, budget: Budget) -> Pruned:
        return self.applied(weight_OI, self.keep(weight_OI, inputs, budget), inputs)

    def applied(self, weight_OI: Tensor, keep_OI: Tensor, inputs: Any) -> Pruned:
        """What becomes of the weights under a mask [O, I]."""
        if not self.refit:
            return Pruned.masked(weight_OI, keep_OI)
        return Pruned(*refitted(weight_OI, keep_OI, inputs.sum_II, self.refit_damping))

    def score(self, weight_OI: Tensor, inputs: Any, budget: Budget) -> Tensor:
        """What each weight is worth [O, I]."""
        raise NotImplementedError

    def keep(self, weight_OI: Tensor, inputs: Any, budget: Budget) -> Tensor:
        """The mask [O, I], True is kept."""
        return budget.keep_per_row(self.score(weight_OI, inputs, budget))
