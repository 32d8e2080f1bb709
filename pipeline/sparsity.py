"""What "pruned" means: how many weights of a matrix go, and over which unit they are counted.

O = output rows of all matrices of a group, stacked; I = input columns; C = some consecutive input columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import torch
from torch import Tensor

from pipeline.errors import Refusal
from pipeline.numerics.masks import keep_highest, keep_n_of_m


@dataclass(frozen=True)
class Unstructured:
    """Any weights may go; `fraction` of them do, as an exact number so that 0.7 of 10 is 7 and not 6.

    `equal_rows`: where rows are counted, each gives up the same; else some give up one more, so that the count of the
    whole matrix is exact too.
    """

    fraction: Decimal | Fraction
    equal_rows: bool = True

    def num_pruned(self, num_weights: int) -> int:
        """floor(num_weights x fraction), in exact arithmetic."""
        return int(num_weights * self.fraction)

    def of_rows(self, num_rows: int, num_columns: int) -> list[tuple[int, "Pattern"]]:
        """Numbers of consecutive rows that give up the same, and the pattern that each such row has by itself.

        Where some give up one more, those are the first ones.
        """
        if self.equal_rows:
            return [(num_rows, self)]
        each, num_with_one_more = divmod(self.num_pruned(num_rows * num_columns), num_rows)
        shares = ((num_with_one_more, each + 1), (num_rows - num_with_one_more, each))
        return [(rows, Unstructured(Fraction(num_pruned, num_columns))) for rows, num_pruned in shares if rows]

    def __str__(self) -> str:
        return f"unstructured {float(self.fraction):.6g}"


@dataclass(frozen=True)
class NofM:
    """Of every `m` consecutive input columns of a row, `n` are kept."""

    n: int
    m: int

    def num_pruned(self, num_weights: int) -> int:
        return num_weights // self.m * (self.m - self.n)

    def of_rows(self, num_rows: int, num_columns: int) -> list[tuple[int, "Pattern"]]:
        """As for unstructured ones: all rows are alike."""
        return [(num_rows, self)]

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Pattern = Unstructured | NofM


@dataclass(frozen=True)
class Budget:
    """What is to be pruned of the matrices of one group, stacked by rows: matrix i has `num_rows[i]` rows.

    `names` are those of their modules within the layer, for methods that treat attention and MLP differently.
    """

    patterns: tuple[Pattern, ...]
    num_rows: tuple[int, ...]
    names: tuple[str, ...] = ()

    @property
    def group_size(self) -> int | None:
        """M where every matrix of the group is N:M with the same M, None where none is."""
        sizes = {pattern.m if isinstance(pattern, NofM) else None for pattern in self.patterns}
        assert len(sizes) == 1, "the matrices of a group are all unstructured or all N of the same M"
        return sizes.pop()

    def num_kept_of_m(self, device: torch.device) -> Tensor:
        """Of each row [O], where every matrix is N:M."""
        num_kept = [pattern.n for pattern in self.patterns if isinstance(pattern, NofM)]
        return torch.tensor(num_kept, dtype=torch.int32).repeat_interleave(torch.tensor(self.num_rows)).to(device)

    def keep_per_row(self, score_OI: Tensor) -> Tensor:
        """Keep the highest scores of every output row, or of every group of M. Returns a mask [O, I]."""
        keeps = []
        for pattern, score_rI in self._matrices(score_OI):
            alike = pattern.of_rows(*score_rI.shape)
            parts = torch.split(score_rI, [num_rows for num_rows, _ in alike])
            keeps += [_keep_of_row(each, part_rI) for (_, each), part_rI in zip(alike, parts, strict=True)]
        return _stacked(keeps)

    def keep_per_matrix(self, score_OI: Tensor) -> Tensor:
        """Keep the highest scores of every matrix, or of every group of M. Returns a mask [O, I]."""
        return _stacked([_keep_of_matrix(pattern, score_rI) for pattern, score_rI in self._matrices(score_OI)])

    def alone(self, stacked_OI: Tensor) -> Iterator[tuple["Budget", Tensor]]:
        """Each matrix of the stack [rows of the matrix, I], with the budget that it has by itself."""
        for pattern, part_rI in self._matrices(stacked_OI):
            yield Budget((pattern,), (len(part_rI),)), part_rI

    def keep_in_columns(self, score_OC: Tensor, first_column: int, num_columns: int) -> Tensor:
        """The mask of columns [first_column, first_column + C) of `num_columns`, where a solver decides them in turn.

        Each matrix gives up the cumulative share of its columns, so that the whole matrix has the exact count.
        """
        keeps = []
        for pattern, score_rC in self._matrices(score_OC):
            if isinstance(pattern, NofM):
                keeps.append(keep_n_of_m(score_rC, pattern.n, pattern.m))
            else:
                total = pattern.num_pruned(score_rC.shape[0] * num_columns)
                stop = first_column + score_rC.shape[1]
                share = total * stop // num_columns - total * first_column // num_columns
                keeps.append(keep_highest(score_rC.reshape(1, -1), share).view_as(score_rC))
        return _stacked(keeps)

    def _matrices(self, score_OI: Tensor) -> Iterator[tuple[Pattern, Tensor]]:
        yield from zip(self.patterns, torch.split(score_OI, list(self.num_rows)), strict=True)


def _keep_of_row(pattern: Pattern, score_rI: Tensor) -> Tensor:
    if isinstance(pattern, NofM):
        return keep_n_of_m(score_rI, pattern.n, pattern.m)
    return keep_highest(score_rI, pattern.num_pruned(score_rI.shape[1]))


def _keep_of_matrix(pattern: Pattern, score_rI: Tensor) -> Tensor:
    if isinstance(pattern, NofM):
        return keep_n_of_m(score_rI, pattern.n, pattern.m)
    return keep_highest(score_rI.reshape(1, -1), pattern.num_pruned(score_rI.numel())).view_as(score_rI)


def _stacked(keeps: list[Tensor]) -> Tensor:
    return torch.cat(keeps) if len(keeps) > 1 else keeps[0]


def parse_pattern(pattern: str, sparsity: float | None) -> Pattern:
    """The pattern that `pruning.pattern` and `pruning.sparsity` ask for; without a sparsity, half of the weights.

    Raises Refusal where they are malformed or contradict each other.
    """
    fraction = None if sparsity is None else Decimal(str(sparsity))
    if fraction is not None and not 0 <= fraction < 1:
        raise Refusal(f"pruning.sparsity = {sparsity}: must be at least 0 and below 1")
    if pattern == "unstructured":
        return Unstructured(Decimal("0.5") if fraction is None else fraction)
    n, m = _parse_n_of_m(pattern)
    if fraction is not None and fraction * m != m - n:
        raise Refusal(
            f"pruning.sparsity = {sparsity} contradicts pruning.pattern = {pattern}, which prunes {m - n} of {m}: "
            "leave pruning.sparsity out"
        )
    return NofM(n, m)


def _parse_n_of_m(pattern: str) -> tuple[int, int]:
    parts = pattern.split(":")
    if len(parts) == 2 and all(part.isascii() and part.isdigit() for part in parts):
        n, m = int(parts[0]), int(parts[1])
        if 0 < n < m:
            return n, m
    raise Refusal(f"pruning.pattern = {pattern!r}: must be 'unstructured' or 'N:M' with N kept of M, for example '2:4'")
