"""One decoder layer: which linears share an input, what is refused, and that no more is computed than is observed.

B = windows in a micro-batch, L = tokens in a window, H = hidden size.
"""

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from handmade import NO_CALL, Handmade, Inputs, handmade, hidden_states, linears_of_one_input
from tiny import everywhere, save_model
from torch import Tensor

from pipeline.errors import Refusal
from pipeline.groups import Group
from pipeline.layer import prune_layer, put_in_place
from pipeline.methods import Magnitude, SparseGPT, Wanda
from pipeline.methods.pruned import Pruned
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.skeleton import Skeleton
from pipeline.numerics.statistics import ColumnSums, Gram, TokenCount
from pipeline.observe import observe, without_inputs
from pipeline.sparsity import Budget, NofM, Pattern, Unstructured


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Skeleton:
    return skeleton_of(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Skeleton:
    return skeleton_of(tmp_path_factory.mktemp("phi3"), "phi3")


def skeleton_of(folder: Path, family: str) -> Skeleton:
    return Skeleton(open_checkpoint(str(save_model(folder, family))), torch.float32, torch.device("cpu"))


def inputs_of(skeleton: Skeleton, layer_index: int, *batch_sizes: int) -> Inputs:
    """Random hidden states in micro-batches of windows of 8 tokens."""
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(size, 8, skeleton.hidden_size, generator=generator), skeleton.calls((size, 8))[layer_index])
        for size in batch_sizes
    ]


def names(groups: list[Group]) -> list[list[str]]:
    return [[linear.name.split(".")[-1] for linear in group.linears] for group in groups]


@pytest.mark.parametrize("statistic", [TokenCount, ColumnSums, Gram])
def test_linears_that_read_one_input_are_one_group(llama: Skeleton, statistic: type[Gram]) -> None:
    groups = observe(llama.load_layer(0), inputs_of(llama, 0, 2, 1), statistic, 24)
    assert names(groups) == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert [group.statistic.num_tokens for group in groups] == [24] * 4
    assert all(group.input is None for group in groups)


def test_fused_linears_are_groups_of_one(phi3: Skeleton) -> None:
    groups = observe(phi3.load_layer(1), inputs_of(phi3, 1, 2), Gram, 16)
    assert names(groups) == [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]


def test_statistics_are_those_of_the_inputs_that_the_linears_see(llama: Skeleton) -> None:
    layer, inputs = llama.load_layer(0), inputs_of(llama, 0, 2, 1, 2)
    seen: dict[str, list[Tensor]] = {linear.name: [] for linear in layer.linears}
    other = llama.load_layer(0)
    for name, inputs_seen in seen.items():
        linear_module = other.module.get_submodule(name)
        linear_module.register_forward_pre_hook(lambda _, args, to=inputs_seen: to.append(args[0].flatten(0, 1)))
    for hidden_BLH, call in inputs:
        other.run(hidden_BLH, call)
    for group in observe(layer, inputs, Gram, 40):
        for linear in group.linears:
            x_TI = torch.cat(seen[linear.name])
            torch.testing.assert_close(group.statistic.sum_II, x_TI.T @ x_TI, rtol=1e-5, atol=1e-6)


def test_nothing_after_the_last_observed_input_is_computed(llama: Skeleton) -> None:
    layer = llama.load_layer(0)
    finished: list[str] = []
    for linear in layer.linears:
        name = linear.name.split(".")[-1]
        layer.module.get_submodule(linear.name).register_forward_hook(lambda *_, name=name: finished.append(name))
    layer.module.register_forward_hook(lambda *_: finished.append("layer"))
    observe(layer, inputs_of(llama, 0, 1, 1, 1, 1), Gram, 32)
    # the first micro-batch runs to the end, to find out which linear comes last
    assert finished.count("down_proj") == finished.count("layer") == 1
    assert finished.count("up_proj") == finished.count("q_proj") == 4


def test_a_layer_has_no_hooks_left(llama: Skeleton) -> None:
    layer = llama.load_layer(0)
    inputs = inputs_of(llama, 0, 1, 1)
    before = layer.run(*inputs[0])
    groups = observe(layer, inputs, Gram, 16)
    sums = [group.statistic.sum_II.clone() for group in groups]
    assert torch.equal(layer.run(*inputs[0]), before)
    assert all(torch.equal(group.statistic.sum_II, was) for group, was in zip(groups, sums, strict=True))


def test_a_linear_that_is_never_used_is_refused() -> None:
    layer = handmade(lambda it, hidden: it.used(hidden), "used", "idle")
    with pytest.raises(Refusal, match=r"layers\.7\.idle\.weight: its linear is used 0 times in layer 7"):
        observe(layer, hidden_states(2), Gram, 6)


