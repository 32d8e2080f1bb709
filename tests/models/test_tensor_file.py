"""Tensors straight from their file: those that the library reads; and no look at them overlooks a NaN."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import Refusal
from pipeline.models.checkpoint import open_file
from pipeline.models.tensor_file import is_finite

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2)
OTHERS = (torch.float8_e4m3fn, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def test_tensors_are_those_that_the_library_reads(tmp_path: Path) -> None:
    numbers = 3 * torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    tensors = {str(dtype): numbers.to(dtype) for dtype in (*FLOATS, *OTHERS)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors")
    expected, found = load_file(tmp_path / "x.safetensors"), open_file(tmp_path / "x.safetensors").read(tensors)
    for key, tensor in expected.items():
        assert (found[key].shape, found[key].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(found[key].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


def test_a_file_that_was_cut_since_its_header_was_read_is_refused(tmp_path: Path) -> None:
    save_file({"first": torch.ones(10), "second": torch.ones(10)}, tmp_path / "x.safetensors")
    opened = open_file(tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[:-4])
    assert torch.equal(opened.read(["first"])["first"], torch.ones(10))
    with pytest.raises(Refusal, match="ends within tensor second"):
        opened.read(["first", "second"])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_number_that_is_not_finite_is_overlooked(dtype: torch.dtype, value: float) -> None:
    for size in (1, 7, 64, 1001):
        sound = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
        assert is_finite(sound)
        for place in {0, size // 2, size - 1}:
            unsound = sound.clone()
            unsound[place] = value
            assert not is_finite(unsound)
    assert is_finite(torch.empty(0, dtype=dtype))
