"""What holds of DSnoT beyond the laws of every method: what swaps change, when they end, and in which linears.

O = output rows, I = input columns, T = tokens.
"""

import itertools
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, save_model
from torch import Tensor

from pipeline.methods import DSnoT, Magnitude, SparseGPT, Wanda
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.skeleton import Skeleton
from pipeline.numerics.statistics import ColumnSums, Gram
from pipeline.sparsity import Budget, NofM, Pattern, Unstructured

NUM_ROWS, NUM_COLUMNS = 24, 64
HALF = Unstructured(Decimal("0.5"))
PATTERNS = {"half": HALF, "most": Unstructured(Decimal("0.8")), "2_4": NofM(2, 4), "1_4": NofM(1, 4)}
RULES: dict[str, dict[str, Any]] = {
    "auto": {},
    "keep_sign": {"keep_sign": True},
    "any_sign": {"keep_sign": False},
    "few": {"max_cycles": 2, "keep_sign": False},
    "magnitude": {"initial": "magnitude"},
    "sparsegpt": {"initial": "sparsegpt"},
}
DEAD = [5, 6, 7, 30]

every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def weight_OI() -> Tensor:
    return torch.randn(NUM_ROWS, NUM_COLUMNS, generator=torch.Generator().manual_seed(5))


def inputs(num_tokens: int = 200, seed: int = 6) -> Gram:
    """Inputs with a mean of their own in every column; some are dead."""
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(num_tokens, NUM_COLUMNS, generator=generator) + torch.randn(NUM_COLUMNS, generator=generator)
    x_TI[:, DEAD] = 0
    gram = Gram.zeros(NUM_COLUMNS, torch.device("cpu"))
    gram.observe(x_TI)
    return gram


def budget(pattern: Pattern) -> Budget:
    return Budget((pattern,), (NUM_ROWS,), ("self_attn.q_proj",))


def keep(pattern: Pattern, statistic: Gram | ColumnSums | None = None, **settings: Any) -> Tensor:
    return DSnoT(**settings).prune(weight_OI(), statistic or inputs(), budget(pattern)).keep_OI


def first_keep(pattern: Pattern, **settings: Any) -> Tensor:
    return keep(pattern, **{**settings, "update_threshold": 1e9})


def error_O(keep_OI: Tensor) -> Tensor:
    """What every row is expected to lose over 2048 tokens."""
    expected_I = inputs().sum_I.double() / inputs().num_tokens * 2048
    return (weight_OI().double() * ~keep_OI) @ expected_I


@every_rule
@every_pattern
def test_swaps_change_the_count_of_no_row_and_of_no_group(pattern: Pattern, rule: dict[str, Any]) -> None:
    first_OI, last_OI = first_keep(pattern, **rule), keep(pattern, **rule)
    group_size = pattern.m if isinstance(pattern, NofM) else NUM_COLUMNS
    first_OG, last_OG = (keep_OI.reshape(NUM_ROWS, -1, group_size).sum(dim=2) for keep_OI in (first_OI, last_OI))
    assert torch.equal(first_OG, last_OG)
    assert not torch.equal(first_OI, last_OI)


@every_rule
@every_pattern
def test_no_row_ends_with_a_larger_error(pattern: Pattern, rule: dict[str, Any]) -> None:
    before_O, after_O = error_O(first_keep(pattern, **rule)), error_O(keep(pattern, **rule))
    assert (after_O.abs() <= before_O.abs() * (1 + 1e-6)).all()
    assert after_O.abs().sum() < 0.8 * before_O.abs().sum()


@every_pattern
def test_the_sign_of_an_error_is_kept_where_that_is_asked_for(pattern: Pattern) -> None:
    before_O, after_O = (error_O(keep(pattern, keep_sign=True, max_cycles=cycles)) for cycles in (1, 50))
    assert torch.equal(before_O.sign(), error_O(first_keep(pattern)).sign())
    assert torch.equal(after_O.sign(), before_O.sign())
    assert (after_O.abs() <= before_O.abs() * (1 + 1e-6)).all()


@every_rule
@every_pattern
def test_rows_within_the_threshold_are_left_alone(pattern: Pattern, rule: dict[str, Any]) -> None:
    first_OI = first_keep(pattern, **rule)
    threshold = float(error_O(first_OI).abs().median()) * (1 + 1e-4)
    is_within_O = error_O(first_OI).abs() <= threshold
    changed_O = (keep(pattern, **rule, update_threshold=threshold) != first_OI).any(dim=1)
    assert 0 < int(is_within_O.sum()) < NUM_ROWS
    assert not changed_O[is_within_O].any() and changed_O.any()


