"""Symmetric matrices of which the lower triangle is computed, by products of their blocks.

T = tokens, O = output rows, I = input columns.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Below this a product is too small for two of half its size to be faster, on a CPU and then on a GPU.
_LEAST_COLUMNS, _LEAST_COLUMNS_ON_GPU = 128, 1024
# Of half precision only so many tokens are copied to float32 at once.
_TOKENS_AT_ONCE = 2048
_NUM_BLOCKS, _ROWS_AT_ONCE = 8, 1024


def add_square(lower_II: Tensor, x_TI: Tensor) -> None:
    """Add xᵀ x to a sum, in float32, in its lower triangle; what is above the diagonal is not to be read."""
    if x_TI.is_cuda:
        _add_by_halves(lower_II, x_TI, _LEAST_COLUMNS_ON_GPU)
        return
    least_columns = max(_LEAST_COLUMNS, min(len(lower_II) // 4, 2 * _LEAST_COLUMNS))
    for part_TI in torch.split(x_TI, _TOKENS_AT_ONCE):
        _add_by_halves(lower_II, part_TI.float(), least_columns)


def _add_by_halves(lower_II: Tensor, x_TI: Tensor, least_columns: int) -> None:
    middle = len(lower_II) // 2
    if middle < least_columns:
        _add_product(lower_II, x_TI, x_TI)
        return
    left_TI, right_TI = x_TI[:, :middle], x_TI[:, middle:]
    _add_by_halves(lower_II[:middle, :middle], left_TI, least_columns)
    _add_product(lower_II[middle:, :middle], right_TI, left_TI)
    _add_by_halves(lower_II[middle:, middle:], right_TI, least_columns)


def _add_product(sum_IJ: Tensor, left_TI: Tensor, right_TJ: Tensor) -> None:
    if left_TI.dtype == torch.float32:
        sum_IJ.addmm_(left_TI.T, right_TJ)
    else:
        # products of half precision are exact in float32: no copy of the inputs in it is needed
        torch.addmm(sum_IJ, left_TI.T, right_TJ, out_dtype=torch.float32, out=sum_IJ)


def mirrored(sum_II: Tensor) -> Tensor:
    """Made exactly symmetric, in place: the lower triangle holds."""
    for start in range(0, len(sum_II), _ROWS_AT_ONCE):
        stop = start + _ROWS_AT_ONCE
        sum_II[:start, start:stop] = sum_II[start:stop, :start].T
        corner = sum_II[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).T)
    return sum_II


def quadratic(weight_OI: Tensor, sum_II: Tensor) -> Tensor:
    """w S wᵀ of every row [O], S symmetric; half of it is computed, since the other half is the same."""
    total_O = weight_OI.new_zeros(len(weight_OI))
    for start, stop in _blocks(len(sum_II)):
        image_OB = weight_OI[:, :start] @ sum_II[:start, start:stop]
        image_OB = torch.addmm(image_OB, weight_OI[:, start:stop], sum_II[start:stop, start:stop], beta=2)
        total_O += (image_OB * weight_OI[:, start:stop]).sum(dim=1)
    return total_O


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    width = max(_LEAST_COLUMNS, -(-size // _NUM_BLOCKS))
    for start in range(0, size, width):
        yield start, min(start + width, size)
