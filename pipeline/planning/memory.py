"""What a worker holds at its widest moment, from what the code holds then: nothing here is fitted.

T = tokens, m = output rows and d = input columns of a group. A layer goes through three moments that can be the widest:
while it is observed, while one of its groups is solved, while it runs pruned.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from pipeline.layer import WEIGHTS_AT_ONCE
from pipeline.methods import Method
from pipeline.methods.alps import ALPS
from pipeline.methods.dsnot import DSnoT
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.models.tracing import LayerTrace
from pipeline.numerics.solve import BLOCK_COLUMNS
from pipeline.numerics.statistics import Gram, Statistic
from pipeline.planning.cost import GroupShape, statistic_bytes
from pipeline.runtime import USUALLY_KEPT_BYTES

_FLOAT, _BOOL = 4, 1


@dataclass(frozen=True)
class Share:
    """What one worker has of a run: hidden states in RAM or on a GPU, and windows that go through a layer together.

    `is_dense`: layers are pruned in a sweep, in which the next one is read and the one before is written meanwhile.
    `suspended`: in a single pass, the bytes of the forwards that stand before each group; None where there are two.
    """

    hidden_bytes: int
    windows_per_micro_batch: int
    window_length: int
    itemsize: int
    base_bytes: int
    on_gpu: bool
    is_dense: bool
    suspended: tuple[int, ...] | None = None
    gpu_hidden_bytes: int = 0

    @property
    def reads_ahead(self) -> bool:
        """Whether the next layer is read while this one is pruned, not only while it runs after that."""
        return self.on_gpu or self.is_dense


@dataclass(frozen=True)
class Outside:
    """What is outside the layers: `stored_bytes`, `loaded_bytes` and `converted_bytes` as in a LayerTrace."""

    stored_bytes: int
    loaded_bytes: int
    converted_bytes: int


@dataclass(frozen=True)
class Moment:
    """What is held by the host and by the GPU, by what it is. On a CPU the host holds all."""

    name: str
    host: dict[str, int] = field(default_factory=dict)
    gpu: dict[str, int] = field(default_factory=dict)

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def gpu_bytes(self) -> int:
        return sum(self.gpu.values())


def moments(
    trace: LayerTrace, before: LayerTrace | None, following: LayerTrace | None, method: Method, share: Share
) -> list[Moment]:
    """Of one layer, with those before and after it, if any."""
    groups = trace.shape.groups
    sums_of = partial(statistic_bytes, statistic=method.statistic)
    forward = trace.forward_bytes * share.windows_per_micro_batch
    if not method.statistic.needs_inputs:
        forward = 0
    host = {
        "process": share.base_bytes,
        "kept by the C library": USUALLY_KEPT_BYTES,
        "layer as stored": trace.stored_bytes,
        "hidden states": share.hidden_bytes,
    }
    ahead = {"next layer": following.stored_bytes if following else 0}
    pruned_with = {**host, **(ahead if share.reads_ahead else {})}
    if share.is_dense and before:
        pruned_with["layer being written"] = before.stored_bytes
    # what is computed with as it is stored is in memory once
    loaded = {"layer loaded": trace.loaded_bytes if share.on_gpu else trace.converted_bytes}
    is_single = share.suspended is not None
    standing = share.suspended or tuple(0 for _ in groups)
    # in a single pass there is one statistic at a time
    observed = {
        "statistics": max(map(sums_of, groups)) if is_single else sum(map(sums_of, groups)),
        "forward": max(forward, _observed(trace, method.statistic, share)),
        "suspended forwards": max(standing, default=0),
    }
    found = [_moment("observing", pruned_with, {**loaded, **observed}, share)]
    for index, group in enumerate(groups):
        solving = {
            "statistics": sum(map(sums_of, groups[index : index + 1 if is_single else None])),
            "solving": solving_bytes(group, method, trace.converted_bytes > 0, share.on_gpu),
            "suspended forwards": standing[index],
        }
        found.append(_moment(f"solving group {index + 1}", pruned_with, {**loaded, **solving}, share))
    return [*found, _moment("running pruned", {**host, **ahead}, {**loaded, "forward": forward}, share)]


def measuring(
    trace: LayerTrace, following: LayerTrace | None, statistic: type[Statistic], share: Share
) -> list[Moment]:
    """While an allocation looks at a layer of the dense model, and the next is read."""
    host = {
        "process": share.base_bytes,
        "kept by the C library": USUALLY_KEPT_BYTES,
        "layer as stored": trace.stored_bytes,
        "next layer": following.stored_bytes if following else 0,
        "hidden states": share.hidden_bytes,
    }
    loaded = {
        "layer loaded": trace.loaded_bytes if share.on_gpu else trace.converted_bytes,
        "statistics": sum(statistic_bytes(group, statistic) for group in trace.shape.groups),
    }
    forward = 0
    if statistic.needs_inputs:
        forward = max(trace.forward_bytes * share.windows_per_micro_batch, _observed(trace, statistic, share))
    # of one linear its weights in float32, and two copies: of their size and their scores, or for singular values
    scores = 3 * _FLOAT * max((linear.num_weights for linear in trace.shape.linears), default=0)
    return [
        _moment("observing for the allocation", host, {**loaded, "forward": forward}, share),
        _moment("measuring for the allocation", host, {**loaded, "scores": scores}, share),
    ]


def at_the_ends(outside: Outside, share: Share) -> list[Moment]:
    """While windows enter, and at the end: what is outside the layers lies in memory, at the end only as stored."""
    host = {"process": share.base_bytes, "outside the layers": outside.stored_bytes}
    loaded = {"outside loaded": outside.loaded_bytes if share.on_gpu else outside.converted_bytes}
    entering = _moment("entering", {**host, "hidden states": share.hidden_bytes}, loaded, share)
    return [entering, Moment("finishing", host)]


def widest(found: Sequence[Moment]) -> tuple[Moment, Moment]:
    """The moment at which the host holds most, and that at which the GPU does."""
    return max(found, key=lambda each: each.host_bytes), max(found, key=lambda each: each.gpu_bytes)


def solving_bytes(group: GroupShape, method: Method, is_converted: bool, on_gpu: bool) -> int:
    """Beside the statistics, while a group goes from its weights to pruned ones: what pipeline/layer.py, the methods
    and numerics/solve.py and refit.py have at once. Change it with them.

    `is_converted`: weights are computed with in another dtype than they are stored in. What SparseLLM has to fit a
    block is not in it.
    """
    stacked, largest = _FLOAT * group.num_weights, _FLOAT * max(each.num_weights for each in group.linears)
    if method.goes_by_rows:
        # what is to be stored of one linear, and what it is computed with if that is another; of some rows weights,
        # what the choice has or what the errors have, masks
        at_once = largest if on_gpu else min(largest, _FLOAT * WEIGHTS_AT_ONCE)
        return (1 + is_converted) * largest + 3 * at_once + 2 * at_once // _FLOAT * _BOOL
    mask = stacked // _FLOAT * _BOOL
    # new and old weights and the mask; of one linear what is stored, its change, and squares of either
    results = 2 * stacked + mask + 3 * largest
    square = _FLOAT * group.num_inputs**2
    if isinstance(method, ALPS):
        # weights, what is solved of them and its mask; C, its decomposition in float64 or eigenvectors and one matrix
        return 2 * stacked + mask + square + max(8 * square, square + 15 * largest)
    if isinstance(method, SparseGPT):
        # a damped copy, which becomes the factor, weights as they were and in work, changes whose memory holds the
        # result, masks; of a block of columns what they were, their scores and what is lost
        block = _FLOAT * group.num_rows * min(group.num_inputs, max(BLOCK_COLUMNS, method.block_columns))
        solving = square + 3 * (stacked + block) + 2 * mask
        refitting = 2 * square + 14 * stacked + mask
    else:
        # weights, scores, and a choice that partitions a copy of them
        solving = 2 * stacked + largest // _FLOAT * (_FLOAT + 2 * _BOOL)
        refitting = square + 13 * stacked + mask
        if isinstance(method, DSnoT):
            # the swaps of one matrix, in both directions; the scores and masks of all stay
            solving = stacked + mask + 16 * largest + square * (method.statistic is Gram)
            refitting += stacked + 2 * mask
    return max(solving, results, refitting * method.refit)


def _observed(trace: LayerTrace, statistic: type[Statistic], share: Share) -> int:
    """The most that a forward holds together with what makes a statistic of a group's input."""
    if not statistic.needs_inputs:
        return 0
    tokens = share.windows_per_micro_batch * share.window_length
    # on a CPU a Gram copies inputs of half precision to float32; column sums take few tokens at a time, and a GPU reads
    # both as they are
    is_copied = statistic is Gram and share.itemsize != _FLOAT and not share.on_gpu
    return max(
        held * share.windows_per_micro_batch + _FLOAT * tokens * group.num_inputs * is_copied
        for group, held in zip(trace.shape.groups, trace.group_bytes, strict=True)
    )


def _moment(name: str, host: dict[str, int], computing: dict[str, int], share: Share) -> Moment:
    if not share.on_gpu:
        return Moment(name, {**host, **computing})
    return Moment(name, host, {**computing, "hidden states": share.gpu_hidden_bytes})
