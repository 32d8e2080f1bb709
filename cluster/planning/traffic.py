"""The bytes of a run without failures: from worker to worker, and from and to the storage.

They follow what cluster/driver.py, cluster/sweep.py and pipeline/worker.py open, keep and send. Change it with them.
"""

import itertools

from cluster.plan import plan_shards
from cluster.planning.portion import Choice
from cluster.planning.schedule import Layout
from cluster.planning.simulate import work_of
from pipeline.methods import Method
from pipeline.models.tracing import LayerTrace
from pipeline.numerics.statistics import Gram
from pipeline.planning.cost import statistic_bytes
from pipeline.planning.disk import entry_bytes, receipt_bytes
from pipeline.planning.scope import Scope
from pipeline.segments import Progress


def network_bytes(scope: Scope, choice: Choice, layout: Layout) -> int:
    """Hidden states that move from team to team, and what replicas tell each other."""
    num_moves, work = len(_entered_from_others(scope, layout)), work_of(layout, Progress())
    if layout.num_teams > 1 and work.sweep:
        num_moves += work.sweep.stop - work.sweep.entry_layer - 1
    method, num_others = scope.config.pruning.method, choice.num_replicas - 1
    sums = num_others * sum(exchanged_sums(trace, method) for trace in scope.traces)
    if not have_owners(scope):
        # every replica gets those of all
        return num_moves * scope.hidden_bytes + choice.num_replicas * sums
    return num_moves * scope.hidden_bytes + sums + num_others * sum(trace.stored_bytes for trace in scope.traces)


def read_bytes(scope: Scope, choice: Choice, layout: Layout) -> int:
    """Digests of the source; what a survey looks at; layers, each of which every replica of its team opens; what teams
    enter with; and at the end what is outside the layers."""
    work, outside = work_of(layout, Progress()), scope.outside.stored_bytes
    opened = [layer for each in work.stretches for layer in range(each.next_layer, each.segment.stop)]
    # a team reads the next layer ahead before it hands over to the one that prunes it
    opened += _entered_from_others(scope, layout)
    entered = [each.entry_layer for each in work.stretches] if layout.needs_activations else []
    if work.sweep:
        opened += range(work.sweep.entry_layer, work.sweep.stop)
        entered.append(work.sweep.entry_layer)
    layers = choice.num_replicas * sum(scope.traces[layer].stored_bytes for layer in opened)
    entries = sum(choice.num_replicas * outside if layer == 0 else _entry(scope, choice) for layer in entered)
    surveyed = (
        sum(trace.stored_bytes for trace in scope.traces) * scope.has_survey
        + outside * scope.config.pruning.surveys_inputs
    )
    return scope.model_bytes * scope.is_hashed + surveyed + layers + entries + outside


def written_bytes(scope: Scope, choice: Choice, layout: Layout) -> int:
    """The model, what is kept for a restart and for segments, and receipts."""
    work, num_kept = work_of(layout, Progress()), 0
    if layout.needs_activations:
        num_kept += len(work.sweep.kept) if work.sweep else 0
        for segment in layout.segments:
            num_kept += sum(layer % layout.keep_entry_every == 0 for layer in range(segment.first + 1, segment.stop))
    receipts = sum(receipt_bytes(len(trace.shape.linears)) for trace in scope.traces)
    return scope.model_bytes + num_kept * _entry(scope, choice) + receipts


def have_owners(scope: Scope) -> bool:
    """Whether each group of linears is solved by one replica, which tells the others the weights.

    Otherwise every replica has all sums and solves by itself.
    """
    pruning = scope.config.pruning
    return not (pruning.method.statistic.needs_inputs and (pruning.permute or pruning.method.prunes_blocks))


def exchanged_sums(trace: LayerTrace, method: Method) -> int:
    """Bytes that a replica sends to whoever solves: of a Gram the lower triangle."""
    num_bytes = sum(statistic_bytes(group, method.statistic) for group in trace.shape.groups)
    return num_bytes // 2 if method.statistic is Gram else num_bytes


def _entered_from_others(scope: Scope, layout: Layout) -> list[int]:
    """The first layers of shards whose team takes the hidden states over from another."""
    if not layout.is_sequential:
        return []
    shards = plan_shards(scope.num_layers, layout.num_shards, layout.num_teams)
    return [
        after.first_layer for before, after in itertools.pairwise(shards) if before.worker_index != after.worker_index
    ]


def _entry(scope: Scope, choice: Choice) -> int:
    """Of a kept input of a layer, of which every replica has a part."""
    return entry_bytes(scope.num_tokens, scope.hidden_size, scope.itemsize, choice.num_replicas)
