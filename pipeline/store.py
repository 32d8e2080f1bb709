"""The run directory: what has been committed, how a layer is committed, and where a run resumes.

A layer's weights are written first and its receipt last, so a receipt proves that the layer is done.
"""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import Incomplete, Refusal
from pipeline.faults import reading
from pipeline.files import create_file, delete_folder, read_text, sha256_of_file, written_whole
from pipeline.layer import LinearResult
from pipeline.lease import LEASE_NAME, LeaseGuard
from pipeline.segments import Segment
from pipeline.settings import Settings
from pipeline.storage import Location, ObjectPath, status

# Inputs of layers that are kept: those within a segment, and those of the dense model.
_ENTRY_KINDS = {False: "layer", True: "dense"}


class Receipt(Settings):
    """Proof that a layer is committed. `num_layers_replayed` were run again, unsolved, just before this layer.

    `etag` is what an object store said of the file once it was there, None on a file system.
    """

    layer_index: int
    fingerprint: str
    file: str
    num_bytes: int
    sha256: str
    etag: str | None = None
    num_tokens: int
    attempt: int
    num_layers_replayed: int
    seconds: float
    environment: dict[str, str]
    linears: list[LinearResult]

    @property
    def relative_error(self) -> float:
        """Mean over the layer's linears."""
        return sum(linear.relative_error for linear in self.linears) / max(1, len(self.linears))


@dataclass(frozen=True)
class RunDirectory:
    """The files of a run."""

    path: Location
    num_layers: int

    @property
    def model(self) -> Location:
        return self.path / "model"

    @property
    def settings_file(self) -> Location:
        return self.path / "run.yaml"

    @property
    def allocation_file(self) -> Location:
        return self.path / "allocation.json"

    @property
    def calibration(self) -> Location:
        return self.path / "calibration"

    @property
    def windows_file(self) -> Location:
        return self.calibration / "windows.parquet"

    @property
    def report_file(self) -> Location:
        return self.path / "report.md"

    @property
    def evaluation_file(self) -> Location:
        return self.path / "metrics" / "evaluation.parquet"

    @property
    def outside_name(self) -> str:
        return self._shard_name(1)

    def layer_name(self, layer_index: int) -> str:
        return self._shard_name(layer_index + 2)

    def receipt_file(self, layer_index: int) -> Location:
        return self.path / "receipts" / f"layer-{layer_index:05d}.json"

    def entry_file(self, layer_index: int, part: int, is_dense: bool) -> Location:
        """A layer's input, of the windows of one replica."""
        return self.path / "activations" / f"{_ENTRY_KINDS[is_dense]}-{layer_index:05d}-{part}.npy"

    def entries(self, num_parts: int, is_dense: bool) -> set[int]:
        """The layers whose input is kept, in all its parts."""
        files = (self.path / "activations").glob(f"{_ENTRY_KINDS[is_dense]}-*-*.npy")
        kept = Counter(int(file.name.split("-")[1]) for file in files)
        return {layer_index for layer_index, num_kept in kept.items() if num_kept == num_parts}

    def receipts(self) -> list[Receipt]:
        """The receipts of the layers committed so far."""
        return [_read_receipt(self.receipt_file(layer_index)) for layer_index in sorted(self.committed())]

    def committed(self) -> set[int]:
        """The layers that have a receipt."""
        names = {file.name for file in (self.path / "receipts").glob("layer-*.json")}
        return {index for index in range(self.num_layers) if self.receipt_file(index).name in names}

    def check_committed(self, receipts: list[Receipt], fingerprint: str, segments: list[Segment]) -> None:
        """Raises Refusal where a committed layer is of another run or not what its receipt says, or one is left out."""
        committed = {receipt.layer_index for receipt in receipts}
        for segment in segments:
            done = [layer_index in committed for layer_index in range(segment.first, segment.stop)]
            if done != sorted(done, reverse=True):
                raise Refusal(
                    f"{self.receipt_file(segment.first + done.index(False))}: missing, though later layers are "
                    "committed; delete the receipts of later layers and run again"
                )
        for receipt in receipts:
            file = self.model / receipt.file
            where = f"layer {receipt.layer_index}: {file}"
            if receipt.fingerprint != fingerprint:
                raise Refusal(f"{where} was committed by a run with other settings; give another output.path")
            if not _is_intact(file, receipt):
                raise Refusal(
                    f"{where} is not what its receipt says; delete the receipts from "
                    f"{self.receipt_file(receipt.layer_index).name} on and run again"
                )

    def commit_layer(self, receipt: Receipt, tensors: dict[str, Tensor], guard: LeaseGuard) -> Receipt:
        """Write a layer's tensors, its metrics and its receipt; `receipt` comes without size and digest.

        A worker that was cut off and given up for lost may do the same: the first receipt counts, and is returned.
        Raises Refusal where it is of other bytes.
        """
        file, receipt_file = self.model / receipt.file, self.receipt_file(receipt.layer_index)

        def check() -> None:
            guard.check()
            with reading(receipt_file):
                if receipt_file.exists():
                    raise _Committed

        try:
            check()
            num_bytes, sha256 = save_tensors(tensors, file, check)
        except _Committed:
            return _read_receipt(receipt_file)
        found = status(file)
        if found.num_bytes != num_bytes:
            raise Incomplete(f"{file}: has {found.num_bytes} bytes, {num_bytes} were written; run again to resume")
        receipt = receipt.model_copy(update={"num_bytes": num_bytes, "sha256": sha256, "etag": found.etag})
        self.write_metrics(f"layer-{receipt.layer_index:05d}", _metrics_table(receipt), guard)
        guard.check()
        if create_file(receipt_file, receipt.model_dump_json(indent=1).encode()):
            return receipt
        first = _read_receipt(receipt_file)
        if first.sha256 != sha256:
            raise Refusal(
                f"layer {receipt.layer_index}: two workers came to other bytes for {file}; delete the receipts from "
                f"{receipt_file.name} on and run again, on machines of one kind"
            )
        return first

    def write_metrics(self, name: str, table: pa.Table, guard: LeaseGuard) -> None:
        with written_whole(self.path / "metrics" / f"{name}.parquet") as temporary:
            pq.write_table(table, temporary)
            guard.check()

    def drop_entries(self, layer_indices: Collection[int], num_parts: int, is_dense: bool) -> None:
        """Delete kept inputs of layers."""
        for layer_index in layer_indices:
            for part in range(num_parts):
                self.entry_file(layer_index, part, is_dense).unlink(missing_ok=True)

    def drop_activations(self) -> None:
        """Delete what only an unfinished run needs."""
        delete_folder(self.path / "activations")

    def drop_temporaries(self) -> None:
        """Delete what a killed process left half written; on an object store there is nothing of the kind."""
        # the second kind is what safetensors writes before it has a file's name
        patterns = ("*.tmp-*", ".tmp??????") if isinstance(self.path, Path) else ()
        for file in (file for pattern in patterns for file in self.path.rglob(pattern)):
            # a process that waits for this one's lease to end writes there
            if file.parent.name != LEASE_NAME:
                file.unlink(missing_ok=True)

    def _shard_name(self, number: int) -> str:
        return f"model-{number:05d}-of-{self.num_layers + 1:05d}.safetensors"


