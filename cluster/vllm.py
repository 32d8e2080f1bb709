"""The vLLM engine: the same rows asked of vLLM through Ray Data LLM, which also splits a model over GPUs and nodes.

vLLM draws from the row's own seed too, but its numbers are not those of the transformers engine, nor does it promise
the same bits for every load.
"""

import importlib.util
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cluster.parcel import packed, unpacked
from pipeline.calibration.generation import Batch, GenerationTask, Tokens, seed_of_row
from pipeline.calibration.rows import Row
from pipeline.calibration.selfgen import VllmEngine
from pipeline.errors import Refusal


def check_available(engine: VllmEngine) -> None:
    """Raises Refusal where Ray Data LLM or vLLM is missing."""
    try:
        import ray.data.llm  # noqa: F401
    except ImportError as error:
        raise Refusal(
            f"calibration.source.engine.name = 'vllm': Ray Data LLM cannot be imported ({error}); "
            "install 'ray[llm]', or use the engine 'transformers'"
        ) from None
    if not engine.packages and importlib.util.find_spec("vllm") is None:
        raise Refusal(
            "calibration.source.engine.name = 'vllm': vLLM is not installed here; install it on every node, name it in "
            "calibration.source.engine.packages to have it installed for the engine alone, or use 'transformers'"
        )


def generate_with_vllm(task: GenerationTask, batches: Sequence[Batch], least: int, most: int) -> Iterator[list[Row]]:
    """Rows by the batch, in the order in which vLLM finishes them, from between `least` and `most` engines."""
    import ray
    from ray.data.llm import build_processor

    requests = [
        request(row_index, prompt, task)
        for batch in batches
        for row_index, prompt in zip(batch.row_indices, batch.prompts, strict=True)
    ]
    processor = build_processor(
        engine_config(task, least, most, max(map(len, (prompt for batch in batches for prompt in batch.prompts)))),
        preprocess=_as_they_are,
        postprocess=lambda item: {"row": packed(lambda: row_from(item, task))},
    )
    rows: list[Row] = []
    for item in processor(ray.data.from_items(requests)).iter_rows():
        rows.append(unpacked(item["row"]))
        if len(rows) == task.batch_size:
            yield rows
            rows = []
    if rows:
        yield rows


def engine_config(task: GenerationTask, least: int, most: int, prompt_length: int) -> Any:
    """Token ids in and out: no chat template, no tokenizer, an environment of its own where packages are asked for."""
    from ray.data.llm import vLLMEngineProcessorConfig

    engine = task.engine
    assert isinstance(engine, VllmEngine)
    return vLLMEngineProcessorConfig(
        model_source=task.model_path if task.is_from_hub else str(task.source),
        engine_kwargs={
            # every node has a cache of the hub of its own
            **({"revision": task.source.name} if task.is_from_hub else {}),
            "dtype": task.dtype,
            "trust_remote_code": task.trust_remote_code,
            "tensor_parallel_size": engine.tensor_parallel_size,
            "pipeline_parallel_size": engine.pipeline_parallel_size,
            "gpu_memory_utilization": engine.gpu_memory_utilization,
            # else room is kept for texts as long as the model takes
            "max_model_len": prompt_length + task.sampling.max_new_tokens,
            # the perplexity of a text is that of the model, before temperature and penalties
            "logprobs_mode": "raw_logprobs",
            # what the checkpoint says about sampling would be mixed into ours
            "generation_config": "vllm",
        },
        runtime_env={"pip": list(engine.packages)} if engine.packages else None,
        concurrency=(least, most),
        batch_size=task.batch_size,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )


def request(row_index: int, prompt: Tokens, task: GenerationTask) -> dict[str, Any]:
    """What Ray Data LLM takes for one text."""
    sampling = task.sampling
    return {
        "row_index": row_index,
        "tokenized_prompt": list(prompt),
        "sampling_params": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "repetition_penalty": sampling.repetition_penalty,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": list(task.eos_tokens),
            "seed": seed_of_row(task.seed, row_index),
            "logprobs": 0,
            "prompt_logprobs": 0,
            "detokenize": False,
        },
    }


def row_from(output: dict[str, Any], task: GenerationTask) -> Row:
    """The row of what Ray Data LLM gives for one text. Raises Refusal where a log-probability is not a number."""
    prompt, generated = list(output["prompt_token_ids"]), list(output["generated_tokens"])
    # the first token of a text has no probability
    told = zip(prompt[1:] + generated, [*output["prompt_logprobs"][1:], *output["logprobs"]], strict=True)
    logprobs = [_logprob(token, known) for token, known in told]
    nll = -math.fsum(logprobs) / len(logprobs)
    if math.isnan(nll):
        raise Refusal(
            f"generating text {output['row_index']}: the model's log-probabilities are not numbers; "
            "check its weights and model.dtype"
        )
    return Row(
        int(output["row_index"]),
        len(prompt),
        np.array(prompt + generated, np.int32),
        generated[-1] in task.eos_tokens,
        math.exp(nll) if nll < 700 else math.inf,
    )


def _logprob(token: int, known: dict[Any, Any]) -> float:
    """Of the tokens told for a position, that of the one that is there; on its way a key may have become text."""
    entry = known.get(token) or known.get(str(token))
    assert entry is not None, f"no log-probability of token {token}"
    return float(entry["logprob"])


def _as_they_are(item: dict[str, Any]) -> dict[str, Any]:
    return item
