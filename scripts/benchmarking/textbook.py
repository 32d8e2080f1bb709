"""SparseGPT and Wanda as their papers run them: the whole model in memory, a statistic for every linear, two passes.

For each layer all windows are run one after another to collect what its seven linears read, these are pruned, and all
windows are run again for what the next layer reads. Written from the papers (2301.00774, algorithm 1; 2306.11695), for
the eye and not for speed. T = tokens, O = output rows, I = input columns, C = columns of a block, N = windows, L =
tokens in a window.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

_BLOCK_COLUMNS, _DAMPING = 128, 0.01


class Solver(Protocol):
    """Sums up what one linear reads, then prunes it."""

    def observe(self, x_TI: Tensor) -> None: ...

    def prune(self, weight_OI: Tensor) -> Tensor: ...


class Wanda:
    """In every row the weights with the smallest |weight| x |input| go. `kept`: None, or (n, m) for n kept of m."""

    def __init__(self, num_inputs: int, sparsity: float, kept: tuple[int, int] | None) -> None:
        self._sparsity, self._kept = sparsity, kept
        self._sum_squares_I = torch.zeros(num_inputs)

    def observe(self, x_TI: Tensor) -> None:
        self._sum_squares_I += x_TI.float().norm(dim=0).square()

    def prune(self, weight_OI: Tensor) -> Tensor:
        score_OI = weight_OI.abs() * self._sum_squares_I.sqrt()
        if self._kept:
            return weight_OI.masked_fill(~_keep_n_of_m(score_OI, *self._kept), 0)
        order_OI = score_OI.sort(dim=1, stable=True).indices
        num_pruned = int(weight_OI.shape[1] * self._sparsity)
        return weight_OI.scatter(1, order_OI[:, :num_pruned], 0)


class SparseGPT:
    """Column by column; the columns to the right make up for each loss. `kept` as above."""

    def __init__(self, num_inputs: int, sparsity: float, kept: tuple[int, int] | None) -> None:
        self._sparsity, self._kept = sparsity, kept
        self._gram_II = torch.zeros(num_inputs, num_inputs)

    def observe(self, x_TI: Tensor) -> None:
        x_TI = x_TI.float()
        self._gram_II += x_TI.T @ x_TI

    def prune(self, weight_OI: Tensor) -> Tensor:
        weight_OI = weight_OI.clone()
        dead_I = self._gram_II.diagonal() == 0
        self._gram_II.diagonal()[dead_I] = 1
        weight_OI[:, dead_I] = 0
        self._gram_II.diagonal().add_(_DAMPING * self._gram_II.diagonal().mean())
        inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(self._gram_II))
        upper_II = torch.linalg.cholesky(inverse_II, upper=True)
        for start in range(0, weight_OI.shape[1], _BLOCK_COLUMNS):
            stop = min(start + _BLOCK_COLUMNS, weight_OI.shape[1])
            weight_OC = weight_OI[:, start:stop].clone()
            error_OC = self._prune_block(weight_OC, upper_II[start:stop, start:stop])
            weight_OI[:, start:stop] = weight_OC
            weight_OI[:, stop:] -= error_OC @ upper_II[start:stop, stop:]
        return weight_OI

    def _prune_block(self, weight_OC: Tensor, upper_CC: Tensor) -> Tensor:
        """Prune a block in place; returns the errors that the columns to its right have to make up for."""
        diagonal_C = upper_CC.diagonal()
        keep_OC, error_OC = torch.ones_like(weight_OC, dtype=torch.bool), torch.zeros_like(weight_OC)
        if not self._kept:
            score_OC = (weight_OC / diagonal_C).square()
            # the papers' threshold, which takes one weight more than the share
            keep_OC = score_OC > score_OC.flatten().sort().values[int(score_OC.numel() * self._sparsity)]
        for column in range(weight_OC.shape[1]):
            if self._kept and column % self._kept[1] == 0:
                here = slice(column, column + self._kept[1])
                keep_OC[:, here] = _keep_n_of_m((weight_OC[:, here] / diagonal_C[here]).square(), *self._kept)
            error_O = weight_OC[:, column] * ~keep_OC[:, column] / diagonal_C[column]
            weight_OC[:, column:] -= error_O[:, None] * upper_CC[column, column:]
            weight_OC[:, column] *= keep_OC[:, column]
            error_OC[:, column] = error_O
        return error_OC


SOLVERS: dict[str, type[Wanda] | type[SparseGPT]] = {"wanda": Wanda, "sparsegpt": SparseGPT}


@torch.no_grad()
def prune_model(model: Any, ids_NL: Tensor, method: str, sparsity: float, kept: tuple[int, int] | None) -> None:
    """Prune the linears of a Llama in place, each layer on what the pruned layers before it give."""
    hidden, call = _catch_first_inputs(model, ids_NL)
    for layer in model.model.layers:
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        solvers: dict[str, Solver] = {
            name: SOLVERS[method](linear.in_features, sparsity, kept) for name, linear in linears.items()
        }
        handles = [linear.register_forward_pre_hook(_observing(solvers[name])) for name, linear in linears.items()]
        for window in hidden:
            layer(window, **call)
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            linear.weight.copy_(solvers.pop(name).prune(linear.weight.float()))
        hidden = [layer(window, **call) for window in hidden]


class _Caught(Exception):
    """Ends a forward before its first layer."""


def _catch_first_inputs(model: Any, ids_NL: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """What the first layer reads of each window, and what it is called with besides."""
    hidden, call = [], {}

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0])
        call.update(kwargs)
        raise _Caught

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for ids_L in ids_NL:
        try:
            model(ids_L[None], use_cache=False)
        except _Caught:
            continue
    handle.remove()
    return hidden, call


def _observing(solver: Solver) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        solver.observe(args[0].flatten(0, -2))

    return hook


def _keep_n_of_m(score_OI: Tensor, n: int, m: int) -> Tensor:
    lowest = torch.unflatten(score_OI, 1, (-1, m)).topk(m - n, largest=False).indices
    shape = (len(score_OI), score_OI.shape[1] // m, m)
    return torch.ones(shape, dtype=torch.bool).scatter_(2, lowest, False).flatten(1)
