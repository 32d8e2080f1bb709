"""Runs whose layers have sparsities of their own: measured once on the dense model, kept, and the same after a kill."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import refusal, shardprune
from safetensors.torch import load_file, save_file
from tiny import digests, save_model, save_tokenizer, save_windows, write_config

from pipeline.store import Receipt, RunDirectory

NUM_LAYERS = 4
ALLOCATIONS = ["owl", "alphapruning"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers differ, and a finished run of each allocation."""
    folder = tmp_path_factory.mktemp("place")
    source = save_model(folder / "model", "llama", num_hidden_layers=NUM_LAYERS)
    save_tokenizer(source)
    windows = save_windows(folder / "windows.parquet", 12, 16)
    settings: dict[str, Any] = {"output.keep_entry_every": 2}
    write_config(folder / "run.yaml", source, windows, folder / "uniform", "wanda", 0.7, **settings)
    for allocation in ALLOCATIONS:
        finished = shardprune("run", *command(folder, allocation, folder / allocation))
        assert finished.code == 0, finished.err
        assert f"layer 4/4  measured for {allocation}, in the dense model" in finished.out
        assert f"# wanda, unstructured 0.7, shared out by {allocation}" in finished.out
    return folder


def command(place: Path, allocation: str, output: Path, *overrides: str) -> list[str]:
    # layers of random weights differ little
    settings = (
        "{name: owl, max_deviation: 0.2, outlier_factor: 3}" if allocation == "owl" else f"{{name: {allocation}}}"
    )
    return [str(place / "run.yaml"), f"pruning.allocation={settings}", f"output.path={output}", *overrides]


def receipts(output: Path) -> list[Receipt]:
    return RunDirectory(output, NUM_LAYERS).receipts()


def allocation_of(output: Path) -> Any:
    return json.loads((output / "allocation.json").read_text())


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_layers_differ_and_the_total_is_exact(allocation: str, place: Path) -> None:
    linears = [linear for receipt in receipts(place / allocation) for linear in receipt.linears]
    assert sum(linear.num_pruned for linear in linears) == sum(linear.num_weights for linear in linears) * 7 // 10
    by_layer = [sum(linear.num_pruned for linear in receipt.linears) for receipt in receipts(place / allocation)]
    assert len(set(by_layer)) > 1
    said = allocation_of(place / allocation)["layers"]
    assert [list(layer.values()) for layer in said] == [
        [f"unstructured {linear.num_pruned / linear.num_weights:.6g}" for linear in receipt.linears]
        for receipt in receipts(place / allocation)
    ]


def test_owl_measures_the_dense_model(place: Path, tmp_path: Path) -> None:
    """Whatever is done to the layers before, and with whichever method."""
    other = command(place, "owl", tmp_path / "out", "pruning.method={name: sparsegpt}", "pruning.sparsity=0.9")
    assert shardprune("run", *other).code == 0
    assert allocation_of(tmp_path / "out")["measured"] == allocation_of(place / "owl")["measured"]


def test_n_of_m_by_layer_is_real_in_every_group(place: Path, tmp_path: Path) -> None:
    overrides = ["pruning.sparsity=null", "pruning.pattern='4:8'"]
    assert shardprune("run", *command(place, "owl", tmp_path / "out", *overrides)).code == 0
    kept = []
    for receipt in receipts(tmp_path / "out"):
        (pattern,) = {linear.pattern for linear in receipt.linears}
        n, m = map(int, pattern.split(":"))
        assert m == 8 and all(linear.num_pruned * m == linear.num_weights * (m - n) for linear in receipt.linears)
        kept.append(n)
    assert sum(kept) == 4 * NUM_LAYERS and len(set(kept)) > 1


def test_two_of_four_is_too_coarse_to_be_shared_out_and_the_report_says_so(place: Path, tmp_path: Path) -> None:
    overrides = ["pruning.allocation={name: owl}", "pruning.sparsity=null", "pruning.pattern='2:4'"]
    finished = shardprune("run", place / "run.yaml", *overrides, f"output.path={tmp_path / 'out'}")
    assert finished.code == 0, finished.err
    assert "# wanda, 2:4, by owl the same in all layers" in finished.out