class _Committed(Exception):
    """Another worker has committed the layer."""


def save_tensors(tensors: dict[str, Tensor], path: Location, check: Callable[[], None]) -> tuple[int, str]:
    """A safetensors file as Hugging Face writes it; `check` raises where it must not appear, which is asked at the end.

    Returns its size and its sha256.
    """
    with written_whole(path) as temporary:
        save_file(dict(sorted(tensors.items())), temporary, metadata={"format": "pt"})
        # a new owner deletes what the one before has not finished
        check()
        written = temporary.stat().st_size, sha256_of_file(temporary)
        check()
    return written


def _is_intact(file: Location, receipt: Receipt) -> bool:
    """Whether a file is the one that its receipt was written for.

    An object store keeps the size and an ETag that changes with the content, so that nothing is downloaded; where the
    ETag is another (a run that was copied there), the bytes decide, as on a file system.
    """
    try:
        found = status(file)
        if found.num_bytes != receipt.num_bytes:
            return False
        if isinstance(file, ObjectPath) and found.etag == receipt.etag:
            return True
        return sha256_of_file(file) == receipt.sha256
    except FileNotFoundError:
        return False


def _read_receipt(file: Location) -> Receipt:
    try:
        return Receipt.model_validate_json(read_text(file))
    except (ValidationError, UnicodeDecodeError):
        raise Refusal(f"{file}: is damaged; delete it and the receipts of later layers and run again") from None


def _metrics_table(receipt: Receipt) -> pa.Table:
    rows: list[dict[str, Any]] = [
        {"layer_index": receipt.layer_index, **linear.model_dump()} for linear in receipt.linears
    ]
    return pa.Table.from_pylist(rows)
