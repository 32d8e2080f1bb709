"""From a config to a job: everything is checked before anything is written."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline import lease
from pipeline.calibration.plan import Calibration, plan_calibration
from pipeline.calibration.reading import Reader
from pipeline.calibration.summary import write_calibration
from pipeline.calibration.vocabulary import Vocabulary
from pipeline.calibration.windows import Windows
from pipeline.config import RunConfig
from pipeline.errors import Refusal
from pipeline.evaluate import evaluation_windows
from pipeline.files import write_file
from pipeline.fingerprint import WINDOWS, content_ids, difference, digest, identify, with_allocation
from pipeline.job import Job, Resolved
from pipeline.lease import LeaseGuard
from pipeline.models.architecture import compute_dtype, load_tokenizer, text_tokens
from pipeline.models.channels import check_groups
from pipeline.models.checkpoint import INDEX_NAME, Checkpoint, open_checkpoint
from pipeline.models.feedforward import find_feed_forward
from pipeline.models.skeleton import Skeleton
from pipeline.planning.disk import check_room
from pipeline.record import RunRecord, read_measured, write_allocation
from pipeline.runtime import Machine, resolve_device, resolve_micro_batch, slow_products
from pipeline.sparsity import NofM
from pipeline.storage import Location, ObjectPath, is_within
from pipeline.store import RunDirectory


@dataclass(frozen=True)
class Prepared:
    """A run that has passed every check. `windows` and their digest are missing while texts are to be generated."""

    config: RunConfig
    resolved: Resolved
    source: Location
    sizes: list[dict[str, int]]
    calibration: Calibration
    windows: Windows | None
    evaluation_ids_NL: Tensor | None
    identity: dict[str, Any]
    source_files: dict[str, Any]

    @property
    def num_layers(self) -> int:
        return len(self.sizes)

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.config.output.folder, self.num_layers)


def prepare(config: RunConfig, machine: Machine, tell: Callable[[str], None]) -> Prepared:
    """Check everything that can be checked before the first layer, for workers on a kind of machine; write nothing.

    Tells what takes long, and what would not have to. Raises Refusal.
    """
    output = config.output.folder
    earlier = RunRecord.read(output)
    checkpoint = open_checkpoint(config.model.path, config.model.revision)
    resolved = resolve(config, checkpoint, machine, earlier.resolved if earlier else None)
    trusted = config.model.trust_remote_code
    skeleton = Skeleton(checkpoint, getattr(torch, resolved.dtype), torch.device("cpu"), trusted)
    check_layout(config, resolved, skeleton)
    tokenizer = load_tokenizer(checkpoint, skeleton.vocabulary_size, trusted)
    text = config.evaluation.text
    evaluation_ids = evaluation_windows(text, tokenizer, config.evaluation_window_length) if text else None
    lease.refuse_live(output)
    source_files = checkpoint.file_digests(earlier.source_files if earlier else {}, tell)
    header_digest = checkpoint.header_digest()
    vocabulary = Vocabulary(skeleton.vocabulary_size, tokenizer, *text_tokens(checkpoint, skeleton))
    model_digest = digest({"header": header_digest, **content_ids(source_files)})
    folder = RunDirectory(output, skeleton.num_layers).calibration
    calibration = plan_calibration(Reader(config, resolved, skeleton, vocabulary, model_digest, folder))
    identity = identify(config, resolved, header_digest, source_files, calibration.generations)
    prepared = Prepared(
        config,
        resolved,
        checkpoint.path,
        skeleton.sizes,
        calibration,
        None,
        evaluation_ids,
        identity,
        source_files,
    )
    _check_output(prepared)
    if earlier is None:
        # later a full disk is what running again may cure
        check_room(config, resolved.num_replicas, skeleton)
        if config.cluster.is_here and (told := slow_products(resolved.dtype, resolved.device)):
            tell(told)
    return prepared if calibration.num_missing else with_windows(prepared)


def with_windows(prepared: Prepared) -> Prepared:
    """The same once no text is missing. Raises Refusal where they are too few, or not those of an earlier attempt."""
    windows = prepared.calibration.windows()
    identity = {**prepared.identity, WINDOWS: windows.digest()}
    settled = replace(prepared, windows=windows, identity=identity)
    _check_output(settled)
    return settled


@contextmanager
def opened(prepared: Prepared, lasts_seconds: float = lease.LASTS_SECONDS) -> Iterator[tuple[LeaseGuard, str | None]]:
    """The lease on the directory of a prepared run, which belongs to this process until the end of the context.

    With it comes a sentence if the directory had to be taken over from a process that is gone.
    """
    held, taken_over = lease.acquire(prepared.config.output.folder, lasts_seconds)
    try:
        prepared.directory.drop_temporaries()
        prepared.calibration.keep_fetched()
        yield held.guard, taken_over
    finally:
        held.release()


def begin(prepared: Prepared, guard: LeaseGuard, survey: Callable[[Job], list[float]]) -> Job:
    """The job of a run whose windows are known. Raises Refusal where what is committed is not what it should be.

    `survey` gives what the allocation measures of every layer; it is asked once in a run, if at all.
    """
    directory, config = prepared.directory, prepared.config
    receipts = directory.receipts()
    job = Job(
        config=config,
        resolved=prepared.resolved,
        source=prepared.source,
        num_layers=prepared.num_layers,
        measured=read_measured(directory) if config.pruning.allocation.statistic else (),
        fingerprint="",
        attempt=1 + max((receipt.attempt for receipt in receipts), default=0),
        guard=guard,
    )
    if config.pruning.allocation.statistic is not None and not job.measured:
        guard.check()
        _write_record(prepared, digest(prepared.identity))
        job = job.model_copy(update={"measured": tuple(survey(job))})
    fingerprint = digest(with_allocation(prepared.identity, job.measured))
    directory.check_committed(receipts, fingerprint, job.segments)
    guard.check()
    if len(receipts) < prepared.num_layers:
        (directory.model / INDEX_NAME).unlink(missing_ok=True)
    # a report is of the config in run.yaml, or there is none
    directory.report_file.unlink(missing_ok=True)
    _write_record(prepared, fingerprint)
    write_allocation(directory, job.measured, config.pruning.allocate(prepared.sizes, job.measured))
    return job.model_copy(update={"fingerprint": fingerprint})


def resolve(config: RunConfig, checkpoint: Checkpoint, machine: Machine, settled: Resolved | None) -> Resolved:
    """What `auto` means: what it meant in the run's first attempt, else what suits this machine."""
    runtime = config.runtime
    asked = settled.device if settled and runtime.device == "auto" else runtime.device
    device = resolve_device(asked, machine)
    dtype = compute_dtype(checkpoint, config.model.dtype, torch.device(device))
    threads = runtime.threads if runtime.threads != "auto" else settled.threads if settled else machine.num_cores
    windows = (
        settled.windows_per_micro_batch
        if settled and isinstance(runtime.micro_batch_tokens, str)
        else resolve_micro_batch(runtime.micro_batch_tokens, device, config.calibration.window_length)
    )
    return Resolved(
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        threads=threads,
        windows_per_micro_batch=windows,
        num_replicas=config.cluster.num_replicas,
        granularity=config.pruning.settle_granularity(settled.granularity if settled else None),
    )


