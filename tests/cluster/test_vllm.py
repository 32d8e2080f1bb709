"""What is asked of vLLM and what becomes of its answers; vLLM itself is not needed."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import refusal, shardprune
from hypothesis import given
from hypothesis import strategies as st
from tiny import build_task, save_model, save_tokenizer, save_windows, selfgen, write_config

from cluster.vllm import check_available, engine_config, request, row_from
from pipeline.calibration.generation import GenerationTask, seed_of_row
from pipeline.calibration.selfgen import VllmEngine
from pipeline.errors import Refusal

try:
    import ray.data.llm  # noqa: F401

    llm_is_missing = None
except ImportError as error:
    llm_is_missing = f"Ray Data LLM cannot be imported: {error}"

needs_ray_llm = pytest.mark.skipif(llm_is_missing is not None, reason=llm_is_missing or "")
without_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")

EOS = 2


def task(**settings: Any) -> GenerationTask:
    return build_task(Path("/models/one"), **{"engine": VllmEngine(), "dtype": "bfloat16", **settings})


def token_logprobs(token_ids: list[int], logprobs: list[float], key: Callable[[int], Any]) -> list[dict[Any, Any]]:
    """As vLLM tells them: for every position the token that is there, perhaps among others."""
    return [
        {key(token + 1): {"logprob": -0.1, "rank": 1, "decoded_token": None}, key(token): {"logprob": logprob}}
        for token, logprob in zip(token_ids, logprobs, strict=True)
    ]


def output(
    prompt: list[int], generated: list[int], logprobs: list[float], key: Callable[[int], Any] = int
) -> dict[str, Any]:
    """What Ray Data LLM gives for a text, of which only the first token has no probability."""
    told = token_logprobs(prompt[1:] + generated, logprobs, key)
    return {
        "row_index": 7,
        "prompt_token_ids": prompt,
        "generated_tokens": generated,
        "prompt_logprobs": [None, *told[: len(prompt) - 1]],
        "logprobs": told[len(prompt) - 1 :],
        "generated_text": "",
    }


# --- what is asked


@needs_ray_llm
@pytest.mark.parametrize("num_gpus", [(1, 1), (4, 1), (2, 3)])
def test_the_engine_is_what_the_config_says(num_gpus: tuple[int, int]) -> None:
    tensor, pipeline = num_gpus
    engine = VllmEngine(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, gpu_memory_utilization=0.8)
    config = engine_config(task(engine=engine, batch_size=16, trust_remote_code=True), 1, 5, 2)
    assert config.model_source == "/models/one"
    assert config.engine_kwargs["tensor_parallel_size"] == tensor
    assert config.engine_kwargs["pipeline_parallel_size"] == pipeline
    assert config.engine_kwargs["gpu_memory_utilization"] == 0.8
    assert config.engine_kwargs["dtype"] == "bfloat16"
    assert config.engine_kwargs["trust_remote_code"] is True
    assert config.engine_kwargs["task_type"] == "generate"
    assert config.get_concurrency() == {"min_size": 1, "max_size": 5}
    assert config.batch_size == 16
    assert config.runtime_env is None
    assert not config.should_continue_on_error


@needs_ray_llm
def test_tokens_go_in_and_out_and_nothing_of_the_checkpoint_is_mixed_in() -> None:
    config = engine_config(task(), 2, 2, 2)
    stages = (
        config.chat_template_stage,
        config.tokenize_stage,
        config.detokenize_stage,
        config.prepare_multimodal_stage,
    )
    assert stages == (False,) * 4
    assert config.engine_kwargs["generation_config"] == "vllm"
    assert config.engine_kwargs["logprobs_mode"] == "raw_logprobs"


@needs_ray_llm
def test_a_model_on_the_hub_is_asked_for_by_its_commit() -> None:
    """Its folder in the driver's cache is on no other node."""
    config = engine_config(
        build_task(Path("/cache/c0ffee"), model_path="org/tiny", is_from_hub=True, engine=VllmEngine()), 1, 1, 2
    )
    assert (config.model_source, config.engine_kwargs["revision"]) == ("org/tiny", "c0ffee")


@needs_ray_llm
def test_packages_are_installed_for_the_engine_alone() -> None:
    config = engine_config(task(engine=VllmEngine(packages=("vllm==0.33.0", "blake3"))), 1, 1, 2)
    assert config.runtime_env == {"pip": ["vllm==0.33.0", "blake3"]}


def test_a_request_carries_every_setting_of_sampling() -> None:
    sampling = {"temperature": 0.6, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.2, "max_new_tokens": 9}
    asked = request(7, (1, 40), task(sampling=sampling, seed=3, eos_tokens=(2, 5)))
    assert asked["row_index"] == 7
    assert asked["tokenized_prompt"] == [1, 40]
    params = asked["sampling_params"]
    assert params.pop("max_tokens") == sampling.pop("max_new_tokens")
    assert sampling.items() <= params.items()
    assert params["stop_token_ids"] == [2, 5]
    assert params["seed"] == seed_of_row(3, 7)
    assert (params["logprobs"], params["prompt_logprobs"]) == (0, 0), "of the tokens that are there, and of no other"


