"""The laws of every method, over every pattern, weight dtype and shape of a group: a new method is one more row.

O = output rows of all matrices of a group, stacked; r = rows of one matrix; I = input columns; T = tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, partial
from typing import Any, get_args

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from pipeline.methods import ALPS, RIA, DSnoT, Magnitude, Method, SparseGPT, SparseLLM, Wanda
from pipeline.methods.pruned import Pruned
from pipeline.numerics.statistics import ColumnSums, Gram, Statistic, TokenCount
from pipeline.sparsity import Budget, NofM, Pattern, Unstructured


@dataclass(frozen=True)
class Row:
    """What the laws need to know of a method: over what it counts, and whether it changes the weights it keeps.

    `is_chaotic`: a rounding error may end in another mask, about as good. All else holds for it to the last bit.
    `any_scale` is false where a setting is in units of the inputs, so that their scale is of concern.
    """

    method: Method
    counts_per: str
    only_masks: bool
    is_chaotic: bool = False
    any_scale: bool = True


@dataclass(frozen=True)
class Shape:
    """The matrices of a group: their rows, their input columns, and how many of those never see an input."""

    num_rows: tuple[int, ...]
    num_columns: int
    num_dead: int = 0


METHODS = {
    "magnitude": Row(Magnitude(), counts_per="matrix", only_masks=True),
    "wanda": Row(Wanda(), counts_per="row", only_masks=True),
    "ria": Row(RIA(), counts_per="matrix", only_masks=True),
    "ria_per_row": Row(RIA(unit="row"), counts_per="row", only_masks=True),
    "magnitude_refit": Row(Magnitude(refit=True), counts_per="matrix", only_masks=False),
    "wanda_refit": Row(Wanda(refit=True), counts_per="row", only_masks=False),
    "ria_refit": Row(RIA(refit=True), counts_per="matrix", only_masks=False),
    # the threshold is an error, so only a threshold of 0 makes the scale of the inputs of no concern
    "dsnot": Row(DSnoT(), counts_per="row", only_masks=True, any_scale=False),
    "dsnot_mlp": Row(DSnoT(refine="mlp", update_threshold=0), counts_per="row", only_masks=True),
    "dsnot_all": Row(DSnoT(refine="all", update_threshold=0), counts_per="row", only_masks=True),
    "dsnot_few_cycles": Row(
        DSnoT(refine="all", max_cycles=3, variance_power=0.5, update_threshold=0), counts_per="row", only_masks=True
    ),
    "dsnot_keep_sign": Row(DSnoT(refine="all", keep_sign=True, update_threshold=0), counts_per="row", only_masks=True),
    "dsnot_any_sign": Row(DSnoT(refine="all", keep_sign=False, update_threshold=0), counts_per="row", only_masks=True),
    "dsnot_high_threshold": Row(
        DSnoT(refine="all", update_threshold=2e3), counts_per="row", only_masks=True, any_scale=False
    ),
    "dsnot_magnitude": Row(
        DSnoT(initial="magnitude", refine="all", update_threshold=0), counts_per="row", only_masks=True
    ),
    "dsnot_sparsegpt": Row(
        DSnoT(initial="sparsegpt", refine="all", update_threshold=0), counts_per="row", only_masks=True
    ),
    "dsnot_refit": Row(DSnoT(refine="all", refit=True, update_threshold=0), counts_per="row", only_masks=False),
    "sparsegpt": Row(SparseGPT(), counts_per="matrix", only_masks=False),
    "sparsegpt_refit": Row(SparseGPT(refit=True), counts_per="matrix", only_masks=False),
    "sparsellm": Row(SparseLLM(), counts_per="matrix", only_masks=False),
    "sparsegpt_blocks_of_20": Row(SparseGPT(block_columns=20), counts_per="matrix", only_masks=False),
    "alps": Row(ALPS(), counts_per="matrix", only_masks=False, is_chaotic=True),
    "alps_from_high_rho": Row(ALPS(rho=20), counts_per="matrix", only_masks=False, is_chaotic=True),
}
PATTERNS = {
    **{f"unstructured_{sparsity}": Unstructured(Decimal(sparsity)) for sparsity in ("0", "0.3", "0.5", "0.7")},
    **{f"{n}_{m}": NofM(n, m) for n, m in ((2, 4), (4, 8), (1, 3))},
}
SHAPES = {
    "one": Shape((16,), 48),
    "tall": Shape((90,), 24),
    "wide": Shape((5,), 168),
    "stacked": Shape((24, 8, 8), 48),
    "stacked_blocks": Shape((7, 10), 264),
    "dead": Shape((12, 9), 144, num_dead=7),
    "mostly_dead": Shape((10,), 48, num_dead=35),
}
# of a model whose attention and MLP read one input
NAMES = ("self_attn.q_proj", "mlp.up_proj", "self_attn.k_proj")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

SCALE_FREE = [name for name, row in METHODS.items() if row.any_scale]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_method = pytest.mark.parametrize("row", METHODS.values(), ids=METHODS)
STEADY = {name: row for name, row in METHODS.items() if not row.is_chaotic}
CHAOTIC = {name: row for name, row in METHODS.items() if row.is_chaotic}
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@cache
def inputs_TI(shape: Shape) -> Tensor:
    """Correlated inputs of uneven scale; dead columns are zero."""
    generator = torch.Generator().manual_seed(1)
    num_columns = shape.num_columns
    mixing_II = torch.randn(num_columns, num_columns, generator=generator) / num_columns**0.5
    x_TI = torch.randn(2 * num_columns, num_columns, generator=generator) @ (torch.eye(num_columns) + mixing_II)
    x_TI *= torch.randn(num_columns, generator=generator).exp()
    x_TI[:, torch.randperm(num_columns, generator=generator)[: shape.num_dead]] = 0
    return x_TI


@cache
def statistic_of(kind: type[Statistic], shape: Shape) -> Any:
    statistic = kind.zeros(shape.num_columns, torch.device("cpu"))
    statistic.observe(inputs_TI(shape))
    return statistic


def weight_of(shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(sum(shape.num_rows), shape.num_columns, generator=generator).to(dtype)


def budget_of(pattern: Pattern, shape: Shape) -> Budget:
    return Budget((pattern,) * len(shape.num_rows), shape.num_rows, NAMES[: len(shape.num_rows)])


def prune(row: Row, pattern: Pattern, shape: Shape, weight_OI: Tensor | None = None) -> Pruned:
    weight_OI = weight_of(shape) if weight_OI is None else weight_OI
    return row.method.prune(weight_OI, statistic_of(row.method.statistic, shape), budget_of(pattern, shape))


def scaled(statistic: Statistic, factor: float) -> Any:
    """What the inputs times the square root of `factor` would have given."""
    if isinstance(statistic, Gram):
        return Gram(statistic.num_tokens, statistic.sum_I * factor**0.5, statistic.sum_II * factor)
    if isinstance(statistic, ColumnSums):
        return ColumnSums(statistic.num_tokens, statistic.sum_I * factor**0.5, statistic.sum_squares_I * factor)
    return TokenCount(statistic.num_tokens)


def per_matrix(shape: Shape, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(torch.split(tensor, list(shape.num_rows)) for tensor in tensors), strict=True))


def distance(left: Tensor, right: Tensor) -> float:
    return float(torch.dist(left.double(), right.double()) / right.double().norm())


def assert_same_but_for_rounding(left: Pruned, right: Pruned, row: Row) -> None:
    """The same mask, and weights up to what float32 loses in a sweep."""
    assert torch.equal(left.keep_OI, right.keep_OI)
    if row.only_masks:
        assert torch.equal(left.weight_OI, right.weight_OI)
    assert distance(left.weight_OI, right.weight_OI) <= 1e-5


@every_dtype
@every_shape
@every_pattern
@every_method
def test_counts_are_exact_and_what_goes_is_zero(row: Row, pattern: Pattern, shape: Shape, dtype: torch.dtype) -> None:
    stored_OI = weight_of(shape, dtype)
    pruned = prune(row, pattern, shape, stored_OI.float())
    assert pruned.keep_OI.dtype == torch.bool
    assert pruned.weight_OI.shape == pruned.keep_OI.shape == stored_OI.shape
    assert pruned.weight_OI.isfinite().all()
    assert (pruned.weight_OI[~pruned.keep_OI] == 0).all()
    for (keep_rI,) in per_matrix(shape, pruned.keep_OI):
        if isinstance(pattern, NofM):
            assert (keep_rI.reshape(len(keep_rI), -1, pattern.m).sum(dim=2) == pattern.n).all()
        elif row.counts_per == "row":
            assert ((~keep_rI).sum(dim=1) == oracle.floor_share(shape.num_columns, str(pattern.fraction))).all()
        else:
            assert int((~keep_rI).sum()) == oracle.floor_share(keep_rI.numel(), str(pattern.fraction))
    if row.only_masks:
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        kept = pruned.weight_OI.to(dtype)[pruned.keep_OI].view(bits)
        assert torch.equal(kept, stored_OI[pruned.keep_OI].view(bits))


def beside_oracle(row: Row, pattern: Pattern, shape: Shape) -> Iterator[tuple[Tensor, ...]]:
    """Of every matrix: the weight, what it became with its mask, and the same by the oracle."""
    pruned = prune(row, pattern, shape)
    matrices = per_matrix(shape, weight_of(shape), pruned.weight_OI, pruned.keep_OI)
    for name, (weight_rI, after_rI, keep_rI) in zip(NAMES, matrices, strict=False):
        yield weight_rI, after_rI, keep_rI, *oracle_prune(row.method, name, pattern, weight_rI, inputs_TI(shape))


@every_shape
@every_pattern
@pytest.mark.parametrize("row", STEADY.values(), ids=STEADY)
def test_masks_and_weights_are_those_of_the_oracle(row: Row, pattern: Pattern, shape: Shape) -> None:
    for _, after_rI, keep_rI, wanted_rI, wanted_keep_rI in beside_oracle(row, pattern, shape):
        assert torch.equal(keep_rI, wanted_keep_rI)
        assert distance(after_rI, wanted_rI.to(after_rI.dtype)) <= (0 if row.only_masks else 1e-5)


@every_shape
@every_pattern
@pytest.mark.parametrize("row", CHAOTIC.values(), ids=CHAOTIC)
def test_a_chaotic_method_comes_out_beside_the_oracle(row: Row, pattern: Pattern, shape: Shape) -> None:
    """99 % of the mask, and the damped output error within 0.1 %."""
    for weight_rI, after_rI, keep_rI, wanted_rI, wanted_keep_rI in beside_oracle(row, pattern, shape):
        assert float((keep_rI == wanted_keep_rI).double().mean()) >= 0.99
        error, wanted_error = (float(damped_errors(part, weight_rI, shape).sum()) for part in (after_rI, wanted_rI))
        nothing = 1e-9 * float(damped_errors(0 * weight_rI, weight_rI, shape).sum())
        assert error == pytest.approx(wanted_error, rel=1e-3, abs=nothing)


def damped_errors(after_rI: Tensor, weight_rI: Tensor, shape: Shape) -> Tensor:
    """Of each row the squared change of its outputs, by the damped Gram."""
    hessian_II = torch.from_numpy(oracle.damped(statistic_of(Gram, shape).sum_II.double().numpy(), 0.01))
    change_rI = after_rI.double() - weight_rI.double()
    return (change_rI @ hessian_II * change_rI).sum(dim=1)


def oracle_prune(method: Method, name: str, pattern: Pattern, weight_rI: Tensor, x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """One matrix by the slow references."""
    weight, x = weight_rI.double().numpy(), x_TI.double().numpy()
    if isinstance(method, SparseGPT):
        args = (weight, x.T @ x, method.damping)
        if isinstance(pattern, NofM):
            after, keep = oracle.sparsegpt_n_of_m(*args, pattern.n, pattern.m)
        else:
            after, keep = oracle.sparsegpt_unstructured(*args, str(pattern.fraction), method.block_columns)
        if method.refit:
            after = oracle.refit(weight, keep, oracle.damped(x.T @ x, method.damping))
        return torch.from_numpy(after), torch.from_numpy(keep)
    if isinstance(method, ALPS):
        choose = partial(oracle_keep, method, pattern)
        after, keep = oracle.alps(weight, x.T @ x, method.damping, method.rho, method.max_iterations, choose)
        return torch.from_numpy(after), torch.from_numpy(keep)
    keep = oracle_mask(method, name, pattern, weight, x)
    after = oracle.refit(weight, keep, oracle.damped(x.T @ x, method.refit_damping)) if method.refit else weight * keep
    return torch.from_numpy(after), torch.from_numpy(keep)


def oracle_mask(method: Method, name: str, pattern: Pattern, weight: Any, x: Any) -> Any:
    if isinstance(method, DSnoT):
        return oracle_dsnot(method, name, pattern, weight, x)
    if isinstance(method, Wanda):
        return oracle_keep(method, pattern, oracle.wanda_score(weight, x))
    if isinstance(method, RIA):
        return oracle_keep(method, pattern, oracle.ria_score(weight, x, method.activation_power))
    return oracle_keep(method, pattern, abs(weight))


def oracle_keep(method: Method, pattern: Pattern, score: Any) -> Any:
    if isinstance(pattern, NofM):
        return oracle.keep_n_of_m(score, pattern.n, pattern.m)
    if isinstance(method, Wanda) or (isinstance(method, RIA) and method.unit == "row"):
        return oracle.keep_per_row(score, str(pattern.fraction))
    return oracle.keep_per_matrix(score, str(pattern.fraction))


def oracle_dsnot(method: DSnoT, name: str, pattern: Pattern, weight_rI: Any, x_TI: Any) -> Any:
    scores = {
        "magnitude": lambda: abs(weight_rI),
        "wanda": lambda: oracle.wanda_score(weight_rI, x_TI),
        "sparsegpt": lambda: oracle.sparsegpt_score(weight_rI, x_TI.T @ x_TI, method.damping),
    }
    score_rI = scores[method.initial]()
    num_columns = score_rI.shape[1]
    if isinstance(pattern, NofM):
        keep_rI = oracle.keep_n_of_m(score_rI, pattern.n, pattern.m)
    else:
        num_pruned = oracle.floor_share(num_columns, str(pattern.fraction))
        keep_rI = np.stack([oracle.keep_by_stable_sort(score_I, num_pruned) for score_I in score_rI])
    if method.refine != "all" and ("attn" in name) != (method.refine == "attention"):
        return keep_rI
    is_n_of_m = isinstance(pattern, NofM)
    keep_sign = is_n_of_m if method.keep_sign == "auto" else method.keep_sign
    rule = oracle.DSnoTRule(method.max_cycles, method.update_threshold, keep_sign, method.variance_power)
    return oracle.dsnot(weight_rI, x_TI, keep_rI, pattern.m if isinstance(pattern, NofM) else num_columns, rule)


@every_shape
@every_pattern
@pytest.mark.parametrize("row", [row for row in METHODS.values() if row.any_scale], ids=SCALE_FREE)
def test_the_scale_of_the_inputs_is_of_no_concern(row: Row, pattern: Pattern, shape: Shape) -> None:
    """Where rounding decides, only of the powers of two, which round nothing."""
    pruned = prune(row, pattern, shape)
    budget = budget_of(pattern, shape)
    for factor in (2.0**-10, 2.0**7) if row.is_chaotic else (2.0**-10, 1e-3, 1e4):
        statistic = scaled(statistic_of(row.method.statistic, shape), factor)
        assert_same_but_for_rounding(row.method.prune(weight_of(shape), statistic, budget), pruned, row)


@every_shape
@every_pattern
@every_method
def test_a_stack_is_pruned_as_its_matrices_are_alone(row: Row, pattern: Pattern, shape: Shape) -> None:
    together = prune(row, pattern, shape)
    statistic = statistic_of(row.method.statistic, shape)
    parts = [
        row.method.prune(weight_rI, statistic, Budget((pattern,), (len(weight_rI),), (name,)))
        for name, (weight_rI,) in zip(NAMES, per_matrix(shape, weight_of(shape)), strict=False)
    ]
    alone = Pruned(torch.cat([part.weight_OI for part in parts]), torch.cat([part.keep_OI for part in parts]))
    assert_same_but_for_rounding(together, alone, row)


@every_pattern
@every_method
def test_pruning_leaves_what_it_was_given_alone(row: Row, pattern: Pattern) -> None:
    shape = SHAPES["dead"]
    weight_OI = weight_of(shape)
    statistic = statistic_of(row.method.statistic, shape)
    before = {name: value.clone() for name, value in vars(statistic).items() if isinstance(value, Tensor)}
    first, second = (prune(row, pattern, shape, weight_OI) for _ in range(2))
    assert torch.equal(weight_OI, weight_of(shape))
    assert all(torch.equal(value, getattr(statistic, name)) for name, value in before.items())
    assert torch.equal(first.weight_OI, second.weight_OI) and torch.equal(first.keep_OI, second.keep_OI)


@pytest.mark.parametrize("shape", [SHAPES["dead"], SHAPES["mostly_dead"]], ids=["dead", "mostly_dead"])
@every_pattern
@pytest.mark.parametrize("name", ["wanda", "ria", "ria_per_row", "sparsegpt", "sparsegpt_blocks_of_20", "alps"])
def test_dead_columns_go_first(name: str, pattern: Pattern, shape: Shape) -> None:
    """In each unit that gives up a count of its own: nothing alive goes while something dead is left."""
    row = METHODS[name]
    dead_OI = (inputs_TI(shape) == 0).all(dim=0).expand(sum(shape.num_rows), -1)
    for dead_rI, keep_rI in per_matrix(shape, dead_OI, prune(row, pattern, shape).keep_OI):
        for dead_S, keep_S in zip(*(units_of(row, pattern, part_rI) for part_rI in (dead_rI, keep_rI)), strict=True):
            assert bool(dead_S[~keep_S].all()) or not bool(keep_S[dead_S].any())


def units_of(row: Row, pattern: Pattern, part_rI: Tensor) -> list[Tensor]:
    """The parts of a matrix that each give up a count of their own."""
    if isinstance(pattern, NofM):
        return list(part_rI.reshape(-1, pattern.m))
    if row.counts_per == "row":
        return list(part_rI)
    if not isinstance(row.method, SparseGPT):
        return [part_rI]
    return [block_rC.flatten() for block_rC in part_rI.split(row.method.block_columns, dim=1)]


@pytest.mark.parametrize("name", ["stacked", "stacked_blocks", "dead"])
@pytest.mark.parametrize("pattern", list(PATTERNS.values())[1:], ids=list(PATTERNS)[1:])
def test_making_up_for_losses_pays(pattern: Pattern, name: str) -> None:
    """Damped output error: refitted on its mask <= SparseGPT's < its mask alone, and < Wanda's; ALPS' < SparseGPT's."""
    shape = SHAPES[name]
    weight_OI = weight_of(shape)
    gram = statistic_of(Gram, shape)
    hessian_II = oracle.damped(gram.sum_II.double().numpy(), 0.01)

    def error(after_OI: Tensor) -> float:
        return oracle.output_error((after_OI - weight_OI).double().numpy(), hessian_II)

    solved = prune(METHODS["sparsegpt"], pattern, shape)
    masked_by_wanda = prune(METHODS["wanda"], pattern, shape)
    refitted = oracle.refit(weight_OI.double().numpy(), solved.keep_OI.numpy(), hessian_II)
    assert error(torch.from_numpy(refitted)) <= error(solved.weight_OI) * (1 + 1e-6)
    assert error(solved.weight_OI) < error(weight_OI * solved.keep_OI)
    assert error(solved.weight_OI) < error(masked_by_wanda.weight_OI)
    assert error(prune(METHODS["alps"], pattern, shape).weight_OI) < error(solved.weight_OI)


@every_shape
@every_pattern
@pytest.mark.parametrize(
    "method", [ALPS(), ALPS(rho=0.01, max_iterations=3, num_refit_steps=0)], ids=["whole", "broken_off"]
)
def test_alps_leaves_no_row_worse_than_its_mask_alone(method: ALPS, pattern: Pattern, shape: Shape) -> None:
    """Not even where the search ends before anything fits; that alone would leave rows of most shapes worse."""
    weight_OI = weight_of(shape)
    pruned = prune(Row(method, "matrix", False), pattern, shape)
    nothing = 1e-6 * damped_errors(0 * weight_OI, weight_OI, shape)
    masked = damped_errors(weight_OI * pruned.keep_OI, weight_OI, shape)
    assert (damped_errors(pruned.weight_OI, weight_OI, shape) <= masked * (1 + 1e-5) + nothing).all()


def test_alps_needs_no_damping_even_where_there_are_fewer_tokens_than_columns() -> None:
    gram = Gram.zeros(48, torch.device("cpu"))
    gram.observe(inputs_TI(SHAPES["one"])[:20])
    weight_OI = weight_of(SHAPES["one"])
    pruned = ALPS(damping=0).prune(weight_OI, gram, Budget((NofM(2, 4),), (16,)))
    assert pruned.weight_OI.isfinite().all()
    assert gram.errors(weight_OI, pruned.weight_OI) < gram.errors(weight_OI, weight_OI * pruned.keep_OI)


def test_alps_refuses_a_gram_that_is_not_finite() -> None:
    gram = Gram(9, torch.zeros(8), torch.eye(8))
    gram.sum_II[2, 3] = gram.sum_II[3, 2] = float("nan")
    with pytest.raises(ArithmeticError, match="not finite"):
        ALPS().prune(torch.ones(4, 8), gram, Budget((NofM(2, 4),), (4,)))


def test_ria_scores_rows_and_columns_of_zeros() -> None:
    shape = SHAPES["one"]
    weight_OI = weight_of(shape)
    weight_OI[3], weight_OI[:, 5] = 0, 0
    pruned = prune(METHODS["ria"], PATTERNS["unstructured_0.5"], shape, weight_OI)
    assert int(pruned.keep_OI.sum()) == weight_OI.numel() // 2
    assert not pruned.keep_OI[3].any() and not pruned.keep_OI[:, 5].any()


def test_relative_importance_alone_looks_at_no_data() -> None:
    shape = SHAPES["dead"]
    row = Row(RIA(activation_power=0), "matrix", True)
    seen, unseen = (
        row.method.prune(weight_of(shape), statistic, Budget((NofM(2, 4),) * 2, shape.num_rows))
        for statistic in (statistic_of(ColumnSums, shape), ColumnSums(0, torch.zeros(144), torch.zeros(144)))
    )
    assert torch.equal(seen.keep_OI, unseen.keep_OI)


def test_the_damping_of_the_settings_is_the_one_used() -> None:
    shape = SHAPES["one"]
    pruned = [prune(Row(SparseGPT(damping=damping), "matrix", False), NofM(2, 4), shape) for damping in (0.01, 0.5)]
    assert [one.damping for one in pruned] == [0.01, 0.5]
    assert not torch.equal(pruned[0].weight_OI, pruned[1].weight_OI)
    assert prune(METHODS["wanda"], NofM(2, 4), shape).damping is None


def test_the_matrix_holds_every_method_of_the_registry() -> None:
    registered, _discriminator = get_args(Method)
    assert {type(row.method) for row in METHODS.values()} == set(get_args(registered))
