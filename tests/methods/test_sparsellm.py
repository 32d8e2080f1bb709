"""The feed-forward block pruned as one: updates are minimisers, any portions of tokens do, a slow oracle agrees.

T = tokens, H = columns of the block's input and output, F = inner columns, K = rows of `up` and `gate`, stacked.
"""

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from command import shardprune
from tiny import everywhere, save_model, save_tokenizer, save_windows, write_config
from torch import Tensor
from torch.nn.functional import silu

from pipeline.activations import Activations, Room, split_windows
from pipeline.errors import Refusal
from pipeline.feedforward import prune_with_block
from pipeline.layer import LinearResult, prune_layer
from pipeline.methods import SparseGPT, SparseLLM
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.feedforward import FeedForward, find_feed_forward
from pipeline.models.skeleton import LoadedLayer, Skeleton
from pipeline.numerics.feedforward import (
    BlockSums,
    Penalties,
    output_gain,
    solve_inner,
    solve_relu,
    solve_up,
    step_gate,
    value_and_slope,
)
from pipeline.numerics.statistics import Gram
from pipeline.observe import observe
from pipeline.recording import recorded
from pipeline.replicas import Alone
from pipeline.sparsity import NofM, Pattern, Unstructured

CPU = torch.device("cpu")
HALF, PENALTIES = Unstructured(Decimal("0.5")), Penalties(up=2.0, gate=0.7, inner=3.0, output=1.5)
NUM_WINDOWS, WINDOW_LENGTH = 12, 16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Point:
    """Everything that the objective depends on, at random, in float64."""

    def __init__(self) -> None:
        self.z, self.s, self.p, self.m, self.n = (2 * random(40, 12, seed=seed) for seed in range(5))
        self.y, self.down = random(40, 8, seed=5), random(8, 12, seed=6)

    def cost_T(self, gated: bool = True, **changed: Tensor) -> Tensor:
        """The objective, token by token."""
        at = {**vars(self), **changed}
        product = silu(at["s"]) * at["z"] if gated else at["z"].relu()
        terms = {
            "up": at["z"] - at["m"],
            "gate": (at["s"] - at["n"]) * gated,
            "inner": at["p"] - product,
            "output": at["y"] - at["p"] @ at["down"].T,
        }
        return sum(getattr(PENALTIES, name) * term.square().sum(dim=1) for name, term in terms.items())


def assert_minimal(point: Point, name: str, best: Tensor, gated: bool = True) -> None:
    """No token is worse off than before, and none would be better off beside its place."""
    cost_T = point.cost_T(gated, **{name: best})
    assert bool((cost_T <= point.cost_T(gated) * (1 + 1e-12)).all())
    for seed in range(20):
        beside = best + 10.0 ** (-seed % 5) * random(*best.shape, seed=100 + seed)
        assert bool((point.cost_T(gated, **{name: beside}) >= cost_T * (1 - 1e-12)).all())


@pytest.mark.parametrize("gated", [True, False])
def test_the_input_of_down_is_a_minimiser(gated: bool) -> None:
    point = Point()
    product = silu(point.s) * point.z if gated else point.z.relu()
    p = solve_inner(product, point.y, point.down, output_gain(point.down, PENALTIES))
    assert_minimal(point, "p", p, gated)


def test_the_input_of_down_is_that_of_the_paper() -> None:
    point = Point()
    product = silu(point.s) * point.z
    system = PENALTIES.output * point.down.T @ point.down + PENALTIES.inner * torch.eye(12, dtype=torch.float64)
    wanted = (PENALTIES.output * point.y @ point.down + PENALTIES.inner * product) @ system.inverse()
    torch.testing.assert_close(
        solve_inner(product, point.y, point.down, output_gain(point.down, PENALTIES)), wanted, rtol=1e-10, atol=1e-12
    )


def test_the_output_of_up_is_a_minimiser() -> None:
    point = Point()
    assert_minimal(point, "z", solve_up(point.p, silu(point.s), point.m, PENALTIES))


