"""RIA: a weight counts by its share of what its row and its column weigh (Zhang et al., "Plug-and-Play", ICLR 2024).

O = output rows of all matrices of a group, stacked; r = rows of one matrix; I = input columns.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.methods.masked import MaskMethod
from pipeline.numerics.statistics import Columns
from pipeline.sparsity import Budget

_SMALLEST = torch.finfo(torch.float32).tiny


class RIA(MaskMethod):
    """Relative importance and activations: (|w| / column sum + |w| / row sum) x |input| ** `activation_power`.

    The sums are those of |w| over the column and the row of each matrix by itself. Shares keep whole rows and columns
    of small weights from being lost. `unit`: over what weights are compared. `activation_power` 0 is relative
    importance alone, which looks at no data.
    """

    name: Literal["ria"] = "ria"
    activation_power: float = Field(0.5, ge=0, le=10)
    unit: Literal["matrix", "row"] = "matrix"

    def score(self, weight_OI: Tensor, inputs: Columns, budget: Budget) -> Tensor:
        relative_OI = torch.cat([_relative_importance(weight_rI.abs()) for _, weight_rI in budget.alone(weight_OI)])
        # relative to the largest, so that no power overflows
        norm_I = inputs.norm_I / inputs.norm_I.max().clamp_min(_SMALLEST)
        return relative_OI * norm_I**self.activation_power

    def keep(self, weight_OI: Tensor, inputs: Columns, budget: Budget) -> Tensor:
        keep = budget.keep_per_matrix if self.unit == "matrix" else budget.keep_per_row
        return keep(self.score(weight_OI, inputs, budget))


def _relative_importance(size_rI: Tensor) -> Tensor:
    # where a row or a column is all zero so is every weight in it, and 0 / 0 is to be 0
    column_sum_I = size_rI.sum(dim=0).clamp_min(_SMALLEST)
    row_sum_r1 = size_rI.sum(dim=1, keepdim=True).clamp_min(_SMALLEST)
    return size_rI / column_sum_I + size_rI / row_sum_r1
