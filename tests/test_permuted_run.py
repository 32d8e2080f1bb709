"""Runs that reorder channels: a checkpoint like the source's, N:M as it is stored, and the same bytes after a kill."""

from pathlib import Path

import pytest
import torch
from command import refusal, shardprune
from safetensors.torch import load_file, save_file
from tiny import digests, random_ids, run_layers, save_model, save_tokenizer, save_windows, write_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.skeleton import Skeleton
from pipeline.store import RunDirectory

# a family with shared heads, one with biases, one with everything fused, one stored [inputs, outputs]
FAMILIES = ["llama", "opt", "phi3", "gpt2"]
METHODS = ["ria", "sparsegpt"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each family in the dtype of the large ones, and a finished run of each method."""
    folder = tmp_path_factory.mktemp("place")
    windows = save_windows(folder / "windows.parquet", 12, 16)
    for family in FAMILIES:
        source = save_tokenizer(save_model(folder / family, family, torch.bfloat16, "30KB"))
        for method in METHODS:
            settings = {"pruning.pattern": "2:4", "pruning.permute": True, "output.keep_entry_every": 2}
            config, output = folder / f"{family}-{method}.yaml", folder / "out" / f"{family}-{method}"
            write_config(config, source, windows, output, method, None, **settings)
            finished = shardprune("run", config)
            assert finished.code == 0, finished.err
            assert f"# {method}, 2:4 with channels reordered\n" in finished.out
    return folder


def load_tensors(folder: Path) -> dict[str, Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def errors_of(output: Path) -> list[float]:
    receipts = RunDirectory(output, 3).receipts()
    return [linear.relative_error for receipt in receipts for linear in receipt.linears if "down" in linear.name]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_has_the_keys_of_the_source_and_the_pattern_as_it_is_stored(family: str, method: str, place: Path) -> None:
    before, after = load_tensors(place / family), load_tensors(place / "out" / f"{family}-{method}" / "model")
    assert {key: (one.dtype, one.shape) for key, one in after.items()} == {
        key: (one.dtype, one.shape) for key, one in before.items()
    }
    receipts = RunDirectory(place / "out" / f"{family}-{method}", 3).receipts()
    linears = {linear.key for receipt in receipts for linear in receipt.linears}
    for key in linears:
        weight_OI = after[key].T if family == "gpt2" else after[key]
        assert bool(((weight_OI.reshape(len(weight_OI), -1, 4) != 0).sum(dim=2) == 2).all()), key
    for key in before.keys() - linears:
        # biases move with their channels; all else stays
        assert torch.equal(before[key].flatten().sort().values, after[key].flatten().sort().values), key


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_runs_it_as_this_project_does(family: str, place: Path) -> None:
    model, ids_NL = place / "out" / f"{family}-ria" / "model", random_ids(2, 16, seed=1)
    skeleton = Skeleton(open_checkpoint(str(model)), torch.bfloat16, torch.device("cpu"))
    with torch.no_grad():
        logits = (
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()(ids_NL, use_cache=False).logits
        )
    assert torch.equal(run_layers(skeleton, ids_NL, 2), logits)


def test_kept_weights_are_those_of_the_source_in_another_place(place: Path) -> None:
    """Undone by the hidden units that only one row can have come from, down_proj is a masked down_proj."""
    before, after = load_tensors(place / "llama"), load_tensors(place / "out" / "llama-ria" / "model")
    for layer_index in range(3):
        prefix = f"model.layers.{layer_index}.mlp"
        up, up_before = after[f"{prefix}.up_proj.weight"], before[f"{prefix}.up_proj.weight"]
        is_from = ((up[:, None] == up_before[None]) | (up[:, None] == 0)).all(dim=2)
        assert bool((is_from.sum(dim=1) == 1).all())
        order_I = is_from.int().argmax(dim=1)
        assert order_I.sort().values.tolist() == list(range(64)) != order_I.tolist()
        for name, axis in (("gate_proj", 0), ("down_proj", 1)):
            pruned = after[f"{prefix}.{name}.weight"]
            wanted = before[f"{prefix}.{name}.weight"].index_select(axis, order_I)
            assert torch.equal(pruned, wanted * (pruned != 0))


def test_a_block_that_is_pruned_as_one_is_reordered_too(place: Path, tmp_path: Path) -> None:
    method = "pruning.method={name: sparsellm, num_rounds: 2}"
    finished = shardprune("run", place / "llama-ria.yaml", method, f"output.path={tmp_path / 'out'}")
    assert finished.code == 0, finished.err
    for key, weight_OI in load_tensors(tmp_path / "out" / "model").items():
        if "_proj" in key:
            assert bool(((weight_OI.reshape(len(weight_OI), -1, 4) != 0).sum(dim=2) == 2).all()), key
    finished = shardprune(
        "run", place / "llama-ria.yaml", method, "pruning.permute=false", f"output.path={tmp_path / 'plain'}"
    )
    assert finished.code == 0 and sum(errors_of(tmp_path / "out")) < sum(errors_of(tmp_path / "plain"))


def test_it_loses_less_than_without(place: Path, tmp_path: Path) -> None:
    arguments = [place / "llama-ria.yaml", "pruning.permute=false", f"output.path={tmp_path / 'out'}"]
    finished = shardprune("run", *arguments)
    assert finished.code == 0 and "reordered" not in finished.out
    without, reordered = errors_of(tmp_path / "out"), errors_of(place / "out" / "llama-ria")
    assert len(without) == 3 and all(map(float.__lt__, reordered, without))


@pytest.mark.parametrize("dies_at_write", range(5, 17, 2))
def test_killed_at_any_write_it_ends_with_the_same_bytes(dies_at_write: int, place: Path, tmp_path: Path) -> None:
    again = [place / "llama-sparsegpt.yaml", f"output.path={tmp_path / 'out'}"]
    assert shardprune("run", *again, dies_at_write=dies_at_write).code == 137
    finished = shardprune("run", *again)
    assert finished.code == 0, finished.err
    assert digests(tmp_path / "out" / "model") == digests(place / "out" / "llama-sparsegpt" / "model")


def test_with_and_without_are_two_runs(place: Path) -> None:
    told = refusal("run", place / "llama-ria.yaml", "pruning.permute=false")
    assert "pruning.permute was True, now False" in told and "another run" in told


def test_a_model_in_which_a_norm_stands_in_between_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    """BitNet has one with a gain before each of the last linears."""
    save_model(tmp_path / "model", "llama")
    config = (tmp_path / "model" / "config.json").read_text()
    (tmp_path / "model" / "config.json").write_text(config.replace('"llama"', '"bitnet"').replace("Llama", "BitNet"))
    file = tmp_path / "model" / "model.safetensors"
    gains = {
        f"model.layers.{index}.{name}.weight": 1 + 0.1 * torch.rand(size)
        for index in range(3)
        for name, size in (("self_attn.attn_sub_norm", 32), ("mlp.ffn_sub_norm", 64))
    }
    save_file({**load_file(file), **gains}, file, metadata={"format": "pt"})
    arguments = [place / "llama-ria.yaml", f"model.path={tmp_path / 'model'}", f"output.path={tmp_path / 'out'}"]
    told = refusal("run", *arguments)
    assert "layer 0" in told and "model.layers.0.self_attn.o_proj.weight changes" in told
    assert "leave pruning.permute out" in told and not list((tmp_path / "out" / "receipts").glob("*"))
    assert shardprune("run", *arguments, "pruning.permute=false", f"output.path={tmp_path / 'without'}").code == 0
