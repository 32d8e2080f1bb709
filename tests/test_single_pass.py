"""A layer pruned in one pass: each linear on what it will really get, nothing computed twice, the same bytes with any
memory.

B = windows in a micro-batch, L = tokens in a window, H = hidden size, O = output rows, I = input columns.
"""

import gc
import itertools
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from command import shardprune
from greenlet import greenlet
from handmade import Handmade, Inputs, handmade, hidden_states
from safetensors.torch import load_file
from tiny import FAMILIES, build_model, digests, everywhere, random_ids, save_model, save_windows, write_config
from torch import Tensor
from torch.multiprocessing import spawn
from torch.multiprocessing.reductions import StorageWeakRef

from pipeline.errors import Refusal
from pipeline.groups import Group
from pipeline.held import Held, measure_held
from pipeline.layer import LinearResult
from pipeline.methods import ALPS, RIA, DSnoT, Method, SparseGPT, Wanda
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.outside import Call
from pipeline.models.skeleton import LoadedLayer, Skeleton
from pipeline.numerics.statistics import Gram, TokenCount
from pipeline.observe import observe
from pipeline.record import RunRecord
from pipeline.replicas import Alone, Meeting, Replica, Replicas, offer_meeting
from pipeline.segments import split
from pipeline.single_pass import SinglePass
from pipeline.sparsity import Budget, Pattern, Unstructured

CPU, HALF = torch.device("cpu"), Unstructured(Decimal("0.5"))
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


def skeleton_of(folder: Path) -> Skeleton:
    return Skeleton(open_checkpoint(str(folder)), torch.float32, CPU)


def inputs_of(skeleton: Skeleton, layer_index: int, *batch_sizes: int) -> Inputs:
    """Random hidden states in micro-batches of windows of 8 tokens."""
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(size, 8, skeleton.hidden_size, generator=generator), skeleton.calls((size, 8))[layer_index])
        for size in batch_sizes
    ]


def groups_of(layer: LoadedLayer, inputs: Inputs) -> list[Group]:
    return observe(layer, inputs[:1], TokenCount, count(inputs[:1]))


def count(inputs: Inputs) -> int:
    """The tokens of all micro-batches."""
    return sum(hidden_BLH[..., 0].numel() for hidden_BLH, _ in inputs)


def passed(
    layer: LoadedLayer, inputs: Inputs, method: Method, may_stand: list[bool], replicas: Replicas | None = None
) -> tuple[list[LinearResult], list[Tensor]]:
    """What became of the linears of a layer, and what it gives for each of the inputs."""
    groups, num_tokens = groups_of(layer, inputs), count(inputs)
    single_pass = SinglePass(layer, inputs.__getitem__, groups, may_stand, replicas or Alone(len(inputs)))
    with single_pass.hooked():
        results = single_pass.prune(method, everywhere(layer, HALF), num_tokens)
        return results, [single_pass.finish(index) for index in range(len(inputs))]


def same_layer(one: LoadedLayer, other: LoadedLayer) -> bool:
    return all(torch.equal(one.stored[key], other.stored[key]) for key in one.stored)


