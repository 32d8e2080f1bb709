"""From a config to a job: everything is checked before anything is written."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from pipeline import lease
from pipeline.calibration.prepare import prepare_windows
from pipeline.calibration.windows import Windows
from pipeline.config import RunConfig
from pipeline.errors import Refusal
from pipeline.evaluate import evaluation_windows
from pipeline.files import storage_error, write_file, write_table
from pipeline.fingerprint import difference, digest, identify
from pipeline.job import Job, Resolved
from pipeline.models.architecture import compute_dtype, load_tokenizer
from pipeline.models.checkpoint import INDEX_NAME, Checkpoint, open_checkpoint
from pipeline.models.skeleton import Skeleton
from pipeline.runtime import Machine, resolve_device, resolve_micro_batch
from pipeline.settings import Settings
from pipeline.sparsity import NofM
from pipeline.store import RunDirectory


class RunRecord(Settings):
    """What run.yaml holds: the config as given, what `auto` came to, and what the fingerprint was made of."""

    fingerprint: str
    resolved: Resolved
    config: dict[str, Any]
    identity: dict[str, Any]
    source_files: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, output: Path) -> "RunRecord | None":
        """The record in a run directory, None where there is none."""
        file = RunDirectory(output, 0).settings_file
        try:
            return cls.model_validate(yaml.safe_load(file.read_text())) if file.is_file() else None
        except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError):
            raise Refusal(f"{file}: is not the record of a run; give another output.path") from None


@dataclass(frozen=True)
class Prepared:
    """A run that has passed every check; nothing has been written yet."""

    config: RunConfig
    resolved: Resolved
    source: Path
    num_layers: int
    windows: Windows
    evaluation_ids_NL: Tensor | None
    identity: dict[str, Any]
    source_files: dict[str, Any]


def prepare(config: RunConfig, machine: Machine, tell: Callable[[str], None]) -> Prepared:
    """Check everything that can be checked before the first layer, for workers on a kind of machine.

    Tells what takes long. Raises Refusal.
    """
    output = config.output.folder
    earlier = RunRecord.read(output)
    checkpoint = open_checkpoint(config.model.path, config.model.revision)
    resolved = _resolve(config, checkpoint, machine, earlier.resolved if earlier else None)
    trusted = config.model.trust_remote_code
    skeleton = Skeleton(checkpoint, getattr(torch, resolved.dtype), torch.device("cpu"), trusted)
    _check_layout(config, skeleton)
    tokenizer = load_tokenizer(checkpoint, skeleton.vocabulary_size, trusted)
    windows = prepare_windows(config.calibration, tokenizer, skeleton.vocabulary_size)
    text = config.evaluation.text
    evaluation_ids = evaluation_windows(text, tokenizer, config.evaluation_window_length) if text else None
    source_files = checkpoint.file_digests(earlier.source_files if earlier else {}, tell)
    identity = identify(config, resolved, checkpoint.header_digest(), source_files, windows.digest())
    lease.refuse_live(output)
    _check_output(output, RunRecord.read(output), identity, checkpoint.path)
    return Prepared(
        config, resolved, checkpoint.path, skeleton.num_layers, windows, evaluation_ids, identity, source_files
    )


@contextmanager
def opened(prepared: Prepared) -> Iterator[tuple[Job, str | None]]:
    """The job of a prepared run, whose directory belongs to this process until the end of the context.

    With it comes a sentence if the directory had to be taken over from a process that is gone.
    """
    path = prepared.config.output.folder
    try:
        path.mkdir(parents=True, exist_ok=True)
        held, taken_over = lease.acquire(path)
    except OSError as error:
        raise storage_error(path, error) from None
    try:
        directory = RunDirectory(path, prepared.num_layers)
        directory.drop_temporaries()
        fingerprint = digest(prepared.identity)
        receipts = directory.receipts()
        directory.check_committed(receipts, fingerprint)
        if len(receipts) < prepared.num_layers:
            (directory.model / INDEX_NAME).unlink(missing_ok=True)
        _write_record(directory, prepared, fingerprint)
        job = Job(
            config=prepared.config,
            resolved=prepared.resolved,
            source=prepared.source,
            num_layers=prepared.num_layers,
            fingerprint=fingerprint,
            attempt=1 + max((receipt.attempt for receipt in receipts), default=0),
            guard=held.guard,
        )
        yield job, taken_over
    finally:
        held.release()


def _resolve(config: RunConfig, checkpoint: Checkpoint, machine: Machine, settled: Resolved | None) -> Resolved:
    """What `auto` means: what it meant in the run's first attempt, else what suits this machine."""
    runtime = config.runtime
    asked = settled.device if settled and runtime.device == "auto" else runtime.device
    device = resolve_device(asked, machine)
    dtype = compute_dtype(checkpoint, config.model.dtype, torch.device(device))
    threads = runtime.threads if runtime.threads != "auto" else settled.threads if settled else machine.num_cores
    windows = (
        settled.windows_per_micro_batch
        if settled and runtime.micro_batch_tokens == "auto"
        else resolve_micro_batch(runtime.micro_batch_tokens, device, config.calibration.window_length)
    )
    return Resolved(
        dtype=str(dtype).removeprefix("torch."), device=device, threads=threads, windows_per_micro_batch=windows
    )


