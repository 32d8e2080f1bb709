"""ShardWorker: prunes decoder layers one after another, in this process or inside a Ray actor.

It holds the weights of one layer and the hidden states of all windows before that layer.
"""

import time
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pipeline.activations import Activations, Room, split_windows
from pipeline.calibration.windows import read_window_ids
from pipeline.evaluate import Perplexity, measure_perplexity
from pipeline.export import finish_model
from pipeline.feedforward import prune_with_block, recorded
from pipeline.job import Job
from pipeline.layer import LinearResult, prune_layer
from pipeline.methods.sparsellm import SparseLLM
from pipeline.models.checkpoint import Checkpoint, open_checkpoint, open_file
from pipeline.models.feedforward import find_feed_forward
from pipeline.models.outside import Call
from pipeline.models.skeleton import LoadedLayer, Skeleton
from pipeline.numerics.statistics import Statistic
from pipeline.observe import Group, Weights, observe, without_inputs
from pipeline.permute import permute_channels
from pipeline.runtime import environment
from pipeline.sparsity import Pattern
from pipeline.storage import Location
from pipeline.store import Receipt


class ShardWorker:
    """One worker of a job. Layers must be entered before they are pruned, and pruned in order."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.resolved.threads)
        self.job, self.directory = job, job.directory
        self.device = torch.device(job.resolved.device)
        self.skeleton = self._skeleton(job.open_source())
        self.micro_batches = split_windows(job.config.calibration.num_windows, job.resolved.windows_per_micro_batch)
        self.room = Room.of(job.config.runtime, self.directory.path / "activations")
        self._activations: Activations | None = None

    def enter(self, layer_index: int) -> None:
        """Make the hidden states before a layer: from the windows for layer 0, else from a kept input."""
        self.open_entry()
        if layer_index > 0:
            self.activations.load(self.directory.entry_file(layer_index))
            return
        outside = self.skeleton.outside()
        ids_NL = read_window_ids(self.directory.windows_file)
        for index, windows in enumerate(self.micro_batches):
            hidden_BLH, calls = outside.record(ids_NL[windows].to(self.device))
            if index == 0:
                self.skeleton.check_calls(ids_NL[windows].shape, calls)
            self.activations.write(index, hidden_BLH)

    def open_entry(self) -> None:
        """Room for the hidden states before a layer, to be filled by `accept` or `enter`."""
        calibration = self.job.config.calibration
        self._activations = Activations(
            (calibration.num_windows, calibration.window_length, self.skeleton.hidden_size),
            self.skeleton.dtype,
            self.micro_batches,
            self.room,
        )

    def export(self, index: int) -> Any:
        """The hidden states of a micro-batch as integers, for another worker."""
        return self.activations.export(index)

    def accept(self, index: int, integers: Any) -> None:
        """Take over a micro-batch that another worker exported."""
        self.activations.accept(index, integers)

    def leave(self) -> None:
        """Free the hidden states, which another worker has taken over."""
        self._activations = None

    def survey(self, layer_index: int) -> float:
        """What the allocation measures of a layer of the dense model; then run it so that the next can be surveyed."""
        allocation = self.job.config.pruning.allocation
        assert allocation.statistic is not None
        layer = self.skeleton.load_layer(layer_index)
        groups = self._observe(layer, allocation.statistic)
        if self.job.survey_needs_activations and layer_index + 1 < self.job.num_layers:
            self._propagate(layer)
        return allocation.measure(Weights(layer, groups))

    def replay(self, layer_index: int) -> None:
        """Run a committed layer again, as it was committed."""
        self._propagate(self.skeleton.load_layer(layer_index, self._committed(layer_index)))
        self._keep_entry(layer_index + 1)

    def prune(self, layer_index: int, num_layers_replayed: int) -> Receipt:
        """Prune and commit one layer, then run it so that the next one can be entered."""
        started = time.perf_counter()
        layer = self.skeleton.load_layer(layer_index)
        linears = self._prune(layer)
        receipt = Receipt(
            layer_index=layer_index,
            fingerprint=self.job.fingerprint,
            file=self.directory.layer_name(layer_index),
            num_bytes=0,
            sha256="",
            num_tokens=self.job.num_tokens if self.job.needs_activations else 0,
            attempt=self.job.attempt,
            num_layers_replayed=num_layers_replayed,
            seconds=time.perf_counter() - started,
            environment=environment(self.job.resolved.device),
            linears=linears,
        )
        receipt = self.directory.commit_layer(receipt, layer.stored, self.job.guard)
        if self.job.needs_activations and layer_index + 1 < self.job.num_layers:
            self._propagate(layer)
            self._keep_entry(layer_index + 1)
        return receipt

    def finish(self) -> None:
        """Write what surrounds the committed layers, so that the model is complete."""
        finish_model(self.job, self.skeleton)

    def evaluate(self, model: Location, ids_NL: Tensor) -> Perplexity:
        """Perplexity of a checkpoint, computed as this job computes."""
        skeleton = self._skeleton(open_checkpoint(str(model)))
        return measure_perplexity(skeleton, ids_NL, self.job.resolved.windows_per_micro_batch, self.room)

    @cached_property
    def patterns(self) -> list[dict[str, Pattern]]:
        """Of every layer, the pattern of each linear by its key."""
        return self.job.config.pruning.allocate(self.skeleton.sizes, self.job.measured)

    @property
    def activations(self) -> Activations:
        assert self._activations is not None, "no layer has been entered"
        return self._activations

    def _observe(self, layer: LoadedLayer, statistic: type[Statistic]) -> list[Group]:
        if not statistic.needs_inputs:
            return without_inputs(layer, statistic)
        return observe(layer, self._inputs(layer.index), statistic, self.job.num_tokens)

    def _inputs(self, layer_index: int) -> Iterator[tuple[Tensor, Call]]:
        """The hidden states of each micro-batch on the device, with the layer's call for their shape."""
        assert self.activations.complete, "a layer is pruned with all windows or not at all"
        for index in range(len(self.micro_batches)):
            hidden_BLH = self.activations.read(index).to(self.device)
            yield hidden_BLH, self.skeleton.calls(tuple(hidden_BLH.shape[:2]))[layer_index]

    def _prune(self, layer: LoadedLayer) -> list[LinearResult]:
        method, patterns = self.job.config.pruning.method, self.patterns[layer.index]
        if not isinstance(method, SparseLLM):
            groups = self._observe(layer, method.statistic)
            self._permute(layer, groups)
            return prune_layer(layer, groups, method, patterns)
        block = find_feed_forward(layer.index, layer.module, layer.linears)
        with recorded(layer, block, self.activations) as read:
            groups = self._observe(layer, method.statistic)
        self._permute(layer, groups)
        return prune_with_block(layer, groups, block, read, self._inputs(layer.index), method, patterns)

    def _permute(self, layer: LoadedLayer, groups: list[Group]) -> None:
        pruning = self.job.config.pruning
        if pruning.permute:
            permute_channels(self.skeleton, layer, groups, pruning.method, self.patterns[layer.index])

    def _propagate(self, layer: LoadedLayer) -> None:
        for index, (hidden_BLH, call) in enumerate(self._inputs(layer.index)):
            self.activations.write(index, layer.run(hidden_BLH, call))

    def _keep_entry(self, layer_index: int) -> None:
        """Keep every few layers' input, also when replaying: it is complete before that layer's receipt, so a restart
        replays at most so many layers."""
        if layer_index % self.job.config.output.keep_entry_every == 0:
            self.job.guard.check()
            self.activations.save(self.directory.entry_file(layer_index))
            self.directory.drop_entries(keep=layer_index)

    def _skeleton(self, checkpoint: Checkpoint) -> Skeleton:
        dtype = getattr(torch, self.job.resolved.dtype)
        return Skeleton(checkpoint, dtype, self.device, self.job.config.model.trust_remote_code)

    def _committed(self, layer_index: int) -> Checkpoint:
        return open_file(self.directory.model / self.directory.layer_name(layer_index))