def same_outputs(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


def load_tensors(folder: Path) -> dict[str, Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


# --- what is computed


@pytest.mark.parametrize("method", [SparseGPT(), Wanda()], ids=["sparsegpt", "wanda"])
def test_each_linear_is_pruned_on_what_the_pruned_ones_before_it_give(
    method: SparseGPT | Wanda, llama: Path, tmp_path: Path
) -> None:
    """Written out for a whole model in memory, which is run anew from its token ids for every group."""
    windows = save_windows(tmp_path / "windows.parquet", 8, 16)
    config = write_config(tmp_path / "run.yaml", llama, windows, tmp_path / "out", method.name)
    assert shardprune("run", config, "pruning.granularity=linear").code == 0
    after = load_tensors(tmp_path / "out" / "model")
    reference = build_model("llama")
    for layer, group in itertools.product(reference.model.layers, GROUPS):
        linears = [layer.get_submodule(name) for name in group]
        inputs = method.statistic.zeros(linears[0].in_features, CPU)
        for ids_BL in random_ids(8, 16).split(4):
            inputs.observe(_input_of(reference, linears[0], ids_BL))
        weight_OI = torch.cat([linear.weight.data for linear in linears])
        rows = [linear.out_features for linear in linears]
        pruned = method.prune(weight_OI, inputs, Budget((HALF,) * len(rows), tuple(rows), group))
        for linear, pruned_rI in zip(linears, pruned.weight_OI.split(rows), strict=True):
            linear.weight.data.copy_(pruned_rI)
    assert all(torch.equal(after[key], tensor) for key, tensor in reference.state_dict().items())


def _input_of(model: Any, linear: Any, ids_BL: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(ids_BL, use_cache=False)
    handle.remove()
    (input_TI,) = seen
    return input_TI


def test_only_what_nothing_stands_before_is_that_of_a_whole_layer(llama: Path, tmp_path: Path) -> None:
    windows = save_windows(tmp_path / "windows.parquet", 8, 16)
    config = write_config(tmp_path / "run.yaml", llama, windows, tmp_path, "sparsegpt")
    for name in ("layer", "linear"):
        assert shardprune("run", config, f"pruning.granularity={name}", f"output.path={tmp_path / name}").code == 0
    records = [RunRecord.read(tmp_path / name) for name in ("layer", "linear")]
    assert [record and record.resolved.granularity for record in records] == ["layer", "linear"]
    by_layer, by_linear = (load_tensors(tmp_path / name / "model") for name in ("layer", "linear"))
    pruned = [key for key, tensor in by_layer.items() if not torch.equal(tensor, load_tensors(llama)[key])]
    same = {key for key in pruned if torch.equal(by_layer[key], by_linear[key])}
    assert same == {f"model.layers.0.{name}.weight" for name in GROUPS[0]}


@pytest.mark.parametrize("may_stand", list(itertools.product([True, False], repeat=4)))
def test_a_forward_begins_again_after_each_group_it_may_not_stand_before(
    llama: Path, may_stand: tuple[bool, ...]
) -> None:
    skeleton = skeleton_of(llama)
    layer, inputs, begun = skeleton.load_layer(0), inputs_of(skeleton, 0, 2, 2, 1), Counter[int]()

    def begin(index: int) -> tuple[Tensor, Call]:
        begun[index] += 1
        return inputs[index]

    single_pass = SinglePass(layer, begin, groups_of(layer, inputs), list(may_stand), Alone(3))
    with single_pass.hooked():
        single_pass.prune(SparseGPT(), everywhere(layer, HALF), 40)
        for index in range(3):
            single_pass.finish(index)
    assert set(begun.values()) == {1 + may_stand.count(False)}


def test_nothing_is_computed_twice(llama: Path) -> None:
    skeleton = skeleton_of(llama)
    layer, inputs, calls = skeleton.load_layer(0), inputs_of(skeleton, 0, 2, 2, 1), []
    groups = groups_of(layer, inputs)
    for linear in layer.linears:
        module = layer.module.get_submodule(linear.name)
        module.register_forward_hook(lambda *_, name=linear.name: calls.append(name))
    single_pass = SinglePass(layer, inputs.__getitem__, groups, [True] * 4, Alone(3))
    with single_pass.hooked():
        single_pass.prune(SparseGPT(), everywhere(layer, HALF), 40)
        assert {calls.count(name) for name in GROUPS[2]} == {3} and calls.count("mlp.down_proj") == 0
        for index in range(3):
            single_pass.finish(index)
    assert {calls.count(linear.name) for linear in layer.linears} == {3}


# --- memory


@pytest.mark.parametrize("method", [Wanda(), RIA(), DSnoT(), SparseGPT(), ALPS()], ids=lambda method: method.name)
def test_where_forwards_may_stand_changes_no_bit(method: Method, llama: Path) -> None:
    skeleton = skeleton_of(llama)
    inputs, wanted = inputs_of(skeleton, 1, 2, 2, 1), skeleton.load_layer(1)
    results, outputs = passed(wanted, inputs, method, [True] * 4)
    assert same_outputs(outputs, [wanted.run(*each) for each in inputs]), "as the layer that was committed gives it"
    for may_stand in itertools.product([True, False], repeat=4):
        layer = skeleton.load_layer(1)
        others, again = passed(layer, inputs, method, list(may_stand))
        assert same_layer(layer, wanted) and same_outputs(again, outputs), may_stand
        assert [one.relative_error for one in others] == [one.relative_error for one in results]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_stands_still_and_goes_on(family: str, tmp_path: Path) -> None:
    skeleton = skeleton_of(save_model(tmp_path, family))
    for layer_index in range(skeleton.num_layers):
        layers = [skeleton.load_layer(layer_index) for _ in range(2)]
        inputs = inputs_of(skeleton, layer_index, 2, 1)
        num_groups = len(groups_of(layers[0], inputs))
        (_, standing), (_, begun_anew) = (
            passed(layer, inputs, Wanda(), [may_stand] * num_groups)
            for layer, may_stand in zip(layers, (True, False), strict=True)
        )
        assert same_layer(*layers) and same_outputs(standing, begun_anew)
        assert same_outputs(standing, [layers[0].run(*each) for each in inputs])


@pytest.mark.parametrize("ram_bytes", [1, 55_000, 85_000])
def test_memory_decides_how_and_not_what(ram_bytes: int, llama: Path, tmp_path: Path) -> None:
    """Room for no forwards, for those before the first group, and for those before all but the widest groups."""
    windows = save_windows(tmp_path / "windows.parquet", 12, 16)
    config = write_config(tmp_path / "run.yaml", llama, windows, tmp_path / "free", "sparsegpt")
    chosen = "pruning.granularity=linear"
    assert shardprune("run", config, chosen).code == 0
    bound = shardprune("run", config, chosen, f"runtime.ram_bytes={ram_bytes}", f"output.path={tmp_path / 'bound'}")
    assert bound.code == 0, bound.err
    assert digests(tmp_path / "bound" / "model") == digests(tmp_path / "free" / "model")


def test_what_is_held_is_what_has_been_made_and_not_freed() -> None:
    """Of 6 tokens of 4 numbers in float32; views, what is written in place and what has been let go count nothing."""

    def flow(it: Handmade, hidden: Tensor) -> Tensor:
        kept = it.first(hidden)
        return kept + it.third(torch.relu(it.second(kept.view_as(kept).mul_(2))))

    layer, inputs = handmade(flow, "first", "second", "third"), hidden_states(2)
    assert measure_held(layer, groups_of(layer, inputs), *inputs[0]) == [0, 96, 2 * 96]


def test_what_is_held_grows_with_the_windows_and_counts_the_widest_point(llama: Path) -> None:
    skeleton = skeleton_of(llama)
    layer, (one, three) = skeleton.load_layer(0), inputs_of(skeleton, 0, 1, 3)
    groups = groups_of(layer, [one])
    held = measure_held(layer, groups, *one)
    assert measure_held(layer, groups, *three) == [3 * num_bytes for num_bytes in held]
    hidden_bytes, inner_bytes = 4 * 8 * 32, 4 * 8 * 64
    assert held[0] >= hidden_bytes and held[3] >= hidden_bytes + inner_bytes
    assert max(held) < 4 * (hidden_bytes + inner_bytes)


def test_layers_with_the_same_linears_are_measured_once(llama: Path) -> None:
    skeleton, held, forwards = skeleton_of(llama), Held(), []
    for layer_index in range(3):
        layer, inputs = skeleton.load_layer(layer_index), inputs_of(skeleton, layer_index, 1)
        groups = groups_of(layer, inputs)
        layer.module.register_forward_hook(lambda *_: forwards.append(1))
        held.before(layer, groups, *inputs[0])
    assert len(forwards) == 1


# --- replicas


def _as_replica(rank: int, folder: Path, meeting: Meeting) -> None:
    """Two replicas, of which one has memory and the other has none, end with the layer of one process."""
    torch.set_num_threads(1)
    skeleton = skeleton_of(folder)
    inputs = inputs_of(skeleton, 0, 2, 2, 2, 1, 1)
    wanted, layer, part = skeleton.load_layer(0), skeleton.load_layer(0), split(5, 2)[rank]
    _, outputs = passed(wanted, inputs, SparseGPT(), [True] * 4, Alone(5, 2))
    replica = Replica(5, 2, rank, meeting, "cpu")
    mine = inputs[part.start : part.stop]
    single_pass = SinglePass(layer, mine.__getitem__, groups_of(layer, mine), [rank == 0] * 4, replica)
    with single_pass.hooked():
        results = single_pass.prune(SparseGPT(), everywhere(layer, HALF), 64)
        assert [result.num_tokens for result in results] == [64] * 7
        assert same_layer(layer, wanted)
        assert same_outputs([single_pass.finish(index) for index in range(len(mine))], [outputs[at] for at in part])
    replica.close()


def test_replicas_end_with_the_bytes_of_one_process(llama: Path) -> None:
    spawn(_as_replica, (llama, offer_meeting("127.0.0.1")), 2)


# --- what goes wrong


def left_standing() -> list[greenlet]:
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is greenlet and each and each.parent is not None]


def hooks(layer: LoadedLayer) -> int:
    return sum(len(module._forward_pre_hooks) for module in layer.module.modules())


def prune_by_hand(layer: LoadedLayer, inputs: Inputs, patterns: dict[str, Pattern] | None = None) -> None:
    groups = groups_of(layer, inputs)
    single_pass = SinglePass(layer, inputs.__getitem__, groups, [True] * len(groups), Alone(len(inputs)))
    with single_pass.hooked():
        single_pass.prune(SparseGPT(), patterns or everywhere(layer, HALF), count(inputs))


def fails_late(it: Handmade, hidden_BLH: Tensor) -> Tensor:
    middle_BLH = it.first(hidden_BLH)
    if not bool(middle_BLH[..., 0].any()):
        raise ArithmeticError("nothing left")
    return it.second(middle_BLH)


@pytest.mark.parametrize("ends", ["in a forward", "between forwards", "well"])
def test_however_it_ends_nothing_stays_behind(ends: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A forward that fails says what it said; others that stand are ended; neither hooks nor a grad mode remain."""
    layer = handmade(fails_late, "first", "second")
    inputs = hidden_states(2, 2)
    if ends == "in a forward":
        inputs.insert(1, (torch.zeros(2, 3, 4), inputs[0][1]))
    if ends == "well":
        prune_by_hand(layer, inputs)
    else:
        with pytest.raises(ArithmeticError if ends == "in a forward" else KeyError):
            prune_by_hand(layer, inputs, {"no pattern": HALF} if ends == "between forwards" else None)
    assert not left_standing() and not hooks(layer) and torch.is_grad_enabled()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("flow", "told"),
    [
        (
            lambda it, hidden: it.second(it.first(hidden)) if len(hidden) == 2 else it.first(hidden),
            r"layers\.7\.second\.weight: its linear is used 0 times by micro-batch 1 in layer 7",
        ),
        (
            lambda it, hidden: it.second(torch.cat([it.first(row) for row in hidden.split(2)])),
            r"layers\.7\.first\.weight: its linear saw 12 tokens instead of 15",
        ),
        (
            lambda it, hidden: it.second(it.first(hidden) / (3 - len(hidden))),
            r"layers\.7\.second\.weight: the inputs of its linear in layer 7 hold NaN or Inf",
        ),
    ],
    ids=["unused", "twice", "not finite"],
)
def test_a_layer_that_does_otherwise_with_later_windows_is_refused(
    flow: Callable[[Handmade, Tensor], Tensor], told: str
) -> None:
    layer, inputs = handmade(flow, "first", "second"), hidden_states(2, 3)
    groups = groups_of(layer, inputs)
    single_pass = SinglePass(layer, inputs.__getitem__, groups, [True, True], Alone(2))
    with pytest.raises(Refusal, match=told), single_pass.hooked():
        single_pass.prune(Wanda(), everywhere(layer, HALF), count(inputs))
    assert not left_standing() and not hooks(layer)


# --- what is kept


def test_what_a_linear_has_read_is_let_go_when_the_forward_goes_on() -> None:
    is_gone: list[bool] = []

    def flow(it: Handmade, hidden: Tensor) -> Tensor:
        scaled = hidden * 2
        read = StorageWeakRef(scaled.untyped_storage())
        given = it.first(scaled)
        del scaled
        is_gone.append(read.expired())
        return it.second(given)

    layer, inputs = handmade(flow, "first", "second"), hidden_states(2, 2)
    groups = groups_of(layer, inputs)
    single_pass = SinglePass(layer, inputs.__getitem__, groups, [True, True], Alone(2))
    with single_pass.hooked():
        single_pass.prune(SparseGPT(), everywhere(layer, HALF), count(inputs))
    # while groups are looked for, their inputs are kept for comparison
    assert is_gone == [False, True, True]


def test_the_sums_of_one_group_are_there_at_a_time() -> None:
    """When the next group is reached, nobody has the Gram of the last any more."""

    def grams() -> int:
        return sum(type(each) is Gram for each in gc.get_objects())

    def flow(it: Handmade, hidden: Tensor) -> Tensor:
        given = it.second(it.first(hidden))
        seen.append(grams())
        return it.third(given)

    seen: list[int] = []
    gc.collect()
    before = grams()
    prune_by_hand(handmade(flow, "first", "second", "third"), hidden_states(2, 2))
    # the first is the search for groups; then the new sums of the third group alone
    assert seen[1:] == [before + 1, before + 1]