def test_rows_of_a_linear_that_goes_whole(place: Path, tmp_path: Path) -> None:
    """Above 99 % a small linear may lose all its weights."""
    finished = shardprune("run", *command(place, "owl", tmp_path / "out", "pruning.sparsity=0.999"))
    assert finished.code == 0, finished.err


@pytest.mark.parametrize("dies_at_write", range(1, 13, 2))
def test_killed_at_any_of_its_first_writes_it_ends_with_the_same_bytes(
    dies_at_write: int, place: Path, tmp_path: Path
) -> None:
    again = command(place, "owl", tmp_path / "out")
    assert shardprune("run", *again, dies_at_write=dies_at_write).code == 137
    is_measured = (tmp_path / "out" / "allocation.json").exists()
    finished = shardprune("run", *again)
    assert finished.code == 0, finished.err
    assert ("measured for owl" in finished.out) != is_measured
    for part in ("model", "calibration"):
        assert digests(tmp_path / "out" / part) == digests(place / "owl" / part)
    assert allocation_of(tmp_path / "out") == allocation_of(place / "owl")


def test_some_of_these_deaths_came_after_the_measuring(place: Path, tmp_path: Path) -> None:
    assert shardprune("run", *command(place, "owl", tmp_path / "out"), dies_at_write=12).code == 137
    assert allocation_of(tmp_path / "out")["measured"] and receipts(tmp_path / "out")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pruning.allocation.max_deviation=0.1", "pruning.allocation.max_deviation was 0.2, now 0.1"),
        ("pruning.allocation={name: uniform}", "pruning.allocation.name was 'owl', now 'uniform'"),
    ],
)
def test_another_allocation_is_another_run(override: str, said: str, place: Path) -> None:
    assert said in refusal("run", *command(place, "owl", place / "owl"), override)


DAMAGED = ["", "{", "[]", '{"measured": [1.0], "layers": []}', '{"measured": [NaN, 1, 2, 3], "layers": []}']


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_allocation_is_named(content: str, place: Path, tmp_path: Path) -> None:
    again = command(place, "owl", tmp_path / "out")
    assert shardprune("run", *again, dies_at_write=12).code == 137
    (tmp_path / "out" / "allocation.json").write_text(content)
    told = refusal("run", *again)
    assert "allocation.json" in told and "delete it" in told
    (tmp_path / "out" / "allocation.json").unlink()
    assert shardprune("run", *again).code == 0
    assert digests(tmp_path / "out" / "model") == digests(place / "owl" / "model")


def test_an_edited_measurement_is_not_that_of_the_committed_layers(place: Path, tmp_path: Path) -> None:
    again = command(place, "owl", tmp_path / "out")
    assert shardprune("run", *again, dies_at_write=12).code == 137
    edited = allocation_of(tmp_path / "out")
    edited["measured"][0] += 1
    (tmp_path / "out" / "allocation.json").write_text(json.dumps(edited))
    assert "other settings" in refusal("run", *again)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pruning.allocation={name: owl, max_deviation: 0.6}", "pruning.allocation.max_deviation"),
        ("pruning.allocation={name: owl, outlier_factor: 0}", "pruning.allocation.outlier_factor"),
        ("pruning.allocation={name: owl, lambda: 0.08}", "pruning.allocation.lambda"),
        ("pruning.allocation={name: owl, outlier_factor: .inf}", "pruning.allocation.outlier_factor"),
        ("pruning.allocation={name: alphapruning, max_ratio: 1}", "pruning.allocation.max_ratio"),
    ],
)
def test_settings_that_mean_nothing_are_refused(override: str, said: str, place: Path, tmp_path: Path) -> None:
    told = refusal("run", place / "run.yaml", override, f"output.path={tmp_path / 'out'}")
    assert said in told
    assert not (tmp_path / "out").exists()


def test_weights_of_the_dense_model_that_are_no_numbers_are_named(place: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_model(model, "llama", num_hidden_layers=NUM_LAYERS)
    save_tokenizer(model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for allocation in ALLOCATIONS:
        told = refusal("run", *command(place, allocation, tmp_path / allocation, f"model.path={model}"))
        assert "model.layers.2.mlp.up_proj.weight" in told and "NaN" in told
