"""Prune the feed-forward block of a decoder layer as one, with auxiliary activations (methods/sparsellm.py).

Weights come from sums over tokens, activations micro-batch by micro-batch: nothing of the size of all tokens is ever in
one place but what lies in Activations. Letters as in numerics/feedforward.py; K = rows of `up` and `gate`, stacked.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.activations import Activations
from pipeline.groups import Group
from pipeline.layer import LinearResult, prune_group, put_in_place, refused_where_unsolvable
from pipeline.methods.pruned import Pruned
from pipeline.methods.sparsellm import Auxiliary, MeanSquares, SparseLLM
from pipeline.models.feedforward import FeedForward
from pipeline.models.outside import Call
from pipeline.models.skeleton import LoadedLayer
from pipeline.numerics.feedforward import BlockSums, mean_squares, output_gain
from pipeline.numerics.statistics import Gram
from pipeline.observe import input_of
from pipeline.recording import bias_of, other_flow
from pipeline.replicas import Replicas, summed_by
from pipeline.sparsity import Budget, Pattern


def prune_with_block(
    layer: LoadedLayer,
    groups: list[Group],
    block: FeedForward,
    inputs: Activations,
    hidden: Callable[[int], tuple[Tensor, Call]],
    method: SparseLLM,
    patterns: dict[str, Pattern],
    replicas: Replicas,
) -> list[LinearResult]:
    """Prune every linear of a layer in place, those of the block together and the others group by group.

    `inputs` is what `recorded` kept, `hidden` gives a micro-batch of the layer's own inputs once more. Replicas share
    the tokens; each solves every system. Raises Refusal where the block computes something else than its names promise,
    or a system cannot be solved.
    """
    results, joined = [], []
    while groups:
        group = groups.pop(0)
        group.settle(layer)
        mine = [linear for linear in group.linears if linear in (block.up, block.gate, block.down)]
        # attention and a block that read one input are one group of the layer
        others = [linear for linear in group.linears if linear not in mine]
        if others:
            results += prune_group(layer, replace(group, linears=others), method, patterns)
        if mine:
            joined.append(replace(group, linears=mine))
    if len(joined) != 2 or joined[1].linears != [block.down]:
        raise other_flow(block)
    tokens = _Tokens(layer, joined[0], joined[1], inputs, block, method, replicas)
    started = time.perf_counter()
    with refused_where_unsolvable(joined[0]):
        if method.reads == "pruned":
            tokens.reread(hidden)
        pruned = _alternate(tokens, [group.budget(patterns) for group in joined], method)
    seconds = time.perf_counter() - started
    num_weights = sum(one.keep_OI.numel() for one in pruned)
    for group, one in zip(joined, pruned, strict=True):
        share = seconds * one.keep_OI.numel() / num_weights
        # what a solver has is the change of the weights of the last round, not of the layer's
        settled = replace(one, change_O=None)
        results += put_in_place(layer, group, method, group.weight_OI(layer), settled, patterns, share)
    return results


def _alternate(tokens: "_Tokens", budgets: list[Budget], method: SparseLLM) -> tuple[Pruned, Pruned]:
    """`up` with `gate`, and `down`, after all rounds."""
    outer_KH, inner_HF = tokens.first_KH, tokens.dense_HF
    outer_gram, inner_gram = tokens.outer_gram, tokens.inner_gram
    for _ in range(method.num_rounds_in(tokens.layer.index) - 1):
        pruned_outer = method.prune(outer_KH, outer_gram, budgets[0])
        pruned_inner = method.prune(inner_HF, inner_gram, budgets[1])
        sums = tokens.update(pruned_outer.weight_OI, pruned_inner.weight_OI)
        outer_KH = method.fitted(tokens.dense_KH, sums.sum_KH, outer_gram)
        inner_HF, inner_gram = method.fitted(tokens.dense_HF, sums.sum_HF, sums.inner), sums.inner
    pruned_outer = method.prune(outer_KH, outer_gram, budgets[0])
    if method.settles:
        sums = tokens.settle(pruned_outer.weight_OI)
        inner_HF, inner_gram = method.fitted(tokens.dense_HF, sums.sum_HF, sums.inner), sums.inner
    return pruned_outer, method.prune(inner_HF, inner_gram, budgets[1])


@dataclass
class _Reread:
    """What is summed over the tokens that the pruned attention gives: of the block's inputs, and to fit weights to."""

    inputs: Gram
    fits: BlockSums

    def __add__(self, other: "_Reread") -> "_Reread":
        return _Reread(self.inputs + other.inputs, self.fits + other.fits)


