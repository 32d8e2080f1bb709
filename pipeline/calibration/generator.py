"""The generator: a whole model that writes texts and measures how likely it finds them.

A plain class, called directly in one process and mapped over batches by Ray Data on a cluster, with the same rows.
A row depends on its prompt, its seed and the shape of its batch, so batches always have the configured size.

B = rows in a batch, L = tokens of a prompt, S = steps, T = tokens of a text.
"""

import math
import tempfile
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from pipeline.calibration.generation import Batch, GenerationTask, Tokens
from pipeline.calibration.rows import Row
from pipeline.calibration.sampling import NotFinite, RowSampler, uniform_of_row
from pipeline.calibration.selfgen import TransformersEngine
from pipeline.errors import Refusal
from pipeline.models.checkpoint import Checkpoint, find_again, open_checkpoint
from pipeline.runtime import free_memory

# Of the device's free memory, what weights may take: the rest is for the keys and values of the texts.
_SHARE_FOR_WEIGHTS = 0.7


class Generator:
    """Holds the model; a call continues the prompts of a batch."""

    def __init__(self, task: GenerationTask) -> None:
        torch.set_num_threads(task.threads)
        self._task, self._device = task, torch.device(task.device)
        try:
            self._model = _load(task)
        except torch.OutOfMemoryError:
            raise Refusal(
                f"model {task.source}: does not fit the GPU's memory; spread it by calibration.source.engine.max_memory"
            ) from None

    def __call__(self, batch: Batch) -> list[Row]:
        """The rows of a batch, in its order. Raises Refusal where logits are not finite or memory does not suffice."""
        num_rows = len(batch.prompts)
        # the last batch is filled up, so that its rows do not depend on how many there are
        num_fillers = self._task.batch_size - num_rows
        prompts = batch.prompts + batch.prompts[-1:] * num_fillers
        row_indices = batch.row_indices + batch.row_indices[-1:] * num_fillers
        try:
            with torch.inference_mode():
                texts = self._continue(prompts, row_indices)[:num_rows]
                perplexities = [perplexity(self._model, torch.tensor(text), self._device) for text in texts]
        except NotFinite:
            raise Refusal(
                f"generating texts {row_indices[0]} to {batch.row_indices[-1]}: the model's logits are not finite; "
                "check its weights and model.dtype"
            ) from None
        except torch.OutOfMemoryError:
            raise Refusal(
                f"calibration.source.batch_size = {self._task.batch_size}: does not fit the GPU's memory; make it "
                "smaller, or spread the model with calibration.source.engine.max_memory"
            ) from None
        return [
            Row(row_index, len(prompt), np.array(text, np.int32), text[-1] in self._task.eos_tokens, measured)
            for row_index, prompt, text, measured in zip(
                batch.row_indices, batch.prompts, texts, perplexities, strict=True
            )
        ]

    def _continue(self, prompts: tuple[Tokens, ...], row_indices: tuple[int, ...]) -> list[Tokens]:
        """Prompt and continuation of every row, up to and with its end-of-text token."""
        task, length, device = self._task, max(map(len, prompts)), self._device
        ids_BL = torch.tensor([[task.pad_token] * (length - len(prompt)) + list(prompt) for prompt in prompts])
        mask_BL = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        num_steps = task.sampling.max_new_tokens
        uniform_BS = torch.stack([uniform_of_row(task.seed, index, num_steps) for index in row_indices])
        generated = self._model.generate(
            input_ids=ids_BL.to(device),
            attention_mask=mask_BL.to(device),
            generation_config=GenerationConfig(
                max_new_tokens=num_steps,
                do_sample=False,
                eos_token_id=list(task.eos_tokens) or None,
                pad_token_id=task.pad_token,
            ),
            logits_processor=[RowSampler(task.sampling, uniform_BS.to(device), length)],
        )
        return [prompt + self._until_end(row[length:]) for prompt, row in zip(prompts, generated.tolist(), strict=True)]

    def _until_end(self, continuation: list[int]) -> Tokens:
        ends = [position for position, token in enumerate(continuation) if token in self._task.eos_tokens]
        return tuple(continuation[: ends[0] + 1] if ends else continuation)


def perplexity(model: Any, ids_T: Tensor, device: torch.device) -> float:
    """exp of the mean negative log-likelihood of a text's tokens after the first; one text, so nothing is padded."""
    ids_1T = ids_T[None].to(device)
    logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0]
    nll = float(cross_entropy(logits_TV[:-1].float(), ids_1T[0, 1:].to(logits_TV.device)))
    if math.isnan(nll):
        raise NotFinite
    return math.exp(nll) if nll < 700 else math.inf


def _load(task: GenerationTask) -> Any:
    """The model, whole on the device where it fits, else spread by accelerate over GPUs, RAM and disk."""
    assert isinstance(task.engine, TransformersEngine)
    logging.disable_progress_bar()
    is_whole = task.engine.max_memory == "auto" and _fits(task)
    model = AutoModelForCausalLM.from_pretrained(
        _open(task).downloaded(),
        dtype=getattr(torch, task.dtype),
        trust_remote_code=task.trust_remote_code,
        **({} if is_whole else _spread(task, task.engine)),
    )
    # what the checkpoint says about sampling would be mixed into ours
    model.generation_config = GenerationConfig()
    return model.eval().to(task.device) if is_whole else model.eval()


def _open(task: GenerationTask) -> Checkpoint:
    return open_checkpoint(str(find_again(task.source, task.model_path)))


def _spread(task: GenerationTask, engine: TransformersEngine) -> dict[str, Any]:
    """How transformers is told to place weights. Raises Refusal where a place is not there."""
    # it would warn of what it was asked for
    getLogger("accelerate.big_modeling").setLevel(ERROR)
    folder = Path(engine.offload_path or tempfile.gettempdir())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(
            f"calibration.source.engine.offload_path = {str(folder)!r}: {error.strerror}; give one that can be written"
        ) from None
    num_gpus = torch.cuda.device_count() if task.device == "cuda" else 0
    if engine.max_memory != "auto":
        max_memory = {int(name) if name.isdigit() else name: amount for name, amount in engine.max_memory.items()}
    elif num_gpus:
        max_memory = None
    else:
        max_memory = {"cpu": int(_SHARE_FOR_WEIGHTS * free_memory("cpu"))}
    for name in max_memory or ():
        if isinstance(name, int) and name >= num_gpus:
            raise Refusal(
                f"calibration.source.engine.max_memory: there is no GPU {name} among {num_gpus}; leave it out"
            )
    return {"device_map": "auto", "max_memory": max_memory, "offload_folder": str(folder)}


def _fits(task: GenerationTask) -> bool:
    itemsize = int(getattr(torch, task.dtype).itemsize)
    entries = _open(task).entries.values()
    num_bytes = sum(math.prod(entry.shape) * itemsize for entry in entries)
    return num_bytes <= _SHARE_FOR_WEIGHTS * free_memory(task.device)
