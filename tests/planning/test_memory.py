"""What is planned to be held: no less than what is there, seen by a ledger of all tensors, and not much more."""

from dataclasses import replace

import pytest
import torch
from handmade import NO_CALL, linears_of_one_input

from pipeline.layer import prune_group
from pipeline.methods import Method
from pipeline.methods.alps import ALPS
from pipeline.methods.dsnot import DSnoT
from pipeline.methods.magnitude import Magnitude
from pipeline.methods.ria import RIA
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.wanda import Wanda
from pipeline.models.tracing import LayerTrace, _Ledger
from pipeline.numerics.statistics import ColumnSums, Gram
from pipeline.observe import observe
from pipeline.planning.cost import GroupShape, LayerShape, LinearShape
from pipeline.planning.memory import Moment, Outside, Share, at_the_ends, moments, solving_bytes
from pipeline.sparsity import Budget, NofM, Pattern, parse_pattern

ROWS, NUM_INPUTS = (512, 512, 256), 512
GROUP = GroupShape(tuple(LinearShape(num_rows, NUM_INPUTS, 0) for num_rows in ROWS))
METHODS = [
    Magnitude(),
    RIA(),
    DSnoT(refine="all"),
    DSnoT(refine="all", initial="sparsegpt"),
    SparseGPT(),
    ALPS(max_iterations=4),
    Magnitude(refit=True),
    Wanda(refit=True),
    DSnoT(refine="all", refit=True),
    SparseGPT(refit=True),
]
TRACE = LayerTrace(
    LayerShape(GROUP.linears),
    stored_bytes=1000,
    loaded_bytes=2000,
    converted_bytes=2000,
    forward_bytes=50,
    group_bytes=(10,),
)
SHARE = Share(
    hidden_bytes=300, windows_per_micro_batch=2, window_length=8, itemsize=2, base_bytes=5, on_gpu=False, is_dense=False
)


def observing(method: Method, share: Share) -> Moment:
    return next(each for each in moments(TRACE, TRACE, TRACE, method, share) if each.name == "observing")


@pytest.mark.parametrize("pattern", [parse_pattern("unstructured", 0.5), NofM(2, 4)], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_method_holds_what_is_planned_for_it(method: Method, pattern: Pattern) -> None:
    weight_OI = torch.randn(sum(ROWS), NUM_INPUTS)
    inputs = method.statistic.zeros(NUM_INPUTS, weight_OI.device)
    inputs.observe(torch.randn(2 * NUM_INPUTS, NUM_INPUTS))
    if isinstance(inputs, Gram):
        inputs.sum_II.diagonal()
    budget = Budget((pattern,) * len(ROWS), ROWS, ("attn",) * len(ROWS))
    with _Ledger() as ledger:
        method.prune(weight_OI, inputs, budget)
    held = weight_OI.nbytes + ledger.most_bytes
    # the scores of a block of columns are no small part of a matrix as small as this one
    assert 0.9 <= solving_bytes(GROUP, method, is_converted=False, on_gpu=False) / held < 2


@pytest.mark.parametrize("pattern", [parse_pattern("unstructured", 0.5), NofM(2, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("are_few", [True, False], ids=["few rows", "all rows, as on a GPU"])
def test_a_method_that_goes_by_rows_holds_one_linear_and_what_some_rows_need(
    are_few: bool, dtype: torch.dtype, pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a group of three that is planned for, the largest is pruned."""
    weights_at_once = 2**14 if are_few else 2**30
    monkeypatch.setattr("pipeline.layer.WEIGHTS_AT_ONCE", weights_at_once)
    monkeypatch.setattr("pipeline.planning.memory.WEIGHTS_AT_ONCE", 2**14)
    layer = linears_of_one_input(ROWS[:1], NUM_INPUTS, dtype)
    (group,) = observe(layer, [(torch.randn(1, 8, NUM_INPUTS), NO_CALL)], ColumnSums, 8)
    with _Ledger() as ledger:
        prune_group(layer, group, Wanda(), {linear.key: pattern for linear in layer.linears})
    planned = solving_bytes(GROUP, Wanda(), is_converted=dtype != torch.float32, on_gpu=not are_few)
    assert 0.95 <= planned / ledger.most_bytes < (1.4 if are_few else 1.7)


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_only_a_gram_copies_inputs_and_only_those_of_half_precision_on_a_cpu(on_gpu: bool, itemsize: int) -> None:
    share = replace(SHARE, on_gpu=on_gpu, itemsize=itemsize)
    for method in (Wanda(), SparseGPT()):
        found = observing(method, share)
        copied = 4 * 2 * 8 * NUM_INPUTS if (method.statistic, on_gpu, itemsize) == (Gram, False, 2) else 0
        # without a copy the forward is widest where it holds most
        assert (found.gpu if on_gpu else found.host)["forward"] == (2 * 10 + copied if copied else 2 * 50)


def test_column_sums_take_few_numbers_at_a_time() -> None:
    sums, x_TI = ColumnSums.zeros(1024, torch.device("cpu")), torch.randn(2048, 1024).bfloat16()
    with _Ledger() as ledger:
        sums.observe(x_TI)
    assert ledger.most_bytes < x_TI.nbytes / 2


def test_in_a_sweep_one_layer_is_read_and_one_is_written_while_one_is_pruned() -> None:
    alone, dense = (observing(SparseGPT(), replace(SHARE, is_dense=is_dense)).host for is_dense in (False, True))
    assert dense == {**alone, "next layer": 1000, "layer being written": 1000}


def test_what_is_outside_the_layers_is_there_twice_where_it_is_converted() -> None:
    outside = Outside(stored_bytes=100, loaded_bytes=240, converted_bytes=200)
    entering, finishing = at_the_ends(outside, SHARE)
    assert (entering.host_bytes, finishing.host_bytes) == (5 + 300 + 100 + 200, 5 + 100)
    entering, finishing = at_the_ends(outside, replace(SHARE, on_gpu=True, gpu_hidden_bytes=7))
    assert (entering.host_bytes, entering.gpu_bytes) == (5 + 300 + 100, 240 + 7)
    assert finishing.gpu_bytes == 0
