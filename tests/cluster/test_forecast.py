"""The plan of a config: what must hold for any machine, and what the command says."""

import json
from pathlib import Path
from typing import Any

import pytest
import s3 as store
import torch
import yaml
from command import refusal, shardprune
from s3 import BUCKET, Server
from safetensors.torch import load_file, save_file
from tiny import save_model, save_windows, write_config

from cluster.planning.command import PlanOptions, describe, plan
from cluster.planning.forecast import Forecast, forecast
from cluster.planning.layouts import choices, recommend
from cluster.planning.portion import Choice
from pipeline.config import ModelSettings
from pipeline.config_file import load_config
from pipeline.planning.rates import Rates, assumed_of_cpu, assumed_of_gpu
from pipeline.planning.scope import Scope, examine, necessary
from pipeline.runtime import Machine

SHAPE = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}
SHAPE |= {"num_key_value_heads": 4, "vocab_size": 1024, "max_position_embeddings": 512, "dtype": "bfloat16"}
RATES = assumed_of_cpu(1, "bfloat16")


def write(folder: Path, num_layers: int = 8, **settings: Any) -> Path:
    """A config, and a model of which nothing but config.json is there."""
    (folder / "m").mkdir(exist_ok=True)
    (folder / "m/config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": num_layers}))
    values = {
        "model": {"path": str(folder / "m")},
        "calibration": {"source": {"name": "text", "path": "none"}, "num_windows": 64, "window_length": 128},
        "runtime": {"device": "cpu", "threads": 1, "micro_batch_tokens": 256},
        "output": {"path": str(folder / "out")},
        **settings,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


def planned(folder: Path, *overrides: str, num_layers: int = 8, num_workers: int = 1) -> tuple[Scope, Forecast]:
    config = load_config(write(folder, num_layers), list(overrides))
    scope, _ = examine(config, Machine(1, False))
    return scope, forecast(scope, RATES, Choice.of(config, num_workers))


def seconds_of_layers(found: Forecast) -> float:
    return sum(found.stages[kind] for kind in ("collecting", "observing", "solving", "propagating"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_assumed_of_products_has_the_one_efficiency_too(dtype: str) -> None:
    for rates in (assumed_of_cpu(2, dtype), assumed_of_gpu("H100", dtype)):
        assert rates.product == rates.forward


def test_time_is_linear_in_layers_and_memory_flat(tmp_path: Path) -> None:
    found = [planned(tmp_path, num_layers=num)[1] for num in (40, 80, 120)]
    seconds = [each.seconds for each in found]
    assert seconds[2] - seconds[1] == pytest.approx(seconds[1] - seconds[0], rel=1e-3)
    assert len({each.host.host_bytes for each in found}) == 1


@pytest.mark.parametrize("granularity", ["layer", "linear"])
def test_passes_are_linear_in_windows(tmp_path: Path, granularity: str) -> None:
    by_windows = [
        planned(tmp_path, f"calibration.num_windows={num}", f"pruning.granularity={granularity}")[1]
        for num in (256, 512, 1024)
    ]
    passes = [each.stages["observing"] + each.stages["propagating"] for each in by_windows]
    assert passes[1] == pytest.approx(2 * passes[0]) and passes[2] == pytest.approx(4 * passes[0])
    solving = [each.stages["solving"] for each in by_windows]
    assert solving == pytest.approx(3 * solving[:1])


def test_shards_need_a_sweep_and_dense_propagation_one_whole_forward(tmp_path: Path) -> None:
    def forwards(*overrides: str) -> float:
        flops = necessary(planned(tmp_path, "pruning.granularity=layer", *overrides)[0])
        return flops.propagating + flops.collecting

    scope, _ = planned(tmp_path)
    layer = scope.traces[0].shape
    whole, cut = (2.0 * num * scope.num_tokens for num in (layer.num_weights, layer.num_weights_before_last_group))
    assert forwards() == pytest.approx(8 * cut + 7 * whole)
    # layers 0 to 3 of the dense model, and no shard runs its last layer for another
    assert forwards("pruning.propagation=shard", "cluster.num_shards=2") == pytest.approx(
        8 * cut + 6 * whole + 4 * whole
    )
    assert forwards("pruning.propagation=dense") == pytest.approx(8 * whole)


def test_one_pass_is_faster_than_two_and_holds_more(tmp_path: Path) -> None:
    (_, two), (_, one) = (planned(tmp_path, f"pruning.granularity={name}") for name in ("layer", "linear"))
    assert seconds_of_layers(one) < seconds_of_layers(two) and one.host.host_bytes > two.host.host_bytes


def test_a_layout_has_the_passes_that_suit_its_propagation(tmp_path: Path) -> None:
    """Auto is one pass for SparseGPT, but under dense propagation, which has none."""
    scope, _ = planned(tmp_path, "cluster.address=auto")
    pruned, dense = (forecast(scope, RATES, Choice(name, 2, 1, 2)) for name in ("pruned", "dense"))
    assert pruned.host.host["suspended forwards"] > 0 == dense.host.host["suspended forwards"]
    scope, _ = planned(tmp_path, "cluster.address=auto", "pruning.granularity=linear")
    assert {choice.propagation for choice in choices(scope, 4)} == {"pruned", "shard"}


def test_where_forwards_cannot_stand_one_pass_takes_longer_and_holds_less(tmp_path: Path) -> None:
    scope, free = planned(tmp_path, "pruning.granularity=linear")
    _, tight = planned(tmp_path, "pruning.granularity=linear", f"runtime.ram_bytes={scope.hidden_bytes + 1}")
    assert seconds_of_layers(tight) > seconds_of_layers(free) and tight.host.host_bytes < free.host.host_bytes


def test_one_team_moves_nothing_from_shard_to_shard(tmp_path: Path) -> None:
    asked = "cluster.address=auto", "cluster.num_shards=4"
    scope, alone = planned(tmp_path, *asked)
    _, two = planned(tmp_path, *asked, num_workers=2)
    assert (alone.network_bytes, two.network_bytes) == (0, 3 * scope.hidden_bytes)


def test_a_source_is_hashed_where_it_is_files_and_not_on_an_object_store(tmp_path: Path, s3: Server) -> None:
    model = save_model(tmp_path / "source", "llama")
    store.upload(model, f"s3://{BUCKET}/planned")
    config = load_config(write(tmp_path), ["calibration.window_length=32"])
    found = []
    for path in (str(model), f"s3://{BUCKET}/planned"):
        scope, _ = examine(config.model_copy(update={"model": ModelSettings(path=path)}), Machine(1, False))
        found.append(forecast(scope, RATES, Choice.of(config, 1)))
    here, there = found
    assert there.stages["preparing"] == RATES.start_seconds < here.stages["preparing"]
    assert here.read_bytes - there.read_bytes == scope.model_bytes


def test_parameters_are_floating_point_numbers(tmp_path: Path) -> None:
    """Not the masks that old checkpoints hold too."""
    file = save_model(tmp_path / "source", "llama") / "model.safetensors"
    tensors = load_file(file)
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    save_file(
        {**tensors, "model.layers.0.self_attn.mask": torch.ones(64, 64, dtype=torch.bool)}, file, {"format": "pt"}
    )
    config = load_config(write(tmp_path), ["calibration.window_length=32"])
    scope, _ = examine(config.model_copy(update={"model": ModelSettings(path=str(file.parent))}), Machine(1, False))
    assert (scope.num_parameters, scope.stored_dtype) == (num_parameters, "float32")


def test_a_local_worker_is_planned_with_the_cores_it_asks_for(tmp_path: Path) -> None:
    config = write(tmp_path, cluster={"address": "local"}, runtime={"device": "cpu"})
    told = plan(load_config(config, ["cluster.worker.num_cpus=5"]), PlanOptions(workers=3))
    assert "assumed: 5 threads" in told and "of 3 workers" in told


def test_hidden_states_beyond_the_ram_they_may_have_lie_on_disk(tmp_path: Path) -> None:
    scope, found = planned(tmp_path, "runtime.ram_bytes=1000")
    assert found.spilled_bytes == scope.hidden_bytes == 64 * 128 * 512 * 2
    assert found.host.host["hidden states"] == 0


def test_the_sweep_of_the_dense_model_is_one_whole_forward_however_layers_are_pruned_afterwards(tmp_path: Path) -> None:
    by_layer, by_linear = (
        planned(tmp_path, "pruning.propagation=shard", "cluster.num_shards=2", f"pruning.granularity={name}")[1]
        for name in ("layer", "linear")
    )
    assert by_linear.stages["passing on"] == pytest.approx(by_layer.stages["passing on"])
    # layers 0 to 3, against 6 of 8 that are run once they are pruned
    assert by_layer.stages["passing on"] == pytest.approx(4 / 6 * by_layer.stages["propagating"])


def test_replicas_solve_groups_side_by_side_but_in_one_pass(tmp_path: Path) -> None:
    for granularity, gains in (("layer", True), ("linear", False)):
        asked = "cluster.address=auto", f"pruning.granularity={granularity}"
        _, one = planned(tmp_path, *asked)
        _, two = planned(tmp_path, *asked, "cluster.num_replicas=2", num_workers=2)
        assert (two.stages["solving"] < 0.9 * one.stages["solving"]) == gains
        assert gains or two.stages["solving"] == pytest.approx(one.stages["solving"])


def test_replicas_share_the_passes_and_exchange_sums(tmp_path: Path) -> None:
    _, one = planned(tmp_path, "cluster.address=auto")
    _, four = planned(tmp_path, "cluster.address=auto", "cluster.num_replicas=4", num_workers=4)
    assert four.stages["propagating"] == pytest.approx(one.stages["propagating"] / 4)
    assert one.network_bytes == 0 < four.network_bytes
    assert four.host.host["hidden states"] * 4 == one.host.host["hidden states"]


def test_every_layout_that_is_tried_fits_the_workers_and_dense_gains_by_them(tmp_path: Path) -> None:
    scope, _ = planned(tmp_path, "cluster.address=auto")
    times = []
    for num_workers in (1, 2, 4, 8):
        found = choices(scope, num_workers)
        assert found and all(choice.num_workers <= num_workers for choice in found)
        times.append(min(forecast(scope, RATES, choice).seconds for choice in found))
    assert times == sorted(times, reverse=True)


def test_where_nothing_flows_from_layer_to_layer_every_team_prunes_and_propagations_are_not_compared(
    tmp_path: Path,
) -> None:
    config = load_config(write(tmp_path, cluster={"address": "auto"}), ["pruning.method.name=magnitude"])
    scope, _ = examine(config, Machine(1, False))
    found = [forecast(scope, RATES, choice) for choice in choices(scope, 8)]
    best = min(found, key=lambda each: each.seconds)
    assert best.num_workers == 8 and best.seconds == forecast(scope, RATES, Choice.of(config, 8)).seconds
    told = recommend(found, None, None)
    assert "| pruned | auto | 1 | 8 |" in told and "Propagations differ" not in told


def test_layouts_that_fit_the_gpu_come_first_and_the_others_are_marked(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, cluster={"address": "auto"}), ["runtime.device=cuda"])
    scope, _ = examine(config, Machine(1, True))
    rates = assumed_of_gpu("A100", scope.resolved.dtype)
    found = [forecast(scope, rates, choice) for choice in choices(scope, 8)]
    sizes = sorted(each.gpu.gpu_bytes for each in found)
    told = recommend(found, rates.gpu_bytes, None)
    assert "FIT" not in told and "do not fit" not in told
    rows = recommend(found, sizes[0], None).splitlines()
    marks = ["DOES NOT FIT" in row for row in rows[4:]]
    assert "do not fit a GPU of" in rows[0] and marks == sorted(marks) and not marks[0] and marks[-1]
    # one that fits is the fastest of its propagation, however fast others are
    fitting = {each.choice.propagation for each in found if each.gpu.gpu_bytes == sizes[0]}
    assert {row.split(" | ")[0] for row, mark in zip(rows[4:], marks, strict=True) if not mark} == {
        f"| {name}" for name in fitting
    }


def test_weights_are_held_once_where_they_need_no_conversion_and_the_next_ones_come_when_there_is_room(
    tmp_path: Path,
) -> None:
    _, plain = planned(tmp_path)
    _, converted = planned(tmp_path, "model.dtype=float32")
    _, dense = planned(tmp_path, "pruning.propagation=dense")
    assert plain.host.name.startswith("solving") and plain.host.host["layer loaded"] == 0
    assert "next layer" not in plain.host.host and dense.host.host["next layer"] > 0
    assert converted.host.host["layer loaded"] == 2 * converted.host.host["layer as stored"]


def test_what_is_outside_the_layers_is_there_twice_where_it_is_converted(tmp_path: Path) -> None:
    outside = {name: planned(tmp_path, f"model.dtype={name}")[0].outside for name in ("bfloat16", "float32")}
    stored = 2 * (2 * 1024 * 512 + 512)
    assert (outside["bfloat16"].stored_bytes, outside["bfloat16"].converted_bytes) == (stored, 0)
    assert (outside["float32"].stored_bytes, outside["float32"].converted_bytes) == (stored, 2 * stored)


def test_what_is_not_modelled_of_a_method_is_said(tmp_path: Path) -> None:
    rates = RATES.model_copy(update={"method": "alps"})
    for method, measured, iterates, has_bound in (
        ("sparsegpt", False, False, True),
        ("alps", False, True, True),
        ("alps", True, False, True),
        ("sparsellm", True, True, False),
    ):
        scope, found = planned(tmp_path, f"pruning.method.name={method}")
        told = describe(scope, rates if measured else RATES, found, None)
        assert (f"solving by {method} as far as it iterates" in told) == iterates
        assert ("at most" in told) == has_bound == (f"the memory of {method}" not in told)


def test_an_allocation_that_looks_at_the_dense_model_is_a_pass_of_its_own(tmp_path: Path) -> None:
    found = {name: planned(tmp_path, f"pruning.allocation.name={name}") for name in ("uniform", "owl", "alphapruning")}
    flops = {name: necessary(scope) for name, (scope, _) in found.items()}
    scope, without = found["uniform"]
    layer = scope.traces[0].shape
    whole, cut = (2.0 * num * scope.num_tokens for num in (layer.num_weights, layer.num_weights_before_last_group))
    assert flops["owl"].propagating - flops["uniform"].propagating == pytest.approx(7 * whole)
    assert flops["owl"].collecting - flops["uniform"].collecting == pytest.approx(8 * cut)
    assert flops["alphapruning"] == flops["uniform"]
    seconds = {name: each.seconds for name, (_, each) in found.items()}
    assert seconds["owl"] > seconds["uniform"] + (8 * cut + 7 * whole) / RATES.forward
    assert seconds["uniform"] < seconds["alphapruning"] < seconds["owl"] and "measuring" not in without.stages
    for name, told in (("owl", "counting outliers"), ("alphapruning", "the singular values of every weight")):
        assert told in describe(found[name][0], RATES, found[name][1], None)


def test_replicas_do_not_share_a_survey(tmp_path: Path) -> None:
    """One worker holds all windows, and takes as long as alone."""
    asked = "cluster.address=auto", "pruning.allocation.name=owl", "calibration.num_windows=2048"
    # whose suspended forwards do not hide it
    asked += ("pruning.granularity=layer",)
    scope, one = planned(tmp_path, *asked)
    _, four = planned(tmp_path, *asked, "cluster.num_replicas=4", num_workers=4)
    assert four.stages["measuring"] == pytest.approx(one.stages["measuring"])
    assert four.host.host["hidden states"] == scope.hidden_bytes and "allocation" in four.host.name
    _, spilling = planned(tmp_path, *asked, "cluster.num_replicas=4", "runtime.ram_bytes=200000000", num_workers=4)
    assert spilling.spilled_bytes == scope.hidden_bytes


def test_what_a_survey_holds_counts_for_a_method_that_looks_at_no_inputs(tmp_path: Path) -> None:
    scope, found = planned(tmp_path, "pruning.method.name=magnitude", "pruning.allocation.name=owl")
    assert scope.hidden_bytes == 0 < scope.survey_hidden_bytes == found.host.host["hidden states"]


def test_a_gpu_holds_what_it_computes_and_the_host_what_it_reads(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), ["runtime.device=cuda"])
    scope, _ = examine(config, Machine(1, True))
    found = forecast(scope, assumed_of_gpu("H100", scope.resolved.dtype), Choice.of(config, 1))
    assert found.gpu.gpu_bytes > 0 and "statistics" in found.gpu.gpu and "statistics" not in found.gpu.host


def test_a_real_run_has_the_bytes_and_the_groups_that_the_command_planned(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m", "llama")
    windows = save_windows(tmp_path / "windows.parquet", 8, 32)
    config = write_config(tmp_path / "run.yaml", model, windows, tmp_path / "out", "sparsegpt")
    rates, picture = tmp_path / "rates.yaml", tmp_path / "plan.svg"
    finished = shardprune("plan", config, "--calibrate-plan", "--rates", rates, "--draw", picture)
    assert finished.code == 0, finished.err
    assert not (tmp_path / "out").exists() and picture.read_text().startswith("<?xml")
    assert Rates.of_file(rates).method == "sparsegpt"
    again = shardprune("plan", config, "--rates", rates)
    assert again.code == 0 and "measured on" in again.out
    assert shardprune("run", config).code == 0
    size = sum(file.stat().st_size for file in (tmp_path / "out/model").iterdir())
    assert f"the finished model has {size:,} bytes" in finished.out


def test_config_json_alone_is_enough_and_workers_bring_advice(tmp_path: Path) -> None:
    config = write(tmp_path, cluster={"address": "auto"})
    told = shardprune(
        "plan", config, "runtime.device=auto", "--gpu", "h200", "--workers", "16", "--price-per-hour", "4"
    )
    assert told.code == 0, told.err
    assert "from config.json alone" in told.out and "H200's published peaks" in told.out
    for propagation in ("pruned", "shard", "dense"):
        assert f"\n| {propagation} |" in told.out


def test_layouts_whose_workers_fail_too_often_are_not_among_the_best(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, cluster={"address": "auto"}), [])
    calm, stormy = (plan(config, PlanOptions(workers=8, failures_per_hour=rate)) for rate in (0.0, 150.0))
    of_all, of_some = (int(told.partition("The best of ")[2].split()[0]) for told in (calm, stormy))
    assert 0 < of_some < of_all


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpu", "V1", "runtime.device=auto"], ["--gpu V1", "A100"]),
        (["--workers", "0"], ["--workers 0", "above 0"]),
        (["--price-per-hour", "-1"], ["--price-per-hour -1", "above 0"]),
        (["--failures-per-hour", "-1"], ["--failures-per-hour -1", "below 0"]),
        (["--rates", "nowhere.yaml"], ["--rates nowhere.yaml", "--calibrate-plan"]),
        (["--rates", "RUN"], ["--rates", "see pipeline/planning/rates.py"]),
        (["--gpu", "H100", "--calibrate-plan"], ["--gpu H100", "--calibrate-plan"]),
        (["--gpu", "H100", "--rates", "r.yaml"], ["--gpu H100", "--rates r.yaml"]),
        (["--workers", "32"], ["--workers 32", "cluster.address = none"]),
        (["runtime.device=cuda", "cluster.address=auto"], ["runtime.device", "--gpu"]),
        (["--draw", "plan.cake"], ["--draw plan.cake", ".svg"]),
        (["--draw", "nowhere/plan.svg"], ["--draw nowhere/plan.svg", "no folder"]),
        (["--price-per-hour", "nan"], ["--price-per-hour nan", "above 0"]),
        (["--failures-per-hour", "inf"], ["--failures-per-hour inf", "number"]),
        (["--calibrate-plan", "--rates", "RUN"], ["--rates", "would be lost"]),
        (["--calibrate-plan", "--rates", "nowhere/r.yaml"], ["--rates nowhere/r.yaml", "no folder"]),
        (
            ["--calibrate-plan", "cluster.address=auto", "cluster.worker.num_gpus=1", "runtime.device=auto"],
            ["--calibrate-plan", "--gpu"],
        ),
        (["--gpu", "H100", "runtime.device=cpu"], ["--gpu H100", "runtime.device = cpu"]),
        (["--workers", "2", "cluster.address=auto", "cluster.num_replicas=4"], ["--workers 2", "num_replicas = 4"]),
        (["cluster.address=local", "cluster.worker.num_cpus=4096"], ["room for 0 workers of 4096 CPU", "--workers"]),
        (["cluster.address=local", "cluster.worker.num_cpus=1e300"], ["cluster.worker.num_cpus", "4096"]),
        (["model.path=/nowhere"], ["model.path = /nowhere", "no such folder"]),
        (["pruning.propagation=shard"], ["cluster.num_shards"]),
        (["calibration.window_length=4096"], ["window_length = 4096", "512"]),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, arguments: list[str], told: list[str]) -> None:
    config = write(tmp_path)
    before = config.read_bytes()
    sentence = refusal("plan", config, *[str(config) if each == "RUN" else each for each in arguments])
    assert all(part in sentence for part in told), sentence
    assert config.read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"source": "2001-99-99"}, "not valid YAML"),
        ({"product": 1e-300}, "product"),
        ({"product": ".nan"}, "product"),
        ({"gpu_bytes": 10**9}, "gpu_bytes"),
        ({"device": "cuda"}, "gpu_bytes"),
    ],
)
def test_rates_that_cannot_be_are_one_sentence(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    rates = tmp_path / "rates.yaml"
    values = {key: value for key, value in RATES.model_dump().items() if key not in changed}
    # as somebody wrote it
    rates.write_text(yaml.safe_dump(values) + "".join(f"{key}: {value}\n" for key, value in changed.items()))
    sentence = refusal("plan", write(tmp_path), "--rates", rates)
    assert f"--rates {rates}" in sentence and told in sentence, sentence


def test_a_ray_of_this_machine_shares_its_memory(tmp_path: Path) -> None:
    """And spills what is beyond; of a cluster elsewhere it is said that nothing is known."""
    config = write(
        tmp_path,
        calibration={"source": {"name": "text", "path": "none"}, "num_windows": 10_000_000, "window_length": 128},
    )
    spilled, taken = (
        plan(load_config(config, [f"cluster.address={address}"]), PlanOptions()) for address in ("local", "auto")
    )
    assert "of hidden states beyond runtime.ram_bytes" in spilled and "taken to be enough" not in spilled
    assert "taken to be enough" in taken and "beyond runtime.ram_bytes" not in taken


def test_rates_of_another_method_are_refused(tmp_path: Path) -> None:
    rates = RATES.model_copy(update={"method": "wanda"})
    rates.write_to(tmp_path / "rates.yaml")
    told = refusal("plan", write(tmp_path), "--rates", tmp_path / "rates.yaml")
    assert "measured with wanda" in told and "sparsegpt" in told


def test_a_config_without_a_known_dtype_is_refused(tmp_path: Path) -> None:
    config = write(tmp_path)
    file = tmp_path / "m/config.json"
    file.write_text(file.read_text().replace("bfloat16", "float8_e4m3fn"))
    assert "dtype 'float8_e4m3fn'" in refusal("plan", config)


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_a_layer_that_no_run_can_observe_is_refused_for_a_plan_as_for_a_run(tmp_path: Path, method: str) -> None:
    config = write(tmp_path, pruning={"method": {"name": method}})
    shape = {"hidden_size": 64, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 96, "time_step_rank": 4}
    (tmp_path / "m/config.json").write_text(json.dumps({"model_type": "mamba", **shape}))
    if method == "magnitude":
        assert shardprune("plan", config).code == 0
    else:
        assert "dt_proj.weight: its linear is used 0 times in layer 0" in refusal("plan", config)
