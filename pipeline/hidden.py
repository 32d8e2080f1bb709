"""The hidden states of a worker's windows before a layer: where they come from, and where they are kept."""

from collections.abc import Iterator
from functools import cached_property

from torch import Tensor

from pipeline.activations import Activations, Room
from pipeline.calibration.windows import read_window_ids
from pipeline.job import Job
from pipeline.models.outside import Call
from pipeline.models.skeleton import Skeleton
from pipeline.replicas import Replicas
from pipeline.segments import needed_dense, obsolete, split


class Hidden:
    """Of all windows of a run, or of those of one replica; micro-batches are numbered as they are here.

    The first replica deletes what is kept and not needed any more, for all.
    """

    def __init__(self, job: Job, skeleton: Skeleton, replicas: Replicas, rank: int | None) -> None:
        self.job, self.directory, self.skeleton, self.replicas, self.rank = job, job.directory, skeleton, replicas, rank
        # where one worker stands for all replicas, it has the parts of all
        self._parts = list(range(job.num_replicas)) if rank is None else [rank]
        dealt = split(len(job.micro_batches), job.num_replicas)
        self.micro_batches = [job.micro_batches[index] for part in self._parts for index in dealt[part]]
        folder, num_sharing = self.directory.path / "activations", job.num_workers_here
        self.room = Room.of(job.config.runtime, folder, num_sharing, skeleton.device)
        self._states: Activations | None = None

    def __len__(self) -> int:
        return len(self.micro_batches)

    @property
    def num_windows(self) -> int:
        return int(self.micro_batches[-1].stop - self.micro_batches[0].start)

    @property
    def window_length(self) -> int:
        return self.job.config.calibration.window_length

    @property
    def is_entered(self) -> bool:
        return self._states is not None

    @property
    def states(self) -> Activations:
        assert self._states is not None, "no layer has been entered"
        return self._states

    def enter(self, layer_index: int, is_dense: bool) -> None:
        """Make the hidden states before a layer: from the windows for layer 0, else from what has been kept."""
        self.make_room()
        if layer_index > 0:
            for part, indices in zip(self._parts, self.replicas.parts, strict=True):
                self.states.load(self.directory.entry_file(layer_index, part, is_dense), indices)
            return
        outside = self.skeleton.outside()
        ids_NL = read_window_ids(self.directory.windows_file)
        for index, windows in enumerate(self.micro_batches):
            hidden_BLH, calls = outside.record(ids_NL[windows].to(self.skeleton.device))
            if index == 0:
                self.skeleton.check_calls(ids_NL[windows].shape, calls)
            self.states.write(index, hidden_BLH)

    def make_room(self) -> None:
        """Room for the hidden states before a layer, which are then written one micro-batch after another."""
        self._states = None
        self._states = self.others()

    def others(self) -> Activations:
        """Room for others of the same windows."""
        first = self.micro_batches[0].start
        return Activations(
            (self.num_windows, self.window_length, self.skeleton.hidden_size),
            self.skeleton.dtype,
            [slice(windows.start - first, windows.stop - first) for windows in self.micro_batches],
            self.room if self._states is None else self._states.room_left,
        )

    def leave(self) -> None:
        """Free them: they are not needed any more, or another worker has taken them over."""
        self._states = None

    def input(self, layer_index: int, index: int) -> tuple[Tensor, Call]:
        """What a layer reads of a micro-batch."""
        return self.on_device(layer_index, self.states.read(index))

    def inputs(self, layer_index: int) -> Iterator[tuple[Tensor, Call]]:
        """What a layer reads of each micro-batch."""
        assert self.states.complete, "a layer is pruned with all windows or not at all"
        for index in range(len(self)):
            yield self.input(layer_index, index)

    def beginning(self, layer_index: int, num_tokens: int) -> tuple[Tensor, Call]:
        """What a layer reads of the first tokens of the first window."""
        return self.on_device(layer_index, self.states.read(0)[:1, :num_tokens])

    @cached_property
    def bytes_beside(self) -> int:
        """How much may be held beside the hidden states where layers are computed."""
        return self.states.room_left.bytes_to_compute

    @property
    def copied_bytes(self) -> int:
        """Of a window, what a forward begins with where hidden states do not lie where layers are computed."""
        states = self.states
        return 0 if states.device.type == self.skeleton.device.type else states.num_bytes // self.num_windows

    def on_device(self, layer_index: int, hidden_BLH: Tensor) -> tuple[Tensor, Call]:
        """Hidden states where they are computed with, and the layer's call for their shape."""
        return hidden_BLH.to(self.skeleton.device), self.skeleton.calls(tuple(hidden_BLH.shape[:2]))[layer_index]

    def keep(self, layer_index: int, always: bool = False) -> None:
        """Keep every few layers' input, also when replaying: it is complete before that layer's receipt, so a restart
        replays at most so many layers."""
        if always or layer_index % self.job.config.output.keep_entry_every == 0:
            self._save(layer_index, is_dense=False)
            # the older one goes once the newer one is there in all its parts
            if layer_index in self.directory.entries(self.job.num_replicas, is_dense=False):
                self.drop_before(layer_index)

    def keep_dense(self, layer_index: int) -> None:
        """Keep them as what the dense model gives before a layer."""
        self._save(layer_index, is_dense=True)
        self.drop_dense()

    def drop_before(self, layer_index: int) -> None:
        """Delete kept inputs of earlier layers of the same segment, and what is not needed of the dense model's."""
        if self._deletes:
            (segment,) = (each for each in self.job.segments if each.first < layer_index <= each.stop)
            kept = self.directory.entries(self.job.num_replicas, is_dense=False)
            older = kept.intersection(range(segment.first + 1, layer_index))
            self.directory.drop_entries(older, self.job.num_replicas, is_dense=False)
            self.drop_dense()

    def drop_dense(self) -> None:
        """Delete inputs of the dense model that no layer will need again."""
        if self._deletes:
            progress = self.job.progress()
            superfluous = obsolete(progress.dense_entries, needed_dense(self.job.segments, progress))
            self.directory.drop_entries(superfluous, self.job.num_replicas, is_dense=True)

    @property
    def _deletes(self) -> bool:
        return not self.rank and self.job.needs_activations

    def _save(self, layer_index: int, is_dense: bool) -> None:
        self.job.guard.check()
        for part, indices in zip(self._parts, self.replicas.parts, strict=True):
            self.states.save(self.directory.entry_file(layer_index, part, is_dense), indices)
