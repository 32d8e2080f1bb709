"""The kept weights that change the output least, for a mask that is given: least squares from the Gram alone.

O = output rows, I = input columns. In every row the kept weights minimise (w' - w) H (w' - w)ᵀ, H the damped Gram. Each
row has a mask and so a system of its own, hence conjugate gradients: one product with H serves all rows.
"""

import torch
from torch import Tensor

from pipeline.numerics.solve import damped

_MAX_ITERATIONS, _TOLERANCE, _ROUNDING = 200, 3e-7, 1e-6


def refitted(weight_OI: Tensor, keep_OI: Tensor, gram_II: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
    """The weight with its kept entries refitted and the others 0, the mask, and the damping. Raises ArithmeticError."""
    hessian_II = damped(gram_II, damping)
    if not bool(hessian_II.isfinite().all()):
        raise ArithmeticError("the Gram is not finite")
    start_OI = weight_OI.masked_fill(~keep_OI, 0)
    solved_OI = solve_on_mask(start_OI, weight_OI @ hessian_II, keep_OI, hessian_II, _MAX_ITERATIONS)
    return solved_OI, keep_OI, damping


def solve_on_mask(
    start_OI: Tensor, wanted_OI: Tensor, keep_OI: Tensor, hessian_II: Tensor, max_iterations: int
) -> Tensor:
    """Rows w that are 0 off the mask with w H = `wanted_OI` on it, H positive definite.

    Conjugate gradients, preconditioned by the diagonal, from `start_OI`, which is 0 off the mask: until the residual of
    every row is below 3e-7 x that row of `wanted_OI`, in the norm of the preconditioner, or `max_iterations` are done.
    A row that is not nearer than at the start, as rounding may have it where H is nearly singular, stays as it was.
    """
    # rows of tiny weights would square to nothing
    scale_O1 = wanted_OI.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(wanted_OI.dtype).tiny)
    first_OI = start_OI / scale_O1
    residual_OI = (wanted_OI / scale_O1 - first_OI @ hessian_II).mul_(keep_OI)
    change_OI = _conjugate_gradients(residual_OI.clone(), wanted_OI / scale_O1, keep_OI, hessian_II, max_iterations)
    gain_O = ((residual_OI - 0.5 * (change_OI @ hessian_II)) * change_OI).sum(dim=1)
    return torch.where((gain_O > 0)[:, None], (first_OI + change_OI) * scale_O1, start_OI)


def _conjugate_gradients(
    residual_OI: Tensor, wanted_OI: Tensor, keep_OI: Tensor, hessian_II: Tensor, max_iterations: int
) -> Tensor:
    """The change, 0 off the mask, whose product with H is the residual on it; `residual_OI` is used up."""
    diagonal_I = hessian_II.diagonal()
    inverse_I = 1 / diagonal_I
    change_OI = torch.zeros_like(residual_OI)
    enough_O = _TOLERANCE**2 * (wanted_OI.square() * inverse_I * keep_OI).sum(dim=1)
    direction_OI = residual_OI * inverse_I
    square_O = (residual_OI * direction_OI).sum(dim=1)
    is_open_O = square_O > enough_O
    for _ in range(max_iterations):
        if not bool(is_open_O.any()):
            break
        image_OI = (direction_OI @ hessian_II).mul_(keep_OI)
        curvature_O = (direction_OI * image_OI).sum(dim=1)
        # a direction in which H is nothing but rounding leads nowhere
        is_open_O = is_open_O & (curvature_O > _ROUNDING * (direction_OI.square() * diagonal_I).sum(dim=1))
        # a row that is done stands still, so that no row depends on the others
        step_O = _ratio(square_O, curvature_O) * is_open_O
        change_OI.addcmul_(step_O[:, None], direction_OI)
        residual_OI.addcmul_(step_O[:, None], image_OI, value=-1)
        scaled_OI = residual_OI * inverse_I
        square_before_O, square_O = square_O, (residual_OI * scaled_OI).sum(dim=1)
        direction_OI.mul_(_ratio(square_O, square_before_O)[:, None]).add_(scaled_OI)
        is_open_O = is_open_O & (square_O > enough_O)
    return change_OI


def _ratio(part_O: Tensor, whole_O: Tensor) -> Tensor:
    """0 where a row is solved to the last digit."""
    return torch.where(whole_O > 0, part_O / whole_O, 0)
