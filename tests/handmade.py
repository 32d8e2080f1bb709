"""Decoder layers of a few small linears with any flow between them, and hidden states for them.

B = windows in a micro-batch, L = tokens in a window, H = hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

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


def hidden_states(*batch_sizes: int) -> Inputs:
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(size, 3, 4, generator=generator), NO_CALL) for size in batch_sizes]
