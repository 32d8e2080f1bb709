"""Measures how fast a method takes groups of a layer from their statistics to pruned weights.

O = output rows, I = input columns, B = windows in a micro-batch, L = tokens in a window, H = hidden size.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.groups import Group
from pipeline.layer import prune_group
from pipeline.methods import Method
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.models.outside import Call
from pipeline.models.skeleton import LoadedLayer
from pipeline.numerics.solve import upper_factor
from pipeline.numerics.statistics import Gram
from pipeline.observe import observe, without_inputs
from pipeline.planning.cost import Flops, GroupShape, LinearShape, is_counted, of_solving
from pipeline.planning.scope import Scope
from pipeline.planning.stopwatch import LEAST_SECONDS, MOST_FLOPS, Stopwatch
from pipeline.sparsity import Pattern

# Of a method that iterates, on no more columns: what it takes grows with their square.
_MOST_COLUMNS = 1024
# Of what a method does not do.
_NO_MATTER = 1e15


def measure_solving(
    scope: Scope, layer: LoadedLayer, hidden_BLH: Tensor, call: Call, seconds: Stopwatch
) -> dict[str, float]:
    """Of the groups that do not take too long, or else of the cheapest."""
    pruning = scope.config.pruning
    patterns = {linear.key: pruning.target for linear in layer.linears}
    num_tokens = hidden_BLH.shape[0] * hidden_BLH.shape[1]
    if pruning.method.statistic.needs_inputs:
        groups = observe(layer, [(hidden_BLH, call)], pruning.method.statistic, num_tokens)
    else:
        groups = without_inputs(layer, pruning.method.statistic)
    if not is_counted(pruning.method) and not pruning.method.prunes_blocks:
        return _measure_iterating(pruning.method, layer, min(groups, key=lambda group: group.cost), patterns, seconds)
    shapes = [_shape(group) for group in groups]
    costs = [of_solving([shape], pruning.method).total for shape in shapes]
    chosen = [index for index, cost in enumerate(costs) if cost <= max(MOST_FLOPS, min(costs))]
    whole = factoring = errors = 0.0
    for group in (groups[index] for index in chosen):
        whole += seconds(partial(prune_group, layer, group, pruning.method, patterns), 3)
        linear = group.linears[0]
        weight_OI = layer.weight_OI(linear)
        change_O = weight_OI.new_zeros(len(weight_OI)) if _gives_change(pruning.method) else None
        once = seconds(partial(group.statistic.errors, weight_OI, weight_OI, change_O), 3)
        errors += once * sum(each.num_outputs for each in group.linears) / linear.num_outputs
        if isinstance(pruning.method, SparseGPT) and isinstance(group.statistic, Gram):
            factoring += seconds(partial(upper_factor, group.statistic.sum_II, pruning.method.damping), 3)
    flops = of_solving([shapes[index] for index in chosen], pruning.method)
    return rates_of_solving(flops, sum(shapes[index].num_weights for index in chosen), whole, factoring, errors)


def _measure_iterating(
    method: Method, layer: LoadedLayer, group: Group, patterns: dict[str, Pattern], seconds: Stopwatch
) -> dict[str, float]:
    """Once, on the first columns of a group."""
    budget, statistic = group.budget(patterns), cast(Any, group.statistic)
    m = budget.group_size or 1
    num_columns = min(group.linears[0].num_inputs, _MOST_COLUMNS // m * m)
    weight_OI = group.weight_OI(layer)[:, :num_columns].contiguous()
    inputs = statistic.reordered(torch.arange(num_columns, device=layer.device))
    whole = seconds(partial(method.prune, weight_OI, inputs, budget), 1)
    errors = seconds(partial(inputs.errors, weight_OI, weight_OI), 1)
    shape = GroupShape(tuple(LinearShape(each.num_outputs, num_columns, 0) for each in group.linears))
    return rates_of_solving(of_solving([shape], method), shape.num_weights, whole + errors, 0.0, errors)


def rates_of_solving(flops: Flops, num_weights: int, whole: float, factoring: float, errors: float) -> dict[str, float]:
    """What is neither factorisation nor errors is the sweep where there is one, else the choice of a mask.

    Errors that are no operations are part of the choice.
    """
    rest = max(whole - factoring - errors * (flops.errors > 0), LEAST_SECONDS)
    return {
        "factorisation": flops.factorisation / factoring if factoring else _NO_MATTER,
        "sweep": flops.sweep / rest if flops.sweep else _NO_MATTER,
        "choice": _NO_MATTER if flops.sweep else num_weights / rest,
        "errors": flops.errors / errors if flops.errors else _NO_MATTER,
    }


def _gives_change(method: Method) -> bool:
    return isinstance(method, SparseGPT) and is_counted(method)


def _shape(group: Group) -> GroupShape:
    return GroupShape(tuple(LinearShape(each.num_outputs, each.num_inputs, 0) for each in group.linears))
