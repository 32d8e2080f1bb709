"""A whole run: exact counts, all else untouched, the same bytes each time, and a model that transformers loads."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from command import shardprune
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import (
    build_model,
    digests,
    modified_ns,
    random_ids,
    run_layers,
    save_model,
    save_text,
    save_tokenizer,
    save_windows,
    write_config,
)
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.skeleton import Skeleton
from pipeline.store import RunDirectory

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart"


@dataclass(frozen=True)
class Case:
    """A family, how it is stored, and what is asked of it."""

    family: str
    dtype: torch.dtype
    max_shard_size: str
    method: str
    sparsity: float | None
    pattern: str


CASES = {
    "llama-wanda": Case("llama", torch.float32, "30KB", "wanda", 0.5, "unstructured"),
    "llama-sparsegpt": Case("llama", torch.bfloat16, "20KB", "sparsegpt", 0.7, "unstructured"),
    "llama-sparsegpt-2:4": Case("llama", torch.bfloat16, "5GB", "sparsegpt", None, "2:4"),
    "gpt2-wanda": Case("gpt2", torch.bfloat16, "5GB", "wanda", 0.3, "unstructured"),
    "gpt2-sparsegpt": Case("gpt2", torch.float32, "5GB", "sparsegpt", 0.6, "unstructured"),
    "gpt2-magnitude-1:4": Case("gpt2", torch.float16, "5GB", "magnitude", 0.75, "1:4"),
    "phi3-magnitude": Case("phi3", torch.bfloat16, "5GB", "magnitude", 0.3, "unstructured"),
    "phi3-sparsegpt": Case("phi3", torch.float16, "5GB", "sparsegpt", 0.5, "unstructured"),
    "llama-sparsellm": Case("llama", torch.bfloat16, "20KB", "sparsellm", 0.7, "unstructured"),
    "opt-sparsellm-2:4": Case("opt", torch.float32, "5GB", "sparsellm", None, "2:4"),
    "opt-wanda-4:8": Case("opt", torch.float32, "5GB", "wanda", None, "4:8"),
}
ATTACHMENTS = {
    "LICENSE": "All rights are given away.\n",
    "chat_template.jinja": "{{ messages }}\n",
    "special/notes.txt": "beside the model\n",
}


@dataclass(frozen=True)
class Run:
    """A finished run with its source."""

    case: Case
    source: Path
    output: Path
    config: Path
    printed: str

    @property
    def model(self) -> Path:
        return self.output / "model"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The run of a case, made once."""
    runs: dict[str, Run] = {}

    def get(name: str) -> Run:
        if name not in runs:
            runs[name] = _run(CASES[name], tmp_path_factory.mktemp("run"))
        return runs[name]

    return get


def _run(case: Case, folder: Path) -> Run:
    source = save_tokenizer(save_model(folder / "source", case.family, case.dtype, case.max_shard_size))
    for name, content in ATTACHMENTS.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(content)
    windows = save_windows(folder / "windows.parquet", 9, 16)
    settings = {
        "pruning.pattern": case.pattern,
        "evaluation.text": str(save_text(folder / "text.txt", 100)),
        "output.keep_entry_every": 2,
    }
    config = write_config(folder / "run.yaml", source, windows, folder / "out", case.method, case.sparsity, **settings)
    finished = shardprune("run", config)
    assert finished.code == 0, finished.err
    return Run(case, source, folder / "out", config, finished.out)


