"""How this process computes: what it has freed stays for the next forward, and goes back after it."""

import platform
from pathlib import Path

import pytest
import torch

from pipeline.runtime import keeping_freed_memory, return_memory, with_memory_kept

MEBIBYTE = 2**20
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")


def resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def use_and_free(num_bytes: int) -> None:
    torch.ones(num_bytes, dtype=torch.uint8)


@needs_glibc
def test_what_a_forward_frees_is_there_for_the_next_and_goes_back_after_it() -> None:
    return_memory()
    before = resident_bytes()
    with keeping_freed_memory():
        use_and_free(200 * MEBIBYTE)
        kept = resident_bytes() - before
    after = resident_bytes() - before
    assert kept > 190 * MEBIBYTE
    assert after < 10 * MEBIBYTE


@needs_glibc
def test_it_does_not_grow_where_small_things_stay_between_large_ones() -> None:
    return_memory()
    before, stays, held = resident_bytes(), [], []
    for _ in with_memory_kept(range(40)):
        for _ in range(4):
            use_and_free(40 * MEBIBYTE)
            stays += [torch.zeros(index) for index in range(1, 40)]
        held.append(resident_bytes() - before)
    # of one forward, as much again that its gaps do not fit, and what may come to it before it goes back
    assert min(held) > 30 * MEBIBYTE
    assert max(held) < (2 * 4 * 40 + 64) * MEBIBYTE
    assert resident_bytes() - before < 10 * MEBIBYTE


@needs_glibc
@pytest.mark.parametrize("fails", [False, True])
def test_large_blocks_go_back_at_once_outside(fails: bool) -> None:
    try:
        with keeping_freed_memory():
            assert not fails
    except AssertionError:
        pass
    before = resident_bytes()
    use_and_free(200 * MEBIBYTE)
    assert resident_bytes() - before < 10 * MEBIBYTE


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    with keeping_freed_memory():
        use_and_free(MEBIBYTE)
