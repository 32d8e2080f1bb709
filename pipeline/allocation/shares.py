"""From what layers want to patterns whose total is exact."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import floor

from pipeline.sparsity import NofM, Pattern, Unstructured

_MOST_PRUNED = Fraction(99, 100)


def share_out(
    target: Pattern, sizes: Sequence[Sequence[int]], sparsities: Callable[[float], list[float]]
) -> list[list[Pattern]]:
    """The pattern of every linear, layer by layer, for the numbers of weights in `sizes`.

    `sparsities(level)` is what each layer wants, none of it falling with `level`, which is found so that together they
    make the target.

    Unstructured: the whole model gives up floor(weights x target), to the weight; what is left after rounding down goes
    to the linears with the largest remainders. No layer gives up more than 99 %, or the target where that is higher.
    N:M: each layer keeps a whole number of every M, at least 1 and at most M - 1. Together they keep exactly N of M
    where layers have one size, else as near to it as raising one layer, or one for another, comes without keeping more.
    """
    weights = [sum(linears) for linears in sizes]
    if isinstance(target, NofM):
        patterns = _n_of_m(target, weights, sparsities)
        return [[pattern] * len(linears) for pattern, linears in zip(patterns, sizes, strict=True)]
    fraction = Fraction(target.fraction)
    wanted = settled(weights, fraction, (Fraction(0), max(fraction, _MOST_PRUNED)), sparsities)
    flat = [size * sparsity for linears, sparsity in zip(sizes, wanted, strict=True) for size in linears]
    counts = iter(_rounded(flat, target.num_pruned(sum(weights))))
    return [[Unstructured(Fraction(next(counts), size), equal_rows=False) for size in linears] for linears in sizes]


def settled(
    weights: Sequence[int],
    target: Fraction,
    bounds: tuple[Fraction, Fraction],
    sparsities: Callable[[float], list[float]],
) -> list[float]:
    """The sparsities within bounds at the level where their mean over weights is the target, by bisection."""
    lowest, highest = map(float, bounds)

    def at(level: float) -> list[float]:
        return [min(max(sparsity, lowest), highest) for sparsity in sparsities(level)]

    def is_below(level: float) -> bool:
        return sum(map(float.__mul__, map(float, weights), at(level))) < float(target) * sum(weights)

    low, high = -2.0, 2.0
    while is_below(high) and high < 1e9:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if is_below(middle) else (low, middle)
    # the lower end, so that numbers rounded down never add up to too much
    return at(low)


def _rounded(wanted: list[float], total: int) -> list[int]:
    """Whole numbers that add up to `total`: rounded down, and one more for those with the largest remainders."""
    counts = list(map(floor, wanted))
    by_remainder = sorted(range(len(wanted)), key=lambda index: counts[index] - wanted[index])
    num_left = total - sum(counts)
    assert 0 <= num_left <= len(counts), (num_left, len(counts))
    for index in by_remainder[:num_left]:
        counts[index] += 1
    return counts


def _n_of_m(target: NofM, weights: list[int], sparsities: Callable[[float], list[float]]) -> list[Pattern]:
    m = target.m
    bounds = (Fraction(1, m), Fraction(m - 1, m))
    kept = [m * (1 - sparsity) for sparsity in settled(weights, Fraction(m - target.n, m), bounds, sparsities)]
    # what bisection leaves open in the last digits must not cost a whole column of a group
    whole = [min(max(floor(one + 1e-9), 1), m - 1) for one in kept]
    num_left = target.n * sum(weights) - sum(map(int.__mul__, whole, weights))
    for index in sorted(range(len(kept)), key=lambda index: whole[index] - kept[index]):
        if weights[index] <= num_left and whole[index] < min(m - 1, kept[index]):
            whole[index] += 1
            num_left -= weights[index]
    _fill(whole, weights, num_left, m)
    return [NofM(n, m) for n in whole]


def _fill(whole: list[int], weights: list[int], num_left: int, m: int) -> None:
    """Raise a layer, or raise one and lower another, for as long as that fits what is left."""
    while num_left > 0:
        higher = [index for index in range(len(whole)) if whole[index] < m - 1]
        lower = [index for index in range(len(whole)) if whole[index] > 1]
        moves: list[tuple[int, int, int | None]] = [(weights[up], up, None) for up in higher]
        moves += [(weights[up] - weights[down], up, down) for up in higher for down in lower if up != down]
        fitting = [move for move in moves if 0 < move[0] <= num_left]
        if not fitting:
            return
        gained, up, down = max(fitting, key=lambda move: move[0])
        whole[up] += 1
        if down is not None:
            whole[down] -= 1
        num_left -= gained