def test_without_a_gate_the_better_branch_is_taken_for_each_number() -> None:
    point = Point()
    z = solve_relu(point.p, point.m, PENALTIES)
    assert_minimal(point, "z", z, gated=False)
    grid_G = torch.linspace(-9, 9, 3601, dtype=torch.float64)

    def cost(at: Tensor) -> Tensor:
        first, second = point.m[..., None], point.p[..., None]
        return PENALTIES.up * (at - first).square() + PENALTIES.inner * (second - at.relu()).square()

    assert bool((cost(z[..., None])[..., 0] <= cost(grid_G).amin(dim=-1) + 1e-12).all())


@pytest.mark.parametrize("rate", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_a_step_of_the_gate_never_raises_the_objective(rate: float, scale: float) -> None:
    """Also where z is so large that a gradient step of the paper's rate would be thrown far off."""
    point = Point()
    point.z, point.p = point.z * scale, point.p * scale
    s = step_gate(point.s, point.p, point.z, point.n, silu, PENALTIES, rate)
    before_T, after_T = point.cost_T(), point.cost_T(s=s)
    assert bool((after_T <= before_T * (1 + 1e-12)).all())
    assert float(after_T.sum()) < float(before_T.sum())


@pytest.mark.parametrize("activation", [silu, torch.nn.functional.gelu, torch.tanh])
def test_the_slope_is_that_of_differences(activation: Any) -> None:
    s = random(50, 3)
    value, slope = value_and_slope(activation, s)
    assert torch.equal(value, activation(s)) and not value.requires_grad
    torch.testing.assert_close(slope, (activation(s + 1e-5) - activation(s - 1e-5)) / 2e-5, rtol=1e-6, atol=1e-8)


def test_a_refit_to_what_the_dense_weight_gives_is_the_dense_weight() -> None:
    x_TI, dense_OI = random(60, 10).float(), random(4, 10, seed=1).float()
    gram = gram_of(x_TI)
    torch.testing.assert_close(SparseLLM().fitted(dense_OI, dense_OI @ gram.sum_II, gram), dense_OI)


def test_a_refit_with_little_damping_is_the_pseudo_inverse() -> None:
    x_TI, t_TO = random(60, 10).float(), random(60, 4, seed=1).float()
    refitted_OI = SparseLLM(damping=1e-6).fitted(torch.zeros(4, 10), t_TO.T @ x_TI, gram_of(x_TI))
    torch.testing.assert_close(refitted_OI, (torch.linalg.pinv(x_TI) @ t_TO).T, rtol=1e-3, atol=1e-4)


def test_a_refit_minimises_the_damped_error() -> None:
    x_TI, t_TO, dense_OI = random(60, 10).float(), random(60, 4, seed=1).float(), random(4, 10, seed=2).float()
    refitted_OI = SparseLLM(damping=0.1).fitted(dense_OI, t_TO.T @ x_TI, gram_of(x_TI)).double()
    ridge = 0.1 * float(x_TI.double().square().sum(dim=0).mean())
    pull_OI = (refitted_OI @ x_TI.T.double() - t_TO.T.double()) @ x_TI.double() + ridge * (refitted_OI - dense_OI)
    assert float(pull_OI.abs().max()) <= 1e-3


def test_sums_add_up_over_any_split_of_the_tokens() -> None:
    wanted_TK, x_TH, y_TH, p_TF = (random(30, width, seed=width).float() for width in (6, 4, 5, 3))
    whole, parts = (BlockSums.zeros(torch.Size((6, 4)), torch.Size((5, 3)), CPU) for _ in range(2))
    whole.observe(wanted_TK, x_TH, y_TH, p_TF)
    for some in (slice(0, 7), slice(7, 8), slice(8, 30)):
        part = BlockSums.zeros(torch.Size((6, 4)), torch.Size((5, 3)), CPU)
        part.observe(wanted_TK[some], x_TH[some], y_TH[some], p_TF[some])
        parts = part + parts
    torch.testing.assert_close(parts.sum_KH, whole.sum_KH)
    torch.testing.assert_close(parts.sum_HF, whole.sum_HF)
    torch.testing.assert_close(parts.inner.sum_II, whole.inner.sum_II)
    assert parts.inner.num_tokens == whole.inner.num_tokens == 30


def gram_of(x_TI: Tensor) -> Gram:
    gram = Gram.zeros(x_TI.shape[1], CPU)
    gram.observe(x_TI)
    return gram


@pytest.fixture(scope="module")
def skeletons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Skeleton]:
    def skeleton(family: str, **config: Any) -> Skeleton:
        path = save_model(tmp_path_factory.mktemp(family), family, **config)
        return Skeleton(open_checkpoint(str(path)), torch.float32, CPU)

    return {
        "llama": skeleton("llama"),
        "biased": skeleton("llama", mlp_bias=True),
        "gemma2": skeleton("gemma2"),
        "opt": skeleton("opt"),
    }


