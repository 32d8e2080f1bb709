"""What a worker keeps: what is committed first stays, and hidden states are the same wherever they lie."""

import itertools
import os
from collections.abc import Callable
from errno import EACCES, EIO, ESTALE
from pathlib import Path

import numpy as np
import pytest
import torch
from s3 import Server

from pipeline.activations import Activations, Room, from_integers, split_windows
from pipeline.calibration.windows import read_window_ids
from pipeline.config import RuntimeSettings
from pipeline.errors import Incomplete, Refusal
from pipeline.lease import LeaseGuard, LeaseLost, acquire, held
from pipeline.models.checkpoint import open_file
from pipeline.models.tensor_file import read_tensors
from pipeline.segments import Segment
from pipeline.storage import locate
from pipeline.store import Receipt, RunDirectory, save_tensors

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


class Meanwhile(LeaseGuard):
    """A guard at one of whose checks something else happens."""

    def __init__(self, guard: LeaseGuard, number: int, happens: Callable[[], object]) -> None:
        super().__init__(guard.directory, guard.owner, guard.number)
        checks = itertools.count(1)

        def check() -> None:
            guard.check()
            if next(checks) == number:
                happens()

        object.__setattr__(self, "check", check)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_worker_given_up_for_lost_that_commits_first_counts(number: int, tmp_path: Path) -> None:
    """Its file and its receipt belong together, whenever it wakes; other bytes are told of at once."""
    directory, (lease, _) = RunDirectory(tmp_path, 3), acquire(tmp_path)
    file = tmp_path / "model" / RECEIPT.file
    kept: list[tuple[Receipt, int]] = []

    def commit() -> None:
        first = directory.commit_layer(RECEIPT, {"weight": torch.zeros(2)}, lease.guard)
        kept.append((first, file.stat().st_ino))

    try:
        guard, late = Meanwhile(lease.guard, number, commit), RECEIPT.model_copy(update={"seconds": 99.0})
        if number == 4:
            with pytest.raises(Refusal, match="two workers came to other bytes"):
                directory.commit_layer(late, {"weight": torch.ones(2)}, guard)
            return
        assert directory.commit_layer(late, {"weight": torch.ones(2)}, guard) == kept[0][0]
        assert file.stat().st_ino == kept[0][1] and directory.receipts() == [kept[0][0]]
    finally:
        lease.release()


def test_an_owner_that_was_replaced_while_it_wrote_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new owner deletes what the one before has not finished."""

    def save(tensors: object, temporary: Path, metadata: object) -> None:
        temporary.unlink()

    def check() -> None:
        raise LeaseLost("taken over")

    monkeypatch.setattr("pipeline.store.save_file", save)
    with pytest.raises(LeaseLost):
        save_tensors({}, tmp_path / "model.safetensors", check)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_shard_may_be_read_by_whom_the_umask_lets(mask: int, tmp_path: Path) -> None:
    """safetensors alone leaves a file for its owner, and the server that is to run the model may be someone else."""
    before = os.umask(mask)
    try:
        save_tensors({"weight": torch.ones(2)}, tmp_path / "model.safetensors", lambda: None)
        (tmp_path / "other.json").write_text("{}")
    finally:
        os.umask(before)
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1 and modes.pop() & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize(("number", "kind"), [(ESTALE, Incomplete), (EIO, Incomplete), (EACCES, Refusal)])
def test_a_file_system_that_fails_a_read_is_a_sentence(
    number: int, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged content is another thing: it is there to stay."""
    directory, (lease, _) = RunDirectory(tmp_path, 3), acquire(tmp_path)
    directory.commit_layer(RECEIPT, {"weight": torch.ones(2)}, lease.guard)
    lease.release()
    file = tmp_path / "model" / RECEIPT.file
    entries, (receipt,) = open_file(file).entries, directory.receipts()
    states = Activations((2, 3, 4), torch.float32, split_windows(2, 1), Room(10**6, tmp_path))

    def fail(*arguments: object, **more: object) -> None:
        raise OSError(number, "as the system says")

    for name in ("pathlib.Path.stat", "pathlib.Path.open", "pathlib.Path.iterdir", "numpy.load"):
        monkeypatch.setattr(name, fail)
    monkeypatch.setattr("pyarrow.parquet.read_table", fail)
    segments = [Segment(0, 3)]
    for ask in (
        lambda: held(tmp_path),
        lambda: directory.commit_layer(RECEIPT, {}, Meanwhile(lease.guard, 0, print)),
        lambda: directory.check_committed([receipt.model_copy(update={"layer_index": 0})], "of the run", segments),
        lambda: read_tensors(file, entries),
        lambda: read_window_ids(tmp_path / "windows.parquet"),
        lambda: states.load(tmp_path / "layer-00002-0.npy", range(2)),
    ):
        with pytest.raises(kind, match="as the system says"):
            ask()


def test_a_kept_input_that_another_worker_has_dropped_means_run_again(s3: Server, tmp_path: Path) -> None:
    states = Activations((2, 3, 4), torch.float32, split_windows(2, 1), Room(10**6, tmp_path))
    for folder in (tmp_path, locate(s3.new_url())):
        with pytest.raises(Incomplete, match="is gone"):
            states.load(folder / "layer-00002-0.npy", range(2))


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
