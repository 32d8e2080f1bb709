"""A job: one run with every choice settled, small enough to be sent to any worker."""

from pipeline.config import RunConfig
from pipeline.lease import LeaseGuard
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.settings import Settings
from pipeline.storage import Location
from pipeline.store import ResumePoint, RunDirectory


class Resolved(Settings):
    """What `auto` came to. Part of the fingerprint: none of it may change between the attempts of a run."""

    dtype: str
    device: str
    threads: int
    windows_per_micro_batch: int
    num_replicas: int = 1


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
    def survey_needs_activations(self) -> bool:
        """Whether the allocation looks at the inputs of the linears of the dense model."""
        statistic = self.config.pruning.allocation.statistic
        return statistic is not None and statistic.needs_inputs

    def resume_point(self) -> ResumePoint:
        """Where the run goes on."""
        num_committed = len(self.directory.receipts())
        if not self.needs_activations:
            return ResumePoint(num_committed, num_committed)
        return self.directory.resume_point(num_committed)

    def open_source(self) -> Checkpoint:
        return open_checkpoint(str(self.source))
