"""The generator: a row depends on its prompt and seed, not on its neighbours; perplexity is that of transformers."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SAMPLING, build_model, build_task, random_ids, save_model
from transformers import AutoModelForCausalLM

from pipeline.calibration.generation import Batch, GenerationTask, Tokens, plan_batches
from pipeline.calibration.generator import Generator
from pipeline.calibration.rows import Row
from pipeline.calibration.sampling import RowSampler
from pipeline.calibration.selfgen import Sampling, TransformersEngine
from pipeline.errors import Refusal

# So cold that the likeliest token is drawn, and a last bit of the logits decides nothing.
GREEDY = {"temperature": 1e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "model", "llama")


def prompts_of(num_rows: int, length: int = 3, seed: int = 0) -> dict[int, Tokens]:
    return {index: tuple(ids) for index, ids in enumerate(random_ids(num_rows, length, seed=seed).tolist())}


def batch(prompts: dict[int, Tokens], *row_indices: int) -> Batch:
    return Batch(row_indices, tuple(prompts[index] for index in row_indices))


def generate(task: GenerationTask, batches: list[Batch]) -> dict[int, Row]:
    generator = Generator(task)
    return {row.row_index: row for each in batches for row in generator(each)}


def same(one: dict[int, Row], other: dict[int, Row]) -> bool:
    """Bit by bit."""
    return one.keys() == other.keys() and all(as_bytes(one[index]) == as_bytes(other[index]) for index in one)


def as_bytes(row: Row) -> tuple[Any, ...]:
    return row.row_index, row.num_prompt_tokens, row.token_ids.tobytes(), row.ended, row.perplexity


def texts(rows: dict[int, Row]) -> dict[int, list[int]]:
    return {index: row.token_ids.tolist() for index, row in sorted(rows.items())}


# --- what a row depends on


def test_the_order_of_the_batches_does_not_matter(model: Path) -> None:
    task, batches = build_task(model), plan_batches(prompts_of(16), 4)
    assert same(generate(task, batches), generate(task, batches[::-1]))
    halves = {**generate(task, batches[:2]), **generate(task, batches[2:])}
    assert same(generate(task, batches), halves), "nor does the number of generators"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_place_of_a_row_in_its_batch_does_not_matter(dtype: str, model: Path) -> None:
    task, prompts = build_task(model, dtype=dtype), prompts_of(4)
    rows = generate(task, [batch(prompts, 0, 1, 2, 3)])
    for order in ((3, 2, 1, 0), (1, 3, 0, 2)):
        assert same(generate(task, [batch(prompts, *order)]), rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_does_not_depend_on_its_neighbours(dtype: str, model: Path) -> None:
    task, prompts = build_task(model, dtype=dtype), prompts_of(20)
    rows = generate(task, [batch(prompts, 0, 1, 2, 3)])
    for others in ((17, 18, 19), (5, 6, 7)):
        assert as_bytes(generate(task, [batch(prompts, 0, *others)])[0]) == as_bytes(rows[0])


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_a_last_batch_of_fewer_rows_gives_them_as_a_full_one(num_rows: int, model: Path) -> None:
    task, prompts = build_task(model), prompts_of(4)
    full = generate(task, [batch(prompts, 0, 1, 2, 3)])
    few = generate(task, [batch(prompts, *range(num_rows))])
    assert list(few) == list(range(num_rows))
    assert same(few, {index: full[index] for index in range(num_rows)})


def test_rows_have_their_own_random_numbers_also_after_one_prompt(model: Path) -> None:
    prompts = dict.fromkeys(range(8), (1,))
    rows = generate(build_task(model), plan_batches(prompts, 4))
    assert len({row.token_ids.tobytes() for row in rows.values()}) == 8
    others = generate(build_task(model, seed=1), plan_batches(prompts, 4))
    assert all(others[index].token_ids.tobytes() != rows[index].token_ids.tobytes() for index in rows)


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "opt", "gpt_neox", "qwen2", "gemma2", "mistral", "bloom", "falcon"]
)
def test_padded_prompts_are_continued_as_if_they_were_not(family: str, tmp_path: Path) -> None:
    task = build_task(save_model(tmp_path / "model", family), GREEDY, batch_size=3)
    prompts = {index: tuple(random_ids(1, length, seed=index)[0].tolist()) for index, length in enumerate((2, 9, 5))}
    together = generate(task, [batch(prompts, 0, 1, 2)])
    alone = generate(task, [batch(prompts, index) for index in range(3)])
    assert texts(together) == texts(alone)
    assert {index: len(prompts[index]) for index in prompts} == {
        index: row.num_prompt_tokens for index, row in together.items()
    }


def test_batch_sizes_agree_in_their_logits_if_not_in_the_last_bit(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Matrix products of another shape may round differently, so a batch size is part of what a row depends on."""
    seen: list[torch.Tensor] = []
    original = RowSampler.__call__

    def watch(self: RowSampler, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.clone())
        return original(self, input_ids, scores)

    monkeypatch.setattr(RowSampler, "__call__", watch)
    prompts, rows, first_logits = prompts_of(64), {}, {}
    for batch_size in (1, 8):
        generator, first_logits[batch_size] = Generator(build_task(model, batch_size=batch_size)), []
        rows[batch_size] = {}
        for each in plan_batches(prompts, batch_size):
            seen.clear()
            rows[batch_size] |= {row.row_index: row for row in generator(each)}
            first_logits[batch_size].append(seen[0])
    num_equal = sum(as_bytes(rows[1][index]) == as_bytes(rows[8][index]) for index in prompts)
    with capsys.disabled():
        print(f"\n{num_equal} of {len(prompts)} rows are the same with batches of 1 and of 8")
    torch.testing.assert_close(torch.cat(first_logits[1]), torch.cat(first_logits[8]), rtol=1e-4, atol=1e-5)


