"""The habits of the official OWL that ours does not share."""

from collections.abc import Sequence
from fractions import Fraction

from pipeline.allocation.alphapruning import AlphaPruning
from pipeline.allocation.owl import Owl
from pipeline.sparsity import Pattern, Unstructured


class OfficialOwl(Owl):
    """OWL whose layers have a sparsity each, of which every row of a linear takes the floor."""

    def allocate(
        self, target: Pattern, sizes: Sequence[Sequence[int]], measured: Sequence[float]
    ) -> list[list[Pattern]]:
        settings = Owl(outlier_factor=self.outlier_factor, max_deviation=self.max_deviation)
        fractions = layer_fractions(settings, target, sizes, measured)
        return [[Unstructured(fraction)] * len(linears) for fraction, linears in zip(fractions, sizes, strict=True)]


def layer_fractions(
    allocation: Owl | AlphaPruning, target: Pattern, sizes: Sequence[Sequence[int]], measured: Sequence[float]
) -> list[Fraction]:
    """What each layer gives up where weights are so many that rounding to whole ones is of no concern."""
    many = [[size * 10**6 for size in linears] for linears in sizes]
    patterns = allocation.allocate(target, many, measured)
    counts = [
        sum(pattern.num_pruned(size) for pattern, size in zip(chosen, linears, strict=True))
        for chosen, linears in zip(patterns, many, strict=True)
    ]
    return [Fraction(count, sum(linears)) for count, linears in zip(counts, many, strict=True)]