@pytest.mark.parametrize("expected", [11, 13])
def test_a_count_of_tokens_that_is_not_the_expected_one_is_refused(expected: int) -> None:
    layer = handmade(lambda it, hidden: it.second(it.first(hidden)), "first", "second")
    with pytest.raises(Refusal, match=rf"layers\.7\.first\.weight: its linear saw 12 tokens instead of {expected}"):
        observe(layer, hidden_states(2, 2), Gram, expected)


def test_a_linear_that_sees_only_some_tokens_is_refused() -> None:
    layer = handmade(lambda it, hidden: it.router(it.always(hidden)[:, :1]), "always", "router")
    with pytest.raises(Refusal, match=r"layers\.7\.router\.weight: its linear saw 4 tokens instead of 12"):
        observe(layer, hidden_states(2, 2), Gram, 12)


@pytest.mark.parametrize("batch_sizes", [(4,), (2, 2)], ids=str)
def test_a_linear_that_is_used_twice_is_refused(batch_sizes: tuple[int, ...]) -> None:
    layer = handmade(lambda it, hidden: it.only(it.only(hidden)), "only")
    with pytest.raises(Refusal, match=r"layers\.7\.only\.weight"):
        observe(layer, hidden_states(*batch_sizes), Gram, 12)


@pytest.mark.parametrize("batch_sizes", [(4,), (2, 2)], ids=str)
def test_a_linear_that_is_used_twice_on_one_input_is_refused(batch_sizes: tuple[int, ...]) -> None:
    layer = handmade(lambda it, hidden: it.only(hidden) + it.only(hidden), "only")
    with pytest.raises(Refusal, match=r"layers\.7\.only\.weight"):
        observe(layer, hidden_states(*batch_sizes), Gram, 12)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (lambda hidden: hidden.view_as(hidden), [["first", "second"]]),
        (lambda hidden: hidden.clone(), [["first"], ["second"]]),
        (lambda hidden: hidden.flip(0), [["first"], ["second"]]),
    ],
    ids=["view", "copy", "flipped"],
)
def test_the_same_memory_is_the_same_input(other: Callable[[Tensor], Tensor], expected: list[list[str]]) -> None:
    layer = handmade(lambda it, hidden: it.first(hidden) + it.second(other(hidden)), "first", "second")
    assert names(observe(layer, hidden_states(2, 2), Gram, 12)) == expected


