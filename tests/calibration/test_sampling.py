"""Sampling: one token per row, drawn by the row's own random number from the distribution that transformers uses.

B = rows, S = steps, V = vocabulary.
"""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import SAMPLING, build_model, random_ids
from torch import Tensor
from transformers import GenerationConfig

from pipeline.calibration.generation import seed_of_row
from pipeline.calibration.sampling import NotFinite, RowSampler, draw, uniform_of_row, warpers
from pipeline.calibration.selfgen import Sampling

JUST_BELOW_1 = math.nextafter(1.0, 0.0)
SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "colder": {"temperature": 0.6},
    "warmer": {"temperature": 1.7},
    "top-k": {"top_k": 5},
    "one token": {"top_k": 1},
    "more than the vocabulary": {"top_k": 1000},
    "top-p": {"top_p": 0.5},
    "hardly any mass": {"top_p": 1e-6},
    "penalty": {"repetition_penalty": 1.3},
    "reward": {"repetition_penalty": 0.7},
    "paper": {"temperature": 0.6, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.2},
}
every_setting = pytest.mark.parametrize("name", SETTINGS)


def sampling(**changes: Any) -> Sampling:
    return Sampling(**{**SAMPLING, **changes})


def warp(settings: Sampling, ids_BL: Tensor, logits_BV: Tensor) -> Tensor:
    for warper in warpers(settings):
        logits_BV = warper(ids_BL, logits_BV)
    return logits_BV


def chi_square(counts: Tensor, probability_V: Tensor) -> tuple[float, float]:
    """Pearson's statistic over the tokens that are expected at all, and a bound far in its tail."""
    expected = probability_V.double() * counts.sum()
    wanted = expected > 0
    statistic = float(((counts[wanted] - expected[wanted]) ** 2 / expected[wanted]).sum())
    degrees = int(wanted.sum()) - 1
    return statistic, degrees + 5 * math.sqrt(2 * degrees) + 10


# --- the draw

weights = st.lists(st.integers(0, 5), min_size=1, max_size=12).filter(any)
uniforms = st.one_of(st.just(0.0), st.just(JUST_BELOW_1), st.floats(0, JUST_BELOW_1))


@given(weights, uniforms)
def test_a_token_of_probability_0_is_never_drawn(weight_V: list[int], uniform: float) -> None:
    probability_V = torch.tensor(weight_V, dtype=torch.float32)
    chosen = int(draw((probability_V / probability_V.sum())[None], torch.tensor([uniform], dtype=torch.float64)))
    assert weight_V[chosen] > 0


@given(weights, st.integers(0, 1023))
def test_the_token_is_the_one_whose_share_of_the_line_holds_the_number(weight_V: list[int], k: int) -> None:
    """In exact arithmetic: numbers and weights are small binary fractions."""
    chosen = int(draw(torch.tensor([weight_V], dtype=torch.float64), torch.tensor([k / 1024], dtype=torch.float64)))
    wanted = Fraction(k, 1024) * sum(weight_V)
    assert sum(weight_V[:chosen]) <= wanted < sum(weight_V[: chosen + 1])


@given(weights)
def test_the_ends_of_the_line_are_the_first_and_last_possible_token(weight_V: list[int]) -> None:
    probability_2V = torch.tensor([weight_V] * 2, dtype=torch.float32) / sum(weight_V)
    first, last = draw(probability_2V, torch.tensor([0.0, JUST_BELOW_1], dtype=torch.float64)).tolist()
    possible = [token for token, weight in enumerate(weight_V) if weight]
    assert (first, last) == (possible[0], possible[-1])


