"""The quickstart model tells pruning methods apart, and its config passes every check."""

from pathlib import Path

import pytest
import torch

from pipeline.config_file import load_config
from pipeline.evaluate import Perplexity
from pipeline.local import generate_locally, run_locally, survey_locally
from pipeline.preparation import begin, opened, prepare, with_windows
from pipeline.runtime import Machine

QUICKSTART = Path("configs/quickstart")
HERE = Machine(num_cores=1, has_cuda=False)
TEXT = f"calibration.source={{name: text, path: {QUICKSTART}/text/calibration.txt}}"


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])


def pruned(method: str, out: Path) -> dict[str, Perplexity]:
    overrides = [
        "cluster={address: none}",
        f"pruning={{method: {{name: {method}}}, sparsity: 0.7}}",
        TEXT,
        "calibration.num_windows=32",
        f"evaluation.text={out}/heldout.txt",
        f"output.path={out}/run",
    ]
    out.mkdir()
    (out / "heldout.txt").write_text((QUICKSTART / "text/heldout.txt").read_text()[:20_000])
    prepared = prepare(load_config(QUICKSTART / "run.yaml", overrides), HERE, print)
    with opened(prepared) as (guard, _):
        return run_locally(begin(prepared, guard, survey_locally), prepared, lambda receipt: None)


def test_methods_are_told_apart_at_70_percent(tmp_path: Path) -> None:
    measured = {method: pruned(method, tmp_path / method) for method in ("magnitude", "wanda", "sparsegpt")}
    dense = measured["wanda"]["dense"].perplexity
    sparsegpt = measured["sparsegpt"]["pruned"].perplexity
    assert dense < sparsegpt
    for method in ("magnitude", "wanda"):
        assert 1.03 * sparsegpt < measured[method]["pruned"].perplexity


def test_the_committed_config_passes_every_check(tmp_path: Path) -> None:
    prepared = prepare(load_config(QUICKSTART / "run.yaml", [f"output.path={tmp_path}/out"]), HERE, print)
    assert prepared.resolved.dtype == "float32"
    (generation,) = prepared.calibration.generations
    assert prepared.windows is None and generation.num_missing == generation.source.num_texts
    assert generation.prompts[0][0] == 0, "each text begins with BOS"
    assert generation.task.eos_tokens == (1,)
    assert not (tmp_path / "out").exists()


def test_its_text_may_be_given_instead(tmp_path: Path) -> None:
    overrides = [f"output.path={tmp_path}/out", TEXT, "calibration.num_windows=128"]
    prepared = prepare(load_config(QUICKSTART / "run.yaml", overrides), HERE, print)
    assert prepared.windows is not None and prepared.windows.ids_NL.shape == (128, 512)
    assert not (tmp_path / "out").exists()
    assert torch.equal(prepared.windows.ids_NL[:, 0], torch.zeros(128, dtype=torch.int64)), "each begins with BOS"


def test_the_model_writes_texts_that_it_finds_likely(tmp_path: Path) -> None:
    overrides = ["num_texts=8", "batch_size=8", "sampling.max_new_tokens=40"]
    settings = [f"calibration.source.{override}" for override in overrides]
    settings += ["calibration.num_windows=4", "calibration.window_length=32", f"output.path={tmp_path}/out"]
    prepared = prepare(load_config(QUICKSTART / "run.yaml", settings), HERE, print)
    (generation,) = prepared.calibration.generations
    with opened(prepared) as (guard, _):
        generate_locally(generation, guard, lambda rows: None)
        windows = with_windows(prepared).windows
    assert windows is not None and windows.ids_NL.shape == (4, 32)
    assert max(row.perplexity for row in generation.rows) < prepared.calibration.vocabulary.size / 4


@pytest.mark.parametrize("recipe", sorted(Path(__file__).parents[1].glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid_configs(recipe: Path) -> None:
    assert load_config(recipe, []).output.path.startswith(("runs/", "/shared/runs/"))
