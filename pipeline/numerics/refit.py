"""The kept weights that change the output least, for a mask that is given: least squares from the Gram alone.

O = output rows, I = input columns. In every row the kept weights minimise (w' - w) H (w' - w)ᵀ, H the damped Gram. Each
row has a mask and so a system of its own, hence conjugate gradients: one product with H serves all rows.
"""

import torch
from torch import Tensor

from pipeline.numerics.solve import damped_diagonal

_MAX_ITERATIONS, _TOLERANCE = 200, 3e-7


def refitted(weight_OI: Tensor, keep_OI: Tensor, gram_II: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
    """The weight with its kept entries refitted and the others 0, the mask, and the damping. Raises ArithmeticError."""
    hessian_II = gram_II.clone()
    hessian_II.diagonal().copy_(damped_diagonal(gram_II, damping))
    start_OI = weight_OI.masked_fill(~keep_OI, 0)
    solved_OI = solve_on_mask(start_OI, weight_OI @ hessian_II, keep_OI, hessian_II, _MAX_ITERATIONS, _TOLERANCE)
    if not bool(solved_OI.isfinite().all()):
        raise ArithmeticError("the Gram is not finite")
    return solved_OI, keep_OI, damping


def solve_on_mask(
    start_OI: Tensor, wanted_OI: Tensor, keep_OI: Tensor, hessian_II: Tensor, max_iterations: int, tolerance: float
) -> Tensor:
    """Rows w that are 0 off the mask with w H = `wanted_OI` on it, H positive definite.

    Conjugate gradients, preconditioned by the diagonal, from `start_OI`, which is 0 off the mask: until the residual of
    every row is below `tolerance` x that row of `wanted_OI`, in the norm of the preconditioner, or `max_iterations` are
    done. The error of no row is larger than at the start.
    """
    inverse_I = 1 / hessian_II.diagonal()
    solved_OI = start_OI.clone()
    residual_OI = (wanted_OI - solved_OI @ hessian_II).mul_(keep_OI)
    enough_O = tolerance**2 * (wanted_OI.square() * inverse_I * keep_OI).sum(dim=1)
    direction_OI = residual_OI * inverse_I
    square_O = (residual_OI * direction_OI).sum(dim=1)
    for _ in range(max_iterations):
        # a row that is solved stands still, so that no row depends on the others
        is_open_O = square_O > enough_O
        if not bool(is_open_O.any()):
            break
        image_OI = (direction_OI @ hessian_II).mul_(keep_OI)
        step_O = _ratio(square_O, (direction_OI * image_OI).sum(dim=1)) * is_open_O
        solved_OI.addcmul_(step_O[:, None], direction_OI)
        residual_OI.addcmul_(step_O[:, None], image_OI, value=-1)
        scaled_OI = residual_OI * inverse_I
        square_before_O, square_O = square_O, (residual_OI * scaled_OI).sum(dim=1)
        direction_OI.mul_(_ratio(square_O, square_before_O)[:, None]).add_(scaled_OI)
    return solved_OI


def _ratio(part_O: Tensor, whole_O: Tensor) -> Tensor:
    """0 where a row is solved to the last digit."""
    return torch.where(whole_O > 0, part_O / whole_O, 0)
