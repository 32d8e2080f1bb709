"""What is known of a run before it begins, without its weights and its windows: all that its costs depend on."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config import RunConfig
from pipeline.job import Resolved, segments_of
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.hollow import is_imagined, open_or_imagine
from pipeline.models.skeleton import Skeleton
from pipeline.models.tracing import LayerTrace, trace_layers
from pipeline.planning.cost import Flops, Passes, activation_bytes, count, of_forwards, of_survey
from pipeline.planning.disk import model_files
from pipeline.planning.memory import Outside
from pipeline.preparation import check_layout, resolve
from pipeline.runtime import Machine


@dataclass(frozen=True)
class Scope:
    """`file_bytes` are the sizes of the finished model's files; `outside` are the tensors outside the layers.

    `is_hashed`: the source's files are read as a whole before the first layer, which those of an object store are not.
    """

    config: RunConfig
    resolved: Resolved
    model_type: str
    stored_dtype: str
    has_weights: bool
    is_hashed: bool
    num_parameters: int
    num_source_files: int
    traces: tuple[LayerTrace, ...]
    outside: Outside
    hidden_size: int
    itemsize: int
    file_bytes: dict[str, int]

    @property
    def num_layers(self) -> int:
        return len(self.traces)

    @property
    def num_tokens(self) -> int:
        return self.config.calibration.num_windows * self.config.calibration.window_length

    @property
    def num_micro_batches(self) -> int:
        return -(-self.config.calibration.num_windows // self.resolved.windows_per_micro_batch)

    @property
    def hidden_bytes(self) -> int:
        """Of all windows before a layer; nothing where the method looks at weights alone."""
        return self._all_hidden_bytes * self.config.pruning.method.statistic.needs_inputs

    @property
    def has_survey(self) -> bool:
        """Whether the allocation looks at the dense model before the first layer is pruned."""
        return self.config.pruning.allocation.statistic is not None

    @property
    def survey_hidden_bytes(self) -> int:
        return self._all_hidden_bytes * self.config.pruning.surveys_inputs

    @property
    def _all_hidden_bytes(self) -> int:
        return activation_bytes(self.num_tokens, self.hidden_size, self.itemsize)

    @property
    def model_bytes(self) -> int:
        return sum(self.file_bytes.values())


def examine(config: RunConfig, machine: Machine) -> tuple[Scope, Skeleton]:
    """What a config asks of workers on a kind of machine, and the model without weights. Raises Refusal as a run."""
    checkpoint = open_or_imagine(config.model.path, config.model.revision, config.model.trust_remote_code)
    resolved = resolve(config, checkpoint, machine, None)
    dtype = getattr(torch, resolved.dtype)
    skeleton = Skeleton(checkpoint, dtype, torch.device("cpu"), config.model.trust_remote_code)
    check_layout(config, resolved, skeleton)
    entries, are_observed = checkpoint.entries, config.pruning.method.statistic.needs_inputs
    scope = Scope(
        config=config,
        resolved=resolved,
        model_type=str(checkpoint.config.get("model_type")),
        stored_dtype=_stored_dtype(checkpoint),
        has_weights=not is_imagined(checkpoint),
        is_hashed=not is_imagined(checkpoint) and isinstance(checkpoint.path, Path),
        num_parameters=sum(math.prod(entry.shape) for entry in entries.values() if entry.torch_dtype),
        num_source_files=len(checkpoint.files),
        traces=tuple(trace_layers(skeleton, config.calibration.window_length, are_observed)),
        outside=_outside(skeleton),
        hidden_size=skeleton.hidden_size,
        itemsize=skeleton.dtype.itemsize,
        file_bytes=model_files(skeleton),
    )
    return scope, skeleton


def _outside(skeleton: Skeleton) -> Outside:
    """What Skeleton.outside() has; the module does not load all that is stored."""
    entries, state = skeleton.checkpoint.entries, skeleton.model.state_dict(keep_vars=True)
    loaded = {key: state[name] for key, name in skeleton.outside_keys.items() if name in state}
    return Outside(
        sum(entries[key].num_bytes for key in skeleton.outside_keys),
        sum(tensor.nbytes for tensor in loaded.values()),
        sum(tensor.nbytes for key, tensor in loaded.items() if entries[key].torch_dtype != tensor.dtype),
    )


def _stored_dtype(checkpoint: Checkpoint) -> str:
    found = {entry.torch_dtype for entry in checkpoint.entries.values() if entry.torch_dtype}
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))


def necessary(scope: Scope) -> Flops:
    """Of all layers, as the propagation has them: with a survey, and with the sweep that `shard` begins with."""
    config, found = scope.config, Flops()
    tokens, pruning = (scope.num_tokens, config.calibration.window_length), config.pruning
    segments, is_dense = segments_of(config, scope.num_layers), pruning.propagation == "dense"
    num_swept = segments[-1].first if pruning.method.statistic.needs_inputs and not is_dense else 0
    last_ones = {segment.stop - 1 for segment in segments}
    for index, trace in enumerate(scope.traces):
        is_single = is_dense or scope.resolved.granularity == "linear"
        passes = Passes(is_single=is_single, goes_on=is_dense or index not in last_ones)
        found += count(trace.shape, pruning.method, *tokens, passes)
        found += of_survey(trace.shape, pruning.allocation, *tokens, goes_on=index + 1 < scope.num_layers)
        if index < num_swept:
            found += of_forwards(trace.shape, *tokens, Passes(is_single=True))
    return found