class _Tokens:
    """The tokens of a block with their auxiliary activations, which begin as those of the dense block."""

    def __init__(
        self,
        layer: LoadedLayer,
        outer: Group,
        inner: Group,
        inputs: Activations,
        block: FeedForward,
        method: SparseLLM,
        replicas: Replicas,
    ) -> None:
        assert isinstance(outer.statistic, Gram) and isinstance(inner.statistic, Gram)
        self.layer, self.block, self.method, self.replicas = layer, block, method, replicas
        self.outer, self.outer_gram, self.inner_gram = outer.linears, outer.statistic, inner.statistic
        self.dense_KH, self.dense_HF = outer.weight_OI(layer), inner.weight_OI(layer)
        self.first_KH = self.dense_KH
        self.bias_K = torch.cat([bias_of(layer, linear) for linear in self.outer])
        self.penalties = method.penalties(self._mean_squares())
        self.inputs, self.outputs = inputs, inputs.beside(len(self.dense_HF))
        self.auxiliary = self.outputs.beside(len(self.dense_KH))

    def reread(self, hidden: Callable[[int], tuple[Tensor, Call]]) -> None:
        """Read what the layer gives the block now that the rest is pruned; the aims stay those of the dense layer."""

        def sums_of(part: range) -> _Reread:
            sums = _Reread(Gram.zeros(self.dense_KH.shape[1], self.layer.device), self._no_sums())
            for index in part:
                _, y_TH, wanted = self._read(index)
                self.inputs.write(index, input_of(self.layer, self.outer[0], *hidden(index)))
                self._write(index, y_TH, wanted)
                x_TH = self._fetch(self.inputs, index)
                sums.inputs.observe(x_TH)
                p_TF = wanted.product_TF(self.block.activation)
                sums.fits.observe(self._stacked(wanted) - self.bias_K, x_TH, y_TH, p_TF)
            return sums

        sums = summed_by(self.replicas, sums_of)
        self.outer_gram = sums.inputs
        self.first_KH = self.method.fitted(self.dense_KH, sums.fits.sum_KH, sums.inputs)

    def update(self, weight_KH: Tensor, down_HF: Tensor) -> BlockSums:
        """New auxiliary activations for pruned weights, and the sums that the next weights are fitted to."""
        gain_HF = output_gain(down_HF, self.penalties)

        def sums_of(part: range) -> BlockSums:
            sums = self._no_sums()
            for index in part:
                x_TH, y_TH, before = self._read(index)
                p_TF, after = self.method.update(
                    before, self._given(x_TH, weight_KH), y_TH, down_HF, gain_HF, self.block.activation, self.penalties
                )
                sums.observe(self._stacked(after) - self.bias_K, x_TH, y_TH, p_TF)
                self._write(index, y_TH, after)
            return sums

        return summed_by(self.replicas, sums_of)

    def settle(self, weight_KH: Tensor) -> BlockSums:
        """The sums where every auxiliary activation is what the pruned weights give."""

        def sums_of(part: range) -> BlockSums:
            sums = self._no_sums()
            for index in part:
                x_TH, y_TH, _ = self._read(index)
                given = self._given(x_TH, weight_KH)
                sums.observe(self._stacked(given) - self.bias_K, x_TH, y_TH, given.product_TF(self.block.activation))
            return sums

        return summed_by(self.replicas, sums_of)

    def _read(self, index: int) -> tuple[Tensor, Tensor, Auxiliary]:
        """x, y and the auxiliary activations of a micro-batch; before the first update they are the dense block's."""
        x_TH = self._fetch(self.inputs, index)
        if self.auxiliary.has(index):
            return x_TH, self._fetch(self.outputs, index), self._split(self._fetch(self.auxiliary, index))
        dense = self._given(x_TH, self.dense_KH)
        return x_TH, dense.product_TF(self.block.activation) @ self.dense_HF.T, dense

    def _write(self, index: int, y_TH: Tensor, auxiliary: Auxiliary) -> None:
        self.outputs.write(index, y_TH)
        self.auxiliary.write(index, self._stacked(auxiliary))

    def _fetch(self, activations: Activations, index: int) -> Tensor:
        return activations.read(index).flatten(0, 1).to(self.layer.device, torch.float32)

    def _given(self, x_TH: Tensor, weight_KH: Tensor) -> Auxiliary:
        return self._split(torch.addmm(self.bias_K, x_TH, weight_KH.T))

    def _split(self, stacked_TK: Tensor) -> Auxiliary:
        parts = torch.split(stacked_TK, [linear.num_outputs for linear in self.outer], dim=1)
        named = dict(zip(self.outer, parts, strict=True))
        return Auxiliary(named[self.block.up], named[self.block.gate] if self.block.gate else None)

    def _stacked(self, auxiliary: Auxiliary) -> Tensor:
        if auxiliary.gate_TF is None:
            return auxiliary.up_TF
        is_up = [linear == self.block.up for linear in self.outer]
        return torch.cat([auxiliary.up_TF if up else auxiliary.gate_TF for up in is_up], dim=1)

    def _mean_squares(self) -> MeanSquares:
        """Of the dense block, without biases."""
        outer = self._split(mean_squares(self.dense_KH, self.outer_gram)[None])
        up_F, gate_F = outer.up_TF, outer.up_TF if outer.gate_TF is None else outer.gate_TF
        inner_F = self.inner_gram.sum_squares_I / self.inner_gram.num_tokens
        output_H = mean_squares(self.dense_HF, self.inner_gram)
        # a block that gives nothing has nothing to weigh
        return MeanSquares(*(float(squares.mean()) or 1.0 for squares in (up_F, gate_F, inner_F, output_H)))

    def _no_sums(self) -> BlockSums:
        return BlockSums.zeros(self.dense_KH.shape, self.dense_HF.shape, self.layer.device)
