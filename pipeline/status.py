"""How a run is doing, read from its directory alone: no process needs to be alive for it."""

from dataclasses import dataclass

from pydantic import ValidationError

from pipeline import lease
from pipeline.clock import clock
from pipeline.errors import Refusal
from pipeline.files import read_text
from pipeline.lease import Held
from pipeline.models.checkpoint import INDEX_NAME
from pipeline.record import AllocationRecord, RunRecord
from pipeline.storage import Location
from pipeline.store import Receipt, RunDirectory


@dataclass(frozen=True)
class Facts:
    """What a run directory tells. `num_layers` is unknown until the allocation is written, just before the first layer.

    `is_complete`: the model's index is there. `is_reported`: so is the report, and nothing is left to do.
    """

    path: str
    choice: str
    num_layers: int | None
    receipts: list[Receipt]
    lease: Held | None
    is_complete: bool
    is_reported: bool


def look(path: Location) -> Facts:
    """The facts of the run in a directory. Raises Refusal where there is none."""
    if not path.is_dir():
        raise Refusal(f"run directory {path}: no such folder; give the output.path of a run")
    record, newest = RunRecord.read(path), lease.held(path)
    num_layers = _num_layers(RunDirectory(path, 0))
    directory = RunDirectory(path, num_layers or 0)
    if record is None and newest is None and not directory.calibration.is_dir():
        raise Refusal(f"run directory {path}: holds no run of shardprune; give the output.path of a run")
    return Facts(
        path=str(path),
        choice=_choice(record) if record else "calibrating",
        num_layers=num_layers,
        receipts=directory.receipts(),
        lease=newest,
        is_complete=(directory.model / INDEX_NAME).exists(),
        is_reported=(path / "report.md").exists(),
    )


def describe(facts: Facts) -> str:
    """The facts in lines."""
    lines = [f"{facts.path}: {facts.choice}", f"state     {_state(facts)}", f"layers    {_layers(facts)}"]
    if facts.receipts:
        lines += [
            f"sparsity  {_sparsity(facts.receipts)}",
            f"time      {_time(facts)}",
            f"attempts  {_attempts(facts)}",
        ]
    return "\n".join([*lines, f"lease     {_lease(facts)}", *_warnings(facts.receipts)])


def _num_layers(directory: RunDirectory) -> int | None:
    file = directory.allocation_file
    try:
        return len(AllocationRecord.model_validate_json(read_text(file)).layers)
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError):
        raise Refusal(f"{file}: is damaged; delete it and run again") from None


def _choice(record: RunRecord) -> str:
    """The method and what it prunes to, by the names of the fingerprint."""
    method, pattern = record.identity.get("pruning.method.name", "?"), record.identity.get("pruning.pattern", "?")
    sparsity = record.identity.get("pruning.sparsity", "?")
    return f"{method}, {f'sparsity {sparsity}' if pattern == 'unstructured' else pattern}"


def _state(facts: Facts) -> str:
    if facts.lease is not None and facts.lease.is_live:
        return "running"
    if facts.is_complete and facts.is_reported:
        return "finished"
    return "the model is complete, its report is not; run again for it" if facts.is_complete else "run again to resume"


def _layers(facts: Facts) -> str:
    if facts.num_layers is None:
        return "none yet, their number is not settled"
    return f"{len(facts.receipts)} of {facts.num_layers} committed"


def _sparsity(receipts: list[Receipt]) -> str:
    linears = [linear for receipt in receipts for linear in receipt.linears]
    num_weights, num_pruned = sum(x.num_weights for x in linears), sum(x.num_pruned for x in linears)
    errors = [receipt.relative_error for receipt in receipts]
    mean = sum(errors) / len(errors)
    return f"{num_pruned / max(1, num_weights):.4f} so far, error {mean:.4f}, of the last layer {errors[-1]:.4f}"


def _time(facts: Facts) -> str:
    assert facts.num_layers is not None, "a layer is committed after the allocation"
    per_layer = sum(receipt.seconds for receipt in facts.receipts) / len(facts.receipts)
    remaining = per_layer * (facts.num_layers - len(facts.receipts))
    # receipts know how long a layer was pruned, not how long it was run for the next one, nor how many are at once
    return f"{per_layer:.1f} s a layer" + (f", {clock(remaining)} of pruning to go" if remaining else "")


def _attempts(facts: Facts) -> str:
    num_attempts = max(receipt.attempt for receipt in facts.receipts)
    num_replayed = sum(receipt.num_layers_replayed for receipt in facts.receipts)
    return f"{num_attempts} that committed a layer, {num_replayed} layers run again after restarts"


def _lease(facts: Facts) -> str:
    if facts.lease is None or facts.lease.holder.released:
        return "held by nobody"
    process, seconds_left = facts.lease.holder.process, facts.lease.seconds_left
    who = f"process {process.pid} on {process.host}"
    if facts.lease.is_dead:
        return f"left by {who}, which is dead; the next run takes over at once"
    if seconds_left < 0:
        return f"left by {who}, ended {clock(-seconds_left)} ago; the next run takes over"
    return f"held by {who}, for {clock(seconds_left)} unless it is renewed"


def _warnings(receipts: list[Receipt]) -> list[str]:
    """Where the layers were pruned with different versions or devices, which may change their last bits."""
    first_layers: dict[str, int] = {}
    for receipt in receipts:
        first_layers.setdefault(str(receipt.environment), receipt.layer_index)
    if len(first_layers) < 2:
        return []
    return [f"warning: layers from {index} on were pruned with {known}" for known, index in first_layers.items()]
