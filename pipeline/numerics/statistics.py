"""What a method may ask to know about the inputs of a group of linears: nothing, column sums, or the Gram.

A statistic is a sum over tokens with the count of tokens: it adds up in any order and over any split of the tokens.
T = tokens, I = input columns, O = output rows. Everything is accumulated in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from pipeline.numerics.triangle import add_square, mirrored, quadratic

_NUMBERS_AT_ONCE = 2**17


class _Outputs:
    """What weights give for the inputs that were seen."""

    def squares(self, weight_OI: Tensor) -> Tensor:
        """|W X|^2 of every row [O]."""
        raise NotImplementedError

    def squares_of_change(self, before_OI: Tensor, after_OI: Tensor) -> Tensor:
        """Those of the difference."""
        return self.squares(before_OI - after_OI)

    def errors(self, before_OI: Tensor, after_OI: Tensor, change_O: Tensor | None = None) -> tuple[float, float]:
        """|(before - after) X|^2 and |before X|^2; `change_O` is the former of every row, where it is known."""
        change_O = self.squares_of_change(before_OI, after_OI) if change_O is None else change_O
        return float(change_O.sum(dtype=torch.float64)), float(self.squares(before_OI).sum(dtype=torch.float64))


@dataclass
class TokenCount(_Outputs):
    """Only how many tokens there were: for methods that look at the weights alone."""

    needs_inputs: ClassVar[bool] = False
    error_kind: ClassVar[str] = "weight"
    num_tokens: int

    @classmethod
    def zeros(cls, num_inputs: int, device: torch.device) -> Self:
        return cls(0)

    def observe(self, x_TI: Tensor) -> None:
        self.num_tokens += x_TI.shape[0]

    def __add__(self, other: TokenCount) -> TokenCount:
        return TokenCount(self.num_tokens + other.num_tokens)

    def reordered(self, order_I: Tensor) -> TokenCount:
        return self

    def is_finite(self) -> bool:
        return True

    def squares(self, weight_OI: Tensor) -> Tensor:
        """|W|^2 of every row: all that can be said without inputs."""
        return weight_OI.square().sum(dim=1)


@dataclass
class ColumnSums(_Outputs):
    """Per input column, the sum of x and of x squared over tokens."""

    needs_inputs: ClassVar[bool] = True
    error_kind: ClassVar[str] = "diagonal"
    num_tokens: int
    sum_I: Tensor
    sum_squares_I: Tensor

    @classmethod
    def zeros(cls, num_inputs: int, device: torch.device) -> Self:
        return cls(0, torch.zeros(num_inputs, device=device), torch.zeros(num_inputs, device=device))

    def observe(self, x_TI: Tensor) -> None:
        self.num_tokens += x_TI.shape[0]
        if x_TI.is_cuda:
            self._observe_at_once(x_TI)
            return
        for part_TI in _parts(x_TI):
            part_TI = part_TI.float()
            self.sum_I += part_TI.sum(dim=0)
            self.sum_squares_I += part_TI.square().sum(dim=0)

    def _observe_at_once(self, x_TI: Tensor) -> None:
        """Each sum by one kernel that reads the inputs as they are and nothing else."""
        self.sum_I += x_TI.sum(dim=0, dtype=torch.float32)
        self.sum_squares_I += torch.linalg.vector_norm(x_TI, dim=0, dtype=torch.float32).square_()

    def __add__(self, other: ColumnSums) -> ColumnSums:
        return ColumnSums(
            self.num_tokens + other.num_tokens,
            self.sum_I + other.sum_I,
            self.sum_squares_I + other.sum_squares_I,
        )

    def reordered(self, order_I: Tensor) -> ColumnSums:
        """That of the inputs with their columns in another order."""
        return ColumnSums(self.num_tokens, self.sum_I[order_I], self.sum_squares_I[order_I])

    @property
    def norm_I(self) -> Tensor:
        """|x| of every column over all tokens."""
        return self.sum_squares_I.sqrt()

    def is_finite(self) -> bool:
        return bool(self.sum_squares_I.isfinite().all())

    def squares(self, weight_OI: Tensor) -> Tensor:
        """|W X|^2 of every row, with the columns of X taken as uncorrelated."""
        return torch.cat([part_rI.square() @ self.sum_squares_I for part_rI in _parts(weight_OI)])

    def squares_of_change(self, before_OI: Tensor, after_OI: Tensor) -> Tensor:
        pairs = zip(_parts(before_OI), _parts(after_OI), strict=True)
        return torch.cat([(before_rI - after_rI).square_() @ self.sum_squares_I for before_rI, after_rI in pairs])


@dataclass
class Gram(_Outputs):
    """The sum of x xᵀ over tokens, beside that of x. The Hessian of |W X - W' X|^2 in a row of W' is 2 Gram.

    Only the lower triangle is summed up, and only that of `lower_II` counts; `sum_II` is the whole.
    """

    needs_inputs: ClassVar[bool] = True
    error_kind: ClassVar[str] = "output"
    symmetric: ClassVar[tuple[str, ...]] = ("lower_II",)
    num_tokens: int
    sum_I: Tensor
    lower_II: Tensor

    def __post_init__(self) -> None:
        self._is_whole = False

    @classmethod
    def zeros(cls, num_inputs: int, device: torch.device) -> Self:
        return cls(0, torch.zeros(num_inputs, device=device), torch.zeros(num_inputs, num_inputs, device=device))

    @property
    def sum_II(self) -> Tensor:
        """Exactly symmetric: whatever was summed up since it was last asked for is mirrored first, in place."""
        if not self._is_whole:
            mirrored(self.lower_II)
            self._is_whole = True
        return self.lower_II

    @property
    def sum_squares_I(self) -> Tensor:
        return self.lower_II.diagonal()

    @property
    def norm_I(self) -> Tensor:
        """|x| of every column over all tokens."""
        return self.sum_squares_I.sqrt()

    def observe(self, x_TI: Tensor) -> None:
        self._is_whole = False
        self.num_tokens += x_TI.shape[0]
        self.sum_I += x_TI.sum(dim=0, dtype=torch.float32)
        add_square(self.lower_II, x_TI)

    def __add__(self, other: Gram) -> Gram:
        return Gram(self.num_tokens + other.num_tokens, self.sum_I + other.sum_I, self.lower_II + other.lower_II)

    def reordered(self, order_I: Tensor) -> Gram:
        """That of the inputs with their columns in another order."""
        return Gram(self.num_tokens, self.sum_I[order_I], self.sum_II[order_I][:, order_I])

    def is_finite(self) -> bool:
        """By the squares alone: no product of two columns is larger than the larger of their squares."""
        return bool(self.sum_squares_I.isfinite().all())

    def squares(self, weight_OI: Tensor) -> Tensor:
        return quadratic(weight_OI, self.sum_II)


# a Gram knows the column sums too
Columns = ColumnSums | Gram
Statistic = TokenCount | ColumnSums | Gram


def _parts(rows_RI: Tensor) -> Sequence[Tensor]:
    """Tokens, or rows of weights, in parts that the cache of a processor holds with their squares; for a GPU whole."""
    return [rows_RI] if rows_RI.is_cuda else torch.split(rows_RI, max(1, _NUMBERS_AT_ONCE // max(1, rows_RI.shape[1])))