def _check_layout(config: RunConfig, skeleton: Skeleton) -> None:
    """Raises Refusal where windows, shards or pattern do not fit the model."""
    skeleton.calls((1, 2))  # an unsupported forward shows without weights
    if not any(skeleton.linears(layer_index) for layer_index in range(skeleton.num_layers)):
        raise Refusal(f"model {skeleton.checkpoint.path}: its layers have no linears to prune; it is not supported")
    skeleton.check_window_length("calibration.window_length", config.calibration.window_length)
    skeleton.check_window_length("evaluation.window_length", config.evaluation_window_length)
    num_shards = config.cluster.num_shards
    if num_shards != "auto" and num_shards > skeleton.num_layers:
        raise Refusal(f"cluster.num_shards = {num_shards}: the model has {skeleton.num_layers} layers; ask for fewer")
    for layer_index, pattern in enumerate(config.pruning.allocate(skeleton.num_layers)):
        for linear in skeleton.linears(layer_index):
            if isinstance(pattern, NofM) and linear.num_inputs % pattern.m:
                raise Refusal(
                    f"pruning.pattern = {pattern}: tensor {linear.key} has {linear.num_inputs} input columns, "
                    f"not a multiple of {pattern.m}; choose an M that divides it"
                )


def _check_output(output: Path, earlier: "RunRecord | None", identity: dict[str, Any], source: Path) -> None:
    if output.is_relative_to(source) or source.is_relative_to(output):
        raise Refusal(f"output.path = {output}: overlaps with the model's folder {source}; give another output.path")
    if earlier:
        differs = difference(earlier.identity, identity)
        if differs:
            raise Refusal(f"output.path = {output}: holds another run ({differs}); give another output.path")
        return
    existing = next((path for path in [output, *output.parents] if path.exists()), output)
    if not existing.is_dir():
        raise Refusal(f"output.path = {output}: {existing} is not a folder; give another output.path")
    if output.exists() and any(
        not file.name.startswith((lease.LEASE_NAME, lease.LOCK_NAME)) for file in output.iterdir()
    ):
        raise Refusal(f"output.path = {output}: holds files that are no run of shardprune; give a new or empty folder")


def _write_record(directory: RunDirectory, prepared: Prepared, fingerprint: str) -> None:
    """run.yaml first: it makes the directory that of this run, so that a restart goes on from anything after it."""
    config = prepared.config
    record = RunRecord(
        fingerprint=fingerprint,
        resolved=prepared.resolved,
        config=config.model_dump(mode="json"),
        identity=prepared.identity,
        source_files=prepared.source_files,
    )
    write_file(directory.settings_file, yaml.safe_dump(record.model_dump(mode="json"), sort_keys=False).encode())
    write_table(prepared.windows.to_table(config.calibration.seed), directory.windows_file)
    patterns = [str(pattern) for pattern in config.pruning.allocate(prepared.num_layers)]
    write_file(directory.path / "allocation.json", json.dumps({"layers": patterns}, indent=1).encode())
