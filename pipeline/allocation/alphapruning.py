"""AlphaPruning: layers whose spectra have heavier tails are pruned less (Lu et al., 2410.10912, section 3).

O = output rows, I = input columns, E = eigenvalues.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.allocation.shares import share_out
from pipeline.numerics.power_law import tail_exponent
from pipeline.numerics.statistics import TokenCount
from pipeline.settings import Settings
from pipeline.sparsity import Pattern


class AlphaPruning(Settings):
    """Looks at no data. Sparsities of layers lie between 1 - `max_ratio` and 1 + `max_ratio` times one level."""

    name: Literal["alphapruning"] = "alphapruning"
    max_ratio: float = Field(0.3, ge=0, le=0.99)
    statistic: ClassVar[type[TokenCount]] = TokenCount

    def measure(self, linears: Sequence[tuple[Tensor, Any]]) -> float:
        """The mean tail exponent of a layer's linears; higher means less heavy-tailed."""
        exponents = [tail_exponent(_eigenvalues(weight_OI)) for weight_OI, _ in linears]
        return sum(exponents) / max(len(exponents), 1)

    def allocate(
        self, target: Pattern, sizes: Sequence[Sequence[int]], measured: Sequence[float]
    ) -> list[list[Pattern]]:
        """The pattern of every linear, layer by layer, for the numbers of weights in `sizes`."""
        lowest, highest = min(measured), max(measured)
        # layers that are all alike share alike
        middle, half = (lowest + highest) / 2, (highest - lowest) / 2 or 1
        ratios = [1 + self.max_ratio * (each - middle) / half for each in measured]
        return share_out(target, sizes, lambda level: [level * ratio for ratio in ratios])


def _eigenvalues(weight_OI: Tensor) -> Tensor:
    """Those of Wᵀ W that are more than rounding."""
    value_E: Tensor = torch.linalg.svdvals(weight_OI)
    rounding = torch.finfo(value_E.dtype).eps * max(weight_OI.shape) * value_E[:1]
    return value_E[value_E > rounding].square()