@every_pattern
def test_more_cycles_than_there_are_weights_to_swap_just_end(pattern: Pattern) -> None:
    most = keep(pattern, max_cycles=NUM_COLUMNS, update_threshold=0, keep_sign=False)
    assert torch.equal(keep(pattern, max_cycles=10_000, update_threshold=0, keep_sign=False), most)


@every_rule
@every_pattern
def test_dead_columns_are_not_swapped(pattern: Pattern, rule: dict[str, Any]) -> None:
    assert torch.equal(keep(pattern, **rule)[:, DEAD], first_keep(pattern, **rule)[:, DEAD])


def test_a_column_that_never_changes_grows_before_all_others() -> None:
    """It adds to the expectation and to nothing else."""
    statistic = inputs()
    constant = int(DEAD[0])
    statistic.sum_I[constant] = 0.01 * statistic.num_tokens
    statistic.sum_II[constant, constant] = 0.01**2 * statistic.num_tokens
    first_OI = keep(HALF, statistic, update_threshold=1e9)
    swapped_OI = keep(HALF, statistic, max_cycles=1, update_threshold=0)
    lost_O = (weight_OI() * ~first_OI) @ statistic.sum_I
    helps_O = weight_OI()[:, constant] * lost_O > 0
    is_better_O = (swapped_OI != first_OI).any(dim=1)
    assert not first_OI[:, constant].any()
    assert torch.equal(swapped_OI[:, constant], helps_O & is_better_O) and swapped_OI[:, constant].any()


def test_the_first_mask_is_that_of_the_initial_method() -> None:
    for initial, method in {"wanda": Wanda(), "magnitude": Magnitude()}.items():
        expected_OI = method.prune(weight_OI(), inputs(), budget(NofM(2, 4))).keep_OI
        assert torch.equal(first_keep(NofM(2, 4), initial=initial), expected_OI)
    # SparseGPT decides its first block before it updates anything
    solved_OI = SparseGPT(block_columns=NUM_COLUMNS).prune(weight_OI()[:1], inputs(), Budget((HALF,), (1,))).keep_OI
    assert torch.equal(first_keep(HALF, initial="sparsegpt")[:1], solved_OI)


def test_the_number_of_tokens_is_of_no_concern() -> None:
    """The threshold is for 2048 tokens, however many there were."""
    threshold = float(error_O(first_keep(HALF)).abs().median())
    twice = keep(HALF, inputs() + inputs(), update_threshold=threshold)
    assert torch.equal(twice, keep(HALF, update_threshold=threshold))


def test_the_gram_and_the_column_sums_give_one_mask() -> None:
    gram = inputs()
    columns = ColumnSums(gram.num_tokens, gram.sum_I, gram.sum_squares_I)
    assert torch.equal(keep(HALF, gram), keep(HALF, columns))
    assert DSnoT().statistic is ColumnSums
    assert DSnoT(refit=True).statistic is DSnoT(initial="sparsegpt").statistic is Gram


def test_the_damping_that_the_first_mask_needed_is_told() -> None:
    assert DSnoT(initial="sparsegpt", damping=0.5).prune(weight_OI(), inputs(), budget(HALF)).damping == 0.5
    assert DSnoT().prune(weight_OI(), inputs(), budget(HALF)).damping is None
    indefinite = inputs()
    indefinite.sum_II[0, 1] = indefinite.sum_II[1, 0] = 1.2 * float(indefinite.sum_squares_I[:2].max())
    raised = DSnoT(initial="sparsegpt").prune(weight_OI(), indefinite, budget(HALF)).damping
    assert raised is not None and raised > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_told_from_mlp_in_every_family(family: str, tmp_path: Path) -> None:
    skeleton = Skeleton(open_checkpoint(str(save_model(tmp_path, family))), torch.float32, torch.device("cpu"))
    names = tuple(linear.name for linear in skeleton.linears(0))
    budget = Budget((HALF,) * len(names), (1,) * len(names), names)
    refined = {
        refine: set(itertools.compress(names, DSnoT(refine=refine).refines(budget)))
        for refine in ("attention", "mlp", "all")
    }
    assert refined["attention"] | refined["mlp"] == refined["all"] == set(names)
    mlp = {name for name in names if "mlp" in name or name in ("fc1", "fc2")}
    assert refined["mlp"] == mlp and 0 < len(mlp) < len(names)
