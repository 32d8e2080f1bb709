"""SparseLLM: prune the linears of a feed-forward block as one, joined by auxiliary activations (2402.17946).

Everything else in a layer is pruned by SparseGPT. Weights and auxiliary activations are found in turn, each with the
others held: the weights from sums over tokens, the activations token by token. O = output rows, I = input columns; the
other letters are those of numerics/feedforward.py.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.methods.sparsegpt import SparseGPT
from pipeline.numerics.feedforward import (
    Activation,
    Penalties,
    solve_inner,
    solve_relu,
    solve_up,
    step_gate,
)
from pipeline.numerics.solve import factor
from pipeline.numerics.statistics import Gram


@dataclass(frozen=True)
class Auxiliary:
    """z and s of some tokens, or what the weights give in their place; `gate` is missing where the block has none."""

    up_TF: Tensor
    gate_TF: Tensor | None = None

    def product_TF(self, activation: Activation) -> Tensor:
        """What `down` reads."""
        return activation(self.up_TF) if self.gate_TF is None else activation(self.gate_TF) * self.up_TF


@dataclass(frozen=True)
class MeanSquares:
    """Of the outputs of `up`, `gate` and the block and of the input of `down`, in the dense block."""

    up: float
    gate: float
    inner: float
    output: float


class SparseLLM(SparseGPT):
    """`alpha`, `beta` and `gamma` weigh the terms of the objective, relative to the mean squares of what they weigh.

    Only their ratios matter; in the paper's code they are equal. `gate_steps` steps of `gate_rate` are taken where
    there is no closed form. `settles`: at last `down` is fitted to what the pruned `up` and `gate` really give it.
    `reads`: the block is fitted on what the pruned or the dense attention of its layer gives it; what it should give is
    that of the dense layer either way. The paper's code has `dense`.
    """

    name: Literal["sparsellm"] = "sparsellm"  # type: ignore[assignment]
    prunes_blocks: ClassVar[bool] = True
    num_rounds: int = Field(4, ge=1)
    alpha: float = Field(1.0, ge=1e-6, le=1e6)
    beta: float = Field(1.0, ge=1e-6, le=1e6)
    gamma: float = Field(1.0, ge=1e-6, le=1e6)
    gate_steps: int = Field(2, ge=1)
    gate_rate: float = Field(1.0, gt=0, le=1)
    settles: bool = True
    reads: Literal["pruned", "dense"] = "pruned"

    def num_rounds_in(self, layer_index: int) -> int:
        return self.num_rounds

    def penalties(self, dense: MeanSquares) -> Penalties:
        """Relative ones: neither a rescaled input nor weights that trade a factor change what is pruned."""
        return Penalties(
            up=self.alpha / dense.up,
            gate=self.alpha / dense.gate,
            inner=self.gamma / dense.inner,
            output=self.beta / dense.output,
        )

    def fitted(self, dense_OI: Tensor, wanted_OI: Tensor, inputs: Gram) -> Tensor:
        """The weight W that minimises |t - W x|^2 + damping |W - dense|^2, where `wanted` is the sum of t xᵀ.

        The limit of little damping is the paper's t X⁺. The damping holds back the change, so that t = dense x gives
        the dense weight itself, and is that of the true Gram each time. Raises ArithmeticError if that is not finite.
        """
        lower_II, _ = factor(inputs.sum_II, self.damping)
        missing_OI = wanted_OI - dense_OI @ inputs.sum_II
        return dense_OI + torch.cholesky_solve(missing_OI.T, lower_II).T

    def update(
        self,
        auxiliary: Auxiliary,
        given: Auxiliary,
        y_TH: Tensor,
        down_HF: Tensor,
        gain_HF: Tensor,
        activation: Activation,
        penalties: Penalties,
    ) -> tuple[Tensor, Auxiliary]:
        """p, and then the new z and s, of some tokens; `given` is what the pruned `up` and `gate` give."""
        p_TF = solve_inner(auxiliary.product_TF(activation), y_TH, down_HF, gain_HF)
        if auxiliary.gate_TF is None or given.gate_TF is None:
            return p_TF, Auxiliary(solve_relu(p_TF, given.up_TF, penalties))
        z_TF = solve_up(p_TF, activation(auxiliary.gate_TF), given.up_TF, penalties)
        s_TF = self.solve_gate(auxiliary.gate_TF, p_TF, z_TF, given.gate_TF, activation, penalties)
        return p_TF, Auxiliary(z_TF, s_TF)

    def solve_gate(
        self, s_TF: Tensor, p_TF: Tensor, z_TF: Tensor, n_TF: Tensor, activation: Activation, penalties: Penalties
    ) -> Tensor:
        for _ in range(self.gate_steps):
            s_TF = step_gate(s_TF, p_TF, z_TF, n_TF, activation, penalties, self.gate_rate)
        return s_TF
