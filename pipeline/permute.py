"""Before N:M pruning: put the channels of a layer in an order in which more of the important weights can stay.

What a layer computes stays the same, which is checked by running it. O = output rows, I = input columns, B = blocks
within which channels may change places, C = channels of a block.
"""

from typing import Any, cast

import torch
from torch import Tensor

from pipeline.errors import Refusal
from pipeline.groups import Group
from pipeline.methods import Method
from pipeline.methods.masked import MaskMethod
from pipeline.models.channels import Channels, find_channels
from pipeline.models.outside import Call
from pipeline.models.skeleton import LoadedLayer, Skeleton
from pipeline.numerics.permutation import best_order
from pipeline.sparsity import Budget, NofM, Pattern

_NUM_TOKENS, _OUTPUT = 8, "output"
# Sums in another order differ by less, and anything that depends on the order of channels by much more.
_TOLERANCE = 1e-4


def permute_channels(
    skeleton: Skeleton, layer: LoadedLayer, groups: list[Group], method: Method, patterns: dict[str, Pattern]
) -> None:
    """Reorder the free channels of a layer, and the statistics of what reads them.

    Raises Refusal where that would change what the layer computes.
    """
    sample = _sample(skeleton, layer)
    expected = _inputs_and_output(layer, *sample)
    for channels in find_channels(layer.module, layer.linears, _group_size(patterns)):
        reader = channels.reader
        (group,) = (group for group in groups if reader in group.linears)
        if len(group.linears) > 1:
            raise _not_free(layer, f"another linear reads the inputs of tensor {reader.key}")
        order_BC = _order(layer, channels, group, method, patterns[reader.key])
        channels.reorder(layer, order_BC)
        column_I = channels.columns(order_BC).to(layer.device)
        group.statistic = group.statistic.reordered(column_I)
        expected[reader.key] = expected[reader.key][..., column_I]
    _check_same(layer, expected, _inputs_and_output(layer, *sample))


def _group_size(patterns: dict[str, Pattern]) -> int:
    group_size = Budget(tuple(patterns.values()), ()).group_size
    assert group_size is not None, "channels are reordered for N:M only"
    return group_size


def _order(layer: LoadedLayer, channels: Channels, group: Group, method: Method, pattern: Pattern) -> Tensor:
    """By the scores that the method prunes by, or by Wanda's if it has none that are fixed beforehand."""
    assert isinstance(pattern, NofM)
    weight_OI, inputs = layer.weight_OI(channels.reader), cast(Any, group.statistic)
    if isinstance(method, MaskMethod):
        score_OI = method.score(weight_OI, inputs, Budget((pattern,), (len(weight_OI),)))
    else:
        score_OI = weight_OI.abs() * inputs.norm_I
    blocks = [channels.scores_of_block(score_OI, block) for block in range(channels.num_blocks)]
    return torch.stack([best_order(score_RC, pattern.n, pattern.m).cpu() for score_RC in blocks])


def _sample(skeleton: Skeleton, layer: LoadedLayer) -> tuple[Tensor, Call]:
    """Hidden states of a few tokens, random ones: methods that look at no data have no others."""
    shape = (1, _NUM_TOKENS)
    hidden_BLH = torch.randn(*shape, skeleton.hidden_size, generator=torch.Generator().manual_seed(layer.index))
    return hidden_BLH.to(layer.device, skeleton.dtype), skeleton.calls(shape)[layer.index]


def _inputs_and_output(layer: LoadedLayer, hidden_BLH: Tensor, call: Call) -> dict[str, Tensor]:
    """What each linear reads, by its key and in the order of use, and what the layer gives."""
    seen: dict[str, Tensor] = {}
    handles = [
        layer.module.get_submodule(linear.name).register_forward_pre_hook(
            lambda _, args, key=linear.key: seen.__setitem__(key, args[0])
        )
        for linear in layer.linears
    ]
    try:
        output_BLH = layer.run(hidden_BLH, call)
    finally:
        for handle in handles:
            handle.remove()
    return {**seen, _OUTPUT: output_BLH}


def _check_same(layer: LoadedLayer, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """All inputs, not the output alone: a change of what one linear reads is not hidden by the residual."""
    for key, before in expected.items():
        tolerance = max(_TOLERANCE, 4 * torch.finfo(before.dtype).eps)
        before, after = before.float(), found[key].float()
        if not float((after - before).norm()) <= tolerance * float(before.norm()):
            what = "its output" if key == _OUTPUT else f"the input of tensor {key}"
            raise _not_free(layer, f"{what} changes with the order of its channels")


def _not_free(layer: LoadedLayer, reason: str) -> Refusal:
    return Refusal(
        f"pruning.permute = true: layer {layer.index} is not one whose channels may change places ({reason}); "
        "leave pruning.permute out for this model"
    )
