"""Two workers that do the same, since one of them was given up for lost: what is committed first stays."""

from pathlib import Path

import pytest
import torch

from pipeline.activations import Activations, Room, split_windows
from pipeline.errors import Incomplete
from pipeline.lease import acquire
from pipeline.store import Receipt, RunDirectory

RECEIPT = Receipt(
    layer_index=1,
    fingerprint="of the run",
    file="model-00003-of-00004.safetensors",
    num_bytes=0,
    sha256="",
    num_tokens=8,
    attempt=1,
    num_layers_replayed=0,
    seconds=1.0,
    environment={},
    linears=[],
)


def test_of_two_receipts_for_a_layer_the_first_counts(tmp_path: Path) -> None:
    directory, (lease, _) = RunDirectory(tmp_path, 3), acquire(tmp_path)
    try:
        first = directory.commit_layer(RECEIPT, {"weight": torch.ones(2)}, lease.guard)
        written = directory.receipt_file(1).stat()
        late = RECEIPT.model_copy(update={"seconds": 99.0})
        assert directory.commit_layer(late, {"weight": torch.ones(2)}, lease.guard) == first
    finally:
        lease.release()
    assert directory.receipts() == [first]
    now = directory.receipt_file(1).stat()
    assert (now.st_ino, now.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)


def test_a_kept_input_that_another_worker_has_dropped_means_run_again(tmp_path: Path) -> None:
    states = Activations((2, 3, 4), torch.float32, split_windows(2, 1), Room(10**6, tmp_path))
    with pytest.raises(Incomplete, match="is gone"):
        states.load(tmp_path / "layer-00002-0.npy", range(2))