def test_what_the_checkpoint_says_about_sampling_is_not_mixed_in(model: Path, tmp_path: Path) -> None:
    plain = generate(build_task(model), plan_batches(prompts_of(8), 4))
    opinionated = save_model(tmp_path / "model", "llama")
    wishes = {
        "do_sample": True,
        "temperature": 0.1,
        "top_k": 1,
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 20,
        "max_length": 5,
        "num_beams": 3,
        "suppress_tokens": list(range(3, 50)),
        "eos_token_id": [2, 7],
    }
    (opinionated / "generation_config.json").write_text(json.dumps(wishes))
    assert same(generate(build_task(opinionated), plan_batches(prompts_of(8), 4)), plain)


def test_first_tokens_follow_the_models_own_distribution(model: Path) -> None:
    num_rows, prompt = 3000, (1, 17)
    task = build_task(model, {"max_new_tokens": 1}, batch_size=1000)
    rows = generate(task, plan_batches(dict.fromkeys(range(num_rows), prompt), 1000))
    with torch.no_grad():
        logits_V = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([prompt])).logits[0, -1]
    expected = num_rows * logits_V.double().softmax(-1)
    counts = torch.tensor([int(row.token_ids[-1]) for row in rows.values()]).bincount(minlength=len(expected))
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < 95 + 5 * math.sqrt(2 * 95)


# --- where a text ends


@pytest.mark.parametrize("eos_tokens", [(2,), (2, 40), tuple(range(30, 60))])
def test_a_text_ends_with_the_first_of_its_end_tokens(eos_tokens: tuple[int, ...], model: Path) -> None:
    task = build_task(model, eos_tokens=eos_tokens, pad_token=eos_tokens[0])
    endless = generate(build_task(model, eos_tokens=()), plan_batches(prompts_of(24), 4))
    assert {len(row.token_ids) for row in endless.values()} == {3 + SAMPLING["max_new_tokens"]}
    assert not any(row.ended for row in endless.values())
    for index, row in generate(task, plan_batches(prompts_of(24), 4)).items():
        tokens = endless[index].token_ids.tolist()
        ends = [position for position in range(3, len(tokens)) if tokens[position] in eos_tokens]
        assert row.token_ids.tolist() == tokens[: ends[0] + 1 if ends else None]
        assert row.ended == bool(ends)
        assert row.is_empty == (ends[:1] == [3])


def test_end_tokens_of_a_prompt_do_not_end_a_text(model: Path) -> None:
    rows = generate(build_task(model), [Batch((0, 1), ((2,), (2,)))])
    assert all(row.num_prompt_tokens == 1 and len(row.token_ids) > 1 for row in rows.values())


def test_a_row_begins_with_its_prompt(model: Path) -> None:
    prompts = prompts_of(8, length=5)
    for index, row in generate(build_task(model), plan_batches(prompts, 4)).items():
        assert tuple(row.token_ids[: row.num_prompt_tokens].tolist()) == prompts[index]
        assert row.token_ids.dtype == np.int32