def test_every_text_has_a_seed_of_its_own_that_fits_64_bits() -> None:
    seeds = {request(row, (1,), task(seed=seed))["sampling_params"]["seed"] for row in range(100) for seed in (0, 1)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


# --- what becomes of the answer


@given(
    prompt=st.lists(st.integers(0, 95), min_size=1, max_size=5),
    generated=st.lists(st.integers(0, 95), min_size=1, max_size=8),
    key=st.sampled_from([int, str]),
    data=st.data(),
)
def test_a_row_is_its_tokens_and_their_perplexity(
    prompt: list[int], generated: list[int], key: Callable[[int], Any], data: st.DataObject
) -> None:
    num_told = len(prompt) + len(generated) - 1
    logprobs = data.draw(st.lists(st.floats(-20, 0), min_size=num_told, max_size=num_told))
    row = row_from(output(prompt, generated, logprobs, key), task())
    assert (row.row_index, row.num_prompt_tokens) == (7, len(prompt))
    assert row.token_ids.tolist() == prompt + generated
    assert row.ended == (generated[-1] == EOS)
    assert row.perplexity == pytest.approx(math.prod(math.exp(-logprob) for logprob in logprobs) ** (1 / num_told))


def test_one_token_after_one_token() -> None:
    row = row_from(output([1], [EOS], [math.log(0.25)]), task())
    assert row.perplexity == pytest.approx(4)
    assert row.ended and row.is_empty


@pytest.mark.parametrize("eos_tokens", [(), (2, 9)])
def test_a_text_ends_with_any_of_the_end_tokens(eos_tokens: tuple[int, ...]) -> None:
    row = row_from(output([1], [4, 9], [-1.0, -1.0]), task(eos_tokens=eos_tokens))
    assert row.ended == bool(eos_tokens)


@pytest.mark.parametrize("logprobs", [[-math.inf, -1.0, -1.0], [-800.0] * 3])
def test_a_text_that_the_model_finds_impossible_has_no_finite_perplexity(logprobs: list[float]) -> None:
    assert row_from(output([1, 3], [4, 5], logprobs), task()).perplexity == math.inf


@pytest.mark.parametrize("position", [0, 1, 2])
def test_probabilities_that_are_not_numbers_are_refused(position: int) -> None:
    logprobs = [-1.0] * 3
    logprobs[position] = math.nan
    with pytest.raises(Refusal, match=r"text 7.*not numbers.*model\.dtype"):
        row_from(output([1, 3], [4, 5], logprobs), task())


# --- where vLLM is missing


@needs_ray_llm
@without_vllm
def test_without_vllm_the_engine_is_refused() -> None:
    with pytest.raises(Refusal, match=r"calibration\.source\.engine\.name = 'vllm'.*packages.*'transformers'"):
        check_available(VllmEngine())


@needs_ray_llm
def test_packages_bring_vllm_along() -> None:
    check_available(VllmEngine(packages=("vllm",)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config that asks vLLM for its calibration data."""
    folder = tmp_path_factory.mktemp("vllm")
    save_tokenizer(save_model(folder / "model", "llama"))
    windows = save_windows(folder / "windows.parquet", 8, 16)
    settings = {"calibration.source": selfgen(engine={"name": "vllm"}), "calibration.windows": "across"}
    write_config(folder / "run.yaml", folder / "model", windows, folder / "out", **settings)
    return folder


@without_vllm
@pytest.mark.parametrize("command", ["run", "calibrate"])
def test_the_command_is_refused_before_anything_is_generated(command: str, place: Path) -> None:
    told = refusal(command, place / "run.yaml", "cluster.address=local")
    assert "calibration.source.engine.name = 'vllm'" in told
    assert not list(place.glob("out/**/*"))


def test_vllm_needs_ray(place: Path) -> None:
    told = refusal("calibrate", place / "run.yaml", "cluster.address=none")
    assert "vllm" in told and "cluster.address" in told


@without_vllm
def test_the_refused_run_goes_on_with_the_other_engine(place: Path) -> None:
    refusal("calibrate", place / "run.yaml", "cluster.address=local")
    finished = shardprune("calibrate", place / "run.yaml", "calibration.source.engine={name: transformers}")
    assert finished.code == 0, finished.err


@pytest.mark.parametrize("temperature", [0.005, 2.5])
def test_a_temperature_that_vllm_does_not_take_is_refused(temperature: float, place: Path) -> None:
    """vLLM 0.33 refuses more than 2 once the model is loaded, and makes 0.01 of less without a word to the user."""
    setting = f"calibration.source.sampling.temperature={temperature}"
    assert "temperature" in refusal("calibrate", place / "run.yaml", "cluster.address=local", setting)