@pytest.mark.parametrize("vocabulary", [2, 96, 151_936])
def test_evenly_spread_numbers_give_every_token_its_share(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    probability_V = (3 * torch.randn(vocabulary, generator=generator)).softmax(0)
    num_draws = 500
    uniform_B = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
    counts = draw(probability_V.expand(num_draws, -1), uniform_B).bincount(minlength=vocabulary)
    assert float((counts - num_draws * probability_V.double()).abs().max()) <= 1.001


def test_the_numbers_of_many_rows_follow_the_probabilities() -> None:
    probability_V = random_ids(1, 1)[0].new_tensor([8, 0, 4, 2, 1, 1], dtype=torch.float32) / 16
    uniform_B = torch.cat([uniform_of_row(0, row_index, 40) for row_index in range(500)])
    counts = draw(probability_V.expand(len(uniform_B), -1), uniform_B).bincount(minlength=6)
    statistic, bound = chi_square(counts, probability_V)
    assert counts[1] == 0 and statistic < bound, counts


@given(st.permutations(range(6)), st.integers(0, 2**63 - 1))
def test_rows_do_not_depend_on_their_neighbours(order: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probability_BV = torch.randn(6, 30, generator=generator).softmax(-1)
    uniform_B = torch.rand(6, generator=generator, dtype=torch.float64)
    chosen_B = draw(probability_BV, uniform_B)
    assert torch.equal(draw(probability_BV[order], uniform_B[order]), chosen_B[order])
    assert torch.equal(
        torch.cat([draw(probability_BV[i : i + 1], uniform_B[i : i + 1]) for i in order]), chosen_B[order]
    )


def test_every_row_of_every_run_has_random_numbers_of_its_own() -> None:
    seeds = {seed_of_row(seed, row_index) for seed in range(20) for row_index in range(500)}
    assert len(seeds) == 10_000 and all(0 <= seed < 2**63 for seed in seeds)
    before = torch.random.get_rng_state()
    uniform_S = uniform_of_row(3, 7, 100)
    torch.rand(5)
    assert torch.equal(uniform_of_row(3, 7, 100), uniform_S)
    assert not torch.equal(uniform_of_row(3, 8, 100), uniform_S)
    assert not torch.equal(uniform_of_row(4, 7, 100), uniform_S)
    assert float(uniform_S.min()) >= 0 and float(uniform_S.max()) < 1
    torch.random.set_rng_state(before)
    uniform_of_row(3, 7, 100)
    assert torch.equal(torch.random.get_rng_state(), before), "the global stream is left alone"


# --- the distribution


@every_setting
def test_the_distribution_is_that_of_generate(name: str) -> None:
    """`generate(do_sample=True)` tells the logits before and after its own processors."""
    settings, model, ids_BL = sampling(**SETTINGS[name]), build_model("llama"), random_ids(5, 7)
    config = settings.model_dump(exclude={"max_new_tokens"})
    told = model.generate(
        ids_BL,
        attention_mask=torch.ones_like(ids_BL),
        generation_config=GenerationConfig(
            **config,
            do_sample=True,
            max_new_tokens=1,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
        ),
    )
    ours_BV = warp(settings, ids_BL, told.logits[0].float())
    assert torch.equal(ours_BV.softmax(-1), told.scores[0].softmax(-1))


@every_setting
def test_many_rows_follow_the_distribution(name: str) -> None:
    settings, num_rows = sampling(**SETTINGS[name]), 4000
    logits_V = 2 * torch.randn(20, generator=torch.Generator().manual_seed(1))
    ids_BL = torch.tensor([[4, 9, 9]]).expand(num_rows, -1)
    uniform_B1 = torch.stack([uniform_of_row(5, row_index, 1) for row_index in range(num_rows)])
    chosen_B = RowSampler(settings, uniform_B1, 3)(ids_BL, logits_V.expand(num_rows, -1)).argmax(-1)
    probability_V = warp(settings, ids_BL[:1], logits_V[None])[0].softmax(-1)
    counts = chosen_B.bincount(minlength=20)
    statistic, bound = chi_square(counts, probability_V)
    assert int(counts[probability_V == 0].sum()) == 0 and statistic < bound, counts


@pytest.mark.parametrize("k", [1, 3, 20])
def test_top_k_leaves_the_k_likeliest(k: int) -> None:
    logits_BV = torch.randn(6, 20, generator=torch.Generator().manual_seed(k))
    warped_BV = warp(sampling(top_k=k), random_ids(6, 3, 20), logits_BV)
    for logits_V, warped_V in zip(logits_BV, warped_BV, strict=True):
        left = warped_V.isfinite().nonzero()[:, 0]
        assert set(left.tolist()) == set(logits_V.topk(k).indices.tolist())
        assert torch.equal(warped_V[left], logits_V[left])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_top_p_leaves_the_fewest_tokens_with_that_mass(p: float) -> None:
    logits_BV = 2 * torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    warped_BV = warp(sampling(top_p=p), random_ids(20, 3, 20), logits_BV)
    for logits_V, warped_V in zip(logits_BV, warped_BV, strict=True):
        probability_V, order_V = logits_V.double().softmax(-1).sort(descending=True)
        fewest = int((probability_V.cumsum(0) < p).sum()) + 1
        assert set(warped_V.isfinite().nonzero()[:, 0].tolist()) == set(order_V[:fewest].tolist())


def test_the_penalty_makes_tokens_that_were_there_less_likely_and_no_other() -> None:
    ids_BL, logits_BV = random_ids(5, 8, 20), torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    warped_BV = warp(sampling(repetition_penalty=1.5), ids_BL, logits_BV)
    for ids_L, logits_V, warped_V in zip(ids_BL.tolist(), logits_BV, warped_BV, strict=True):
        for token in range(20):
            was, now = float(logits_V[token]), float(warped_V[token])
            assert (now < was) if token in ids_L else (now == was)


def test_what_does_nothing_is_not_done() -> None:
    assert warpers(sampling()) == []
    assert len(warpers(sampling(**SETTINGS["paper"]))) == 4


# --- the logits processor


def sampler(num_rows: int, **changes: Any) -> RowSampler:
    uniform_BS = torch.stack([uniform_of_row(0, row_index, 4) for row_index in range(num_rows)])
    return RowSampler(sampling(**changes), uniform_BS, prompt_length=3)


def test_one_token_of_every_row_is_left_possible_at_every_step() -> None:
    for length in (3, 4, 6):
        logits_BV = torch.randn(5, 20, generator=torch.Generator().manual_seed(length))
        left_BV = sampler(5)(random_ids(5, length, 20), logits_BV)
        assert left_BV.isfinite().sum(-1).tolist() == [1] * 5
        uniform_B = torch.stack([uniform_of_row(0, row_index, 4)[length - 3] for row_index in range(5)])
        assert torch.equal(left_BV.argmax(-1), draw(logits_BV.softmax(-1), uniform_B))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_distribution_are_told(value: float) -> None:
    logits_BV = torch.zeros(3, 20)
    logits_BV[1, 7] = value
    with pytest.raises(NotFinite):
        sampler(3)(random_ids(3, 3, 20), logits_BV)
    with pytest.raises(NotFinite):
        sampler(3)(random_ids(3, 3, 20), torch.full((3, 20), -math.inf))


def test_a_model_may_forbid_tokens() -> None:
    logits_BV = torch.zeros(50, 20)
    logits_BV[:, 3:] = -math.inf
    assert int(sampler(50)(random_ids(50, 3, 20), logits_BV).argmax(-1).max()) <= 2