# --- perplexity


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_perplexity_is_what_transformers_computes(family: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", family)
    rows = generate(build_task(folder), plan_batches(prompts_of(8), 4))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for row in rows.values():
        ids_1T = torch.from_numpy(row.token_ids.astype(np.int64))[None]
        with torch.no_grad():
            loss = float(model(ids_1T, labels=ids_1T).loss)
        assert row.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_the_text_that_the_model_likes_best_has_the_lowest_perplexity(model: Path) -> None:
    prompts = plan_batches(prompts_of(8), 4)
    liked, usual, strange = (
        np.mean([row.perplexity for row in generate(build_task(model, {"temperature": t}), prompts).values()])
        for t in (1e-3, 1.0, 100.0)
    )
    assert liked < usual < strange


def test_a_perplexity_beyond_all_numbers_is_infinite(tmp_path: Path) -> None:
    """The text that is drawn is not always one that the model thinks possible: here by a temperature of a million."""
    folder = save_model(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] *= 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rows = generate(build_task(folder, {"temperature": 1e9}), plan_batches(prompts_of(4), 4))
    assert [row.perplexity for row in rows.values()] == [math.inf] * 4


# --- where the weights lie

TIERS: dict[str, dict[str, Any]] = {
    "memory and disk": {"cpu": "60KB", "disk": "1GB"},
    "disk alone": {"cpu": 0, "disk": "1GB"},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TIERS)
def test_a_model_spread_over_tiers_gives_the_rows_of_a_whole_one(name: str, dtype: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama", torch.float32, "30KB", num_hidden_layers=4)
    batches = plan_batches(prompts_of(8), 4)
    engine = TransformersEngine(max_memory=TIERS[name], offload_path=str(tmp_path / "offload"))
    spread = Generator(build_task(folder, dtype=dtype, engine=engine))
    tiers = set(map(str, spread._model.hf_device_map.values()))
    assert tiers == ({"cpu", "disk"} if name == "memory and disk" else {"disk"})
    rows = {row.row_index: row for each in batches for row in spread(each)}
    assert same(rows, generate(build_task(folder, dtype=dtype), batches))


@pytest.mark.parametrize("named", [True, False], ids=["offload_path", "the default"])
def test_two_models_may_be_spread_over_one_disk_at_a_time(
    named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of the same names, on a disk that they share and converted on the way: neither takes the other's."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    offload_path = str(tmp_path / "scratch") if named else None
    engine = TransformersEngine(max_memory={"cpu": "60KB", "disk": "1GB"}, offload_path=offload_path)
    folder, other = (save_model(tmp_path / name, "llama", num_hidden_layers=4) for name in ("model", "other"))
    tensors = load_file(other / "model.safetensors")
    save_file({key: -tensor for key, tensor in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})
    first = Generator(build_task(folder, dtype="bfloat16", engine=engine))
    second = Generator(build_task(other, dtype="bfloat16", engine=engine))
    for model, generator in ((folder, first), (other, second)):
        whole = generate(build_task(model, dtype="bfloat16"), plan_batches(prompts_of(4), 4))
        assert same({row.row_index: row for each in plan_batches(prompts_of(4), 4) for row in generator(each)}, whole)


def test_a_whole_model_is_not_spread(model: Path) -> None:
    assert not hasattr(Generator(build_task(model))._model, "hf_device_map")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_spread_over_gpu_memory_and_disk_gives_the_rows_of_a_whole_one(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama", torch.float32, "30KB", num_hidden_layers=6)
    batches = plan_batches(prompts_of(8), 4)
    engine = TransformersEngine(
        max_memory={"0": "90KB", "cpu": "60KB", "disk": "1GB"}, offload_path=str(tmp_path / "offload")
    )
    spread = Generator(build_task(folder, device="cuda", engine=engine))
    assert set(map(str, spread._model.hf_device_map.values())) == {"0", "cpu", "disk"}
    rows = {row.row_index: row for each in batches for row in spread(each)}
    assert texts(rows) == texts(generate(build_task(folder, device="cuda"), batches))


# --- what goes wrong


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    build_model("llama").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(Refusal, match=r"texts 4 to 7: .* not finite; .*model\.dtype"):
        generate(build_task(tmp_path / "model"), plan_batches(prompts_of(8), 4)[1:])


def test_sampling_settings_are_all_there() -> None:
    """Adding one needs a thought on whether transformers warps in the same order."""
    assert set(Sampling.model_fields) == set(SAMPLING)
