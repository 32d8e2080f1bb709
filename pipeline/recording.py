"""Record what the feed-forward block of a decoder layer reads, while the layer is observed.

Letters as in numerics/feedforward.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count, repeat

import torch
from torch import Tensor, nn

from pipeline.activations import Activations
from pipeline.errors import Refusal
from pipeline.methods.sparsellm import Auxiliary
from pipeline.models.feedforward import FeedForward
from pipeline.models.skeleton import Linear, LoadedLayer


@contextmanager
def recorded(layer: LoadedLayer, block: FeedForward, hidden: Activations) -> Iterator[Activations]:
    """What the block reads, kept while the layer is observed micro-batch by micro-batch within the context.

    Raises Refusal where `down` does not read what the names of the block promise.
    """
    inputs, indices, is_first = hidden.beside(block.up.num_inputs), count(), chain([True], repeat(False))

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.write(next(indices), args[0])

    def check(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if next(is_first):
            _check_flow(layer, block, inputs.read(0).flatten(0, 1), args[0].flatten(0, -2))

    hooks = {block.up: keep, block.down: check}
    handles = [layer.module.get_submodule(at.name).register_forward_pre_hook(hook) for at, hook in hooks.items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def bias_of(layer: LoadedLayer, linear: Linear) -> Tensor:
    """The bias of a linear in float32, zeros where it has none."""
    bias = layer.module.get_submodule(linear.name).bias
    return bias.float() if isinstance(bias, Tensor) else torch.zeros(linear.num_outputs, device=layer.device)


def other_flow(block: FeedForward) -> Refusal:
    """What is said of a block that computes something else than its names promise."""
    return Refusal(
        f"tensor {block.down.key}: its linear does not read activation(gate) x up of its block, which "
        "pruning.method = sparsellm needs; use another method"
    )


def _check_flow(layer: LoadedLayer, block: FeedForward, x_TH: Tensor, p_TF: Tensor) -> None:
    x_TH = x_TH.to(layer.device, torch.float32)
    up_TF, gate_TF = (
        torch.addmm(bias_of(layer, linear), x_TH, layer.weight_OI(linear).T) if linear else None
        for linear in (block.up, block.gate)
    )
    assert up_TF is not None
    product_TF = Auxiliary(up_TF, gate_TF).product_TF(block.activation)
    if not bool(p_TF.isfinite().all()):
        return  # observing it tells
    # computed in float32 here and in model.dtype there; anything but that rounding is another flow
    if not torch.dist(product_TF, p_TF.float()) <= 0.05 * product_TF.norm():
        raise other_flow(block)
