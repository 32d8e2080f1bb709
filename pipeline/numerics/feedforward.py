"""The feed-forward block with auxiliary activations (SparseLLM, 2402.17946, eq. 6): each of them solved for in turn.

T = tokens, H = columns of the block's input and output, F = inner columns. With z for the output of `up`, s for that
of `gate`, p for the input of `down` and y for what the dense block gave, without the bias of `down`, the objective is

    up |z - m|^2 + gate |s - n|^2 + inner |p - f(s) z|^2 + output |y - p Wᵀ|^2        m, n: what the weights give

and where there is no gate, f(s) z is relu(z). Tokens are independent of each other, so they come in any portions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.numerics.statistics import Gram

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Penalties:
    """The weights of the four terms, in the paper alpha, alpha, gamma and beta."""

    up: float
    gate: float
    inner: float
    output: float


@dataclass
class BlockSums:
    """All that the weights are fitted to: a sum over tokens. K = rows of `up` and `gate` together."""

    sum_KH: Tensor
    sum_HF: Tensor
    inner: Gram

    @classmethod
    def zeros(cls, shape_KH: torch.Size, shape_HF: torch.Size, device: torch.device) -> BlockSums:
        zeros_KH, zeros_HF = (torch.zeros(shape, device=device) for shape in (shape_KH, shape_HF))
        return cls(zeros_KH, zeros_HF, Gram.zeros(shape_HF[1], device))

    def observe(self, wanted_TK: Tensor, x_TH: Tensor, target_TH: Tensor, p_TF: Tensor) -> None:
        self.sum_KH.addmm_(wanted_TK.T, x_TH)
        self.sum_HF.addmm_(target_TH.T, p_TF)
        self.inner.observe(p_TF)

    def __add__(self, other: BlockSums) -> BlockSums:
        return BlockSums(self.sum_KH + other.sum_KH, self.sum_HF + other.sum_HF, self.inner + other.inner)


def mean_squares(weight_OI: Tensor, inputs: Gram) -> Tensor:
    """The mean square over tokens of each output [O]."""
    return (weight_OI @ inputs.sum_II * weight_OI).sum(dim=1) / inputs.num_tokens


def output_gain(down_HF: Tensor, penalties: Penalties) -> Tensor:
    """How p answers to an error of the output [H, F]: output Wᵀ (output W Wᵀ + inner I)⁻¹, transposed.

    The paper inverts (output Wᵀ W + inner I), which is F x F; this is the same by the push-through identity.
    Raises ArithmeticError where rounding leaves nothing of the second.
    """
    square_HH = penalties.output * (down_HF @ down_HF.T)
    square_HH.diagonal().add_(penalties.inner)
    lower_HH, failed = torch.linalg.cholesky_ex(square_HH)
    if failed:
        raise ArithmeticError("the weights of its block weigh too much in its objective")
    return torch.cholesky_solve(penalties.output * down_HF, lower_HH)


def solve_inner(product_TF: Tensor, y_TH: Tensor, down_HF: Tensor, gain_HF: Tensor) -> Tensor:
    """p, the minimiser of inner |p - product|^2 + output |y - p Wᵀ|^2."""
    return torch.addmm(product_TF, y_TH - product_TF @ down_HF.T, gain_HF)


def solve_up(p_TF: Tensor, opening_TF: Tensor, m_TF: Tensor, penalties: Penalties) -> Tensor:
    """z, the minimiser of up |z - m|^2 + inner |p - f(s) z|^2; `opening` is f(s)."""
    weighted_TF = penalties.up * m_TF + penalties.inner * opening_TF * p_TF
    return weighted_TF / (penalties.up + penalties.inner * opening_TF.square())


def solve_relu(p_TF: Tensor, m_TF: Tensor, penalties: Penalties) -> Tensor:
    """z, the minimiser of up |z - m|^2 + inner |p - relu(z)|^2: the better of the best z >= 0 and the best z <= 0."""
    above_TF = (penalties.up * m_TF + penalties.inner * p_TF) / (penalties.up + penalties.inner)
    above_TF.clamp_(min=0)
    below_TF = m_TF.clamp(max=0)
    cost_above_TF = penalties.up * (above_TF - m_TF).square() + penalties.inner * (p_TF - above_TF).square()
    cost_below_TF = penalties.up * (below_TF - m_TF).square() + penalties.inner * p_TF.square()
    return torch.where(cost_above_TF < cost_below_TF, above_TF, below_TF)


def step_gate(
    s_TF: Tensor, p_TF: Tensor, z_TF: Tensor, n_TF: Tensor, activation: Activation, penalties: Penalties, rate: float
) -> Tensor:
    """s after one Gauss-Newton step, times `rate`, on gate |s - n|^2 + inner |p - f(s) z|^2.

    Every s has a cost of its own, and keeps its place where the step would raise it. Plain gradient steps, as in the
    paper's code, diverge where inner z^2 f'(s)^2 exceeds 1 / rate.
    """
    opening_TF, slope_TF = value_and_slope(activation, s_TF)
    error_TF = opening_TF * z_TF - p_TF
    jacobian_TF = slope_TF * z_TF
    gradient_TF = penalties.gate * (s_TF - n_TF) + penalties.inner * error_TF * jacobian_TF
    stepped_TF = s_TF - rate * gradient_TF / (penalties.gate + penalties.inner * jacobian_TF.square())
    before_TF = penalties.gate * (s_TF - n_TF).square() + penalties.inner * error_TF.square()
    error_TF = activation(stepped_TF) * z_TF - p_TF
    after_TF = penalties.gate * (stepped_TF - n_TF).square() + penalties.inner * error_TF.square()
    return torch.where(after_TF < before_TF, stepped_TF, s_TF)


def value_and_slope(activation: Activation, s_TF: Tensor) -> tuple[Tensor, Tensor]:
    """f(s) and f'(s) of an elementwise function."""
    with torch.enable_grad():
        s_TF = s_TF.detach().requires_grad_()
        value_TF = activation(s_TF)
        (slope_TF,) = torch.autograd.grad(value_TF.sum(), s_TF)
    return value_TF.detach(), slope_TF
