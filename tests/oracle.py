"""Slow float64 references, written from the papers and nothing else, to be trusted by eye.

O = output rows, I = input columns, C = some consecutive columns. Masks are boolean, True is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class DSnoTRule:
    """When a row of DSnoT ends, and the power of the variance."""

    max_cycles: int
    update_threshold: float
    keep_sign: bool
    variance_power: float


def floor_share(num_weights: int, sparsity: str) -> int:
    """floor(num_weights x sparsity) with the sparsity read as the decimal it is written as."""
    return int(Fraction(sparsity) * num_weights)


def keep_by_stable_sort(score: Array, num_pruned: int) -> Mask:
    """All but the `num_pruned` lowest of a flat list; of equal ones the first in the list go first."""
    keep = np.ones(score.size, dtype=bool)
    keep[np.argsort(score.reshape(-1), kind="stable")[:num_pruned]] = False
    return keep.reshape(score.shape)


def keep_n_of_m(score_OI: Array, n: int, m: int) -> Mask:
    """The n highest of every m consecutive columns of every row."""
    keep_OI = np.empty(score_OI.shape, dtype=bool)
    for row in range(score_OI.shape[0]):
        for first in range(0, score_OI.shape[1], m):
            group = slice(first, first + m)
            keep_OI[row, group] = keep_by_stable_sort(score_OI[row, group], m - n)
    return keep_OI


def keep_per_matrix(score_OI: Array, sparsity: str) -> Mask:
    """The lowest scores of the whole matrix go."""
    return keep_by_stable_sort(score_OI, floor_share(score_OI.size, sparsity))


def keep_per_row(score_OI: Array, sparsity: str) -> Mask:
    """The lowest scores of every output row go."""
    num_pruned = floor_share(score_OI.shape[1], sparsity)
    return np.stack([keep_by_stable_sort(score_I, num_pruned) for score_I in score_OI])


def wanda_score(weight_OI: Array, x_TI: Array) -> Array:
    """|w_ij| |x_j| (2306.11695, equation 1)."""
    return np.abs(weight_OI) * np.linalg.norm(x_TI, axis=0)


def ria_score(weight_OI: Array, x_TI: Array, power: float) -> Array:
    """|w_ij| as a share of its column and of its row, times |x_j| ** power (Zhang et al., ICLR 2024)."""
    size_OI = np.abs(weight_OI)
    share_OI = np.zeros_like(size_OI)
    for row, column in zip(*np.nonzero(size_OI), strict=True):
        size = size_OI[row, column]
        share_OI[row, column] = size / size_OI[:, column].sum() + size / size_OI[row].sum()
    return share_OI * np.linalg.norm(x_TI, axis=0) ** power


def dsnot(weight_OI: Array, x_TI: Array, keep_OI: Mask, group: int, rule: DSnoTRule) -> Mask:
    """The mask of DSnoT (2310.08915), row by row and swap by swap: of all masks on its way, that of the least error."""
    expected_I = x_TI.mean(axis=0) * 2048
    variance_I = x_TI.var(axis=0) ** rule.variance_power
    score_OI = wanda_score(weight_OI, x_TI)
    rows = zip(weight_OI * expected_I, score_OI, keep_OI, strict=True)
    return np.stack([_dsnot_row(d_I, variance_I, score_I, keep_I, group, rule) for d_I, score_I, keep_I in rows])


def _dsnot_row(d_I: Array, variance_I: Array, score_I: Array, keep_I: Mask, group: int, rule: DSnoTRule) -> Mask:
    columns = range(len(d_I))
    error = best_error = float(d_I[~keep_I].sum())
    keep_I, best_I, untouched = keep_I.copy(), keep_I, set(columns)
    for _ in range(rule.max_cycles):
        sign = np.sign(error)
        grow = [j for j in columns if j in untouched and not keep_I[j] and sign * d_I[j] > 0]
        go = [j for j in columns if j in untouched and keep_I[j] and sign * d_I[j] < 0]
        # what grows needs something of its own group to go
        grow = [j for j in grow if any(other // group == j // group for other in go)]
        if abs(error) <= rule.update_threshold or not grow:
            break
        grown = max(grow, key=lambda j: sign * d_I[j] / variance_I[j])
        gone = min((j for j in go if j // group == grown // group), key=lambda j: score_I[j])
        after = error + d_I[gone] - d_I[grown]
        if rule.keep_sign and np.sign(after) != sign:
            break
        untouched -= {grown, gone}
        keep_I[grown], keep_I[gone], error = True, False, after
        if abs(error) < abs(best_error):
            best_I, best_error = keep_I.copy(), error
    return best_I


def sparsegpt_score(weight_OI: Array, gram_II: Array, damping: float) -> Array:
    """What SparseGPT would score each weight if nothing were pruned before it: w² / U_jj², inverse(H) = Uᵀ U."""
    upper_II = np.linalg.cholesky(np.linalg.inv(damped(gram_II, damping))).T
    return np.where(gram_II.diagonal() == 0, -1, (weight_OI / upper_II.diagonal()) ** 2)


def damped(gram_II: Array, damping: float) -> Array:
    """The Gram plus `damping` x the mean diagonal of its live columns; a dead column gets that mean as its diagonal."""
    diagonal_I = gram_II.diagonal()
    mean = diagonal_I[diagonal_I > 0].mean()
    return gram_II + np.diag(np.where(diagonal_I == 0, mean, 0) + damping * mean)


def output_error(change_OI: Array, hessian_II: Array) -> float:
    """The sum over rows of d H dᵀ, for the change d of a row."""
    return float(np.trace(change_OI @ hessian_II @ change_OI.T))


def refit(weight_OI: Array, keep_OI: Mask, hessian_II: Array) -> Array:
    """The kept weights that minimise the output error of each row, by its normal equations."""
    refitted_OI = np.zeros_like(weight_OI)
    for row, keep_I in enumerate(keep_OI):
        wanted_I = hessian_II @ weight_OI[row]
        refitted_OI[row, keep_I] = np.linalg.solve(hessian_II[np.ix_(keep_I, keep_I)], wanted_I[keep_I])
    return refitted_OI


def sparsegpt_unstructured(
    weight_OI: Array, gram_II: Array, damping: float, sparsity: str, block: int
) -> tuple[Array, Mask]:
    """SparseGPT where each block of columns gives up its cumulative share of the matrix's exact count."""
    num_rows, num_columns = weight_OI.shape
    total = floor_share(num_rows * num_columns, sparsity)

    def choose(cost_OC: Array, first: int) -> Mask:
        before = total * first // num_columns
        after = total * (first + cost_OC.shape[1]) // num_columns
        return keep_by_stable_sort(cost_OC, after - before)

    return _sparsegpt(weight_OI, gram_II, damping, choose, block)