def prune_block(
    skeleton: Skeleton,
    method: SparseLLM,
    windows_per_micro_batch: int = 4,
    pattern: Pattern = HALF,
    room: Room | None = None,
) -> tuple[LoadedLayer, list[LinearResult]]:
    """Layer 1 pruned on random hidden states."""
    layer = skeleton.load_layer(1)
    micro_batches = split_windows(NUM_WINDOWS, windows_per_micro_batch)
    shape = (NUM_WINDOWS, WINDOW_LENGTH, skeleton.hidden_size)
    hidden = Activations(shape, torch.float32, micro_batches, room or Room(10**9, Path("unused")))
    hidden_NLH = random(*shape, seed=7).float()
    for index, windows in enumerate(micro_batches):
        hidden.write(index, hidden_NLH[windows])
    calls = [skeleton.calls((len(hidden.read(i)), WINDOW_LENGTH))[1] for i in range(len(micro_batches))]
    inputs = [(hidden.read(i), call) for i, call in enumerate(calls)]
    block = find_feed_forward(1, layer.module, layer.linears)
    with recorded(layer, block, hidden) as read:
        groups = observe(layer, inputs, Gram, NUM_WINDOWS * WINDOW_LENGTH)
    alone, patterns = Alone(len(inputs)), everywhere(layer, pattern)
    return layer, prune_with_block(layer, groups, block, read, inputs.__getitem__, method, patterns, alone)


FAMILIES = ["llama", "biased", "gemma2", "opt"]


