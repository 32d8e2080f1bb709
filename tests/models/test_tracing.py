"""A layer that is run without numbers tells what one with numbers does; config.json alone tells as much as a model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import shardprune
from tiny import FAMILIES, VOCABULARY, save_model

from pipeline.errors import Refusal
from pipeline.held import measure_held
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.hollow import open_or_imagine
from pipeline.models.skeleton import Skeleton
from pipeline.models.tracing import trace_layers
from pipeline.numerics.statistics import TokenCount
from pipeline.observe import observe

LENGTH = 16


def imagine(model: Path, folder: Path) -> Skeleton:
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    return Skeleton(open_or_imagine(str(folder), None, False), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_alone_gives_the_tensors_groups_and_held_bytes_of_the_checkpoint(tmp_path: Path, family: str) -> None:
    real = Skeleton(open_checkpoint(str(save_model(tmp_path / "m", family))), torch.float32, torch.device("cpu"))
    hollow = imagine(tmp_path / "m", tmp_path / "c")
    stored, imagined = (
        {key: (entry.shape, entry.dtype) for key, entry in skeleton.checkpoint.entries.items()}
        for skeleton in (real, hollow)
    )
    assert imagined == stored
    for layer_index, trace in enumerate(trace_layers(hollow, LENGTH)):
        layer, call = real.load_layer(layer_index), real.calls((1, LENGTH))[layer_index]
        hidden = torch.randn(1, LENGTH, real.hidden_size)
        groups = observe(layer, [(hidden, call)], TokenCount, LENGTH)
        seen = {linear.name: number for number, group in enumerate(groups) for linear in group.linears}
        expected = [(each.num_outputs, each.num_inputs) for group in groups for each in group.linears]
        assert sorted((each.num_outputs, each.num_inputs) for each in trace.shape.linears) == sorted(expected)
        assert sorted(each.group for each in trace.shape.linears) == sorted(seen.values())
        assert list(trace.group_bytes) == measure_held(layer, groups, hidden, call)


def test_the_dtype_of_a_config_is_that_of_its_tensors(tmp_path: Path) -> None:
    save_model(tmp_path / "m", "llama", torch.bfloat16)
    assert {entry.dtype for entry in imagine(tmp_path / "m", tmp_path / "c").checkpoint.entries.values()} == {"BF16"}


def test_held_bytes_grow_with_the_window(tmp_path: Path) -> None:
    save_model(tmp_path / "m", "llama")
    short, long = (trace_layers(imagine(tmp_path / "m", tmp_path / str(length)), length)[0] for length in (8, 32))
    assert long.forward_bytes == 4 * short.forward_bytes and long.shape == short.shape


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"_attn_implementation": "flash_attention_2"}, "not installed"),
        ({"pad_token_id": VOCABULARY}, f"pad_token_id = {VOCABULARY}"),
        ({"hidden_size": -32}, "negative dimension -32"),
        ({"hidden_size": 2**61}, "overflowed"),
        ({"vocab_size": 10**18}, "overflowed"),
        ({"vocab_size": 0, "pad_token_id": None}, "embed_tokens.weight the shape (0, 32)"),
        ({"intermediate_size": 0}, "layers.0.mlp.gate_proj.weight the shape (0, 32)"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
    ],
)
def test_a_config_of_no_model_is_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    model = save_model(tmp_path / "m", "llama")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(Refusal) as refused:
        imagine(model, tmp_path / "c")
    assert f"{tmp_path}/c: config.json" in str(refused.value) and told in str(refused.value)


def test_pickled_weights_are_refused_for_a_plan_as_for_a_run(tmp_path: Path) -> None:
    save_model(tmp_path / "m", "llama")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{path: {tmp_path}/m}}\ncalibration: {{source: {{name: text, path: none}}, window_length: 16}}\n"
        f"output: {{path: {tmp_path}/out}}\n"
    )
    finished = shardprune("plan", config)
    assert finished.code == 2 and "pickled" in finished.err