def sparsegpt_n_of_m(weight_OI: Array, gram_II: Array, damping: float, n: int, m: int) -> tuple[Array, Mask]:
    """SparseGPT where every m columns keep n of each row."""
    return _sparsegpt(weight_OI, gram_II, damping, lambda cost_OC, first: keep_n_of_m(cost_OC, n, m), m)


def _sparsegpt(
    weight_OI: Array, gram_II: Array, damping: float, choose: Callable[[Array, int], Mask], block: int
) -> tuple[Array, Mask]:
    """Optimal brain surgeon on the columns from left to right (2301.00774, equations 2, 3 and 7).

    A column that is passed is frozen. What is right of it makes up for its loss by the inverse Hessian of the columns
    that are not passed yet, which is computed anew for every column.
    """
    num_columns = weight_OI.shape[1]
    inverses = _inverses_of_the_rest(damped(gram_II, damping).tobytes(), num_columns)
    cost_of_one_I = np.array([1 / inverse_I[0] for inverse_I in inverses])
    weight_OI = weight_OI.copy()
    keep_OI = np.ones(weight_OI.shape, dtype=bool)
    for column, inverse_I in enumerate(inverses):
        if column % block == 0:
            some = slice(column, min(column + block, num_columns))
            cost_OC = weight_OI[:, some] ** 2 * cost_of_one_I[some]
            # what never sees an input costs less than anything else
            cost_OC[:, gram_II.diagonal()[some] == 0] = -1
            keep_OI[:, some] = choose(cost_OC, column)
        removed_O = np.where(keep_OI[:, column], 0, weight_OI[:, column])
        weight_OI[:, column:] -= np.outer(removed_O / inverse_I[0], inverse_I)
        weight_OI[~keep_OI[:, column], column] = 0
    return weight_OI, keep_OI


