"""What is counted is what is done: against torch's own counter, on real layers of every family."""

from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, save_model
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.wanda import Wanda
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.skeleton import LoadedLayer, Skeleton
from pipeline.models.tracing import trace_layers
from pipeline.numerics.statistics import ColumnSums
from pipeline.observe import Observer
from pipeline.planning.cost import (
    Flops,
    LayerShape,
    LinearShape,
    Passes,
    count,
    of_forwards,
    of_single_pass,
    of_solving,
)
from pipeline.replicas import Alone

LENGTH = 24
FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **also: sdpa_flop_count(q, k, v)
}


def llama_70b() -> LayerShape:
    hidden, wide, narrow = 8192, 28672, 1024
    sizes = [(hidden, hidden, 0), (narrow, hidden, 0), (narrow, hidden, 0), (hidden, hidden, 1)]
    sizes += [(wide, hidden, 2), (wide, hidden, 2), (hidden, wide, 3)]
    return LayerShape(tuple(LinearShape(*size) for size in sizes), hidden)


def open_first_layer(folder: Path, family: str) -> tuple[Skeleton, LoadedLayer]:
    skeleton = Skeleton(open_checkpoint(str(save_model(folder, family))), torch.float32, torch.device("cpu"))
    return skeleton, skeleton.load_layer(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_forwards_are_counted_as_torch_counts_them(tmp_path: Path, family: str) -> None:
    skeleton, layer = open_first_layer(tmp_path, family)
    shape, call = trace_layers(skeleton, 8)[0].shape, skeleton.calls((2, LENGTH))[0]
    observer = Observer(layer, ColumnSums, 4 * LENGTH, Alone(2))
    counted = []
    for index in range(2):
        with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
            observer.see(index, torch.randn(2, LENGTH, skeleton.hidden_size), call)
        counted.append(counter.get_total_flops())
    whole = of_forwards(shape, 2 * LENGTH, LENGTH, Passes(is_single=True))
    cut = of_forwards(shape, 2 * LENGTH, LENGTH, Passes(goes_on=False))
    # torch counts the upper half of the scores too
    assert counted == [whole.propagating + 2 * whole.attention, cut.collecting + 2 * cut.attention]


def test_a_layer_of_70b_costs_what_the_papers_arithmetic_says() -> None:
    flops = count(llama_70b(), SparseGPT(), 128 * 2048, 2048, Passes())
    assert flops.propagating == pytest.approx(4.5e14, rel=0.01)
    # one triangle of four Grams
    assert flops.statistic == pytest.approx(5.4e14 / 2, rel=0.01)
    # of a Cholesky factor, an inverse and another factor only the first
    assert flops.factorisation == pytest.approx((3 * 7.3e11 + 3.1e13) / 4, rel=0.02)
    assert flops.sweep == pytest.approx(5.5e11 * 2 + 2 * 1.9e12 + 6.7e12 + 2 * 7e10, rel=0.03)


@pytest.mark.parametrize("method", [SparseGPT(), Wanda()])
def test_what_depends_on_tokens_grows_with_them_and_the_rest_does_not(method: SparseGPT | Wanda) -> None:
    once, thrice = (count(llama_70b(), method, tokens, 2048, Passes()) for tokens in (4096, 3 * 4096))
    solving = of_solving(llama_70b().groups, method)
    assert thrice.total - solving.total == pytest.approx(3 * (once.total - solving.total))
    assert (thrice.factorisation, thrice.sweep, thrice.errors) == (once.factorisation, once.sweep, once.errors)


def test_one_pass_that_may_stand_is_one_forward_and_one_that_may_not_is_as_many_as_there_are_groups() -> None:
    shape, tokens = llama_70b(), 4096
    one = of_forwards(shape, tokens, 2048, Passes(is_single=True))
    standing = sum(of_single_pass(shape, tokens, 2048, [True] * 4), Flops())
    assert standing == one
    falling = sum(of_single_pass(shape, tokens, 2048, [False] * 4), Flops())
    before = [shape.num_weights_before(group) for group in range(4)]
    assert falling.propagating == pytest.approx(one.propagating + 2 * tokens * sum(before))
    # all but the first replay go through the attention
    assert falling.attention == pytest.approx(4 * one.attention)


def test_a_method_that_reads_nothing_costs_no_forwards() -> None:
    from pipeline.methods.magnitude import Magnitude

    assert count(llama_70b(), Magnitude(), 4096, 2048, Passes()).total == 0
