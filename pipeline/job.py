"""A job: one run with every choice settled, small enough to be sent to any worker."""

from pipeline.activations import split_windows
from pipeline.config import Granularity, RunConfig
from pipeline.lease import LeaseGuard
from pipeline.models.checkpoint import Checkpoint, find_again, open_checkpoint
from pipeline.runtime import Machine
from pipeline.segments import Progress, Segment, Stretch, Work, cut, work_left
from pipeline.settings import Settings
from pipeline.storage import Location, locate
from pipeline.store import RunDirectory


class Resolved(Settings):
    """What `auto` came to. Part of the fingerprint: none of it may change between the attempts of a run."""

    dtype: str
    device: str
    threads: int
    windows_per_micro_batch: int
    num_replicas: int = 1
    granularity: Granularity = "layer"


class Job(Settings):
    """Everything a worker needs to know; the windows lie in the run directory.

    `measured`: what the allocation measured of every layer, empty where it measures nothing or has not done so yet.
    """

    config: RunConfig
    resolved: Resolved
    source: Location
    num_layers: int
    measured: tuple[float, ...]
    fingerprint: str
    attempt: int
    guard: LeaseGuard

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.guard.directory, self.num_layers)

    @property
    def num_tokens(self) -> int:
        return self.config.calibration.num_windows * self.config.calibration.window_length

    @property
    def needs_activations(self) -> bool:
        """Whether the method looks at the inputs of the linears at all."""
        return self.config.pruning.method.statistic.needs_inputs

    @property
    def is_dense(self) -> bool:
        """Whether every layer is pruned on what it reads in the dense model."""
        return self.needs_activations and self.config.pruning.propagation == "dense"

    @property
    def segments(self) -> list[Segment]:
        """Where pruned propagation begins anew."""
        return segments_of(self.config, self.num_layers)

    @property
    def num_replicas(self) -> int:
        return self.resolved.num_replicas

    @property
    def num_workers_here(self) -> int:
        """How many workers may hold hidden states on this machine at once, at most."""
        cluster = self.config.cluster
        is_one_at_a_time = self.config.pruning.propagation == "pruned" and self.num_replicas == 1
        if cluster.address == "none" or is_one_at_a_time:
            return 1
        return max(1, int(Machine.here().num_cores // cluster.worker.num_cpus))

    @property
    def micro_batches(self) -> list[slice]:
        """The windows of each."""
        return split_windows(self.config.calibration.num_windows, self.resolved.windows_per_micro_batch)

    def progress(self) -> Progress:
        """What is there of the run."""
        directory, committed = self.directory, self.directory.committed()
        if not self.needs_activations:
            return Progress(committed)
        entries, dense_entries = (directory.entries(self.num_replicas, is_dense) for is_dense in (False, True))
        return Progress(committed, entries, dense_entries)

    def work_left(self) -> Work:
        """What is still to be done."""
        progress, keep_entry_every = self.progress(), self.config.output.keep_entry_every
        if self.needs_activations:
            return work_left(self.segments, progress, keep_entry_every, self.is_dense)
        missing = [segment for segment in self.segments if segment.first not in progress.committed]
        return Work(None, tuple(Stretch(segment, segment.first, segment.first) for segment in missing))

    @property
    def is_from_hub(self) -> bool:
        """Whether every host downloads the model for itself."""
        return not locate(self.config.model.path).is_dir()

    def find_source(self) -> Location:
        """Where the dense model lies; one from the hub is downloaded to this host if it has only been to another."""
        return find_again(self.source, self.config.model.path)

    def open_source(self) -> Checkpoint:
        """The dense model."""
        return open_checkpoint(str(self.find_source()))


def segments_of(config: RunConfig, num_layers: int) -> list[Segment]:
    """Where pruned propagation begins anew; where nothing flows from layer to layer, every layer stands alone."""
    if not config.pruning.method.statistic.needs_inputs:
        return cut(num_layers, num_layers)
    num_segments = {"pruned": 1, "shard": config.cluster.num_shards, "dense": num_layers}
    return cut(num_layers, int(num_segments[config.pruning.propagation]))