@cache
def _inverses_of_the_rest(hessian: bytes, num_columns: int) -> list[Array]:
    """For each column the first row of the inverse of H without the columns before it. Bytes, to be remembered by."""
    hessian_II = np.frombuffer(hessian).reshape(num_columns, num_columns)
    return [np.linalg.inv(hessian_II[column:, column:])[0] for column in range(num_columns)]


def alps(
    weight_OI: Array, gram_II: Array, damping: float, rho: float, max_iterations: int, choose: Callable[[Array], Mask]
) -> tuple[Array, Mask]:
    """ALPS in plain words: ADMM with an inverse per step (2406.07831, section 3.2), then conjugate gradients (3.3).

    `choose` gives the mask of the highest scores. B is to fit, D is to be sparse, and the mask is that of B in the end.
    What never sees an input goes first.
    """
    hessian_II = damped(gram_II, damping)
    norm_I = np.sqrt(hessian_II.diagonal())
    hessian_II, dense_OI = hessian_II / np.outer(norm_I, norm_I), weight_OI * norm_I
    dead_I = gram_II.diagonal() == 0

    def largest(value_OI: Array) -> Mask:
        return choose(np.where(dead_I, -1, np.abs(value_OI)))

    sparse_OI, dual_OI = dense_OI * largest(dense_OI), np.zeros_like(dense_OI)
    seen_OI, has_grown = largest(dense_OI), False
    for iteration in range(1, max_iterations + 1):
        right_OI = dense_OI @ hessian_II - dual_OI + rho * sparse_OI
        fitted_OI = right_OI @ np.linalg.inv(hessian_II + rho * np.eye(len(hessian_II)))
        keep_OI = largest(fitted_OI + dual_OI / rho)
        sparse_OI = (fitted_OI + dual_OI / rho) * keep_OI
        dual_OI = dual_OI + rho * (fitted_OI - sparse_OI)
        if iteration % 3 == 0:
            share = (keep_OI != seen_OI).sum() / keep_OI.sum()
            seen_OI = keep_OI
            if (share == 0 and has_grown) or (share < 3e-4 and iteration > 30):
                break
            if share > 0.005 or has_grown:
                rho, has_grown = min(rho * (1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1), 1e6), True
            else:
                rho = max(rho / 5, 1e-4)
                if share > 0:
                    sparse_OI, dual_OI = dense_OI * largest(dense_OI), np.zeros_like(dense_OI)
    keep_OI = largest(fitted_OI)
    steps = [_conjugate_gradients(*row, hessian_II, 10) for row in zip(fitted_OI, dense_OI, keep_OI, strict=True)]
    return np.stack(steps) / norm_I, keep_OI


def _conjugate_gradients(start_I: Array, dense_I: Array, keep_I: Mask, hessian_II: Array, num_steps: int) -> Array:
    """Steps towards the kept weights of one row that give the outputs of the dense row, the others being 0."""
    matrix_KK = hessian_II[np.ix_(keep_I, keep_I)]
    solved_K = start_I[keep_I]
    residual_K = (hessian_II @ dense_I)[keep_I] - matrix_KK @ solved_K
    direction_K = residual_K
    for _ in range(num_steps):
        if not residual_K.any():
            break
        step = residual_K @ residual_K / (direction_K @ matrix_KK @ direction_K)
        solved_K = solved_K + step * direction_K
        before_K, residual_K = residual_K, residual_K - step * (matrix_KK @ direction_K)
        direction_K = residual_K + residual_K @ residual_K / (before_K @ before_K) * direction_K
    solved_I = np.zeros_like(start_I)
    solved_I[keep_I] = solved_K
    return solved_I


