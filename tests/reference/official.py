"""The habits of the official code that ours does not share, restated so that everything else can be compared exactly.

O = output rows, I = input columns, C = columns of one block.
"""

from typing import Literal

import torch
from torch import Tensor

from pipeline.methods.alps import ALPS
from pipeline.methods.pruned import Pruned
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.sparsellm import MeanSquares, SparseLLM
from pipeline.numerics.feedforward import Activation, Penalties, value_and_slope
from pipeline.numerics.masks import keep_highest, keep_n_of_m
from pipeline.numerics.solve import sweep, upper_factor
from pipeline.numerics.statistics import Gram
from pipeline.sparsity import Budget, NofM, Unstructured


def num_below_threshold(num_weights: int, pattern: Unstructured) -> int:
    """How many scores are <= the one at index int(num_weights x sparsity): one more than asked."""
    return pattern.num_pruned(num_weights) + 1


class OfficialSparseGPT(SparseGPT):
    """SparseGPT with the official counts per block, dead columns and scale of the Hessian."""

    num_windows: int

    def prune(self, weight_OI: Tensor, inputs: Gram, budget: Budget) -> Pruned:
        hessian_II = inputs.sum_II * (2 / self.num_windows)
        dead_I = hessian_II.diagonal() == 0
        hessian_II.diagonal()[dead_I] = 1
        upper_II, damping = upper_factor(hessian_II, self.damping)

        def choose(score_OC: Tensor, first_column: int) -> Tensor:
            parts = zip(budget.patterns, score_OC.split(list(budget.num_rows)), strict=True)
            return torch.cat([_choose_in_matrix(pattern, score_rC) for pattern, score_rC in parts])

        step = budget.group_size or self.block_columns
        swept_OI, _, _ = sweep(weight_OI.masked_fill(dead_I, 0), upper_II, choose, step)
        # a weight of a dead column is 0 even where it was not chosen
        return Pruned(swept_OI, swept_OI != 0, damping)


class OfficialALPS(ALPS):
    """ALPS with a dead column as any other: in the mean of the damping, only that on its diagonal, not going first."""

    def prune(self, weight_OI: Tensor, inputs: Gram, budget: Budget) -> Pruned:
        # a diagonal too small to count in any sum is not dead
        sum_II = inputs.sum_II.clone()
        sum_II.diagonal().clamp_min_(torch.finfo(torch.float32).tiny)
        return super().prune(weight_OI, Gram(inputs.num_tokens, inputs.sum_I, sum_II), budget)


def _choose_in_matrix(pattern: Unstructured | NofM, score_rC: Tensor) -> Tensor:
    if isinstance(pattern, NofM):
        return keep_n_of_m(score_rC, pattern.n, pattern.m)
    num_pruned = num_below_threshold(score_rC.numel(), pattern)
    return keep_highest(score_rC.reshape(1, -1), num_pruned).view_as(score_rC)


class OfficialSparseLLM(SparseLLM):
    """SparseLLM with the official counts, rounds, damping, pseudo-inverses, penalties and gradient steps."""

    num_windows: int
    settles: bool = False
    reads: Literal["pruned", "dense"] = "dense"

    def num_rounds_in(self, layer_index: int) -> int:
        return 1 if layer_index in (1, 30, 31) else self.num_rounds

    def penalties(self, dense: MeanSquares) -> Penalties:
        return Penalties(5, 5, 5, 5)

    def prune(self, weight_OI: Tensor, inputs: Gram, budget: Budget) -> Pruned:
        # the damping stays in the Hessian: one that is used again is damped again
        times = vars(inputs)["num_times_damped"] = vars(inputs).get("num_times_damped", 0) + 1
        damping = (1 + self.damping) ** times - 1
        return OfficialSparseGPT(num_windows=self.num_windows, damping=damping).prune(weight_OI, inputs, budget)

    def fitted(self, dense_OI: Tensor, wanted_OI: Tensor, inputs: Gram) -> Tensor:
        return (wanted_OI.double() @ torch.linalg.pinv(inputs.sum_II.double(), hermitian=True)).float()

    def solve_gate(
        self, s_TF: Tensor, p_TF: Tensor, z_TF: Tensor, n_TF: Tensor, activation: Activation, penalties: Penalties
    ) -> Tensor:
        for _ in range(2):
            value_TF, slope_TF = value_and_slope(activation, s_TF)
            pull_TF = penalties.gate * (s_TF - n_TF) + penalties.inner * (value_TF * z_TF - p_TF) * slope_TF * z_TF
            s_TF = s_TF - 0.01 * 2 * pull_TF
        return s_TF
