"""SparseGPT: prune column by column, and let the remaining weights make up for each loss (2301.00774, algorithm 1).

O = output rows, I = input columns, C = columns decided together.
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from pipeline.methods.pruned import Pruned
from pipeline.numerics.refit import refitted
from pipeline.numerics.solve import NumKept, damped_diagonal, sweep, upper_factor
from pipeline.numerics.statistics import Gram
from pipeline.settings import Settings
from pipeline.sparsity import Budget


class SparseGPT(Settings):
    """`damping` is relative to the mean diagonal of the Gram; `block_columns` share one unstructured choice.

    `refit`: the mask stays, and the kept weights are solved anew, all of a row at once, also those on the left, which
    the sweep has left behind.
    """

    name: Literal["sparsegpt"] = "sparsegpt"
    statistic: ClassVar[type[Gram]] = Gram
    prunes_blocks: ClassVar[bool] = False
    goes_by_rows: ClassVar[bool] = False
    best_granularity: ClassVar[Literal["layer", "linear"]] = "linear"
    damping: float = Field(0.01, ge=0, le=1)
    block_columns: int = Field(128, ge=1)
    refit: bool = False

    def prune(self, weight_OI: Tensor, inputs: Gram, budget: Budget) -> Pruned:
        num_columns = weight_OI.shape[1]
        upper_II, damping = upper_factor(inputs.sum_II, self.damping)
        dead_I = inputs.sum_squares_I == 0
        some_are_dead = bool(dead_I.any())

        def choose(score_OC: Tensor, first_column: int) -> Tensor:
            if some_are_dead:
                # scores are squares: -1 sends columns that never saw an input first
                score_OC = score_OC.masked_fill(dead_I[first_column : first_column + score_OC.shape[1]], -1)
            return budget.keep_in_columns(score_OC, first_column, num_columns)

        m = budget.group_size
        each = NumKept(m, budget.num_kept_of_m(weight_OI.device), dead_I) if m else None
        pruned_OI, keep_OI, loss_O = sweep(weight_OI, upper_II, choose, m or self.block_columns, each)
        if self.refit:
            return Pruned(*refitted(weight_OI, keep_OI, inputs.sum_II, damping))
        # the loss counts the damping as if it were inputs
        added_I = damped_diagonal(inputs.sum_II, damping) - inputs.sum_squares_I
        change_O = (loss_O - (pruned_OI - weight_OI).square_() @ added_I).clamp_min_(0)
        return Pruned(pruned_OI, keep_OI, damping, change_O)
