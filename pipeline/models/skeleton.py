"""Run a model one decoder layer at a time, with the weights of one layer in memory.

B = windows in a micro-batch, L = tokens in a window, H = hidden size.
"""

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.errors import Refusal
from pipeline.models.architecture import build_empty_model, find_layers, name_tensors
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.outside import Call, Outside
from pipeline.models.placing import buffers_to, set_tensor
from pipeline.models.tensor_file import is_finite, refuse_non_finite


@dataclass(frozen=True)
class Linear:
    """One weight matrix of a decoder layer: its module's name within the layer and its checkpoint key.

    `transposed` is true where it is stored [inputs, outputs]; `bias_key` is the key of its bias, if it has one.
    """

    name: str
    key: str
    num_outputs: int
    num_inputs: int
    transposed: bool
    bias_key: str | None = None


class LoadedLayer:
    """One decoder layer with its weights; `stored` holds its tensors as the checkpoint has them, by key.

    Where they are computed with as they are stored, the module has the same memory, so neither is written to in place.
    """

    def __init__(self, index: int, module: nn.Module, stored: dict[str, Tensor], linears: list[Linear]) -> None:
        self.index, self.module, self.stored, self.linears = index, module, stored, linears

    def run(self, hidden_BLH: Tensor, call: Call) -> Tensor:
        """The output [B, L, H] of the layer."""
        with torch.no_grad():
            return call.apply(self.module, hidden_BLH)

    def weight_OI(self, linear: Linear) -> Tensor:
        """The stored weight in float32 on the device of the layer, [outputs, inputs]."""
        return self.as_stored(linear).to(torch.float32)

    def as_stored(self, linear: Linear) -> Tensor:
        """The same in its dtype."""
        stored, parameter = self.stored[linear.key], self.module.get_parameter(f"{linear.name}.weight")
        if stored.device != parameter.device:
            # the module has the same numbers, unless it computes in another dtype
            stored = parameter.data if stored.dtype == parameter.dtype else stored.to(parameter.device)
        return stored.T if linear.transposed else stored

    def replace(self, linear: Linear, weight_OI: Tensor) -> None:
        """Put a new weight [outputs, inputs] in place, rounded to the stored dtype."""
        old = self.stored[linear.key]
        new = (weight_OI.T if linear.transposed else weight_OI).to(old.dtype).contiguous()
        if not is_finite(new):
            raise Refusal(
                f"tensor {linear.key}: its pruned weights do not fit {old.dtype}; convert it to a wider dtype"
            )
        self.place(linear.key, f"{linear.name}.weight", new)

    def place(self, key: str, name: str, stored: Tensor) -> None:
        """Put a tensor in place that is as the checkpoint would have it, by its key and the name of its parameter."""
        # from a GPU it comes behind what is computed there: `written` waits for it
        self.stored[key] = stored.to("cpu", non_blocking=True)
        parameter = self.module.get_parameter(name)
        parameter.data = stored.to(parameter.device, parameter.dtype)

    def written(self) -> dict[str, Tensor]:
        """`stored`, once all of it has come to the host."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.stored

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device


class Skeleton:
    """A model without weights, of which decoder layers and the outside of the layers are made real on demand."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
    ) -> None:
        self.checkpoint, self.device = checkpoint, device
        self.model = build_empty_model(checkpoint, dtype, trust_remote_code)
        self.layers_name, self.layers = find_layers(self.model)
        self.names = name_tensors(checkpoint, self.model)
        self._calls: dict[tuple[int, ...], tuple[Tensor, list[Call]]] = {}
        self._check_complete()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def vocabulary_size(self) -> int:
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden state between layers."""
        return self._recorded((1, 2))[0].dtype

    @cached_property
    def layer_keys(self) -> list[dict[str, str]]:
        """Per layer, checkpoint key to the name within the layer, also for tensors that the module never loads."""
        keys: list[dict[str, str]] = [{} for _ in self.layers]
        for key, name in self.names.items():
            if name.startswith(self.layers_name + "."):
                index, _, inner = name.removeprefix(self.layers_name + ".").partition(".")
                if index.isdigit() and int(index) < self.num_layers:
                    keys[int(index)][key] = inner
        return keys

    @cached_property
    def outside_keys(self) -> dict[str, str]:
        """Checkpoint key to the name in the model, for everything outside the layers."""
        inside = {key for keys in self.layer_keys for key in keys}
        return {key: name for key, name in self.names.items() if key not in inside}

    def linears(self, layer_index: int) -> list[Linear]:
        """The prunable weight matrices of a layer, in the order of its modules."""
        keys = {name: key for key, name in self.layer_keys[layer_index].items()}
        linears = []
        for name, module in self.layers[layer_index].named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                transposed = isinstance(module, Conv1D)
                shape = tuple(module.weight.shape)
                num_outputs, num_inputs = reversed(shape) if transposed else shape
                key, bias_key = keys[f"{name}.weight"], keys.get(f"{name}.bias")
                linears.append(Linear(name, key, num_outputs, num_inputs, transposed, bias_key))
        return linears

    @cached_property
    def sizes(self) -> list[dict[str, int]]:
        """Of every layer, the number of weights of each prunable matrix by its checkpoint key."""
        return [
            {linear.key: linear.num_outputs * linear.num_inputs for linear in self.linears(layer_index)}
            for layer_index in range(self.num_layers)
        ]

    def calls(self, shape: tuple[int, ...]) -> list[Call]:
        """What each layer is called with for ids of a shape [B, L]; needs no weights."""
        return self._recorded(shape)[1]

    def check_window_length(self, name: str, window_length: int) -> None:
        """Raises Refusal where a setting asks for longer windows than the model takes."""
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if longest and window_length > longest:
            raise Refusal(
                f"{name} = {window_length}: the model takes at most {longest} tokens; ask for shorter windows"
            )

    def check_calls(self, shape: tuple[int, ...], calls: list[Call]) -> None:
        """Raises Refusal where layers were called with something that depends on the tokens."""
        for layer_index, (call, expected) in enumerate(zip(calls, self.calls(shape), strict=True)):
            if not call.same_as(expected):
                raise Refusal(
                    f"model {type(self.model).__name__}: layer {layer_index} is called with arguments that depend on "
                    "the tokens, which is not supported"
                )

    def outside(self) -> Outside:
        """Everything outside the layers with its weights, in memory for as long as the caller holds it."""
        outside, layers = self._copy_outside()
        state = outside.state_dict(keep_vars=True)
        wanted = {key: name for key, name in self.outside_keys.items() if name in state}
        tensors = self.checkpoint.read(wanted)
        refuse_non_finite(tensors, "outside the layers")
        for key, name in wanted.items():
            set_tensor(outside, name, tensors[key].to(self.device, state[name].dtype))
        outside.tie_weights(missing_keys=set(state) - set(wanted.values()), recompute_mapping=False)
        return Outside(outside, layers)

    def read_layer(self, layer_index: int, source: Checkpoint | None = None) -> dict[str, Tensor]:
        """The tensors of a decoder layer as stored, from this checkpoint or from `source` with the same keys.

        Raises Refusal where one holds NaN or Inf.
        """
        stored = (source or self.checkpoint).read(self.layer_keys[layer_index], pinned=self.device.type == "cuda")
        refuse_non_finite(stored, f"layer {layer_index}")
        return stored

    def load_layer(self, layer_index: int, stored: dict[str, Tensor] | None = None) -> LoadedLayer:
        """A decoder layer with its weights: those that `read_layer` gave, or else read now.

        Weights are copied only where they are computed with elsewhere or in another dtype.
        """
        keys = self.layer_keys[layer_index]
        if stored is None:
            stored = self.read_layer(layer_index)
        module = copy.deepcopy(self.layers[layer_index])
        state = module.state_dict(keep_vars=True)
        for key, name in keys.items():
            if name in state:
                set_tensor(module, name, stored[key].to(self.device, non_blocking=True).to(state[name].dtype))
        return LoadedLayer(layer_index, buffers_to(module, self.device), stored, self.linears(layer_index))

    def _recorded(self, shape: tuple[int, ...]) -> tuple[Tensor, list[Call]]:
        if shape not in self._calls:
            hollow, layers = self._copy_outside()
            for name, parameter in dict(hollow.named_parameters()).items():
                if not name.startswith(self.layers_name + "."):
                    zeros = torch.zeros((), dtype=parameter.dtype, device=self.device).expand(parameter.shape)
                    set_tensor(hollow, name, zeros)
            ids_BL = torch.zeros(shape, dtype=torch.int64, device=self.device)
            self._calls[shape] = Outside(hollow, layers).record(ids_BL)
        return self._calls[shape]

    def _copy_outside(self) -> tuple[Any, Any]:
        model = buffers_to(copy.deepcopy(self.model), self.device)
        return model, model.get_submodule(self.layers_name)

    def _check_complete(self) -> None:
        """Every parameter must come from the checkpoint, with its shape and as plain floating-point numbers."""
        keys = {name: key for key, name in self.names.items()}
        shared: dict[int, list[str]] = {}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, parameter in parameters.items():
            shared.setdefault(id(parameter), []).append(name)
        for names in shared.values():
            if not any(name in keys for name in names):
                raise Refusal(f"model {self.checkpoint.path}: has no tensor {names[0]}; complete the checkpoint")
        for name in parameters.keys() & keys.keys():
            entry, wanted = self.checkpoint.entries[keys[name]], tuple(parameters[name].shape)
            if entry.shape != wanted:
                raise Refusal(f"tensor {keys[name]}: has shape {entry.shape}, config.json says {wanted}; mend either")
            if entry.torch_dtype is None:
                raise Refusal(f"tensor {keys[name]}: is stored as {entry.dtype}; convert it to F32, BF16 or F16 first")
