"""What a worker keeps: what is committed first stays, and hidden states are the same wherever they lie."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.activations import Activations, Room, from_integers, split_windows
from pipeline.config import RuntimeSettings
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_lie_in_the_first_place_that_has_room_and_are_saved_alike(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """A device that is the processor itself has its own share of room."""
    shape, micro_batches = (5, 3, 4), split_windows(5, 2)
    num_bytes = 60 * dtype.itemsize
    hidden_NLH = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    saved = set()
    for number, (device_bytes, ram_bytes) in enumerate(
        [(num_bytes, 0), (num_bytes - 1, num_bytes), (0, num_bytes - 1)]
    ):
        room = Room(ram_bytes, tmp_path / str(number), torch.device("cpu"), device_bytes)
        states = Activations(shape, dtype, micro_batches, room)
        left = states.room_left
        assert (left.device_bytes, left.ram_bytes) == [(0, 0), (num_bytes - 1, 0), (0, num_bytes - 1)][number]
        # what has no room at all lies in a file, which has no name any more
        assert (tmp_path / str(number)).exists() == (number == 2)
        for index, windows in enumerate(micro_batches):
            states.write(index, hidden_NLH[windows])
        states.save(tmp_path / f"{number}.npy", range(1, 3))
        saved.add((tmp_path / f"{number}.npy").read_bytes())
        again = Activations(shape, dtype, micro_batches, room)
        again.load(tmp_path / f"{number}.npy", range(1, 3))
        assert torch.equal(torch.cat([again.read(1), again.read(2)]), hidden_NLH[2:])
    assert len(saved) == 1
    integers = np.load(tmp_path / "0.npy")
    assert integers.shape == (3, 3, 4) and torch.equal(from_integers(integers, dtype), hidden_NLH[2:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_hidden_states_stay_there_within_their_budget(tmp_path: Path) -> None:
    for gpu_bytes, kind in [(96, "cuda"), (95, "cpu")]:
        room = Room.of(RuntimeSettings(gpu_bytes=gpu_bytes), tmp_path, device=torch.device("cuda"))
        states = Activations((2, 3, 4), torch.float32, split_windows(2, 1), room)
        assert states.device.type == kind
        states.write(1, torch.ones(1, 3, 4))
        states.save(tmp_path / f"{kind}.npy", range(1, 2))
    assert (tmp_path / "cuda.npy").read_bytes() == (tmp_path / "cpu.npy").read_bytes()
