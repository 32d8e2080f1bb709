"""The config: what may be written, what overrides do, and which settings the fingerprint knows."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import EvaluateConfig, RunConfig
from pipeline.config_file import load_config, validate
from pipeline.errors import Refusal
from pipeline.fingerprint import WINDOWS, difference, digest, identify
from pipeline.job import Resolved
from pipeline.methods.wanda import Wanda
from pipeline.sparsity import NofM

RESOLVED = Resolved(dtype="bfloat16", device="cpu", threads=1, windows_per_micro_batch=4)


def values(**settings: Any) -> dict[str, Any]:
    return {
        "model": {"path": "model"},
        "calibration": {"source": {"name": "text", "path": "text.txt"}},
        "output": {"path": "out"},
        **settings,
    }


def config(*overrides: str, **settings: Any) -> RunConfig:
    return validate(RunConfig, values(**settings), list(overrides))


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    (tmp_path / "run.yaml").write_text(text)
    return load_config(tmp_path / "run.yaml", list(overrides))


def told(*overrides: str, **settings: Any) -> str:
    with pytest.raises(Refusal) as refused:
        config(*overrides, **settings)
    return str(refused.value)


def test_defaults_are_those_of_the_papers() -> None:
    settled = config()
    assert (settled.calibration.num_windows, settled.calibration.window_length) == (128, 2048)
    assert (settled.pruning.method.name, str(settled.pruning.target)) == ("sparsegpt", "unstructured 0.5")
    assert (settled.cluster.address, settled.pruning.pattern) == ("none", "unstructured")


def test_what_a_config_says_survives_being_written_and_read() -> None:
    settled = config("pruning.method={name: wanda}", "pruning.pattern='2:4'", "pruning.sparsity=null")
    written = yaml.safe_dump(settled.model_dump(mode="json"))
    assert RunConfig.model_validate(yaml.safe_load(written)) == settled


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config().pruning.sparsity = 0.6  # type: ignore[misc]


def test_overrides_win_over_the_file_and_later_over_earlier(tmp_path: Path) -> None:
    text = yaml.safe_dump(values(pruning={"method": {"name": "wanda"}, "sparsity": 0.3}))
    settled = load(tmp_path, text, "pruning.sparsity=0.4", "pruning.sparsity=0.6", "calibration.seed=7")
    assert (settled.pruning.sparsity, settled.calibration.seed) == (0.6, 7)
    assert isinstance(settled.pruning.method, Wanda)


def test_an_override_may_name_a_section_that_the_file_lacks(tmp_path: Path) -> None:
    settled = load(tmp_path, yaml.safe_dump(values()), "cluster.worker.num_cpus=2", "evaluation.text=a=b.txt")
    assert settled.cluster.worker.num_cpus == 2
    assert settled.evaluation.text == "a=b.txt"


@given(st.integers(1, 59), st.integers(1, 59))
def test_every_pattern_may_be_written_without_quotes(n: int, m: int) -> None:
    if not n < m:
        return
    settled = config(f"pruning.pattern={n}:{m}", pruning={"method": {"name": "wanda"}})
    assert settled.pruning.allocate([{"a": 64}] * 2, ()) == [{"a": NofM(n, m)}] * 2


@given(st.integers(1, 31), st.integers(2, 32))
def test_sparsity_beside_a_pattern_must_be_what_it_implies(n: int, m: int) -> None:
    if not n < m or m not in (2, 4, 8, 16, 32):
        return
    for sparsity in {1 - n / m, 0.5}:
        overrides = [f"pruning.pattern='{n}:{m}'", f"pruning.sparsity={sparsity}"]
        if sparsity == 1 - n / m:
            assert config(*overrides).pruning.target == NofM(n, m)
        else:
            assert f"prunes {m - n} of {m}: leave pruning.sparsity out" in told(*overrides)


@given(st.integers(0, 999))
def test_sparsity_is_taken_as_a_decimal(thousandths: int) -> None:
    pattern = config(f"pruning.sparsity={thousandths / 1000}").pruning.target
    assert pattern.num_pruned(1000) == thousandths


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("pruning.method.name=wonder", ["pruning.method.name = 'wonder'", "'wanda'"]),
        ("prunning.sparsity=0.5", ["prunning: unknown key"]),
        ("pruning.method.colour=red", ["pruning.method.colour: unknown key"]),
        ("cluster.worker.gpus=1", ["cluster.worker.gpus: unknown key"]),
        ("pruning.method={}", ["pruning.method.name: missing"]),
        ("calibration.source={name: text}", ["calibration.source.path: missing"]),
        ("pruning.method={name: sparsegpt, damping: -1}", ["pruning.method.damping = -1"]),
        ("pruning.method={name: sparsegpt, block_columns: 0}", ["pruning.method.block_columns = 0"]),
        ("pruning.method={name: wanda, damping: 0.01}", ["pruning.method.damping: unknown key"]),
        ("runtime.threads=none", ["runtime.threads = 'none'", "auto"]),
        ("calibration.source.path=3", ["calibration.source.path = 3"]),
        ("evaluation.window_length=0", ["evaluation.window_length = 0"]),
    ],
)
def test_messages_name_the_key_as_it_was_written(override: str, parts: list[str]) -> None:
    answer = told(override, pruning={"method": {"name": "sparsegpt"}, "sparsity": 0.5})
    assert all(part in answer for part in parts), answer
    assert "\n" not in answer


def test_several_mistakes_are_counted() -> None:
    answer = told("runtime.threads=0", "calibration.seed=-1", "output.path=null")
    assert answer.endswith("(and 2 more)") or "(and 3 more)" in answer


def test_evaluate_takes_the_same_settings() -> None:
    settled = validate(
        EvaluateConfig, {"model": {"path": "m"}, "evaluation": {}}, ["evaluation.text=t", "runtime.threads=1"]
    )
    assert (settled.evaluation.text, settled.runtime.threads) == ("t", 1)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["pruning.propagation=dense"], "pruning.propagation = dense"),
        (["pruning.method={name: sparsellm}"], "pruning.method = sparsellm"),
        (["pruning.method={name: magnitude}"], "pruning.method = magnitude"),
        (["pruning.permute=true", "pruning.pattern='2:4'"], "pruning.permute = true"),
    ],
)
def test_where_a_layer_cannot_be_pruned_in_one_pass_auto_is_layer_and_linear_is_refused(
    settings: list[str], why: str
) -> None:
    assert config(*settings).pruning.settle_granularity(None) == "layer"
    refused = told(*settings, "pruning.granularity=linear")
    assert refused.startswith("pruning.granularity = 'linear': ") and why in refused and "\n" not in refused


def test_granularity_is_what_is_asked_for_else_what_it_has_been_else_what_suits_the_method() -> None:
    assert config("pruning.granularity=linear").pruning.settle_granularity("layer") == "linear"
    assert config().pruning.settle_granularity("linear") == "linear"
    for name in ("wanda", "sparsegpt", "alps"):
        pruning = config(f"pruning.method={{name: {name}}}").pruning
        assert pruning.settle_granularity(None) == pruning.method.best_granularity


# --- the fingerprint


def identity(*overrides: str, resolved: Resolved = RESOLVED, windows: str = "w" * 64) -> dict[str, Any]:
    settled = config(*overrides, pruning={"method": {"name": "sparsegpt"}, "sparsity": 0.5})
    source_files = {"model.safetensors": {"sha256": "s" * 64}}
    return {**identify(settled, resolved, "h" * 64, source_files, []), WINDOWS: windows}


@pytest.mark.parametrize(
    "override",
    [
        "output.path=elsewhere",
        "output.keep_entry_every=2",
        "evaluation.text=text.txt",
        "evaluation.window_length=128",
        "cluster.address=local",
        "cluster.num_shards=7",
        "cluster.worker.num_cpus=4",
        "runtime.ram_bytes=1",
        "runtime.gpu_bytes=1",
        "runtime.spill_path=/somewhere",
        "model.path=the/same/model/elsewhere",
        "calibration.source.path=the/same/windows/elsewhere",
        "pruning.granularity=layer",
    ],
)
def test_the_fingerprint_leaves_out_what_does_not_change_the_bytes(override: str) -> None:
    assert digest(identity(override)) == digest(identity())
    assert difference(identity(), identity(override)) == ""


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("pruning.sparsity=0.6", "pruning.sparsity was 0.5, now 0.6"),
        ("pruning.pattern='2:4'", "pruning.pattern was 'unstructured', now '2:4'"),
        ("pruning.method={name: wanda}", "pruning.method.name was 'sparsegpt', now 'wanda'"),
        ("pruning.method.damping=0.1", "pruning.method.damping was 0.01, now 0.1"),
        ("pruning.method.block_columns=64", "pruning.method.block_columns was 128, now 64"),
    ],
)
def test_the_fingerprint_knows_every_pruning_key_by_its_name(override: str, name: str) -> None:
    assert digest(identity(override)) != digest(identity())
    assert name in difference(identity(), identity(override))


def test_the_fingerprint_knows_whether_channels_are_reordered() -> None:
    pattern = ("pruning.pattern='2:4'", "pruning.sparsity=null")
    without, reordered = identity(*pattern), identity(*pattern, "pruning.permute=true")
    assert digest(without) != digest(reordered) and digest(without) == digest(
        identity(*pattern, "pruning.permute=false")
    )
    assert difference(without, reordered) == "pruning.permute was False, now True"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"dtype": "float32"}, "model.dtype was 'bfloat16', now 'float32'"),
        ({"device": "cuda"}, "runtime.device was 'cpu', now 'cuda'"),
        ({"threads": 2}, "runtime.threads was 1, now 2"),
        ({"windows_per_micro_batch": 1}, "runtime.micro_batch_tokens (in windows) was 4, now 1"),
        ({"num_replicas": 2}, "cluster.num_replicas was 1, now 2"),
        ({"granularity": "linear"}, "pruning.granularity was 'layer', now 'linear'"),
    ],
)
def test_the_fingerprint_knows_what_auto_came_to(change: dict[str, Any], name: str) -> None:
    other = identity(resolved=RESOLVED.model_copy(update=change))
    assert digest(other) != digest(identity())
    assert difference(identity(), other) == name


def test_the_fingerprint_knows_windows_and_every_file_of_the_source() -> None:
    assert "calibration windows" in difference(identity(), identity(windows="v" * 64))
    settled = config()
    files = {"a.safetensors": {"sha256": "1" * 64, "modified_ns": 1}, "b.safetensors": {"sha256": "2" * 64}}
    first = identify(settled, RESOLVED, "h" * 64, files, [])
    touched = {**files, "a.safetensors": {"sha256": "1" * 64, "modified_ns": 2}}
    assert digest(identify(settled, RESOLVED, "h" * 64, touched, [])) == digest(first)
    changed = {**files, "a.safetensors": {"sha256": "3" * 64}}
    assert "a.safetensors" in difference(first, identify(settled, RESOLVED, "h" * 64, changed, []))
    assert "(config and tensors)" in difference(first, identify(settled, RESOLVED, "g" * 64, files, []))


def test_a_sparsity_that_the_pattern_implies_may_be_written_or_not() -> None:
    """The same run: `pruning.sparsity` absent, or equal to 1 - N/M."""
    written = identity("pruning.pattern='2:4'", "pruning.sparsity=0.5")
    assert digest(identity("pruning.pattern='2:4'", "pruning.sparsity=null")) == digest(written)
