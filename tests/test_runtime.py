"""How this process computes: what it has freed stays for the next forward, and goes back after it."""

import gc
import platform
from pathlib import Path

import numpy
import pytest
import torch

from pipeline.runtime import _anonymous_bytes, keeping_freed_memory, return_memory, with_memory_kept

MEBIBYTE = 2**20
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")


def resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def settled_bytes() -> int:
    """Resident, once what earlier tests have left is gone."""
    gc.collect()
    return_memory()
    return resident_bytes()


def use_and_free(num_bytes: int) -> None:
    torch.ones(num_bytes, dtype=torch.uint8)


@needs_glibc
def test_what_a_forward_frees_is_there_for_the_next_and_goes_back_after_it() -> None:
    before = settled_bytes()
    with keeping_freed_memory():
        # each as large as any glibc can be told to keep
        tensors = [torch.ones(20 * MEBIBYTE, dtype=torch.uint8) for _ in range(10)]
        del tensors
        within = resident_bytes() - before
    after = resident_bytes() - before
    assert within > 190 * MEBIBYTE
    assert after < 10 * MEBIBYTE


@needs_glibc
def test_it_does_not_grow_where_small_things_stay_between_large_ones() -> None:
    before, stays, held = settled_bytes(), [], []
    for _ in with_memory_kept(range(40)):
        for _ in range(4):
            use_and_free(40 * MEBIBYTE)
            stays += [torch.zeros(index) for index in range(1, 40)]
        held.append(resident_bytes() - before)
    # the blocks of one forward, those of the next, and 64 MiB
    assert min(held) > 30 * MEBIBYTE
    assert max(held) < (2 * 4 * 40 + 64) * MEBIBYTE
    assert resident_bytes() - before < 10 * MEBIBYTE


@needs_glibc
def test_pages_of_a_mapped_file_do_not_count(tmp_path: Path) -> None:
    numpy.ones(100 * MEBIBYTE, dtype=numpy.uint8).tofile(tmp_path / "states")
    before = settled_bytes(), _anonymous_bytes()
    mapped = numpy.memmap(tmp_path / "states", dtype=numpy.uint8, mode="r")
    assert int(mapped[::1024].max()) == 1
    after = resident_bytes(), _anonymous_bytes()
    assert after[0] - before[0] > 90 * MEBIBYTE
    assert after[1] - before[1] < 10 * MEBIBYTE


@needs_glibc
@pytest.mark.parametrize("fails", [False, True])
def test_large_blocks_go_back_at_once_outside(fails: bool) -> None:
    try:
        with keeping_freed_memory():
            assert not fails
    except AssertionError:
        pass
    before = settled_bytes()
    use_and_free(200 * MEBIBYTE)
    assert resident_bytes() - before < 10 * MEBIBYTE


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    with keeping_freed_memory():
        use_and_free(MEBIBYTE)