def load_tensors(folder: Path) -> dict[str, Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def is_linear(key: str, tensor: Tensor) -> bool:
    """The matrices inside the decoder layers, told by their names in the checkpoint alone."""
    return tensor.ndim == 2 and re.search(r"(^|\.)(layers|h)\.\d+\.", key) is not None


def same_bytes(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize("name", CASES)
def test_every_linear_has_the_exact_count_of_zeros(name: str, finished: Callable[[str], Run]) -> None:
    run = finished(name)
    case = run.case
    linears = {key: tensor for key, tensor in load_tensors(run.model).items() if is_linear(key, tensor)}
    assert len(linears) == len(json.loads((run.output / "receipts" / "layer-00000.json").read_text())["linears"]) * 3
    for key, tensor in linears.items():
        zero_OI = (tensor.T if case.family == "gpt2" else tensor) == 0
        if ":" in case.pattern:
            n, m = map(int, case.pattern.split(":"))
            assert bool((zero_OI.reshape(-1, m).sum(dim=1) == m - n).all()), key
        elif case.method == "wanda":
            wanted = math.floor(zero_OI.shape[1] * round(100 * (case.sparsity or 0)) / 100)
            assert bool((zero_OI.sum(dim=1) == wanted).all()), key
        else:
            assert int(zero_OI.sum()) == zero_OI.numel() * round(100 * (case.sparsity or 0)) // 100, key


@pytest.mark.parametrize("name", CASES)
def test_everything_else_is_the_source_byte_for_byte(name: str, finished: Callable[[str], Run]) -> None:
    run = finished(name)
    before, after = load_tensors(run.source), load_tensors(run.model)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[key].dtype, after[key].shape), key
        if not is_linear(key, tensor):
            assert same_bytes(tensor, after[key]), key
        elif run.case.method not in ("sparsegpt", "sparsellm"):
            kept = after[key] != 0
            assert torch.equal(tensor[kept], after[key][kept]), key


@pytest.mark.parametrize("name", CASES)
def test_receipts_say_what_is_in_the_files(name: str, finished: Callable[[str], Run]) -> None:
    run = finished(name)
    tensors, found = load_tensors(run.model), digests(run.model)
    receipts = RunDirectory(run.output, 3).receipts()
    assert len(receipts) == 3
    for receipt in receipts:
        assert receipt.sha256 == found[receipt.file]
        assert receipt.num_bytes == (run.model / receipt.file).stat().st_size
        assert (receipt.attempt, receipt.num_layers_replayed) == (1, 0)
        assert receipt.num_tokens == (0 if run.case.method == "magnitude" else 9 * 16)
        for linear in receipt.linears:
            zeros = linear.num_weights - int(tensors[linear.key].count_nonzero())
            assert (linear.num_pruned, linear.num_zeros_in_source) == (zeros, 0)
    rows = pq.read_table(run.output / "metrics" / "layer-00001.parquet").to_pylist()
    assert [row["num_pruned"] for row in rows] == [linear.num_pruned for linear in receipts[1].linears]


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_the_model_and_agrees_on_its_logits(name: str, finished: Callable[[str], Run]) -> None:
    run, ids_NL = finished(name), random_ids(2, 24, seed=1)
    dtype = torch.float32 if run.case.dtype == torch.float16 else run.case.dtype
    model, told = AutoModelForCausalLM.from_pretrained(run.model, dtype=dtype, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    with torch.no_grad():
        logits = model.eval()(ids_NL, use_cache=False).logits
    assert bool(logits.isfinite().all())
    skeleton = Skeleton(open_checkpoint(str(run.model)), dtype, torch.device("cpu"))
    assert torch.equal(run_layers(skeleton, ids_NL, 2), logits)


@pytest.mark.parametrize("name", CASES)
def test_index_is_exact_and_names_every_file(name: str, finished: Callable[[str], Run]) -> None:
    run = finished(name)
    index = json.loads((run.model / "model.safetensors.index.json").read_text())
    held = {}
    for file in run.model.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            held.update(dict.fromkeys(opened.keys(), file.name))
    assert index["weight_map"] == held
    assert sorted(set(held.values())) == [f"model-{number:05d}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in load_tensors(run.source).values())


@pytest.mark.parametrize("name", ["llama-wanda", "gpt2-sparsegpt"])
def test_what_lies_beside_the_weights_is_carried_over(name: str, finished: Callable[[str], Run]) -> None:
    run = finished(name)
    before, after = digests(run.source), digests(run.model)
    beside = {file for file in before if not re.search(r"\.safetensors(\.index\.json)?$", file)}
    assert {*ATTACHMENTS, "config.json", "generation_config.json", "tokenizer.json"} <= beside
    assert {file: after[file] for file in beside} == {file: before[file] for file in beside}
    assert {file for file in after if ".safetensors" not in file} == beside
    assert len(AutoTokenizer.from_pretrained(run.model)) == 96


@pytest.mark.parametrize("name", ["llama-wanda", "phi3-magnitude"])
def test_a_finished_run_leaves_no_activations_or_temporaries(name: str, finished: Callable[[str], Run]) -> None:
    names = {file.name for file in finished(name).output.iterdir()}
    files = {"run.yaml", "allocation.json", "report.md"}
    assert names == files | {"calibration", "model", "receipts", "metrics", "lease"}
    (lease,) = (finished(name).output / "lease").iterdir()
    assert json.loads(lease.read_text())["released"]


@pytest.mark.parametrize("name", ["llama-wanda", "phi3-magnitude"])
def test_running_again_changes_nothing_and_prints_the_report(name: str, finished: Callable[[str], Run]) -> None:
    run = finished(name)
    before, written = digests(run.output), modified_ns(run.output)
    again = shardprune("run", run.config)
    assert (again.code, again.err) == (0, "")
    assert again.out.strip() == (run.output / "report.md").read_text().strip()
    assert again.out.strip() in run.printed
    assert digests(run.output) == before
    results = [file for file in written if file.startswith(("model/", "receipts/", "metrics/layer"))]
    assert len(results) > 10
    assert {file: modified_ns(run.output)[file] for file in results} == {file: written[file] for file in results}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("llama-sparsegpt", []),
        ("llama-sparsegpt", ["runtime.ram_bytes=1"]),
        ("gpt2-wanda", ["runtime.ram_bytes=1", "runtime.spill_path={tmp_path}", "cluster.num_shards=2"]),
    ],
)
def test_the_same_bytes_each_time_and_when_spilling_to_disk(
    name: str, overrides: list[str], finished: Callable[[str], Run], tmp_path: Path
) -> None:
    run = finished(name)
    overrides = [override.format(tmp_path=tmp_path / "spill") for override in overrides]
    again = shardprune("run", run.config, f"output.path={tmp_path / 'out'}", *overrides)
    assert again.code == 0, again.err
    assert digests(tmp_path / "out" / "model") == digests(run.model)
    assert not (tmp_path / "spill").exists() or not list((tmp_path / "spill").iterdir())


def test_micro_batches_change_nothing_but_the_order_of_sums(finished: Callable[[str], Run], tmp_path: Path) -> None:
    run = finished("llama-wanda")
    again = shardprune("run", run.config, f"output.path={tmp_path / 'out'}", "runtime.micro_batch_tokens=16")
    assert again.code == 0, again.err
    before, after = load_tensors(run.model), load_tensors(tmp_path / "out" / "model")
    differing = sum(int((before[key] != after[key]).sum()) for key in before)
    assert differing <= 4


def mean_of_window_means(folder: Path, ids_T: Tensor, window_length: int) -> float:
    """Perplexity as the papers say it, by the model's own forward."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    windows = ids_T[: len(ids_T) // window_length * window_length].view(-1, window_length)
    with torch.no_grad():
        losses = [cross_entropy(model(ids[None]).logits[0, :-1].float(), ids[1:]) for ids in windows]
    return math.exp(sum(map(float, losses)) / len(losses))


@pytest.mark.parametrize("name", ["llama-wanda", "opt-wanda-4:8"])
def test_evaluation_beside_the_run_is_that_of_plain_transformers(name: str, finished: Callable[[str], Run]) -> None:
    run = finished(name)
    ids_T = random_ids(1, 100)[0]
    rows = pq.read_table(run.output / "metrics" / "evaluation.parquet").to_pylist()
    measured = {row["model"]: row["perplexity"] for row in rows}
    assert {(row["num_windows"], row["window_length"]) for row in rows} == {(6, 16)}
    for which, folder in {"dense": run.source, "pruned": run.model}.items():
        assert measured[which] == pytest.approx(mean_of_window_means(folder, ids_T, 16), rel=1e-6)
        assert f"| {which} | {measured[which]:.3f} | 6 of 16 tokens |" in run.printed


def test_evaluate_command_gives_the_perplexity_of_plain_transformers(
    finished: Callable[[str], Run], tmp_path: Path
) -> None:
    run, text = finished("llama-wanda"), save_text(tmp_path / "text.txt", 250, seed=3)
    arguments = [f"evaluation.text={text}", "evaluation.window_length=24", "runtime.micro_batch_tokens=72"]
    told = shardprune("evaluate", run.model, "runtime.threads=1", *arguments)
    assert told.code == 0, told.err
    wanted = mean_of_window_means(run.model, random_ids(1, 250, seed=3)[0], 24)
    assert told.out == f"perplexity {wanted:.4f} on {text} (10 windows of 24 tokens)\n"


@pytest.mark.skipif(not (QUICKSTART / "model" / "tokenizer.json").exists(), reason="no quickstart model here")
def test_evaluate_tokenises_a_text_once_and_as_a_whole(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((QUICKSTART / "text" / "heldout.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    model = QUICKSTART / "model"
    told = shardprune(
        "evaluate", model, "runtime.threads=1", "model.dtype=float32", f"evaluation.text={text}",
        "evaluation.window_length=128",
    )  # fmt: skip
    assert told.code == 0, told.err
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(encoding="utf-8"))["input_ids"]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    folder = tmp_path / "model"
    reference.save_pretrained(folder)
    wanted = mean_of_window_means(folder, torch.tensor(ids), 128)
    assert float(told.out.split()[1]) == pytest.approx(wanted, abs=1e-3)


def test_pruning_nothing_gives_the_source_back(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama", torch.bfloat16)
    windows = save_windows(tmp_path / "windows.parquet", 4, 16)
    for method in ("wanda", "sparsegpt"):
        config = write_config(tmp_path / "run.yaml", source, windows, tmp_path / method, method, 0)
        assert shardprune("run", config).code == 0
        before, after = load_tensors(source), load_tensors(tmp_path / method / "model")
        assert all(same_bytes(tensor, after[key]) for key, tensor in before.items())


def test_tensors_that_no_module_loads_are_in_the_pruned_model(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama", torch.bfloat16)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0),
        "model.layers.3.eh_proj.weight": torch.randn(8, 8),
        "counter": torch.tensor([7]),
    }
    _add_tensors(source / "model.safetensors", extra)
    windows = save_windows(tmp_path / "windows.parquet", 4, 16)
    config = write_config(tmp_path / "run.yaml", source, windows, tmp_path / "out")
    finished = shardprune("run", config)
    assert finished.code == 0, finished.err
    after = load_tensors(tmp_path / "out" / "model")
    assert after.keys() == load_tensors(source).keys()
    assert all(torch.equal(after[key], value) for key, value in extra.items())


def test_a_model_with_tied_embeddings_stays_tied(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "qwen2", torch.bfloat16)
    windows = save_windows(tmp_path / "windows.parquet", 4, 16)
    assert shardprune("run", write_config(tmp_path / "run.yaml", source, windows, tmp_path / "out")).code == 0
    assert "lm_head.weight" not in load_tensors(tmp_path / "out" / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_layers_after_the_first_see_what_the_pruned_ones_give(tmp_path: Path) -> None:
    """Wanda, written out for a whole model in memory: prune layer 0, run it, and so on."""
    source = save_model(tmp_path / "source", "llama")
    windows = save_windows(tmp_path / "windows.parquet", 4, 16)
    config = write_config(tmp_path / "run.yaml", source, windows, tmp_path / "out")
    assert shardprune("run", config).code == 0
    after = load_tensors(tmp_path / "out" / "model")
    reference = _wanda(build_model("llama"), random_ids(4, 16), 0.5)
    for key, tensor in reference.items():
        assert int((after[key] != tensor).sum()) <= 2, key  # two scores may tie but for the order of a sum


def _remember_norm(norms: dict[str, Tensor], name: str) -> Any:
    return lambda _, args: norms.__setitem__(name, args[0].flatten(0, 1).norm(dim=0))


def _wanda(model: Any, ids_NL: Tensor, sparsity: float) -> dict[str, Tensor]:
    for layer in model.model.layers:
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        norms: dict[str, Tensor] = {}
        handles = [module.register_forward_pre_hook(_remember_norm(norms, name)) for name, module in linears.items()]
        with torch.no_grad():
            model(ids_NL)
        for handle in handles:
            handle.remove()
        for name, module in linears.items():
            score_OI = module.weight.data.abs() * norms[name]
            lowest = score_OI.argsort(dim=1, stable=True)[:, : int(score_OI.shape[1] * sparsity)]
            module.weight.data.scatter_(1, lowest, 0)
    return {key: value for key, value in model.state_dict().items() if is_linear(key, value)}


def _add_tensors(file: Path, extra: dict[str, Tensor]) -> None:
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