def sparsellm_two_rounds(
    x_TH: Array, weights: list[Array], biases: list[Array], sparsity: str, damping: float, steps: int, settles: bool
) -> list[Array]:
    """Up, gate and down (or up and down, with ReLU) after two rounds of SparseLLM (2402.17946, section 3.3).

    Everything is solved as it is written, with all tokens at once; the penalties are one over the mean squares.
    """
    *outer, down_HF = weights
    z, s = [x_TH @ weight.T + bias for weight, bias in zip(outer, biases, strict=True)] + [None] * (2 - len(outer))
    p = _product(z, s)
    y = p @ down_HF.T
    squares = [np.mean((x_TH @ weight.T) ** 2) for weight in outer]
    pruned = [_prune_half(weight, x_TH, damping, sparsity) for weight in outer]
    pruned_down = _prune_half(down_HF, p, damping, sparsity)
    given = [x_TH @ weight.T + bias for weight, bias in zip(pruned, biases, strict=True)]
    on_p, on_y = 1 / np.mean(p**2), 1 / np.mean(y**2)
    system = on_y * pruned_down.T @ pruned_down + on_p * np.eye(p.shape[1])
    p = np.linalg.solve(system, (on_y * y @ pruned_down + on_p * p).T).T
    z, s = _new_auxiliary(z, s, p, given, [1 / square for square in squares], on_p, steps)
    wanted = [aux - bias for aux, bias in zip((z, s), biases, strict=False)]
    refitted = [_refit_inputs(weight, aim, x_TH, damping) for weight, aim in zip(outer, wanted, strict=True)]
    pruned = [_prune_half(weight, x_TH, damping, sparsity) for weight in refitted]
    if settles:
        p = _product(*[x_TH @ weight.T + bias for weight, bias in zip(pruned, biases, strict=True)])
    return [*pruned, _prune_half(_refit_inputs(down_HF, y, p, damping), p, damping, sparsity)]


def _product(z: Array, s: Array | None = None) -> Array:
    return np.maximum(z, 0) if s is None else _silu(s) * z


def _silu(s: Array) -> Array:
    return s / (1 + np.exp(-s))


def _prune_half(weight_OI: Array, x_TI: Array, damping: float, sparsity: str) -> Array:
    return sparsegpt_unstructured(weight_OI, x_TI.T @ x_TI, damping, sparsity, 128)[0]


def _refit_inputs(dense_OI: Array, wanted_TO: Array, x_TI: Array, damping: float) -> Array:
    """The minimiser of |t - W x|^2 + damping |W - dense|^2, by its normal equations."""
    gram_II = x_TI.T @ x_TI
    ridge_II = damped(gram_II, damping) - gram_II
    return np.linalg.solve(gram_II + ridge_II, (wanted_TO.T @ x_TI + dense_OI @ ridge_II).T).T


def _new_auxiliary(
    z: Array, s: Array | None, p: Array, given: list[Array], on_outer: list[float], on_p: float, steps: int
) -> tuple[Array, Array | None]:
    if s is None:
        branches = [np.maximum((on_outer[0] * given[0] + on_p * p) / (on_outer[0] + on_p), 0), np.minimum(given[0], 0)]
        costs = [on_outer[0] * (b - given[0]) ** 2 + on_p * (p - np.maximum(b, 0)) ** 2 for b in branches]
        return np.where(costs[0] < costs[1], *branches), None
    opening = _silu(s)
    z = (on_outer[0] * given[0] + on_p * opening * p) / (on_outer[0] + on_p * opening**2)
    for _ in range(steps):
        sigmoid = 1 / (1 + np.exp(-s))
        jacobian = sigmoid * (1 + s * (1 - sigmoid)) * z

        def cost(s: Array, z: Array = z) -> Array:
            return on_outer[1] * (s - given[1]) ** 2 + on_p * (p - _silu(s) * z) ** 2

        pull = on_outer[1] * (s - given[1]) + on_p * (_silu(s) * z - p) * jacobian
        stepped = s - pull / (on_outer[1] + on_p * jacobian**2)
        s = np.where(cost(stepped) < cost(s), stepped, s)
    return z, s
