"""ShardWorker: prunes decoder layers one after another, in this process or inside a Ray actor.

It holds the weights of one layer, those of the next one on their way, and the hidden states of its windows before that
layer. Of several replicas each has a part of the windows; all of them prune a layer together, and the first commits it.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from functools import cached_property, partial

import torch
from torch import Tensor

from pipeline.evaluate import Perplexity, measure_perplexity
from pipeline.export import finish_model
from pipeline.feedforward import prune_with_block
from pipeline.groups import Group, Weights
from pipeline.held import Held
from pipeline.hidden import Hidden
from pipeline.job import Job
from pipeline.layer import LinearResult, prune_layer
from pipeline.loading import Layers
from pipeline.methods.sparsellm import SparseLLM
from pipeline.models.checkpoint import Checkpoint, open_checkpoint, open_file
from pipeline.models.skeleton import LoadedLayer, Skeleton
from pipeline.numerics.statistics import Statistic
from pipeline.observe import Observer, observe, without_inputs
from pipeline.passing import Again, Block, Passing, recorded_block
from pipeline.permute import permute_channels
from pipeline.replicas import Alone, Replicas
from pipeline.runtime import environment, return_memory, with_memory_kept
from pipeline.single_pass import SinglePass, single_pass
from pipeline.sparsity import Pattern
from pipeline.store import Receipt


class ShardWorker:
    """One worker of a job. Layers must be entered before they are pruned, and pruned in order.

    Micro-batches are numbered as this worker has them. `rank` is that of the worker among the replicas of a shard, None
    where it stands for all of them.
    """

    def __init__(self, job: Job, replicas: Replicas | None = None, rank: int | None = None) -> None:
        torch.set_num_threads(job.resolved.threads)
        self.job, self.directory, self.rank = job, job.directory, rank
        self.device = torch.device(job.resolved.device)
        self.skeleton = self._skeleton(job.open_source())
        self.replicas = replicas or Alone(len(job.micro_batches), job.num_replicas)
        self.hidden = Hidden(job, self.skeleton, self.replicas, rank)
        self._passing: Passing | None = None
        self._held = Held()
        self._layers, self._committer = Layers(self.skeleton), ThreadPoolExecutor(1, "commit")
        self._committing: dict[int, Future[Receipt | None]] = {}

    def enter(self, layer_index: int, is_dense: bool) -> None:
        """Make the hidden states before a layer; `is_dense`: those of the dense model."""
        self.hidden.enter(layer_index, is_dense)

    def leave(self) -> None:
        """Free the hidden states."""
        self.hidden.leave()

    def survey(self, layer_index: int) -> float:
        """What the allocation measures of a layer of the dense model; then run it so that the next can be surveyed."""
        allocation = self.job.config.pruning.allocation
        assert allocation.statistic is not None
        layer = self._layers.load(layer_index)
        self._layers.read_ahead(layer_index + 1)
        groups = self._observe(layer, allocation.statistic)
        if self.job.config.pruning.surveys_inputs and layer_index + 1 < self.job.num_layers:
            self._propagate(layer)
        return allocation.measure(Weights(layer, groups))

    def open(self, layer_index: int, next_layer: int | None, is_pruned: bool, keeps: bool) -> None:
        """Begin to let micro-batches pass through a layer of the dense model.

        `is_pruned`: it is observed meanwhile, to be pruned when it is closed. `keeps`: what it gives is kept here, for
        `keep_dense` or for the next layer.
        """
        if keeps and not self.hidden.is_entered:
            self.hidden.make_room()
        method, observer = self.job.config.pruning.method, None
        layer = self._layers.load(layer_index)
        self._layers.read_ahead(next_layer)
        if is_pruned:
            observer = Observer(layer, method.statistic, self.job.num_tokens, self.replicas, self._all_need_sums, True)
        self._passing = Passing(self.hidden, layer, keeps, observer, records=is_pruned and method.prunes_blocks)

    def step(self, index: int, hidden_BLH: Tensor | None = None) -> Tensor:
        """The output of the opened layer for a micro-batch, one of those that are here unless it is given."""
        return self._opened.step(index, hidden_BLH)

    def close(self, num_layers_replayed: int) -> None:
        """All micro-batches have passed: prune the layer if it was observed, and begin to commit it."""
        passing, self._passing = self._opened, None
        passing.end()
        if passing.observer is None:
            return
        linears = self._prune(passing.layer, passing.observer.groups(), passing.block, passing.again)
        # one at a time is written while the next ones run
        for earlier in list(self._committing.values()):
            earlier.result()
        layer, started = passing.layer, passing.started
        self._committing[layer.index] = self._commit(layer, linears, started, num_layers_replayed)

    def receipt(self, layer_index: int) -> Receipt | None:
        """Of a layer that was closed, once it is committed. Only the first replica has one to give."""
        receipt = self._committing[layer_index].result()
        self.hidden.drop_dense()
        return receipt

    def keep_dense(self, layer_index: int) -> None:
        """Keep the hidden states as what the dense model gives before a layer."""
        self.hidden.keep_dense(layer_index)

    def keep(self, layer_index: int) -> None:
        """Keep the hidden states before a layer, since this worker is about to be taken away."""
        self.hidden.keep(layer_index, always=True)

    def replay(self, layer_index: int) -> None:
        """Run a committed layer again, as it was committed."""
        committed = open_file(self.directory.model / self.directory.layer_name(layer_index))
        stored = self.skeleton.read_layer(layer_index, committed)
        self._propagate(self.skeleton.load_layer(layer_index, stored))
        self.hidden.keep(layer_index + 1)

    def prune(self, layer_index: int, num_layers_replayed: int, is_last: bool) -> Receipt | None:
        """Prune and commit one layer, and run it so that the next one can be entered unless it is the last.

        It is committed while it runs. Only the first replica has a receipt to give.
        """
        started = time.perf_counter()
        layer, next_layer = self._layers.load(layer_index), None if is_last else layer_index + 1
        if self.device.type == "cuda":
            self._layers.read_ahead(next_layer)
        with self._single_pass(layer) as gradually:
            if gradually is None:
                linears = self._prune_whole(layer)
            else:
                method, patterns = self.job.config.pruning.method, self.patterns[layer_index]
                linears = gradually.prune(method, patterns, self.job.num_tokens)
            committing = self._commit(layer, linears, started, num_layers_replayed)
            if self.job.needs_activations and not is_last:
                # where layers are solved in this memory, that is when they need most of it
                self._layers.read_ahead(next_layer)
                self._propagate(layer, gradually)
                # what is kept for a layer says that those before it are committed
                committing.result()
                self.hidden.keep(layer_index + 1)
        receipt = committing.result()
        if is_last:
            self.hidden.drop_before(layer_index + 1)
        return receipt

    def finish(self) -> None:
        """Write what surrounds the committed layers, so that the model is complete."""
        finish_model(self.job, self.skeleton)

    def evaluate(self, is_dense: bool, ids_NL: Tensor) -> Perplexity:
        """Perplexity of the dense or of the pruned model, computed as this job computes."""
        checkpoint = self.job.open_source() if is_dense else open_checkpoint(str(self.directory.model))
        skeleton, room = self._skeleton(checkpoint), self.hidden.room
        return measure_perplexity(skeleton, ids_NL, self.job.resolved.windows_per_micro_batch, room)

    @cached_property
    def patterns(self) -> list[dict[str, Pattern]]:
        """Of every layer, the pattern of each linear by its key."""
        return self.job.config.pruning.allocate(self.skeleton.sizes, self.job.measured)

    @property
    def _opened(self) -> Passing:
        assert self._passing is not None, "no layer is open"
        return self._passing

    @property
    def _all_need_sums(self) -> bool:
        """Whether every replica solves everything by itself."""
        return self.job.config.pruning.permute or self.job.config.pruning.method.prunes_blocks

    def _observe(self, layer: LoadedLayer, statistic: type[Statistic]) -> list[Group]:
        if not statistic.needs_inputs:
            return without_inputs(layer, statistic, self.replicas)
        with closing(with_memory_kept(self.hidden.inputs(layer.index))) as inputs:
            return observe(layer, inputs, statistic, self.job.num_tokens, self.replicas, self._all_need_sums)

    def _prune_whole(self, layer: LoadedLayer) -> list[LinearResult]:
        """Prune a layer on what its linears read while it is dense."""
        method = self.job.config.pruning.method
        with recorded_block(layer, self.hidden.states) if method.prunes_blocks else nullcontext() as block:
            groups = self._observe(layer, method.statistic)
        return self._prune(layer, groups, block, partial(self.hidden.input, layer.index))

    def _single_pass(self, layer: LoadedLayer) -> AbstractContextManager[SinglePass | None]:
        """What prunes a layer linear by linear, None where it is pruned as a whole."""
        if self.job.resolved.granularity == "layer":
            return nullcontext()
        return single_pass(layer, self.hidden, self.replicas, self._held)

    def _prune(self, layer: LoadedLayer, groups: list[Group], block: Block | None, again: Again) -> list[LinearResult]:
        return_memory()
        method, patterns = self.job.config.pruning.method, self.patterns[layer.index]
        if self._all_need_sums:
            for group in groups:
                group.settle(layer)
        if self.job.config.pruning.permute:
            permute_channels(self.skeleton, layer, groups, method, patterns)
        if block is None:
            return prune_layer(layer, groups, method, patterns, self.replicas)
        assert isinstance(method, SparseLLM)
        return prune_with_block(layer, groups, block.feed_forward, block.read, again, method, patterns, self.replicas)

    def _commit(
        self, layer: LoadedLayer, linears: list[LinearResult], started: float, num_layers_replayed: int
    ) -> "Future[Receipt | None]":
        """Begin to write a pruned layer. Of several replicas the first does it, since all have the same."""
        if self.rank:
            done: Future[Receipt | None] = Future()
            done.set_result(None)
            return done
        receipt = Receipt(
            layer_index=layer.index,
            fingerprint=self.job.fingerprint,
            file=self.directory.layer_name(layer.index),
            num_bytes=0,
            sha256="",
            num_tokens=self.job.num_tokens if self.job.needs_activations else 0,
            attempt=self.job.attempt,
            num_layers_replayed=num_layers_replayed,
            seconds=time.perf_counter() - started,
            environment=environment(self.job.resolved.device),
            linears=linears,
        )
        return self._committer.submit(self.directory.commit_layer, receipt, layer.written(), self.job.guard)

    def _propagate(self, layer: LoadedLayer, begun: SinglePass | None = None) -> None:
        for index in with_memory_kept(range(len(self.hidden))):
            output_BLH = begun.finish(index) if begun else layer.run(*self.hidden.input(layer.index, index))
            self.hidden.states.write(index, output_BLH)

    def _skeleton(self, checkpoint: Checkpoint) -> Skeleton:
        dtype = getattr(torch, self.job.resolved.dtype)
        return Skeleton(checkpoint, dtype, self.device, self.job.config.model.trust_remote_code)
