"""How this process computes: what it has freed stays for the next forward and goes back after it; what it does slowly
it says."""

import gc
import platform
from pathlib import Path
from types import SimpleNamespace

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


@pytest.mark.parametrize("has_products", [False, True])
def test_a_slow_dtype_is_told_of_by_each_command_until_a_run_has_begun(
    has_products: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pipeline.runtime._has_bfloat16_products", lambda: has_products)
    model = save_tokenizer(save_model(tmp_path / "m", "llama", torch.bfloat16))
    windows = save_windows(tmp_path / "windows.parquet", 4, 16)
    config = load_config(write_config(tmp_path / "run.yaml", model, windows, tmp_path / "out", "magnitude"), [])
    sentence = slow_products("bfloat16", "cpu")
    assert (sentence is None) == has_products
    expected = [] if sentence is None else [sentence]

    told: list[str] = []
    prepared = prepare(config, Machine(1, has_cuda=False), told.append)
    assert told == expected
    with opened(prepared) as (guard, _):
        run_locally(begin(prepared, guard, lambda job: []), prepared, lambda receipt: None)
    prepare(config, Machine(1, has_cuda=False), told.append)
    assert told == expected

    values = {"path": str(model)}, {"text": str(save_text(tmp_path / "text.txt", 100)), "window_length": 20}
    settings = dict(zip(("model", "evaluation"), values, strict=True), runtime={"threads": 1, "device": "cpu"})
    told.clear()
    evaluate_checkpoint(EvaluateConfig.model_validate(settings), told.append)
    assert told == expected


@pytest.mark.parametrize(("address", "is_here"), [("none", True), ("local", True), ("auto", False)])
def test_a_plan_knows_of_slow_products_on_this_machine_alone(
    address: str, is_here: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pipeline.runtime._has_bfloat16_products", lambda: False)
    model = save_model(tmp_path / "m", "llama", torch.bfloat16)
    windows = save_windows(tmp_path / "windows.parquet", 4, 16)
    settings = {"cluster.address": address}
    config = load_config(write_config(tmp_path / "run.yaml", model, windows, tmp_path / "out", **settings), [])
    planned, told = plan(config, PlanOptions()), []
    assert ("model.dtype = bfloat16: " in planned) == is_here
    assert ("16 GFLOP/s in bfloat16" in planned, "160 GFLOP/s in bfloat16" in planned) == (is_here, not is_here)
    if address == "auto":
        prepare(config, Machine(1, has_cuda=False), told.append)
        assert told == []


@pytest.mark.parametrize(("dtype", "device"), [("float32", "cpu"), ("bfloat16", "cuda")])
def test_what_is_not_slow_is_not_told_of(dtype: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.runtime._has_bfloat16_products", lambda: False)
    assert slow_products(dtype, device) is None


@pytest.mark.parametrize("answer", [None, False, True])
def test_torch_is_asked_for_products_of_bfloat16(answer: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    operators = SimpleNamespace() if answer is None else SimpleNamespace(_is_mkldnn_bf16_supported=lambda: answer)
    monkeypatch.setattr("torch.ops.mkldnn", operators)
    assert _has_bfloat16_products() is bool(answer)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_torch_has_the_operator_that_is_asked() -> None:
    assert isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool)