def test_an_input_that_is_written_to_in_between_is_another_input() -> None:
    def flow(it: Handmade, hidden: Tensor) -> Tensor:
        shared = hidden.clone()
        before = it.first(shared)
        return before + it.second(shared.mul_(3))

    layer = handmade(flow, "first", "second")
    assert names(observe(layer, hidden_states(2, 2), Gram, 12)) == [["first"], ["second"]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("statistic", [ColumnSums, Gram])
def test_inputs_that_are_not_finite_are_refused_with_their_layer_and_key(statistic: type[Gram], bad: float) -> None:
    def flow(it: Handmade, hidden: Tensor) -> Tensor:
        middle = it.first(hidden)
        middle[-1, 0, 2] = bad
        return it.second(middle)

    layer = handmade(flow, "first", "second")
    with pytest.raises(Refusal, match=r"layers\.7\.second\.weight: the inputs .* in layer 7 hold NaN or Inf"):
        observe(layer, hidden_states(2, 2), statistic, 12)


def test_weights_alone_need_no_groups(llama: Skeleton) -> None:
    layer = llama.load_layer(0)
    groups = without_inputs(layer, TokenCount)
    assert [group.linears for group in groups] == [[linear] for linear in layer.linears]


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", [Unstructured(Decimal("0.3")), NofM(2, 4)], ids=str)
def test_results_are_those_of_the_weights_put_in_place(
    llama: Skeleton, method: Wanda | SparseGPT, pattern: Unstructured | NofM
) -> None:
    layer, dense = llama.load_layer(0), llama.load_layer(0)
    inputs = inputs_of(llama, 0, 2, 2)
    groups = observe(layer, inputs, method.statistic, 32)
    results = prune_layer(layer, groups, method, everywhere(layer, pattern))
    assert not groups and [result.key for result in results] == [linear.key for linear in layer.linears]
    for result, linear in zip(results, layer.linears, strict=True):
        stored, running = layer.stored[linear.key], layer.module.get_submodule(linear.name).weight
        assert torch.equal(stored, running) and not torch.equal(stored, dense.stored[linear.key])
        assert stored.dtype == dense.stored[linear.key].dtype and stored.shape == dense.stored[linear.key].shape
        assert result.num_weights == stored.numel()
        assert result.num_pruned == stored.numel() - int(stored.count_nonzero())
        assert (result.num_zeros_in_source, result.num_tokens, result.pattern) == (0, 32, str(pattern))
        assert 0 < result.relative_error < 1
    untouched = dense.stored.keys() - {linear.key for linear in layer.linears}
    assert all(torch.equal(layer.stored[key], dense.stored[key]) for key in untouched)


def test_weights_that_are_computed_with_as_they_are_stored_are_in_memory_once(llama: Skeleton) -> None:
    layer, dense = llama.load_layer(0), llama.load_layer(0)
    given = {key: tensor.clone() for key, tensor in dense.stored.items()}

    def are_shared() -> list[bool]:
        parameters = {name: parameter.data_ptr() for name, parameter in layer.module.named_parameters()}
        return [parameters[name] == layer.stored[key].data_ptr() for key, name in llama.layer_keys[0].items()]

    assert all(are_shared())
    before = dict(layer.stored)
    prune_layer(layer, without_inputs(layer, TokenCount), Magnitude(), everywhere(layer, NofM(2, 4)))
    assert all(are_shared())
    # nor is what was stored before written to
    assert all(torch.equal(before[key], given[key]) for key in given)


def test_freed_memory_goes_back_before_each_group_is_solved(llama: Skeleton, monkeypatch: pytest.MonkeyPatch) -> None:
    """What forwards have left in the C library would be held beside what a solver needs."""
    told: list[str] = []

    class Told(Magnitude):
        def prune(self, weight_OI: Tensor, statistic: TokenCount, budget: Budget) -> Pruned:
            told.append("solved")
            return super().prune(weight_OI, statistic, budget)

    monkeypatch.setattr("pipeline.layer.return_memory", lambda: told.append("returned"))
    layer = llama.load_layer(0)
    prune_layer(layer, without_inputs(layer, TokenCount), Told(), everywhere(layer, NofM(2, 4)))
    assert told == ["returned", "solved"] * len(layer.linears)


def test_a_method_that_writes_into_what_it_is_given_is_a_bug(llama: Skeleton) -> None:
    """Errors are measured against it, and it may be the very tensor that was read."""

    class Careless(Magnitude):
        def prune(self, weight_OI: Tensor, statistic: TokenCount, budget: Budget) -> Pruned:
            return super().prune(weight_OI.mul_(2), statistic, budget)

    layer = llama.load_layer(0)
    with pytest.raises(AssertionError, match="wrote into the weights"):
        prune_layer(layer, without_inputs(layer, TokenCount), Careless(), everywhere(layer, NofM(2, 4)))


@pytest.mark.parametrize("left", [1e-30, -1.0])
def test_a_method_that_leaves_a_weight_which_its_mask_prunes_is_a_bug(llama: Skeleton, left: float) -> None:
    class Forgetful(Magnitude):
        def prune(self, weight_OI: Tensor, statistic: TokenCount, budget: Budget) -> Pruned:
            pruned = super().prune(weight_OI, statistic, budget)
            forgotten = (~pruned.keep_OI).nonzero()[-1]
            pruned.weight_OI[*forgotten] = left
            return pruned

    layer = llama.load_layer(0)
    with pytest.raises(AssertionError, match=r"left a pruned weight of .* that is not 0"):
        prune_layer(layer, without_inputs(layer, TokenCount), Forgetful(), everywhere(layer, NofM(2, 4)))


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16],
    ids=str,
)
def test_kept_weights_keep_their_bits_in_the_stored_dtype(dtype: torch.dtype) -> None:
    layer = handmade(lambda it, hidden: it.only(hidden), "only")
    before = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(dtype)
    layer.stored["layers.7.only.weight"] = before
    prune_layer(layer, without_inputs(layer, TokenCount), Magnitude(), everywhere(layer, NofM(2, 4)))
    after = layer.stored["layers.7.only.weight"]
    assert after.dtype == dtype and int((after == 0).sum()) == 8
    assert torch.equal(after[after != 0], before[after != 0])


