"""Decoder layers of a few small linears with any flow between them, and hidden states for them.

B = windows in a micro-batch, L = tokens in a window, H = hidden size.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.models.outside import Call
from pipeline.models.skeleton import Linear, LoadedLayer

NO_CALL = Call((), {}, positional=True)
Inputs = list[tuple[Tensor, Call]]


class Handmade(nn.Module):
    """A layer of linears of 4 x 4 with any flow between them."""

    def __init__(self, flow: Callable[["Handmade", Tensor], Tensor], *names: str) -> None:
        super().__init__()
        self.flow = flow
        for name in names:
            self.add_module(name, nn.Linear(4, 4, bias=False))

    def forward(self, hidden_BLH: Tensor) -> Tensor:
        return self.flow(self, hidden_BLH)


def handmade(flow: Callable[[Handmade, Tensor], Tensor], *names: str) -> LoadedLayer:
    torch.manual_seed(1)
    module = Handmade(flow, *names).requires_grad_(False)
    stored = {f"layers.7.{name}.weight": module.get_submodule(name).weight.clone() for name in names}
    linears = [Linear(name, f"layers.7.{name}.weight", 4, 4, transposed=False) for name in names]
    return LoadedLayer(7, module, stored, linears)


def linears_of_one_input(
    nums_outputs: Sequence[int], num_inputs: int, dtype: torch.dtype = torch.float32, transposed: bool = False
) -> LoadedLayer:
    """A layer of linears of any size beside each other, whose weights may be stored [inputs, outputs]."""
    torch.manual_seed(2)
    layer = handmade(lambda it, hidden: torch.cat([each(hidden) for each in it.children()], dim=-1))
    for index, num_outputs in enumerate(nums_outputs):
        name, key = f"number_{index}", f"layers.7.number_{index}.weight"
        linear = Conv1D(num_outputs, num_inputs) if transposed else nn.Linear(num_inputs, num_outputs, bias=False)
        layer.stored[key] = torch.randn(linear.weight.shape).to(dtype)
        linear.weight.data = layer.stored[key].float()
        layer.module.add_module(name, linear.requires_grad_(False))
        layer.linears.append(Linear(name, key, num_outputs, num_inputs, transposed))
    return layer


def hidden_states(*batch_sizes: int) -> Inputs:
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(size, 3, 4, generator=generator), NO_CALL) for size in batch_sizes]
