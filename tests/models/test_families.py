"""Running a model layer by layer gives the bits that transformers gives, for every family of decoders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, build_model, random_ids, run_layers, save_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.models.architecture import compute_dtype
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.skeleton import Skeleton

CPU = torch.device("cpu")
STORAGES = {
    "float32-sharded": {"dtype": torch.float32, "max_shard_size": "30KB"},
    "bfloat16-single": {"dtype": torch.bfloat16},
    "float16-single": {"dtype": torch.float16},
}


def open_skeleton(folder: Path, asked_dtype: str = "auto") -> Skeleton:
    checkpoint = open_checkpoint(str(folder))
    return Skeleton(checkpoint, compute_dtype(checkpoint, asked_dtype, CPU), CPU)


def logits_of_transformers(folder: Path, dtype: torch.dtype, ids_NL: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        logits = model(ids_NL, use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_layer_by_layer_is_bit_exact(family: str, storage: str, tmp_path: Path) -> None:
    options: dict[str, Any] = STORAGES[storage]
    save_model(tmp_path, family, **options)
    skeleton, ids_NL = open_skeleton(tmp_path), random_ids(2, 24)
    computed = torch.float32 if options["dtype"] == torch.float16 else options["dtype"]
    assert skeleton.dtype == computed
    assert (len(skeleton.checkpoint.files) > 1) == ("sharded" in storage)
    assert torch.equal(run_layers(skeleton, ids_NL, 2), logits_of_transformers(tmp_path, computed, ids_NL))


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_without_weights_are_the_calls_with_weights(family: str, tmp_path: Path) -> None:
    skeleton = open_skeleton(save_model(tmp_path, family))
    ids_NL = random_ids(2, 24)
    _, calls = skeleton.outside().record(ids_NL)
    skeleton.check_calls(tuple(ids_NL.shape), calls)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_outside_share_out_every_tensor_once(family: str, tmp_path: Path) -> None:
    skeleton = open_skeleton(save_model(tmp_path, family))
    parts = [*skeleton.layer_keys, skeleton.outside_keys]
    assert sorted(key for part in parts for key in part) == sorted(skeleton.checkpoint.entries)
    assert all(skeleton.layer_keys)


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_are_the_matrices_of_a_layer(family: str, tmp_path: Path) -> None:
    skeleton = open_skeleton(save_model(tmp_path, family))
    for layer_index, keys in enumerate(skeleton.layer_keys):
        matrices = {key for key in keys if len(skeleton.checkpoint.entries[key].shape) == 2}
        assert {linear.key for linear in skeleton.linears(layer_index)} == matrices
        layer = skeleton.load_layer(layer_index)
        for linear in layer.linears:
            assert tuple(layer.weight_OI(linear).shape) == (linear.num_outputs, linear.num_inputs)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_last_micro_batch_may_be_smaller(family: str, tmp_path: Path) -> None:
    skeleton, ids_NL = open_skeleton(save_model(tmp_path, family)), random_ids(5, 24)
    wanted = [logits_of_transformers(tmp_path, torch.float32, ids) for ids in ids_NL.split(2)]
    assert torch.equal(run_layers(skeleton, ids_NL, 2), torch.cat(wanted))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "opt"])
def test_attention_implementation_of_the_config_is_used(family: str, attention: str, tmp_path: Path) -> None:
    save_model(tmp_path, family)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attn_implementation": attention}))
    skeleton, ids_NL = open_skeleton(tmp_path), random_ids(2, 24)
    assert skeleton.model.config._attn_implementation == attention
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention).eval()
    with torch.no_grad():
        wanted = reference(ids_NL, use_cache=False).logits
    assert torch.equal(run_layers(skeleton, ids_NL, 2), wanted)


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("llama", "model."), ("opt", "model.")])
def test_checkpoint_of_the_base_model_works(family: str, prefix: str, tmp_path: Path) -> None:
    model = build_model(family, tie_word_embeddings=True)
    model.base_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": model.config.architectures}))
    skeleton, ids_NL = open_skeleton(tmp_path), random_ids(2, 24)
    assert not any(key.startswith(prefix) for key in skeleton.checkpoint.entries)
    with torch.no_grad():
        wanted = model(ids_NL, use_cache=False).logits
    assert torch.equal(run_layers(skeleton, ids_NL, 2), wanted)


def test_tensors_of_a_mixed_checkpoint_stay_as_stored(tmp_path: Path) -> None:
    save_model(tmp_path, "llama", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {key: value.float() + 1e-4 if "norm" in key else value for key, value in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    skeleton, ids_NL = open_skeleton(tmp_path), random_ids(2, 24)
    assert skeleton.dtype == torch.bfloat16
    stored = {key: value for index in range(3) for key, value in skeleton.load_layer(index).stored.items()}
    assert stored and all(torch.equal(value, tensors[key]) for key, value in stored.items())
    assert {value.dtype for value in stored.values()} == {torch.float32, torch.bfloat16}
    wanted = logits_of_transformers(tmp_path, torch.bfloat16, ids_NL)
    assert torch.equal(run_layers(skeleton, ids_NL, 2), wanted)


def test_tensors_that_no_module_loads_are_kept(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0),
        "model.layers.3.mtp.weight": torch.randn(4, 4),
        "model.layers.0.step": torch.tensor(7),
    }
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    skeleton = open_skeleton(tmp_path)
    stored = skeleton.load_layer(0).stored
    assert torch.equal(stored["model.layers.0.self_attn.rotary_emb.inv_freq"], torch.arange(4.0))
    assert stored["model.layers.0.step"].dtype == torch.int64
    assert "model.layers.3.mtp.weight" in skeleton.outside_keys
    run_layers(skeleton, random_ids(2, 24), 2)


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_asked_dtype_is_computed_in_and_the_stored_one_kept(asked: str, tmp_path: Path) -> None:
    save_model(tmp_path, "llama", dtype=torch.float16)
    skeleton, ids_NL = open_skeleton(tmp_path, asked), random_ids(2, 24)
    dtype = getattr(torch, asked)
    assert skeleton.dtype == dtype
    assert {value.dtype for value in skeleton.load_layer(0).stored.values()} == {torch.float16}
    assert torch.equal(run_layers(skeleton, ids_NL, 2), logits_of_transformers(tmp_path, dtype, ids_NL))
