"""The same pattern for every decoder layer."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pipeline.settings import Settings
from pipeline.sparsity import Pattern


class Uniform(Settings):
    """What the papers of Wanda and SparseGPT do."""

    name: Literal["uniform"] = "uniform"
    statistic: ClassVar[None] = None

    def allocate(
        self, target: Pattern, sizes: Sequence[Sequence[int]], measured: Sequence[float]
    ) -> list[list[Pattern]]:
        """The pattern of every linear, layer by layer, for the numbers of weights in `sizes`."""
        return [[target] * len(linears) for linears in sizes]
