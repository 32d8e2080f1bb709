"""What pruning a decoder layer costs, by count: floating-point operations by stage, and the bytes of what is held.

T = tokens, L = tokens in a window, m = output rows and d = input columns of a linear; linears that read the same input
are a group, with m the rows of all of them. Counted are, once each:

    propagating     the whole forward with the pruned weights, 2 m d T for every linear; nothing after the last layer
    collecting      the forward before it that only feeds the statistics: the same, but it ends at the input of the
                    last group; none in a single pass that goes on, nor in a sweep, whose one forward gives both
    attention       apart from these two: 2 L T x (heads x head size) for each of them, the lower half of the scores
                    of every window and their products with the values
    statistic       d² T for the Gram of a group, one triangle of it; 4 d T for column sums
    factorisation   1/3 d³ for a group: a Cholesky factor
    sweep           m d²: every column is told the changes of all columns to its left; of a method that iterates one
                    product of the weights with a matrix of d x d, and a rate that was measured holds how many there are
    errors          m d² for the outputs of the weights on the Gram, of which half is computed, and as much for those
                    of their change where the sweep does not give it; 4 m d on column sums

`necessary` leaves out attention and errors, as the counts of the papers' methods do. Norms, activations, choices and
copies are no matrix products and count nothing. Of the methods, SparseGPT and those that only choose a mask are counted
(`is_counted`); refits, ALPS and SparseLLM iterate for as long as their data make them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from pipeline.allocation import Allocation
from pipeline.methods import Method
from pipeline.methods.masked import MaskMethod
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.numerics.statistics import Gram, Statistic

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class LinearShape:
    """One weight matrix, [outputs, inputs]; `group` is the number of the input that it reads, by first use."""

    num_outputs: int
    num_inputs: int
    group: int

    @property
    def num_weights(self) -> int:
        return self.num_outputs * self.num_inputs


@dataclass(frozen=True)
class GroupShape:
    """Linears that read the same input."""

    linears: tuple[LinearShape, ...]

    @property
    def number(self) -> int:
        return self.linears[0].group

    @property
    def num_inputs(self) -> int:
        return self.linears[0].num_inputs

    @property
    def num_rows(self) -> int:
        return sum(linear.num_outputs for linear in self.linears)

    @property
    def num_weights(self) -> int:
        return self.num_rows * self.num_inputs

    @property
    def gram_bytes(self) -> int:
        """Of a float32 Gram and the column sums beside it."""
        return _FLOAT_BYTES * (self.num_inputs**2 + self.num_inputs)


@dataclass(frozen=True)
class LayerShape:
    """The linears of a decoder layer in the order in which it calls them; `attention_width` is heads x head size."""

    linears: tuple[LinearShape, ...]
    attention_width: int = 0

    @property
    def groups(self) -> list[GroupShape]:
        numbers = sorted({linear.group for linear in self.linears})
        return [GroupShape(tuple(each for each in self.linears if each.group == number)) for number in numbers]

    @property
    def num_weights(self) -> int:
        return sum(linear.num_weights for linear in self.linears)

    def num_weights_before(self, group: int) -> int:
        """Of the linears that are called before anything reads the input of a group."""
        first = next(index for index, each in enumerate(self.linears) if each.group == group)
        return sum(linear.num_weights for linear in self.linears[:first])

    @property
    def num_weights_before_last_group(self) -> int:
        return self.num_weights_before(self.groups[-1].number)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations by stage, as the module says."""

    propagating: float = 0.0
    collecting: float = 0.0
    attention: float = 0.0
    statistic: float = 0.0
    factorisation: float = 0.0
    sweep: float = 0.0
    errors: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})

    @property
    def total(self) -> float:
        return float(sum(getattr(self, each.name) for each in fields(self)))

    @property
    def necessary(self) -> float:
        """Without attention and errors."""
        return self.total - self.attention - self.errors


@dataclass(frozen=True)
class Passes:
    """How the tokens go through a layer: in one forward that both feeds the statistics and goes on, or in two.

    `goes_on`: something follows that reads what the layer gives.
    """

    is_single: bool = False
    goes_on: bool = True

    @property
    def num_whole(self) -> int:
        return int(self.goes_on)

    @property
    def num_collecting(self) -> int:
        """Forwards that end at the last observed input."""
        return int(not (self.is_single and self.goes_on))


