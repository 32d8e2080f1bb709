"""What a method may ask to know about the inputs of a group of linears: nothing, column sums, or the Gram.

A statistic is a sum over tokens with the count of tokens: it adds up in any order and over any split of the tokens.
T = tokens, I = input columns, O = output rows. Everything is accumulated in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

_ROWS_AT_ONCE = 1024


@dataclass
class TokenCount:
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

    def relative_error(self, before_OI: Tensor, after_OI: Tensor) -> float:
        """|before - after|^2 / |before|^2: all that can be said without inputs."""
        return _ratio((before_OI - after_OI).square().sum(), before_OI.square().sum())


@dataclass
class ColumnSums:
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
        x_TI = x_TI.float()
        self.num_tokens += x_TI.shape[0]
        self.sum_I += x_TI.sum(dim=0)
        self.sum_squares_I += x_TI.square().sum(dim=0)

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

    def relative_error(self, before_OI: Tensor, after_OI: Tensor) -> float:
        """|(before - after) X|^2 / |before X|^2, with the columns of X taken as uncorrelated."""
        change = ((before_OI - after_OI).square() @ self.sum_squares_I).sum()
        return _ratio(change, (before_OI.square() @ self.sum_squares_I).sum())


@dataclass
class Gram:
    """The sum of x xᵀ over tokens, beside that of x. The Hessian of |W X - W' X|^2 in a row of W' is 2 Gram."""

    needs_inputs: ClassVar[bool] = True
    error_kind: ClassVar[str] = "output"
    symmetric: ClassVar[tuple[str, ...]] = ("sum_II",)
    num_tokens: int
    sum_I: Tensor
    sum_II: Tensor

    @classmethod
    def zeros(cls, num_inputs: int, device: torch.device) -> Self:
        return cls(0, torch.zeros(num_inputs, device=device), torch.zeros(num_inputs, num_inputs, device=device))

    @property
    def sum_squares_I(self) -> Tensor:
        return self.sum_II.diagonal()

    @property
    def norm_I(self) -> Tensor:
        """|x| of every column over all tokens."""
        return self.sum_squares_I.sqrt()

    def observe(self, x_TI: Tensor) -> None:
        x_TI = x_TI.float()
        self.num_tokens += x_TI.shape[0]
        self.sum_I += x_TI.sum(dim=0)
        self.sum_II.addmm_(x_TI.T, x_TI)

    def __add__(self, other: Gram) -> Gram:
        return Gram(self.num_tokens + other.num_tokens, self.sum_I + other.sum_I, self.sum_II + other.sum_II)

    def reordered(self, order_I: Tensor) -> Gram:
        """That of the inputs with their columns in another order."""
        return Gram(self.num_tokens, self.sum_I[order_I], self.sum_II[order_I][:, order_I])

    def is_finite(self) -> bool:
        return bool(self.sum_II.isfinite().all())

    def relative_error(self, before_OI: Tensor, after_OI: Tensor) -> float:
        """|(before - after) X|^2 / |before X|^2 on the calibration tokens."""
        return _ratio(self._output_square(before_OI - after_OI), self._output_square(before_OI))

    def _output_square(self, weight_OI: Tensor) -> Tensor:
        return (weight_OI @ self.sum_II * weight_OI).sum()


# a Gram knows the column sums too
Columns = ColumnSums | Gram
Statistic = TokenCount | ColumnSums | Gram


def mirrored(sum_II: Tensor) -> Tensor:
    """Made exactly symmetric, in place: rounding leaves a product xᵀx only nearly so. The lower triangle holds."""
    for first in range(0, len(sum_II), _ROWS_AT_ONCE):
        stop = first + _ROWS_AT_ONCE
        sum_II[:first, first:stop] = sum_II[first:stop, :first].T
        corner = sum_II[first:stop, first:stop]
        corner.copy_(corner.tril() + corner.tril(-1).T)
    return sum_II


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if float(whole) > 0 else 0.0
