"""How a model's next token is drawn: the usual warpers, then one random number per row and step that is the row's own.

`generate` of transformers draws all rows of a batch from one stream of random numbers, so that a text would depend on
its neighbours. Here the draw is the last logits processor, and `generate` merely takes the one token it leaves.

B = rows in a batch, L = tokens so far, S = steps, V = vocabulary.
"""

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.calibration.generation import seed_of_row
from pipeline.calibration.selfgen import Sampling


class NotFinite(ArithmeticError):
    """Logits that are no distribution."""


class RowSampler(LogitsProcessor):  # type: ignore[misc]
    """Leaves one token of every row possible: the one that the row's own random number falls on."""

    def __init__(self, sampling: Sampling, uniform_BS: Tensor, prompt_length: int) -> None:
        self._warpers = warpers(sampling)
        self._uniform_BS, self._prompt_length = uniform_BS, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Raises NotFinite where the logits are no distribution; -inf forbids a token, as usual."""
        if not torch.isfinite(scores.amax(dim=-1)).all():
            raise NotFinite
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        if not torch.isfinite(scores.amax(dim=-1)).all():
            raise NotFinite
        uniform_B = self._uniform_BS[:, input_ids.shape[1] - self._prompt_length]
        chosen_B = draw(scores.softmax(dim=-1), uniform_B.to(scores.device))
        return torch.full_like(scores, -torch.inf).scatter(1, chosen_B[:, None], 0.0)


def draw(probability_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token [B] at which the cumulative probability passes a number in [0, 1); never one of probability 0."""
    cumulative_BV = probability_BV.double().cumsum(dim=-1)
    total_B1 = cumulative_BV[:, -1:].contiguous()
    chosen_B1 = torch.searchsorted(cumulative_BV, uniform_B[:, None] * total_B1, right=True)
    # the product may round up to the total
    last_B1 = torch.searchsorted(cumulative_BV, total_B1)
    return torch.minimum(chosen_B1, last_B1)[:, 0]


def uniform_of_row(seed: int, row_index: int, num_steps: int) -> Tensor:
    """The random numbers [S] in [0, 1) of one text, whatever else is generated beside it."""
    generator = torch.Generator().manual_seed(seed_of_row(seed, row_index))
    return torch.rand(num_steps, dtype=torch.float64, generator=generator)


def warpers(sampling: Sampling) -> list[LogitsProcessor]:
    """Those that change anything, in the order in which `generate` applies them."""
    chosen: list[LogitsProcessor] = []
    if sampling.repetition_penalty != 1:
        chosen.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1:
        chosen.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chosen.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chosen.append(TopPLogitsWarper(sampling.top_p))
    return chosen
