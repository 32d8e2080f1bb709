"""ALPS: look for the mask and the weights of a matrix together, then refine the weights (Meng et al., 2406.07831).

O = output rows of all matrices of a group, stacked; r = rows of one matrix; I = input columns. Everything is in units
in which the damped Gram H has the diagonal 1: C = N⁻¹ H N⁻¹ and W N in place of W, with N the norms of the columns.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.methods.pruned import Pruned
from pipeline.numerics.refit import solve_on_mask
from pipeline.numerics.solve import damped_diagonal
from pipeline.numerics.statistics import Gram
from pipeline.settings import Settings
from pipeline.sparsity import Budget

# The schedule of the official code: every so many iterations the mask is compared with the one before, and from a
# certain iteration on a mask that hardly moves is taken for settled.
_LOOK_EVERY, _SETTLED_FROM, _SETTLED_SHARE = 3, 30, 3e-4
# Where C is singular, only rho bounds the inverse of C + rho; below this, rounding would choose the mask.
_LOWEST_RHO, _HIGHEST_RHO = 1e-4, 1e6


class ALPS(Settings):
    """`damping` is relative to the mean diagonal of the Gram; `rho`, where the penalty starts, to the diagonal of C.

    ADMM for |(B - W) X|² where B = D and D is within the counts (section 3.2, algorithm 1): one eigendecomposition in
    float64 for a group, but a rho and an end for each of its matrices. Then `num_refit_steps` of conjugate gradients on
    the mask (section 3.3, algorithm 2). Columns that never saw an input give up their weights first.

    Holds beside the Gram: C and, while it decomposes C, about four I x I of float64, later one of float32; and about
    ten tensors of the size of the largest matrix. An iteration is two products of r x I with I x I and one choice.
    """

    name: Literal["alps"] = "alps"
    statistic: ClassVar[type[Gram]] = Gram
    prunes_blocks: ClassVar[bool] = False
    goes_by_rows: ClassVar[bool] = False
    best_granularity: ClassVar[Literal["layer", "linear"]] = "linear"
    damping: float = Field(0.01, ge=0, le=1)
    rho: float = Field(0.1, ge=_LOWEST_RHO, le=_HIGHEST_RHO)
    max_iterations: int = Field(300, ge=1)
    num_refit_steps: int = Field(10, ge=0)

    def prune(self, weight_OI: Tensor, inputs: Gram, budget: Budget) -> Pruned:
        correlation_II, norm_I = _normalised(inputs.sum_II, self.damping)
        solve = _shifted_solver(correlation_II)
        dead_I = inputs.sum_II.diagonal() == 0
        solved, keeps = [], []
        for own_budget, weight_rI in budget.alone(weight_OI):
            dense_rI = weight_rI * norm_I
            wanted_rI = dense_rI @ correlation_II
            found_rI, keep_rI = self._search(dense_rI, wanted_rI, solve, partial(_keep_largest, own_budget, dead_I))
            start_rI = _better_rows(found_rI * keep_rI, dense_rI * keep_rI, dense_rI, correlation_II)
            solved_rI = solve_on_mask(start_rI, wanted_rI, keep_rI, correlation_II, self.num_refit_steps)
            solved.append(solved_rI / norm_I)
            keeps.append(keep_rI)
        return Pruned(torch.cat(solved), torch.cat(keeps), self.damping)

    def _search(
        self,
        dense_rI: Tensor,
        wanted_rI: Tensor,
        solve: Callable[[Tensor, float], Tensor],
        choose: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The weights B, not yet 0 anywhere, and the mask of those of them that are to stay."""
        rho, has_grown = self.rho, False
        seen_rI = choose(dense_rI)
        num_kept = max(1, int(seen_rI.sum()))
        first_rI = dense_rI * seen_rI
        sparse_rI, dual_rI = first_rI, torch.zeros_like(dense_rI)
        for iteration in range(self.max_iterations):
            found_rI = solve(wanted_rI - dual_rI + rho * sparse_rI, rho)
            shifted_rI = found_rI + dual_rI / rho
            keep_rI = choose(shifted_rI)
            sparse_rI = shifted_rI * keep_rI
            # V + rho (B - D), where D is B + V / rho on the mask and 0 off it
            dual_rI = rho * (shifted_rI - sparse_rI)
            if (iteration + 1) % _LOOK_EVERY:
                continue
            share = int((keep_rI != seen_rI).sum()) / num_kept
            seen_rI = keep_rI
            if (share == 0 and has_grown) or (share < _SETTLED_SHARE and iteration >= _SETTLED_FROM):
                break
            rho, has_grown = _next_rho(rho, share, has_grown)
            if share > 0 and not has_grown:
                # rho was too high for the mask to leave the one it began with
                sparse_rI, dual_rI = first_rI, torch.zeros_like(dense_rI)
        return found_rI, choose(found_rI)


def _keep_largest(budget: Budget, dead_I: Tensor, value_rI: Tensor) -> Tensor:
    return budget.keep_per_matrix(value_rI.abs().masked_fill(dead_I, -1))


def _next_rho(rho: float, share: float, has_grown: bool) -> tuple[float, bool]:
    """The penalty after a look at which `share` of the mask had changed, and whether it has ever been raised."""
    if share > 0.1:
        factor = 1.3
    elif share > 0.005:
        factor = 1.2
    else:
        factor = 1.1 if has_grown else 0.2
    return min(max(factor * rho, _LOWEST_RHO), _HIGHEST_RHO), factor > 1


def _normalised(gram_II: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """C and the norms of the columns, whose mean square is 1: a power of two in the Gram changes no bit of either."""
    diagonal_I = damped_diagonal(gram_II, damping)
    norm_I = (diagonal_I / diagonal_I.mean()).sqrt()
    correlation_II = gram_II / diagonal_I.mean()
    correlation_II.div_(norm_I).div_(norm_I[:, None]).fill_diagonal_(1)
    if not bool(correlation_II.isfinite().all()):
        raise ArithmeticError("the Gram is not finite")
    return correlation_II, norm_I


def _shifted_solver(correlation_II: Tensor) -> Callable[[Tensor, float], Tensor]:
    """A function that gives Y (C + rho)⁻¹ as Y Q (λ + rho)⁻¹ Qᵀ, with the eigenvalues λ and eigenvectors Q of C.

    Two products where an inverse would take one; but nothing is built anew when rho changes, less is held, and it is
    as accurate as an inverse that was built in float64.
    """
    value_I, vector_II = torch.linalg.eigh(correlation_II.double())
    # rounding can take the lowest eigenvalues of a Gram below 0
    value_I, vector_II = value_I.clamp_min(0).float(), vector_II.float()
    return lambda wanted_rI, rho: ((wanted_rI @ vector_II) / (value_I + rho)) @ vector_II.T


def _better_rows(first_rI: Tensor, second_rI: Tensor, dense_rI: Tensor, correlation_II: Tensor) -> Tensor:
    """Of each row the one with the smaller output error."""
    changes = (first_rI - dense_rI, second_rI - dense_rI)
    first_r, second_r = (((change_rI @ correlation_II) * change_rI).sum(dim=1) for change_rI in changes)
    return torch.where((first_r <= second_r)[:, None], first_rI, second_rI)
