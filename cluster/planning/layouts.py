"""Layouts worth trying with some workers, and the best of them."""

from cluster.planning.forecast import Forecast
from cluster.planning.portion import Choice
from pipeline.clock import clock
from pipeline.planning.scope import Scope

_NUM_SHOWN = 5


def choices(scope: Scope, num_workers: int) -> list[Choice]:
    """Replicas by powers of two, and under `shard` one or two shards for each team.

    Where nothing flows from layer to layer there is one propagation, and every team prunes layers by itself.
    """
    found = []
    num_replicas = 1
    while num_replicas <= min(num_workers, scope.num_micro_batches):
        teams = min(num_workers // num_replicas, scope.num_layers)
        if not scope.config.pruning.method.statistic.needs_inputs:
            found.append(Choice("pruned", None, num_replicas, teams * num_replicas))
        else:
            found.append(Choice("pruned", 1, num_replicas, num_replicas))
            if teams > 1:
                found += _of_many_teams(scope, num_workers // num_replicas, num_replicas)
        num_replicas *= 2
    return found


def _of_many_teams(scope: Scope, num_teams: int, num_replicas: int) -> list[Choice]:
    found, num_layers = [], scope.num_layers
    # which has no single pass
    if scope.config.pruning.granularity != "linear":
        num_dense = min(num_teams, num_layers)
        found.append(Choice("dense", num_dense, num_replicas, num_dense * num_replicas))
    for num_shards in sorted({min(num_teams * times, num_layers) for times in (1, 2)}):
        found.append(Choice("shard", num_shards, num_replicas, min(num_teams, num_shards) * num_replicas))
    return found


def recommend(found: list[Forecast], gpu_bytes: int | None, price_per_hour: float | None) -> str:
    """The fastest of every propagation, and then the next fastest; those that fit the GPU first."""

    def fits(each: Forecast) -> bool:
        return gpu_bytes is None or each.gpu.gpu_bytes <= gpu_bytes

    ranked = sorted(found, key=lambda each: (not fits(each), each.seconds))
    first = [next((x for x in ranked if x.choice.propagation == name), None) for name in ("pruned", "shard", "dense")]
    best = [each for each in first if each]
    shown = best + [each for each in ranked if each not in best][: max(0, _NUM_SHOWN - len(best))]
    costs = "" if price_per_hour is None else " cost |"
    lines = [f"| propagation | num_shards | num_replicas | workers | time | busy | RAM | GPU |{costs}"]
    lines.append("|---|---|---|---|---|---|---|---|" + ("---|" if costs else ""))
    for each in sorted(shown, key=ranked.index):
        choice, gpu = each.choice, size(each.gpu.gpu_bytes) + ", DOES NOT FIT" * (not fits(each))
        cells = [choice.propagation, choice.num_shards or "auto", choice.num_replicas, choice.num_workers]
        cells += [clock(each.seconds), f"{each.schedule.busy_share:.0%}", size(each.host.host_bytes), gpu]
        cells += [] if price_per_hour is None else [f"{each.cost(price_per_hour):.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    told = f"The best of {len(found)} layouts, by time."
    if not all(map(fits, shown)):
        told += f" Last come those that do not fit a GPU of {size(gpu_bytes or 0)}."
    if len(best) > 1:
        told += " Propagations differ in what a layer is pruned on, not only in time."
    return "\n".join([told, "", *lines])


def size(num_bytes: float) -> str:
    """3.3 GB, 12 MB; a dash for nothing."""
    if not num_bytes:
        return "-"
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"