@pytest.mark.parametrize("weights_at_once", [1, 7 * 12, 2**18])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "patterns",
    [
        (Unstructured(Decimal("0.3")), Unstructured(Decimal("0.55"))),
        (Unstructured(Decimal("0.31"), equal_rows=False), Unstructured(Fraction(1, 7), equal_rows=False)),
        (NofM(2, 4), NofM(1, 4)),
    ],
    ids=str,
)
def test_row_after_row_is_as_all_at_once(
    patterns: tuple[Pattern, Pattern],
    dtype: torch.dtype,
    transposed: bool,
    weights_at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reference is the method on the stacked weights, put in place as those of other methods are."""
    monkeypatch.setattr("pipeline.layer.WEIGHTS_AT_ONCE", weights_at_once)
    layer, stacked = (linears_of_one_input((9, 23), 12, dtype, transposed) for _ in range(2))
    for weight in [each.stored[linear.key] for each in (layer, stacked) for linear in layer.linears]:
        weight[::3, ::4] = 0
    inputs: Inputs = [(torch.randn(1, 40, 12, generator=torch.Generator().manual_seed(6)), NO_CALL)]
    of_linears = dict(zip([linear.key for linear in layer.linears], patterns, strict=True))
    results = prune_layer(layer, observe(layer, inputs, ColumnSums, 40), Wanda(), of_linears)
    (group,) = observe(stacked, inputs, ColumnSums, 40)
    weight_OI = group.weight_OI(stacked)
    pruned = Wanda().prune(weight_OI, group.statistic, group.budget(of_linears))
    expected = put_in_place(stacked, group, Wanda(), weight_OI, pruned, of_linears, 0.0)
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(layer.stored[result.key], stacked.stored[result.key])
        assert layer.stored[result.key].stride() == stacked.stored[result.key].stride()
        assert result.relative_error == pytest.approx(wanted.relative_error, rel=1e-5)
        assert result.num_zeros_in_source > 0
        same = {"seconds": 0.0, "relative_error": 0.0}
        assert result.model_copy(update=same) == wanted.model_copy(update=same)


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=["wanda", "sparsegpt"])
@pytest.mark.parametrize("is_lost", [True, False], ids=["what is lost", "what is kept"])
def test_outputs_that_are_not_finite_are_refused(method: Wanda | SparseGPT, is_lost: bool) -> None:
    """Where only what is kept overflows, a finite loss by that would be no error at all."""
    layer = handmade(lambda it, hidden: it.only(hidden), "only")
    weight_II = torch.full((4, 4), 1e19)
    if not is_lost:
        weight_II[:, ::2] = 1e-3
    layer.stored["layers.7.only.weight"] = weight_II
    x_TI = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    groups = observe(layer, [(x_TI[None], NO_CALL)], method.statistic, 100)
    with pytest.raises(Refusal, match=r"layers\.7\.only\.weight: its outputs after pruning are out of all proportion"):
        prune_layer(layer, groups, method, everywhere(layer, NofM(2, 4)))


def test_weights_that_a_solver_has_blown_up_are_refused() -> None:
    class Diverged(Magnitude):
        def prune(self, weight_OI: Tensor, statistic: TokenCount, budget: Budget) -> Pruned:
            pruned = super().prune(weight_OI, statistic, budget)
            return Pruned(pruned.weight_OI * 1e30, pruned.keep_OI)

    layer = handmade(lambda it, hidden: it.only(hidden), "only")
    with pytest.raises(Refusal, match=r"layers\.7\.only\.weight: its outputs after pruning are out of all proportion"):
        prune_layer(layer, without_inputs(layer, TokenCount), Diverged(), everywhere(layer, NofM(2, 4)))


def test_zeros_of_the_source_are_counted_apart() -> None:
    layer = handmade(lambda it, hidden: it.only(hidden), "only")
    layer.stored["layers.7.only.weight"][0] = 0
    half = everywhere(layer, Unstructured(Decimal("0.5")))
    (result,) = prune_layer(layer, without_inputs(layer, TokenCount), Magnitude(), half)
    assert (result.num_pruned, result.num_zeros_in_source) == (8, 4)


def test_a_weight_that_outgrows_its_stored_dtype_is_refused() -> None:
    """Four inputs that are nearly equal: the one weight that stays takes the sum of all, beyond 65504."""
    layer = handmade(lambda it, hidden: it.only(hidden), "only")
    layer.stored["layers.7.only.weight"] = torch.full((4, 4), 40000.0, dtype=torch.float16)
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(100, 1, generator=generator) + 0.02 * torch.randn(100, 4, generator=generator)
    groups = observe(layer, [(x_TI[None], NO_CALL)], Gram, 100)
    with pytest.raises(Refusal, match=r"layers\.7\.only\.weight"):
        prune_layer(layer, groups, SparseGPT(damping=1e-4), everywhere(layer, NofM(1, 4)))
