"""The SparseGPT solver: one factorisation of the Gram, one sweep over the columns (Frantar & Alistarh, 2301.00774).

O = output rows, I = input columns, C = columns of a block. Everything is float32.

The paper spreads errors by U, upper triangular, with inverse(H) = Uᵀ U (eq. 3-5 and algorithm 1 there), H the damped
Gram. Here nothing as large as H is inverted. With H = R Rᵀ, R upper triangular, a change d of a row loses |d R|², of
which the part of column j is the sum of d_k R_kj over all k up to j. So what the columns left of a block have changed
by asks only for d R within the block to be 0: its own changes are minus that sum, times the inverse of the block of R
on the diagonal. That inverse is the block of U, and within the block errors are spread as in the paper.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Columns within which errors are spread; beyond them changes are.
BLOCK_COLUMNS = 128
# Columns swept one by one on a CPU before their errors reach the columns to the right as one matrix product.
_LEAF_COLUMNS = 16
_NUMBERS_AT_ONCE = 2**20


def upper_factor(gram_II: Tensor, damping: float) -> tuple[Tensor, float]:
    """R, upper triangular, with gram + damping x mean diagonal = R Rᵀ, and the damping that was needed.

    It is the Cholesky factorisation of that matrix with rows and columns reversed, in the memory that R ends up in.
    Raises ArithmeticError if the Gram is not finite.
    """
    factor_II, damping = factor(gram_II, damping, backwards=True)
    _reverse(factor_II)
    return factor_II, damping


def factor(gram_II: Tensor, damping: float, *, backwards: bool = False) -> tuple[Tensor, float]:
    """The lower Cholesky factor of the damped Gram, if asked with rows and columns reversed, and the damping.

    Where it is not positive definite the damping is raised tenfold until it is. Raises ArithmeticError if the Gram is
    not finite.
    """
    while damping < 1e6:
        # by columns, as LAPACK wants it, so that the factor takes the place of the matrix
        lower_II = damped(gram_II, damping, backwards=backwards).T
        failed = torch.empty((), dtype=torch.int32, device=gram_II.device)
        torch.linalg.cholesky_ex(lower_II, out=(lower_II, failed))
        # what is not finite anywhere reaches the diagonal
        if not failed and bool(lower_II.diagonal().isfinite().all()):
            return lower_II, damping
        del lower_II
        damping = max(10 * damping, 1e-4)
    raise ArithmeticError("the Gram is not finite")


def damped(gram_II: Tensor, damping: float, *, backwards: bool = False) -> Tensor:
    """A copy with the damped diagonal, if asked with rows and columns reversed."""
    diagonal_I = damped_diagonal(gram_II, damping)
    hessian_II = gram_II.flip(0, 1) if backwards else gram_II.clone()
    hessian_II.diagonal().copy_(diagonal_I.flip(0) if backwards else diagonal_I)
    return hessian_II


def damped_diagonal(gram_II: Tensor, damping: float) -> Tensor:
    """The diagonal of the damped Gram [I]: `damping` x the mean diagonal of its live columns is added.

    A column without any input gets that mean first.
    """
    diagonal_I = gram_II.diagonal()
    live_I = diagonal_I > 0
    mean = diagonal_I[live_I].mean() if bool(live_I.any()) else torch.ones_like(diagonal_I[:1]).mean()
    return torch.where(live_I, diagonal_I, mean) + damping * mean


# The mask of some columns from their scores and the number of the first.
Choose = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class NumKept:
    """Of every `m` consecutive columns of a row so many are kept; dead columns go first."""

    m: int
    num_kept_O: Tensor
    is_dead_I: Tensor


def sweep(
    weight_OI: Tensor, upper_II: Tensor, choose: Choose, step: int, each: NumKept | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Prune column by column, each time changing the columns to the right to make up for the error.

    `upper_II` is R. `choose(score_OC, first_column)` gives the mask of the next `step` columns from their scores
    w² / U_jj² after all updates from the left. Returns the new weight and the mask, both [O, I], and of every row the
    loss d H dᵀ for its change d [O]; pruned weights are exactly 0.
    `each`: the same choice where N of M are kept, for a GPU, which would wait for `choose` at every step.
    """
    weight_IO = weight_OI.T.clone(memory_format=torch.contiguous_format)
    keep_IO = torch.empty_like(weight_IO, dtype=torch.bool)
    # what a column has changed by, once it is swept; until then d R of the columns to its left
    change_IO = torch.zeros_like(weight_IO)
    loss_O = weight_IO.new_zeros(weight_IO.shape[1])

    def spread(start: int, middle: int, stop: int) -> None:
        change_IO[middle:stop].addmm_(upper_II[start:middle, middle:stop].T, change_IO[start:middle])

    def sweep_block(start: int, stop: int) -> None:
        weight_CO, change_CO = weight_IO[start:stop], change_IO[start:stop]
        # in the order of its memory, which a block of the columns of weight_OI is not
        before_CO = weight_CO.clone()
        identity_CC = torch.eye(stop - start, device=upper_II.device)
        inverse_CC = torch.linalg.solve_triangular(upper_II[start:stop, start:stop], identity_CC, upper=True)
        weight_CO.addmm_(inverse_CC.T, change_CO, alpha=-1)
        # what was asked of the block is done: its memory holds the errors
        _sweep_block(weight_CO, change_CO, keep_IO[start:stop], inverse_CC, _Choice(choose, step, each, start))
        loss_O.add_(change_CO.square_().sum(dim=0))
        torch.sub(weight_CO, before_CO, out=change_CO)

    _by_halves(0, len(weight_IO), -(-BLOCK_COLUMNS // step) * step, sweep_block, spread)
    # the changes are used up: their memory holds the result
    return change_IO.view(weight_OI.shape).copy_(weight_IO.T), keep_IO.T.contiguous(), loss_O


@dataclass(frozen=True)
class _Choice:
    """How the masks of a block are chosen, `step` columns at a time, and the number of its first column."""

    choose: Choose
    step: int
    each: NumKept | None
    first_column: int


def _sweep_block(weight_CO: Tensor, error_CO: Tensor, keep_CO: Tensor, upper_CC: Tensor, choice: _Choice) -> None:
    """Choose and sweep, in place, all columns of a block; `upper_CC` is that of U."""
    most_columns, sweep_leaf = _leaf(weight_CO.device)

    def spread(start: int, middle: int, stop: int) -> None:
        weight_CO[middle:stop].addmm_(upper_CC[start:middle, middle:stop].T, error_CO[start:middle], alpha=-1)

    def choose_and_sweep(start: int, stop: int) -> None:
        weight_cO, keep_cO = weight_CO[start:stop], keep_CO[start:stop]
        diagonal_c1 = upper_CC.diagonal()[start:stop, None]
        keep_cO.copy_(choice.choose((weight_cO / diagonal_c1).square_().T, choice.first_column + start).T)
        # a cast of bytes is vectorised, one of booleans is not
        lost_cO = (~keep_cO).view(torch.uint8).float()
        torch.div(lost_cO, diagonal_c1, out=error_CO[start:stop])
        _by_halves(start, stop, most_columns, sweep_chosen, spread)
        weight_cO.addcmul_(weight_cO, lost_cO, value=-1)

    def sweep_choosing(start: int, stop: int) -> None:
        here = slice(start, stop)
        first_column = choice.first_column + start
        _sweep_choosing(weight_CO[here], error_CO[here], keep_CO[here], upper_CC[here, here], first_column, choice.each)

    def sweep_chosen(start: int, stop: int) -> None:
        sweep_leaf(weight_CO[start:stop], error_CO[start:stop], upper_CC[start:stop, start:stop])

    each = choice.each
    if each is not None and weight_CO.is_cuda and each.m <= most_columns:
        _by_halves(0, len(weight_CO), most_columns // each.m * each.m, sweep_choosing, spread)
    else:
        _by_halves(0, len(weight_CO), choice.step, choose_and_sweep, spread)


def _by_halves(
    start: int,
    stop: int,
    width: int,
    sweep_some: Callable[[int, int], None],
    spread: Callable[[int, int, int], None],
) -> None:
    """Sweep up to `width` columns at a time, and spread the errors of each half over the other as one product."""
    # no closure that calls itself: it would hold the tensors of a sweep until the garbage collector comes
    if stop - start <= width:
        sweep_some(start, stop)
        return
    middle = start + -(-(stop - start) // (2 * width)) * width
    _by_halves(start, middle, width, sweep_some, spread)
    spread(start, middle, stop)
    _by_halves(middle, stop, width, sweep_some, spread)


def sweep_columns(weight_CO: Tensor, error_CO: Tensor, upper_CC: Tensor) -> None:
    """Sweep columns whose mask is chosen, one by one, in place.

    `error_CO` has what a weight of 1 would leave, 1 / U_jj where it is pruned and 0 where not, and is given the errors.
    Kept weights get all updates from the left; pruned ones are left as they were when they were reached.
    """
    for column, (weight_O, error_O) in enumerate(zip(weight_CO.unbind(), error_CO.unbind(), strict=True), 1):
        error_O.mul_(weight_O)
        weight_CO[column:].addr_(upper_CC[column - 1, column:], error_O, alpha=-1)


def _sweep_choosing(
    weight_CO: Tensor, error_CO: Tensor, keep_CO: Tensor, upper_CC: Tensor, start: int, each: NumKept | None
) -> None:
    from pipeline.numerics import kernel

    assert each is not None
    is_dead_C = each.is_dead_I[start : start + len(weight_CO)]
    kernel.choose_and_sweep_columns(weight_CO, error_CO, keep_CO, upper_CC, is_dead_C, each.num_kept_O, each.m)


def _leaf(device: torch.device) -> tuple[int, Callable[[Tensor, Tensor, Tensor], None]]:
    """How columns are swept one by one on a device, and up to how many of them."""
    if device.type == "cuda":
        # a GPU build of torch brings triton; others do without
        from pipeline.numerics import kernel

        return kernel.MOST_COLUMNS, kernel.sweep_columns
    return _LEAF_COLUMNS, sweep_columns


def _reverse(matrix_II: Tensor) -> None:
    """Reverse the rows and the columns in place, piece by piece: of numbers in a row that is one reversal."""
    numbers = matrix_II.T.view(-1)
    for start in range(0, len(numbers) // 2, _NUMBERS_AT_ONCE):
        stop = min(start + _NUMBERS_AT_ONCE, len(numbers) // 2)
        front, back = numbers[start:stop], numbers[len(numbers) - stop : len(numbers) - start]
        reversed_front = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(reversed_front)
