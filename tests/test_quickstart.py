"""The quickstart model tells pruning methods apart, and its config passes every check."""

from pathlib import Path

import pytest
import torch

from pipeline.config_file import load_config
from pipeline.evaluate import Perplexity
from pipeline.local import run_locally
from pipeline.preparation import opened, prepare
from pipeline.runtime import Machine

QUICKSTART = Path("configs/quickstart")
HERE = Machine(num_cores=1, has_cuda=False)


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])


def pruned(method: str, out: Path) -> dict[str, Perplexity]:
    overrides = [
        "cluster={address: none}",
        f"pruning={{method: {{name: {method}}}, sparsity: 0.7}}",
        "calibration.num_windows=32",
        f"evaluation.text={out}/heldout.txt",
        f"output.path={out}/run",
    ]
    out.mkdir()
    (out / "heldout.txt").write_text((QUICKSTART / "text/heldout.txt").read_text()[:60_000])
    prepared = prepare(load_config(QUICKSTART / "run.yaml", overrides), HERE, print)
    with opened(prepared) as (job, _):
        return run_locally(job, prepared, lambda receipt: None)


def test_methods_are_told_apart_at_70_percent(tmp_path: Path) -> None:
    measured = {method: pruned(method, tmp_path / method) for method in ("magnitude", "wanda", "sparsegpt")}
    dense = measured["wanda"]["dense"].perplexity
    sparsegpt = measured["sparsegpt"]["pruned"].perplexity
    assert dense < sparsegpt
    for method in ("magnitude", "wanda"):
        assert 1.03 * sparsegpt < measured[method]["pruned"].perplexity


def test_the_committed_config_passes_every_check(tmp_path: Path) -> None:
    prepared = prepare(load_config(QUICKSTART / "run.yaml", [f"output.path={tmp_path}/out"]), HERE, print)
    assert prepared.resolved.dtype == "bfloat16"
    assert prepared.windows.ids_NL.shape == (128, 512)
    assert not (tmp_path / "out").exists()
    assert torch.equal(prepared.windows.ids_NL[:, 0], torch.zeros(128, dtype=torch.int64)), "each begins with BOS"


@pytest.mark.parametrize("recipe", sorted(Path(__file__).parents[1].glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid_configs(recipe: Path) -> None:
    assert load_config(recipe, []).output.path.startswith(("runs/", "/shared/runs/"))
