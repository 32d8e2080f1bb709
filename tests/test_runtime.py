"""How this process computes: what it has freed stays for the next forward and goes back after it; what it does slowly
it says."""

import gc
import platform
from pathlib import Path

import numpy
import pytest
import torch
from tiny import save_model, save_text, save_tokenizer, save_windows, write_config

from cluster.planning.command import PlanOptions, plan
from pipeline.config import EvaluateConfig
from pipeline.config_file import load_config
from pipeline.evaluate import evaluate_checkpoint
from pipeline.local import run_locally
from pipeline.preparation import begin, opened, prepare
from pipeline.runtime import (
    Machine,
    _anonymous_bytes,
    _has_bfloat16_products,
    keeping_freed_memory,
    return_memory,
    slow_products,
    with_memory_kept,
)

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


@pytest.mark.parametrize("has_them", [False, True])
def test_a_slow_dtype_is_told_of_by_each_command_and_once_in_a_run(
    has_them: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pipeline.runtime._has_bfloat16_products", lambda: has_them)
    model = save_tokenizer(save_model(tmp_path / "m", "llama", torch.bfloat16))
    windows = save_windows(tmp_path / "windows.parquet", 4, 16)
    config = load_config(write_config(tmp_path / "run.yaml", model, windows, tmp_path / "out", "magnitude"), [])
    text = {"text": str(save_text(tmp_path / "text.txt", 100)), "window_length": 20}
    told: list[str] = []

    planned = plan(config, PlanOptions())
    prepared = prepare(config, Machine(1, has_cuda=False), told.append)
    with opened(prepared) as (guard, _):
        run_locally(begin(prepared, guard, lambda job: []), prepared, lambda receipt: None)
    prepare(config, Machine(1, has_cuda=False), told.append)
    evaluate_checkpoint(
        EvaluateConfig.model_validate(
            {"model": {"path": str(model)}, "evaluation": text, "runtime": {"threads": 1, "device": "cpu"}}
        ),
        told.append,
    )

    sentence = slow_products(torch.bfloat16, "cpu")
    if has_them:
        assert sentence is None and told == [] and "model.dtype" not in planned
    else:
        assert sentence is not None and told == [sentence, sentence] and planned.count(sentence) == 1


@pytest.mark.parametrize(("dtype", "device"), [(torch.float32, "cpu"), (torch.bfloat16, "cuda")])
def test_what_is_not_slow_is_not_told_of(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.runtime._has_bfloat16_products", lambda: False)
    assert slow_products(dtype, device) is None


@pytest.mark.skipif(platform.machine() != "x86_64" or platform.system() != "Linux", reason="reads flags of x86")
def test_products_of_bfloat16_need_avx512() -> None:
    line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    assert _has_bfloat16_products() == ({"avx512bw", "avx512vl", "avx512dq"} <= set(line.split()))
