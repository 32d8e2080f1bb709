"""Perplexity of a checkpoint, streamed layer by layer, so that a model larger than memory can be evaluated.

The protocol of the pruning papers: one tokenisation, consecutive windows, the rest dropped, all windows weigh the same.
N = windows, B = windows in a micro-batch, L = window length, H = hidden size, V = vocabulary.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from pipeline.activations import Activations, Room, split_windows
from pipeline.calibration.text import read_files
from pipeline.calibration.windows import digest_ids
from pipeline.config import EvaluateConfig
from pipeline.errors import Refusal
from pipeline.models.architecture import compute_dtype, load_tokenizer
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.skeleton import Skeleton
from pipeline.runtime import Machine, resolve_device, resolve_micro_batch, slow_products, with_memory_kept


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log-likelihood in nats per predicted token, over windows of one length."""

    nll: float
    num_windows: int
    window_length: int
    windows_digest: str

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf


def evaluate_checkpoint(config: EvaluateConfig, tell: Callable[[str], None]) -> Perplexity:
    """Perplexity of a checkpoint on disk or on the hub. Tells where the dtype is a slow one. Raises Refusal."""
    runtime, window_length = config.runtime, config.evaluation.window_length
    if config.evaluation.text is None or window_length is None:
        raise Refusal("evaluation: give evaluation.text=PATH and evaluation.window_length=NUMBER")
    machine = Machine.here()
    device = resolve_device(runtime.device, machine)
    torch.set_num_threads(machine.num_cores if runtime.threads == "auto" else runtime.threads)
    checkpoint = open_checkpoint(config.model.path, config.model.revision)
    dtype = compute_dtype(checkpoint, config.model.dtype, torch.device(device))
    if told := slow_products(str(dtype).removeprefix("torch."), device):
        tell(told)
    skeleton = Skeleton(checkpoint, dtype, torch.device(device), config.model.trust_remote_code)
    skeleton.check_window_length("evaluation.window_length", window_length)
    tokenizer = load_tokenizer(checkpoint, skeleton.vocabulary_size, config.model.trust_remote_code)
    ids_NL = evaluation_windows(config.evaluation.text, tokenizer, window_length)
    num_windows = resolve_micro_batch(runtime.micro_batch_tokens, device, window_length)
    room = Room.of(runtime, Path(tempfile.gettempdir()), device=torch.device(device))
    return measure_perplexity(skeleton, ids_NL, num_windows, room)


def evaluation_windows(text: str, tokenizer: PreTrainedTokenizerBase | None, window_length: int) -> Tensor:
    """Consecutive windows of ids [N, L] of a file or folder. Raises Refusal where it has not one window of text."""
    if tokenizer is None:
        raise Refusal("evaluation.text: the model has no tokenizer; leave evaluation.text out")
    ids_T = torch.tensor(tokenizer("\n\n".join(read_files((text,))), verbose=False)["input_ids"], dtype=torch.int64)
    num_windows = len(ids_T) // window_length
    if num_windows == 0:
        raise Refusal(
            f"evaluation.text = {text}: has {len(ids_T)} tokens, less than one window of {window_length}; "
            "give more text or a smaller evaluation.window_length"
        )
    return ids_T[: num_windows * window_length].view(num_windows, window_length)


def measure_perplexity(skeleton: Skeleton, ids_NL: Tensor, windows_per_micro_batch: int, room: Room) -> Perplexity:
    """Perplexity of the skeleton's checkpoint on windows of ids [N, L]."""
    micro_batches = split_windows(len(ids_NL), windows_per_micro_batch)
    num_windows, window_length = ids_NL.shape
    shape = (num_windows, window_length, skeleton.hidden_size)
    activations = Activations(shape, skeleton.dtype, micro_batches, room)
    outside = skeleton.outside()
    for index, windows in enumerate(micro_batches):
        activations.write(index, outside.record(ids_NL[windows].to(skeleton.device))[0])
    del outside
    for layer_index in range(skeleton.num_layers):
        layer = skeleton.load_layer(layer_index)
        for index in with_memory_kept(range(len(micro_batches))):
            hidden_BLH = activations.read(index).to(skeleton.device)
            call = skeleton.calls(tuple(hidden_BLH.shape[:2]))[layer_index]
            activations.write(index, layer.run(hidden_BLH, call))
        del layer
    outside = skeleton.outside()
    total = 0.0
    for index, windows in enumerate(micro_batches):
        # one window at a time: logits are the largest tensors of all
        for ids_L, hidden_LH in zip(ids_NL[windows], activations.read(index), strict=True):
            ids_1L = ids_L[None].to(skeleton.device)
            logits_1LV = outside.logits(ids_1L, hidden_LH[None].to(skeleton.device))
            total += float(cross_entropy(logits_1LV[0, :-1].float(), ids_1L[0, 1:]))
    return Perplexity(total / num_windows, num_windows, window_length, digest_ids(ids_NL))
