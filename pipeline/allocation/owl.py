"""OWL: layers with more outliers are pruned less (Yin et al., 2310.05175, section 4).

O = output rows, I = input columns.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.allocation.shares import share_out
from pipeline.numerics.statistics import ColumnSums
from pipeline.settings import Settings
from pipeline.sparsity import Pattern


class Owl(Settings):
    """An outlier is a weight whose Wanda score is above `outlier_factor` (the paper's M) x the mean of its layer.

    Sparsities of layers lie at most 2 x `max_deviation` (the paper's lambda) apart. Under N:M they are rounded to whole
    columns of M: 0.08 of 4 is none, so that 2:4 stays 2:4 in every layer.
    """

    name: Literal["owl"] = "owl"
    outlier_factor: float = Field(5, gt=0)
    max_deviation: float = Field(0.08, ge=0, le=0.5)
    statistic: ClassVar[type[ColumnSums]] = ColumnSums

    def measure(self, linears: Sequence[tuple[Tensor, Any]]) -> float:
        """The share of outliers among all weights of a layer, in per cent; scores of all its linears count together."""
        num_weights, total = 0, 0.0
        for weight_OI, inputs in linears:
            num_weights += weight_OI.numel()
            total += float(_scores(weight_OI, inputs).sum(dtype=torch.float64))
        threshold = self.outlier_factor * total / max(num_weights, 1)
        num_outliers = sum(int((_scores(weight_OI, inputs) > threshold).sum()) for weight_OI, inputs in linears)
        return 100 * num_outliers / max(num_weights, 1)

    def allocate(
        self, target: Pattern, sizes: Sequence[Sequence[int]], measured: Sequence[float]
    ) -> list[list[Pattern]]:
        """The pattern of every linear, layer by layer, for the numbers of weights in `sizes`."""
        lowest, highest = min(measured), max(measured)
        spared = [2 * self.max_deviation * (share - lowest) / ((highest - lowest) or 1) for share in measured]
        return share_out(target, sizes, lambda level: [level - each for each in spared])


def _scores(weight_OI: Tensor, inputs: ColumnSums) -> Tensor:
    return weight_OI.abs() * inputs.norm_I