@pytest.mark.parametrize("pattern", [HALF, Unstructured(Decimal("0.7")), NofM(2, 4)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_is_pruned_by_the_exact_count(
    family: str, pattern: Pattern, skeletons: dict[str, Skeleton]
) -> None:
    layer, results = prune_block(skeletons[family], SparseLLM(num_rounds=2), pattern=pattern)
    assert {result.key for result in results} == {linear.key for linear in layer.linears}
    for result in results:
        stored = layer.stored[result.key]
        assert result.num_pruned == pattern.num_pruned(stored.numel()) == int((stored == 0).sum())
        assert (result.damping, result.num_tokens) == (0.01, NUM_WINDOWS * WINDOW_LENGTH)
        assert 0 < result.relative_error < 1


@pytest.mark.parametrize("family", FAMILIES)
def test_one_round_that_does_not_settle_is_sparsegpt(family: str, skeletons: dict[str, Skeleton]) -> None:
    layer, _ = prune_block(skeletons[family], SparseLLM(num_rounds=1, settles=False, reads="dense"))
    plain = skeletons[family].load_layer(1)
    hidden_NLH = random(NUM_WINDOWS, WINDOW_LENGTH, skeletons[family].hidden_size, seed=7).float()
    calls = skeletons[family].calls((4, WINDOW_LENGTH))
    inputs = [(hidden_BLH, calls[1]) for hidden_BLH in hidden_NLH.split(4)]
    prune_layer(plain, observe(plain, inputs, Gram, NUM_WINDOWS * WINDOW_LENGTH), SparseGPT(), everywhere(plain, HALF))
    assert all(torch.equal(layer.stored[key], plain.stored[key]) for key in plain.stored)


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_are_of_the_weights_of_the_layer(family: str, skeletons: dict[str, Skeleton]) -> None:
    """Rounds after the first solve for others."""
    layer, results = prune_block(skeletons[family], SparseLLM(num_rounds=2, reads="dense"))
    plain = skeletons[family].load_layer(1)
    hidden_NLH = random(NUM_WINDOWS, WINDOW_LENGTH, skeletons[family].hidden_size, seed=7).float()
    calls = skeletons[family].calls((NUM_WINDOWS, WINDOW_LENGTH))
    groups = observe(plain, [(hidden_NLH, calls[1])], Gram, NUM_WINDOWS * WINDOW_LENGTH)
    errors = {
        linear.key: group.statistic.errors(plain.stored[linear.key], layer.stored[linear.key])
        for group in groups
        for linear in group.linears
    }
    wanted = {key: change / whole for key, (change, whole) in errors.items()}
    assert {result.key: result.relative_error for result in results} == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_change_nothing_but_rounding(family: str, skeletons: dict[str, Skeleton]) -> None:
    layers = [prune_block(skeletons[family], SparseLLM(), size)[0] for size in (12, 5, 1)]
    for key, tensor in layers[0].stored.items():
        for other in layers[1:]:
            assert torch.equal(other.stored[key] == 0, tensor == 0), key
            torch.testing.assert_close(other.stored[key], tensor, rtol=1e-3, atol=1e-5)


def test_where_activations_lie_changes_nothing(tmp_path: Path, skeletons: dict[str, Skeleton]) -> None:
    in_ram, _ = prune_block(skeletons["llama"], SparseLLM())
    # room for the hidden states and x, none for the rest
    room = Room(2 * NUM_WINDOWS * WINDOW_LENGTH * skeletons["llama"].hidden_size * 4, tmp_path)
    spilled, _ = prune_block(skeletons["llama"], SparseLLM(), room=room)
    assert all(torch.equal(in_ram.stored[key], spilled.stored[key]) for key in in_ram.stored)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_rounds", [1, 3, 6])
def test_the_damping_of_every_round_is_that_of_the_settings(num_rounds: int, skeletons: dict[str, Skeleton]) -> None:
    used: list[float | None] = []

    class Watched(SparseLLM):
        def prune(self, *args: Any) -> Any:
            pruned = super().prune(*args)
            used.append(pruned.damping)
            return pruned

    _, results = prune_block(skeletons["llama"], Watched(num_rounds=num_rounds, damping=0.02))
    assert used == [0.02] * (2 + 2 * num_rounds)
    assert {result.damping for result in results} == {0.02}


@pytest.mark.parametrize("family", FAMILIES)
def test_settling_lowers_the_error_of_the_block(family: str, skeletons: dict[str, Skeleton]) -> None:
    """The output of the block for the very inputs it was pruned on."""
    apart, settled = (
        block_error(
            skeletons[family],
            prune_block(skeletons[family], SparseLLM(num_rounds=1, settles=settles, reads="dense"))[0],
        )
        for settles in (False, True)
    )
    assert settled < 0.97 * apart


def read_by(skeleton: Skeleton, dense: LoadedLayer, block: FeedForward) -> Tensor:
    """What the block reads in a forward of the layer."""
    seen: list[Tensor] = []
    dense.module.get_submodule(block.up.name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    hidden_NLH = random(NUM_WINDOWS, WINDOW_LENGTH, skeleton.hidden_size, seed=7).float()
    dense.run(hidden_NLH, skeleton.calls((NUM_WINDOWS, WINDOW_LENGTH))[1])
    return seen[0]


def block_error(skeleton: Skeleton, pruned: LoadedLayer) -> float:
    dense = skeleton.load_layer(1)
    block = find_feed_forward(1, dense.module, dense.linears)
    read_NLH = read_by(skeleton, dense, block)

    def output(layer: LoadedLayer) -> Tensor:
        up, down = (layer.module.get_submodule(linear.name) for linear in (block.up, block.down))
        gate = layer.module.get_submodule(block.gate.name) if block.gate else None
        inner = block.activation(gate(read_NLH)) * up(read_NLH) if gate else block.activation(up(read_NLH))
        return down(inner)

    return float((output(pruned) - output(dense)).square().sum())


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_a_block_makes_up_for_the_attention_before_it(family: str, skeletons: dict[str, Skeleton]) -> None:
    """On what the pruned attention gives it, its output is nearer to that of the dense layer."""
    skeleton = skeletons[family]
    hidden_NLH = random(NUM_WINDOWS, WINDOW_LENGTH, skeleton.hidden_size, seed=7).float()
    call = skeleton.calls((NUM_WINDOWS, WINDOW_LENGTH))[1]

    def output_of_block(layer: LoadedLayer) -> Tensor:
        seen: list[Tensor] = []
        down = find_feed_forward(1, layer.module, layer.linears).down
        layer.module.get_submodule(down.name).register_forward_hook(lambda *args: seen.append(args[2]))
        layer.run(hidden_NLH, call)
        return seen[0]

    wanted = output_of_block(skeleton.load_layer(1))
    blind, aware = (
        float((output_of_block(prune_block(skeleton, SparseLLM(num_rounds=1, reads=reads))[0]) - wanted).square().sum())
        for reads in ("dense", "pruned")
    )
    assert aware < blind


@pytest.mark.parametrize("settles", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_two_rounds_are_those_of_the_oracle(family: str, settles: bool, skeletons: dict[str, Skeleton]) -> None:
    skeleton = skeletons[family]
    layer, _ = prune_block(skeleton, SparseLLM(num_rounds=2, settles=settles, reads="dense"))
    dense = skeleton.load_layer(1)
    block = find_feed_forward(1, dense.module, dense.linears)
    read_NLH = read_by(skeleton, dense, block)
    linears = [linear for linear in (block.up, block.gate, block.down) if linear]
    weights = [dense.weight_OI(linear).double().numpy() for linear in linears]
    biases = [_bias_of(dense, linear.name) for linear in linears[:-1]]
    x_TH = read_NLH.flatten(0, -2).double().numpy()
    wanted = oracle.sparsellm_two_rounds(x_TH, weights, biases, "0.5", 0.01, 2, settles)
    for linear, wanted_OI in zip(linears, wanted, strict=True):
        ours_OI = layer.weight_OI(linear).double().numpy()
        assert np.mean((ours_OI == 0) == (wanted_OI == 0)) >= 0.9995, linear.key
        assert np.linalg.norm(ours_OI - wanted_OI) <= 1e-3 * np.linalg.norm(wanted_OI), linear.key


def _bias_of(layer: LoadedLayer, name: str) -> Any:
    bias = layer.module.get_submodule(name).bias
    return np.zeros(1) if bias is None else bias.detach().double().numpy()


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("gpt2", {}, "has no linears named gate_proj/up_proj/down_proj or fc1/fc2 beside an activation"),
        ("phi3", {}, "has no linears named"),
        ("opt", {"activation_function": "gelu"}, "has no gate, and GELUActivation instead of ReLU"),
    ],
)
def test_a_layer_without_such_a_block_is_refused_before_anything_is_written(
    family: str, config: dict[str, str], reason: str, tmp_path: Path
) -> None:
    source = save_tokenizer(save_model(tmp_path / "source", family, **config))
    windows = save_windows(tmp_path / "windows.parquet", 4, 16)
    settings = write_config(tmp_path / "run.yaml", source, windows, tmp_path / "out", "sparsellm")
    finished = shardprune("run", settings)
    assert finished.code == 2 and not (tmp_path / "out").exists()
    assert f"pruning.method = sparsellm: the feed-forward block of layer 0 {reason}" in finished.err


def test_a_block_that_computes_something_else_is_refused(skeletons: dict[str, Skeleton]) -> None:
    module = skeletons["llama"].layers[1].mlp
    sound: Any = type(module)

    class WithAnotherFlow(sound):
        """Its names and its activation are those of a gated block; its forward is not."""

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.gate_proj(x).tanh() * self.up_proj(x))

    module.__class__ = WithAnotherFlow
    try:
        with pytest.raises(Refusal, match=r"layers\.1\.mlp\.down_proj\.weight: its linear does not read"):
            prune_block(skeletons["llama"], SparseLLM())
    finally:
        module.__class__ = sound
