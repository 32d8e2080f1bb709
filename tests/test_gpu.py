"""What only a GPU can tell: weights and hidden states on it are those of the host, and memory decides how, not what.

Without Ray and the rest of what the tests need: python -m pytest --noconftest -m gpu tests/test_gpu.py tests/numerics
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import digests, save_model, save_windows, write_config

from pipeline.config_file import load_config
from pipeline.local import run_locally, survey_locally
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.skeleton import Skeleton
from pipeline.preparation import begin, opened, prepare
from pipeline.runtime import Machine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("gpu") / "model", "llama", request.param)


@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16], ids=str)
def test_weights_on_a_gpu_are_those_that_are_stored(model: Path, computed_in: torch.dtype) -> None:
    skeleton = Skeleton(open_checkpoint(str(model)), computed_in, torch.device("cuda"))
    stored = skeleton.read_layer(0)
    before = {key: tensor.clone() for key, tensor in stored.items()}
    layer = skeleton.load_layer(0, stored)
    for linear in layer.linears:
        weight_OI = layer.weight_OI(linear)
        assert weight_OI.is_cuda and torch.equal(weight_OI.cpu(), before[linear.key].float())
        halved_OI = weight_OI.masked_fill(weight_OI < weight_OI.median(), 0)
        layer.replace(linear, halved_OI)
        assert torch.equal(layer.weight_OI(linear), halved_OI)
    for linear in layer.linears:
        written = layer.written()[linear.key]
        assert written.device.type == "cpu" and written.dtype == before[linear.key].dtype
        running = layer.module.get_parameter(f"{linear.name}.weight")
        assert torch.equal(written.to(computed_in), running.cpu())


def pruned(model: Path, folder: Path, **settings: Any) -> dict[str, str]:
    folder.mkdir()
    windows = save_windows(folder / "windows.parquet", 12, 16)
    chosen = {"runtime.device": "cuda", **settings}
    config = write_config(folder / "run.yaml", model, windows, folder / "out", "sparsegpt", **chosen)
    prepared = prepare(load_config(config, []), Machine.here(), print)
    with opened(prepared) as (guard, _):
        run_locally(begin(prepared, guard, survey_locally), prepared, lambda receipt: None)
    return digests(folder / "out" / "model")


@pytest.mark.parametrize("granularity", ["layer", "linear"])
def test_memory_decides_how_and_not_what(model: Path, tmp_path: Path, granularity: str) -> None:
    """Hidden states on the GPU, in RAM, and in a file; with one pass, forwards that stand and that are begun anew."""
    chosen = {"pruning.granularity": granularity}
    free = pruned(model, tmp_path / "free", **chosen)
    in_ram = pruned(model, tmp_path / "ram", **chosen, **{"runtime.gpu_bytes": 1})
    in_file = pruned(model, tmp_path / "file", **chosen, **{"runtime.gpu_bytes": 1, "runtime.ram_bytes": 1})
    assert free == in_ram == in_file
