"""Find the feed-forward block of a decoder layer, for methods that prune it as one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.errors import Refusal
from pipeline.models.skeleton import Linear


@dataclass(frozen=True)
class FeedForward:
    """down(activation(gate x) * up x), or down(relu(up x)) where there is no gate."""

    up: Linear
    gate: Linear | None
    down: Linear
    activation: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Names:
    up: str
    gate: str | None
    down: str
    activation: str


# How architectures name the linears of the block, and the activation beside them in the same module.
_KNOWN = (
    _Names("up_proj", "gate_proj", "down_proj", "act_fn"),  # Llama, Mistral, Qwen, Gemma, OLMo, Cohere, ...
    _Names("fc1", None, "fc2", "activation_fn"),  # OPT
)


def find_feed_forward(layer_index: int, module: nn.Module, linears: list[Linear]) -> FeedForward:
    """The block of a layer, told by its names; the module may be without weights.

    Any activation of a gate will do, as only its value and slope are asked for. Without a gate it must be ReLU, for
    which alone there is a closed form. Raises Refusal where there is no such block.
    """
    by_name = {linear.name: linear for linear in linears}
    for linear in linears:
        parent, _, last = linear.name.rpartition(".")
        for names in _KNOWN:
            others = [f"{parent}.{name}".lstrip(".") for name in (names.gate, names.down) if name]
            activation = getattr(module.get_submodule(parent), names.activation, None)
            if last == names.up and activation is not None and all(name in by_name for name in others):
                if names.gate is None and not _is_relu(activation):
                    raise _unsuitable(layer_index, f"has no gate, and {type(activation).__name__} instead of ReLU")
                gate = by_name[others[0]] if names.gate else None
                return FeedForward(linear, gate, by_name[others[-1]], activation)
    known = " or ".join("/".join(filter(None, (names.gate, names.up, names.down))) for names in _KNOWN)
    raise _unsuitable(layer_index, f"has no linears named {known} beside an activation")


def _is_relu(activation: Callable[[Tensor], Tensor]) -> bool:
    points = torch.linspace(-4, 4, 33)
    return torch.equal(activation(points), points.clamp(min=0))


def _unsuitable(layer_index: int, reason: str) -> Refusal:
    return Refusal(
        f"pruning.method = sparsellm: the feed-forward block of layer {layer_index} {reason}; use another method"
    )