def is_counted(method: Method) -> bool:
    """Whether what a method does with weights and statistics is known by count."""
    if method.prunes_blocks or not isinstance(method, SparseGPT | MaskMethod):
        return False
    return not method.refit


def count(layer: LayerShape, method: Method, num_tokens: int, window_length: int, passes: Passes) -> Flops:
    """Of one layer, all its tokens. A method that looks at weights alone has no forwards and no statistic."""
    of_tokens = Flops()
    if method.statistic.needs_inputs:
        of_tokens = of_forwards(layer, num_tokens, window_length, passes)
        of_tokens += of_statistic(layer, method.statistic, num_tokens)
    return of_tokens + of_solving(layer.groups, method)


def of_forwards(layer: LayerShape, num_tokens: int, window_length: int, passes: Passes) -> Flops:
    num_forwards = passes.num_whole + passes.num_collecting
    return Flops(
        propagating=2.0 * layer.num_weights * num_tokens * passes.num_whole,
        collecting=2.0 * layer.num_weights_before_last_group * num_tokens * passes.num_collecting,
        attention=2.0 * window_length * num_tokens * layer.attention_width * num_forwards,
    )


def of_single_pass(
    layer: LayerShape, num_tokens: int, window_length: int, may_stand: Sequence[bool]
) -> tuple[Flops, Flops]:
    """Until the last group has been seen, and from there to the end, where forwards stand before some groups.

    Before the others they end once their input has been seen, and begin anew for what follows. The attention lies
    between the first group and the second.
    """
    attention = 2.0 * window_length * num_tokens * layer.attention_width

    def between(start: int | None, stop: int | None) -> Flops:
        first = 0 if start is None else layer.num_weights_before(start)
        last = layer.num_weights if stop is None else layer.num_weights_before(stop)
        has_attention = (start is None or start == numbers[0]) and stop != numbers[0]
        return Flops(propagating=2.0 * num_tokens * (last - first), attention=attention * has_attention)

    numbers = [group.number for group in layer.groups]
    seen, stands_before = Flops(), None
    for number, may in zip(numbers, may_stand, strict=True):
        seen += between(stands_before, number)
        stands_before = number if may else None
    return seen, between(stands_before, None)


def of_statistic(layer: LayerShape, statistic: type[Statistic], num_tokens: int) -> Flops:
    if statistic is Gram:
        return Flops(statistic=sum(float(group.num_inputs) ** 2 * num_tokens for group in layer.groups))
    return Flops(statistic=sum(4.0 * group.num_inputs * num_tokens for group in layer.groups))


def of_survey(layer: LayerShape, allocation: Allocation, num_tokens: int, window_length: int, goes_on: bool) -> Flops:
    """Of what an allocation looks at in a layer of the dense model; what it then does with the weights is no product
    or, as singular values, not known by count."""
    if allocation.statistic is None or not allocation.statistic.needs_inputs:
        return Flops()
    forwards = of_forwards(layer, num_tokens, window_length, Passes(goes_on=goes_on))
    return forwards + of_statistic(layer, allocation.statistic, num_tokens)


def of_solving(groups: Iterable[GroupShape], method: Method) -> Flops:
    """Of some groups, from their weights and whole statistics to pruned weights and their errors."""
    solved = Flops()
    for group in groups:
        squared = float(group.num_inputs) ** 2
        sweeps = isinstance(method, SparseGPT)
        outputs = 4.0 * group.num_inputs
        if method.statistic is Gram:
            outputs = squared * (1 if sweeps and is_counted(method) else 2)
        solved += Flops(
            factorisation=1 / 3 * squared * group.num_inputs * sweeps,
            sweep=squared * group.num_rows * (sweeps or not is_counted(method)),
            errors=group.num_rows * outputs * method.statistic.needs_inputs,
        )
    return solved


def statistic_bytes(group: GroupShape, statistic: type[Statistic]) -> int:
    """Of what is summed up for a group."""
    if statistic is Gram:
        return group.gram_bytes
    return 2 * _FLOAT_BYTES * group.num_inputs * statistic.needs_inputs


def activation_bytes(num_tokens: int, hidden_size: int, itemsize: int) -> int:
    """Of the hidden states of some tokens before a layer."""
    return num_tokens * hidden_size * itemsize
