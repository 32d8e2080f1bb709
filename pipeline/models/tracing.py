"""What a decoder layer does, found by running it on tensors without numbers: no weights are needed, and no time.

B = windows, L = tokens in a window, H = hidden size.
"""

import copy
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pipeline.groups import check_used_once
from pipeline.models.skeleton import Linear, Skeleton
from pipeline.planning.cost import LayerShape, LinearShape


def _fused_attention(query: Any, key: Any, value: Any, *rest: Any, **settings: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


# that of a CPU, which torch's counter does not know
_FLOPS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention}


@dataclass(frozen=True)
class LayerTrace:
    """The shape of a layer, and what the forward of one window holds beside weights and input.

    `stored_bytes` and `loaded_bytes` are those of its tensors as the checkpoint has them and as they are computed with;
    `converted_bytes` those of the latter that are of another dtype. `forward_bytes` are those at the widest moment,
    `group_bytes` those at the first use of each group's input, this included.
    """

    shape: LayerShape
    stored_bytes: int
    loaded_bytes: int
    converted_bytes: int
    forward_bytes: int
    group_bytes: tuple[int, ...]


def trace_layers(skeleton: Skeleton, window_length: int, are_observed: bool = True) -> list[LayerTrace]:
    """Of every layer; those that are alike are run once.

    Raises Refusal where the inputs of linears are to be observed, and one is never used or used twice.
    """
    known: dict[Any, LayerTrace] = {}
    traces = []
    for layer_index, module in enumerate(skeleton.layers):
        tensors = tuple((name, tuple(each.shape)) for name, each in module.state_dict().items())
        stored_bytes = sum(skeleton.checkpoint.entries[key].num_bytes for key in skeleton.layer_keys[layer_index])
        kind = (type(module), tensors, stored_bytes)
        if kind not in known:
            known[kind] = _trace(skeleton, layer_index, window_length, stored_bytes, are_observed)
        traces.append(known[kind])
    return traces


@dataclass
class _Seen:
    """The groups so far: what identifies their input, and what was held when it was first read."""

    inputs: list[Any] = field(default_factory=list)
    held_bytes: list[int] = field(default_factory=list)
    linears: list[LinearShape] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def _trace(
    skeleton: Skeleton, layer_index: int, window_length: int, stored_bytes: int, are_observed: bool
) -> LayerTrace:
    call = skeleton.calls((1, window_length))[layer_index]
    module = copy.deepcopy(skeleton.layers[layer_index])
    linears, dtype, device = skeleton.linears(layer_index), skeleton.dtype, skeleton.device
    seen, ledger = _Seen(), _Ledger()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                hollow = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                owner._parameters[name] = nn.Parameter(hollow, requires_grad=False)
        hidden_BLH = torch.empty((1, window_length, skeleton.hidden_size), dtype=dtype, device=device)
        for linear in linears:
            module.get_submodule(linear.name).register_forward_pre_hook(_observer(linear, seen, ledger))
        with FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter, ledger:
            call.apply(module, hidden_BLH)
    if are_observed:
        check_used_once(linears, seen.names, layer_index)
    of_linears = sum(2 * linear.num_weights * window_length for linear in seen.linears)
    stored = {name: skeleton.checkpoint.entries[key] for key, name in skeleton.layer_keys[layer_index].items()}
    loaded = {name: parameter.numel() * parameter.element_size() for name, parameter in module.named_parameters()}
    width = round((counter.get_total_flops() - of_linears) / (4 * window_length**2))
    return LayerTrace(
        LayerShape(tuple(seen.linears), width),
        stored_bytes,
        sum(loaded.values()),
        sum(num_bytes for name, num_bytes in loaded.items() if stored[name].torch_dtype != dtype),
        ledger.most_bytes,
        tuple(seen.held_bytes),
    )


def _observer(linear: Linear, seen: _Seen, ledger: "_Ledger") -> Any:
    def on_call(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        read = ledger.identify(args[0])
        if read not in seen.inputs:
            seen.inputs.append(read)
            seen.held_bytes.append(ledger.num_bytes)
        seen.linears.append(LinearShape(linear.num_outputs, linear.num_inputs, seen.inputs.index(read)))
        seen.names.append(linear.name)

    return on_call


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes of all living tensors that were made within it; weights, inputs and their views are not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = self.most_bytes = 0
        self._numbers: dict[int, int] = {}
        self._references: list[Any] = []

    def identify(self, tensor: Tensor) -> Any:
        """Equal for tensors that are the same memory, with nothing written to it in between."""
        number = self._number(tensor.untyped_storage(), is_made_here=False)
        return number, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor._version

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._number(tensor.untyped_storage(), is_made_here=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._number(tensor.untyped_storage(), is_made_here=True)
        return result

    def _number(self, storage: Any, is_made_here: bool) -> int:
        """A number that no other storage has, also none that lives later in the same place."""
        key, size = storage._cdata, storage.nbytes() * is_made_here
        if key in self._numbers:
            return self._numbers[key]

        def on_end(_: Any) -> None:
            del self._numbers[key]
            self.num_bytes -= size

        self._references.append(weakref.ref(storage, on_end))
        self._numbers[key] = len(self._references)
        self.num_bytes += size
        self.most_bytes = max(self.most_bytes, self.num_bytes)
        return self._numbers[key]