def check_layout(config: RunConfig, resolved: Resolved, skeleton: Skeleton) -> None:
    """Raises Refusal where windows, shards, replicas or pattern do not fit the model."""
    skeleton.calls((1, 2))  # an unsupported forward shows without weights
    if not any(skeleton.linears(layer_index) for layer_index in range(skeleton.num_layers)):
        raise Refusal(f"model {skeleton.checkpoint.path}: its layers have no linears to prune; it is not supported")
    if config.pruning.method.prunes_blocks:
        for layer_index, module in enumerate(skeleton.layers):
            find_feed_forward(layer_index, module, skeleton.linears(layer_index))
    skeleton.check_window_length("calibration.window_length", config.calibration.window_length)
    skeleton.check_window_length("evaluation.window_length", config.evaluation_window_length)
    num_shards = config.cluster.num_shards
    if num_shards != "auto" and num_shards > skeleton.num_layers:
        raise Refusal(f"cluster.num_shards = {num_shards}: the model has {skeleton.num_layers} layers; ask for fewer")
    if num_shards == "auto" and config.pruning.propagation == "shard":
        raise Refusal(
            "pruning.propagation = 'shard': what comes out depends on where shards begin; give cluster.num_shards"
        )
    num_micro_batches = math.ceil(config.calibration.num_windows / resolved.windows_per_micro_batch)
    if resolved.num_replicas > num_micro_batches:
        raise Refusal(
            f"cluster.num_replicas = {resolved.num_replicas}: there are {num_micro_batches} micro-batches to share; "
            "ask for fewer replicas, more calibration.num_windows or less runtime.micro_batch_tokens"
        )
    if isinstance(config.pruning.target, NofM):
        check_groups(skeleton, config.pruning.target, config.pruning.permute)


def _check_output(prepared: Prepared) -> None:
    """Raises Refusal where the run directory cannot be that of this run."""
    output, source = prepared.config.output.folder, prepared.source
    earlier = RunRecord.read(output)
    if is_within(output, source) or is_within(source, output):
        raise Refusal(f"output.path = {output}: overlaps with the model's folder {source}; give another output.path")
    if earlier:
        differs = difference(earlier.identity, prepared.identity)
        if differs:
            raise Refusal(f"output.path = {output}: holds another run ({differs}); give another output.path")
        return
    if not isinstance(output, ObjectPath):
        existing = next((path for path in [output, *output.parents] if path.exists()), output)
        if not existing.is_dir():
            raise Refusal(f"output.path = {output}: {existing} is not a folder; give another output.path")
    if output.is_dir() and not all(map(_may_stand_in_a_new_run, output.iterdir())):
        raise Refusal(f"output.path = {output}: holds files that are no run of shardprune; give a new or empty folder")


def _may_stand_in_a_new_run(file: Location) -> bool:
    """The lease, calibration data of an attempt that got no further, and what a killed process left half written."""
    ours = (lease.LEASE_NAME, RunDirectory(file.parent, 0).calibration.name)
    return file.name in ours or ".tmp-" in file.name


def _write_record(prepared: Prepared, fingerprint: str) -> None:
    """run.yaml first: it makes the directory that of this run, so that a restart goes on from anything after it."""
    directory, windows = prepared.directory, prepared.windows
    assert windows is not None, "the windows are known"
    record = RunRecord(
        fingerprint=fingerprint,
        resolved=prepared.resolved,
        config=prepared.config.model_dump(mode="json"),
        identity=prepared.identity,
        source_files=prepared.source_files,
    )
    write_file(directory.settings_file, record.to_yaml())
    write_calibration(prepared.calibration, windows, directory.calibration)
