"""Metrics: harmless without Ray, counts that hold, and a dashboard of nothing but what there is."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from command import shardprune
from tiny import save_model, save_windows, write_config

from cluster.metrics import COUNTERS, GAUGES, TAGS, Pruned, RunMetrics, num_dampings_raised
from pipeline.config_file import load_config
from pipeline.job import Job, Resolved
from pipeline.lease import LeaseGuard
from pipeline.store import Receipt, RunDirectory

DASHBOARD = Path(__file__).parents[2] / "configs" / "clusters" / "grafana-dashboard.json"
EXPORTED = {f"ray_{name}" for name in GAUGES} | {f"ray_{name}_total" for name in COUNTERS}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A finished run."""
    folder = tmp_path_factory.mktemp("run")
    model, windows = save_model(folder / "model", "llama"), save_windows(folder / "windows.parquet", 8, 16)
    config = write_config(folder / "run.yaml", model, windows, folder / "out", "sparsegpt")
    assert shardprune("run", config).code == 0
    return Job(
        config=load_config(config, []),
        resolved=Resolved(dtype="float32", device="cpu", threads=1, windows_per_micro_batch=4),
        source=model,
        num_layers=3,
        measured=(),
        fingerprint="",
        attempt=1,
        guard=LeaseGuard(folder / "out", "", 1),
    )


@pytest.fixture
def receipts(job: Job) -> list[Receipt]:
    return RunDirectory(job.guard.directory, job.num_layers).receipts()


def with_dampings(receipt: Receipt, *dampings: float | None) -> Receipt:
    linears = [receipt.linears[0].model_copy(update={"damping": damping}) for damping in dampings]
    return receipt.model_copy(update={"linears": linears})


def test_without_ray_metrics_go_nowhere(job: Job, receipts: list[Receipt]) -> None:
    metrics = RunMetrics(job, [])
    for receipt in receipts:
        metrics.on_layer(receipt)
    metrics.on_restart()
    metrics.on_moved(1)


def test_only_a_raised_damping_counts(receipts: list[Receipt]) -> None:
    receipt = with_dampings(receipts[0], None, 0.01, 0.1, 1.0)
    assert num_dampings_raised(receipt, 0.01) == 2
    assert num_dampings_raised(receipt, 1.0) == 0
    assert num_dampings_raised(receipt, None) == 0


def test_what_is_pruned_adds_up(receipts: list[Receipt]) -> None:
    pruned = sum(map(Pruned.of, receipts), Pruned())
    assert 2 * pruned.num_pruned == pruned.num_weights > 0
    assert sum(map(Pruned.of, reversed(receipts)), Pruned()) == pruned


def test_names_are_as_prometheus_wants_them() -> None:
    for name in [*GAUGES, *COUNTERS]:
        assert re.fullmatch(r"shardprune_[a-z]+(_[a-z]+)*", name)
        assert not name.endswith("_total"), "Ray adds it to counters, and a gauge has none"
    assert not GAUGES.keys() & COUNTERS.keys()


def test_the_dashboard_shows_all_there_is_and_nothing_else() -> None:
    text = DASHBOARD.read_text()
    used = set(re.findall(r"\b(?:ray_)?shardprune_\w+", text))
    assert used == EXPORTED


def test_the_dashboard_is_one_that_grafana_loads() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    assert dashboard["uid"] and dashboard["title"] and isinstance(dashboard["schemaVersion"], int)
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels:
        assert panel["title"] and panel["type"] in ("timeseries", "stat", "gauge")
        assert panel["datasource"] == source and panel["targets"]
        for target in panel["targets"]:
            assert target["datasource"] == source
            labels = re.findall(r"by \(([^)]*)\)|\{\{(\w+)\}\}", target["expr"] + target["legendFormat"])
            assert {label.strip() for pair in labels for part in pair for label in part.split(",") if label} <= {*TAGS}
            variables_used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval", "__range"}
            assert variables_used <= variables.keys()
            assert target["expr"].count("(") == target["expr"].count(")")
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        assert not _overlap(one, other)


def _overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        one[start] < other[start] + other[size] and other[start] < one[start] + one[size]
        for start, size in (("x", "w"), ("y", "h"))
    )
