"""What cannot work is refused in one sentence that names it, before anything is written: exit code 2."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command import Finished, refusal, sentence, shardprune
from safetensors.torch import load_file, save_file
from tiny import digests, random_ids, save_model, save_text, save_tokenizer, save_windows, write_config

from pipeline.config_file import load_config
from pipeline.errors import Refusal
from pipeline.local import survey_locally
from pipeline.preparation import begin, opened, prepare
from pipeline.runtime import Machine

HERE = Machine.here()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything is right: copy it and spoil one thing."""
    folder = tmp_path_factory.mktemp("sound")
    save_tokenizer(save_model(folder / "model", "llama", torch.float32, max_shard_size="30KB"))
    save_tokenizer(save_model(folder / "single", "llama", torch.bfloat16))
    save_windows(folder / "windows.parquet", 6, 16)
    save_text(folder / "text.txt", 400)
    return folder


@pytest.fixture
def place(sound: Path, tmp_path: Path) -> Path:
    """A copy of the sound folder with a config that prunes model/ into out/."""
    folder = tmp_path / "place"
    shutil.copytree(sound, folder)
    write_config(folder / "run.yaml", folder / "model", folder / "windows.parquet", folder / "out")
    return folder


def refused(place: Path, *overrides: str, model: str | None = None) -> str:
    """The sentence with which the run in `place` is refused; nothing may have been written."""
    overrides = (*overrides, f"model.path={place / model}") if model else overrides
    before = digests(place)
    with pytest.raises(Refusal) as told:
        prepared = prepare(load_config(place / "run.yaml", list(overrides)), HERE, print)
        with opened(prepared) as (guard, _):
            begin(prepared, guard, survey_locally)
    assert digests(place) == before
    assert not (place / "out").exists()
    return str(told.value)


def test_the_sound_folder_is_sound(place: Path) -> None:
    assert shardprune("run", place / "run.yaml").code == 0


# --- the config


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("pruning.method.name=sparsgpt", ["pruning.method.name = 'sparsgpt'", "sparsegpt", "wanda", "magnitude"]),
        ("prunning.sparsity=0.5", ["prunning", "unknown key"]),
        ("pruning.sparsty=0.5", ["pruning.sparsty", "unknown key"]),
        ("pruning.method.dampening=0.1", ["pruning.method.dampening", "unknown key"]),
        ("calibration.source.paths=x", ["calibration.source.paths", "unknown key"]),
        ("pruning.sparsity=1", ["pruning.sparsity = 1", "below 1"]),
        ("pruning.sparsity=-0.1", ["pruning.sparsity = -0.1", "at least 0"]),
        ("pruning.sparsity=.nan", ["pruning.sparsity = nan"]),
        ("pruning.sparsity=much", ["pruning.sparsity = 'much'", "number"]),
        ("pruning.method={name: ria, activation_power: .inf}", ["pruning.method.activation_power = inf"]),
        ("pruning.method={name: ria, activation_power: 11}", ["pruning.method.activation_power = 11"]),
        ("pruning.method={name: dsnot, update_threshold: .nan}", ["pruning.method.update_threshold = nan"]),
        ("pruning.method={name: sparsellm, alpha: .inf}", ["pruning.method.alpha = inf"]),
        ("pruning.method={name: sparsellm, beta: 1.0e9}", ["pruning.method.beta"]),
        ("pruning.method={name: alps, rho: 0}", ["pruning.method.rho = 0"]),
        ("pruning.method={name: wanda, refit_damping: 2}", ["pruning.method.refit_damping = 2"]),
        ("pruning.pattern=4:2", ["pruning.pattern = '4:2'", "N:M"]),
        ("pruning.pattern=0:4", ["pruning.pattern = '0:4'", "N:M"]),
        ("pruning.pattern=two of four", ["pruning.pattern = 'two of four'", "unstructured", "2:4"]),
        ("pruning.pattern=true", ["pruning.pattern = True"]),
        ("pruning.permute=true", ["pruning.permute = true", "unstructured", "N:M"]),
        ("pruning.permute=perhaps", ["pruning.permute = 'perhaps'"]),
        ("pruning.propagation=sideways", ["pruning.propagation = 'sideways'", "'pruned'", "'shard'", "'dense'"]),
        ("pruning.propagation=shard", ["pruning.propagation = 'shard'", "cluster.num_shards"]),
        ("pruning.granularity=row", ["pruning.granularity = 'row'", "'layer'", "'linear'"]),
        ("pruning.allocation.name=by hand", ["pruning.allocation.name = 'by hand'", "uniform", "owl"]),
        (
            "calibration.source.name=corpus",
            ["calibration.source.name = 'corpus'", "text", "parquet", "dataset", "selfgen", "mix"],
        ),
        ("calibration.num_windows=0", ["calibration.num_windows = 0", "1"]),
        ("calibration.num_windows=many", ["calibration.num_windows = 'many'"]),
        ("calibration.window_length=1", ["calibration.window_length = 1", "2"]),
        ("calibration.seed=-1", ["calibration.seed = -1", "0"]),
        ("calibration.bos=perhaps", ["calibration.bos = 'perhaps'"]),
        ("runtime.threads=0", ["runtime.threads = 0", "1"]),
        ("runtime.micro_batch_tokens=0", ["runtime.micro_batch_tokens = 0"]),
        ("runtime.device=tpu", ["runtime.device = 'tpu'", "cpu", "cuda"]),
        ("runtime.gpu_bytes=0", ["runtime.gpu_bytes = 0"]),
        ("runtime.ram_bytes=-1", ["runtime.ram_bytes = -1"]),
        ("cluster.address=nowhere", ["cluster.address = 'nowhere'", "HOST:PORT"]),
        ("cluster.address=host:port", ["cluster.address = 'host:port'", "HOST:PORT"]),
        ("cluster.num_shards=0", ["cluster.num_shards = 0"]),
        ("cluster.num_shards=4", ["cluster.num_shards = 4", "3 layers"]),
        ("cluster.num_replicas=0", ["cluster.num_replicas = 0"]),
        ("cluster.num_replicas=1000", ["cluster.num_replicas = 1000", "micro-batches"]),
        ("cluster.stall_seconds=0", ["cluster.stall_seconds = 0"]),
        ("cluster.worker.num_cpus=0", ["cluster.worker.num_cpus = 0"]),
        ("output.keep_entry_every=0", ["output.keep_entry_every = 0"]),
        ("model.dtype=int8", ["model.dtype = 'int8'", "bfloat16"]),
        ("model.dtype=float16", ["model.dtype = 'float16'", "CPU", "float32"]),
        ("output.path=''", ["output.path = ''", "is empty"]),
        ("model.path=''", ["model.path = ''", "is empty"]),
        ("runtime.spill_path=''", ["runtime.spill_path = ''", "is empty"]),
        ("model.path=null", ["model.path = None"]),
        ("model=here", ["model = 'here'"]),
        ("evaluation.tasks=[mmlu]", ["evaluation.tasks"]),
        ("pruning.sparsity", ["'pruning.sparsity'", "key.sub=value"]),
        ("=0.5", ["'=0.5'", "key.sub=value"]),
        ("pruning.sparsity.more=0.5", ["pruning.sparsity.more", "sparsity is a plain value"]),
        ("pruning.sparsity=[", ["pruning.sparsity=[", "not valid YAML"]),
    ],
)
def test_settings_that_cannot_be(place: Path, override: str, told: list[str]) -> None:
    answer = refused(place, override)
    assert all(part in answer for part in told), answer


def test_channels_of_a_model_that_are_all_in_one_group(place: Path) -> None:
    """Heads of 8 and 32 hidden units, in groups of 32."""
    save_model(place / "single", "llama", torch.bfloat16, intermediate_size=32)
    overrides = ["pruning.sparsity=null", "pruning.pattern='16:32'"]
    answer = refused(place, *overrides, "pruning.permute=true", model="single")
    assert all(part in answer for part in ("pruning.permute = true", "LlamaForCausalLM", "groups of 32")), answer


def test_cuda_where_there_is_none(place: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "runtime.device = 'cuda'" in refused(place, "runtime.device=cuda")


@pytest.mark.parametrize(
    ("sparsity", "pattern", "told"),
    [("0.6", "2:4", ["0.6", "2 of 4"]), ("0.5", "1:4", ["0.5", "3 of 4"]), ("0", "2:4", ["0.0", "2 of 4"])],
)
def test_sparsity_at_odds_with_the_pattern(place: Path, sparsity: str, pattern: str, told: list[str]) -> None:
    answer = refused(place, f"pruning.sparsity={sparsity}", f"pruning.pattern='{pattern}'")
    assert "pruning.sparsity" in answer and "pruning.pattern" in answer
    assert all(part in answer for part in told), answer


def test_pattern_that_does_not_divide_the_columns(place: Path) -> None:
    answer = refused(place, "pruning.sparsity=null", "pruning.pattern='2:5'")
    assert "pruning.pattern = 2:5" in answer and "model.layers.0" in answer and "32" in answer


def test_pattern_may_be_unquoted_although_yaml_reads_a_number(place: Path) -> None:
    """YAML 1.1 takes 2:4 for minutes and seconds: 124."""
    text = (place / "run.yaml").read_text()
    (place / "run.yaml").write_text(text.replace("sparsity: 0.5", "pattern: 2:4"))
    assert shardprune("run", place / "run.yaml").code == 0
    receipt = json.loads((place / "out" / "receipts" / "layer-00000.json").read_text())
    assert {linear["pattern"] for linear in receipt["linears"]} == {"2:4"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, ["No such file", "YAML"]),
        ("model: {path: [", ["not valid YAML"]),
        ("model: x\n\tpath: y", ["not valid YAML"]),
        (b"model: \xff\xfe", ["not valid YAML"]),
        ("just words", ["mapping"]),
        ("- a\n- b", ["mapping"]),
        ("", ["mapping"]),
        ("1: 2\nmodel: {path: x}\ncalibration: {source: {name: text, path: y}}\noutput: {path: z}", ["1"]),
        ("model: {path: x}", ["calibration", "missing"]),
        ("model: {path: x}\ncalibration: {source: {path: y}}\noutput: {path: z}", ["calibration.source.name"]),
        ("model: {}\ncalibration: {source: {name: text, path: y}}\noutput: {path: z}", ["model.path", "missing"]),
        ("model:\ncalibration: {source: {name: text, path: y}}\noutput: {path: z}", ["model"]),
    ],
)
def test_configs_that_cannot_be_read(tmp_path: Path, content: str | bytes | None, told: list[str]) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    answer = refusal("run", path)
    assert all(part in answer for part in told), answer


def test_a_fresh_process_says_the_same(tmp_path: Path) -> None:
    """The command as it is installed, with nothing imported before."""
    command = Path(sys.executable).with_name("shardprune")
    if not command.exists():
        pytest.skip("shardprune is not installed beside this Python")
    result = subprocess.run([command, "run", tmp_path / "none.yaml"], capture_output=True, text=True)
    assert sentence(Finished(result.returncode, result.stdout, result.stderr)).startswith("config ")
    assert (result.returncode, result.stdout) == (2, "")


# --- the checkpoint


def _edit_config(**changes: Any) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        config = {key: value for key, value in {**config, **changes}.items() if value is not ...}
        (model / "config.json").write_text(json.dumps(config))

    return spoil


def _edit_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        file = model / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        change(index)
        file.write_text(json.dumps(index))

    return spoil


def _first_shard(model: Path) -> Path:
    return min(model.glob("*.safetensors"))


def _cut(num_bytes: int) -> Callable[[Path], None]:
    """Leaves the first bytes, or for a negative number takes away the last."""

    def spoil(model: Path) -> None:
        file = _first_shard(model)
        file.write_bytes(file.read_bytes()[:num_bytes])

    return spoil


def _append(model: Path) -> None:
    with _first_shard(model).open("ab") as file:
        file.write(b"\0" * 8)


def _with_header(text: bytes) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        _first_shard(model).write_bytes(len(text).to_bytes(8, "little") + text)

    return spoil


def _edit_header(old: bytes, new: bytes) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        file = _first_shard(model)
        content = file.read_bytes()
        assert len(old) == len(new) and old in content
        file.write_bytes(content.replace(old, new, 1))

    return spoil


def _edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        file = model / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return spoil


def _rename_to_pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


SHARDED: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "shard missing": (lambda model: _first_shard(model).unlink(), ["model-00001", "missing"]),
    "cut to nothing": (_cut(0), ["model-00001", "cut short"]),
    "cut in the header's length": (_cut(5), ["model-00001", "cut short"]),
    "cut after the header's length": (_cut(8), ["model-00001", "cut short"]),
    "cut in the header": (_cut(60), ["model-00001", "cut short"]),
    "cut in a tensor": (_cut(-100), ["model-00001", "bytes", "copy it again"]),
    "cut by one byte": (_cut(-1), ["model-00001", "bytes"]),
    "bytes appended": (_append, ["model-00001", "bytes"]),
    "header is not JSON": (_with_header(b"{'a': 1}"), ["model-00001", "not a safetensors file"]),
    "header is a list": (_with_header(b"[]"), ["model-00001", "not a safetensors file"]),
    "header of numbers": (_with_header(b'{"a":1}'), ["model-00001", "not a safetensors file"]),
    "header without offsets": (_edit_header(b"data_offsets", b"data_0ffsets"), ["model-00001"]),
    "header of another dtype": (_edit_header(b'"F32"', b'"F64"'), ["F64"]),
    "header of no dtype": (_edit_header(b'"F32"', b'"X99"'), ["X99"]),
    "header of another shape": (_edit_header(b'"shape":[96', b'"shape":[95'), ["wrong size"]),
    "html instead of weights": (lambda m: _first_shard(m).write_text("<html>Not found</html>"), ["model-00001"]),
    "index not JSON": (lambda m: (m / "model.safetensors.index.json").write_text("{"), ["index.json", "JSON"]),
    "index without map": (_edit_index(lambda index: index.pop("weight_map")), ["weight_map"]),
    "index with a tensor too many": (
        _edit_index(lambda index: index["weight_map"].update({"more.weight": "model-00001-of-00005.safetensors"})),
        ["more.weight"],
    ),
    "index with a file too many": (
        _edit_index(lambda index: index["weight_map"].update({"more.weight": "model-9.safetensors"})),
        ["model-9.safetensors", "missing"],
    ),
    "index with a tensor in another file": (
        _edit_index(
            lambda index: index["weight_map"].update(
                {min(index["weight_map"]): max(index["weight_map"].values()), "model.norm.weight": "?"}
            )
        ),
        ["?"],
    ),
    "index with numbers": (
        _edit_index(lambda index: index["weight_map"].update({"model.norm.weight": 7})),
        ["index.json"],
    ),
}
SINGLE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no config.json": (lambda model: (model / "config.json").unlink(), ["config.json"]),
    "config.json not JSON": (lambda model: (model / "config.json").write_text("{"), ["config.json", "JSON"]),
    "config.json a list": (lambda model: (model / "config.json").write_text("[]"), ["config.json", "object"]),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), ["not a checkpoint"]),
    "pickles only": (_rename_to_pickle, ["pickled", "safetensors"]),
    "unknown model type": (_edit_config(model_type="llamoid"), ["'llamoid'", "unknown"]),
    "no model type": (_edit_config(model_type=...), ["model_type", "None"]),
    "remote code without consent": (
        _edit_config(model_type="llamoid", auto_map={"AutoModelForCausalLM": "code.Model"}),
        ["remote code", "model.trust_remote_code=true"],
    ),
    "quantised": (_edit_config(quantization_config={"quant_method": "gptq", "bits": 4}), ["quantised"]),
    "hidden size of another model": (_edit_config(hidden_size=64), ["shape", "config.json"]),
    "more layers than tensors": (_edit_config(num_hidden_layers=4), ["model.layers.3", "complete the checkpoint"]),
    "no layers": (_edit_config(num_hidden_layers=0), ["layers"]),
    "hidden size a word": (_edit_config(hidden_size="wide"), ["config.json"]),
    "heads that do not divide": (_edit_config(num_attention_heads=5, head_dim=...), ["model"]),
    "unknown activation": (_edit_config(hidden_act="swooglu"), ["swooglu"]),
    "tensor missing": (_edit_tensors(lambda t: t.pop("model.norm.weight")), ["model.norm.weight", "complete"]),
    "linear missing": (
        _edit_tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        ["model.layers.1.mlp.up_proj.weight", "complete"],
    ),
    "tensor of another shape": (
        _edit_tensors(lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(63, 32)})),
        ["model.layers.1.mlp.up_proj.weight", "(63, 32)", "(64, 32)"],
    ),
    "tensor of integers": (
        _edit_tensors(lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(64, 32, dtype=torch.int8)})),
        ["model.layers.1.mlp.up_proj.weight", "I8", "convert"],
    ),
    "tokenizer too large": (lambda model: save_tokenizer(model, 97), ["tokenizer", "97", "96"]),
    "tokenizer of another model": (lambda model: save_tokenizer(model, 40), ["tokenizer", "40", "96"]),
    "tokenizer damaged": (lambda model: (model / "tokenizer.json").write_text("{"), ["tokenizer"]),
    "tokenizer of another format": (lambda model: (model / "tokenizer.json").write_text("{}"), ["tokenizer"]),
}


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_checkpoints_that_are_not_sound(place: Path, name: str) -> None:
    spoil, told = SHARDED[name]
    spoil(place / "model")
    answer = refused(place)
    assert all(part in answer for part in told), answer


@pytest.mark.parametrize("name", SINGLE)
def test_checkpoints_that_are_not_sound(place: Path, name: str) -> None:
    spoil, told = SINGLE[name]
    spoil(place / "single")
    answer = refused(place, model="single")
    assert all(part in answer for part in told), answer


def test_index_that_puts_a_tensor_in_another_file(place: Path) -> None:
    file = place / "model" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    first, last = min(index["weight_map"].values()), max(index["weight_map"].values())
    key = next(key for key, name in index["weight_map"].items() if name == first)
    index["weight_map"][key] = last
    file.write_text(json.dumps(index))
    answer = refused(place)
    assert key in answer and last in answer


@pytest.mark.parametrize("path", ["none", "run.yaml", "windows.parquet/model"])
def test_model_path_that_is_no_folder(place: Path, path: str) -> None:
    assert str(place / path) in refused(place, f"model.path={place / path}")


def test_model_id_that_is_nowhere_to_be_had(place: Path) -> None:
    assert "model.path = nobody/nothing" in refused(place, "model.path=nobody/nothing")


@pytest.mark.parametrize(
    ("family", "config", "told"),
    [
        ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1}, "mixture of experts"),
        ("t5", {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}, "decoder-only"),
        ("bart", {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}, "decoder-only"),
        ("vit", {"hidden_size": 16, "num_hidden_layers": 1}, "decoder-only"),
    ],
)
def test_models_that_are_no_dense_decoders(place: Path, family: str, config: dict[str, Any], told: str) -> None:
    content = {**config, "model_type": family, "vocab_size": 96}
    (place / "single" / "config.json").write_text(json.dumps(content))
    assert told in refused(place, model="single")


# --- the calibration data


def _rows(rows: Any, column: str = "input_ids", kind: Any = None) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        pq.write_table(pa.table({column: pa.array(rows, kind)}), path)

    return write


def _changed(value: int) -> list[list[int]]:
    rows: list[list[int]] = random_ids(6, 16).tolist()
    rows[3][5] = value
    return rows


PARQUETS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing": (lambda path: path.unlink(), ["windows.parquet", "no such file"]),
    "not Parquet": (lambda path: path.write_text("w3 w4"), ["windows.parquet", "Parquet"]),
    "empty file": (lambda path: path.write_text(""), ["windows.parquet", "Parquet"]),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-20]), ["windows.parquet", "Parquet"]),
    "without the column": (_rows(random_ids(6, 16).tolist(), "tokens"), ["'input_ids'", "tokens"]),
    "too few rows": (_rows(random_ids(5, 16).tolist()), ["5 windows", "num_windows = 6"]),
    "no rows": (_rows([], kind=pa.list_(pa.int32())), ["0 windows"]),
    "unequal lengths": (_rows([[3] * 16] * 5 + [[3] * 15]), ["window_length = 16", "15"]),
    "another length": (_rows([[3] * 17] * 6), ["window_length = 16", "17"]),
    "rows of words": (_rows([["w3"] * 16] * 6), ["input_ids", "whole numbers"]),
    "rows of fractions": (_rows([[3.5] * 16] * 6), ["input_ids", "whole numbers"]),
    "rows of truth values": (_rows([[True] * 16] * 6), ["input_ids", "whole numbers"]),
    "no lists": (_rows([3] * 6), ["input_ids", "lists"]),
    "an absent row": (_rows([[3] * 16] * 5 + [None]), ["input_ids", "missing"]),
    "an absent token": (_rows([[3] * 16] * 5 + [[3] * 15 + [None]]), ["input_ids", "missing"]),
    "a token below 0": (_rows(_changed(-1)), ["token id -1", "vocabulary of 96"]),
    "a token too large": (_rows(_changed(96)), ["token id 96", "vocabulary of 96"]),
    "a token beyond 64 bits": (_rows(_changed(2**63), kind=pa.list_(pa.uint64())), ["not in range"]),
}


@pytest.mark.parametrize("name", PARQUETS)
def test_parquet_files_that_cannot_be_used(place: Path, name: str) -> None:
    spoil, told = PARQUETS[name]
    spoil(place / "windows.parquet")
    answer = refused(place)
    assert all(part in answer for part in told), answer


@pytest.mark.parametrize("setting", ["calibration.window_length", "evaluation.window_length"])
def test_windows_longer_than_the_model_takes(place: Path, setting: str) -> None:
    answer = refused(place, f"{setting}=65")
    assert f"{setting} = 65" in answer and "64" in answer


def _text_source(path: Path) -> list[str]:
    return [f"calibration.source={{name: text, path: {path}}}"]


def test_too_little_text(place: Path) -> None:
    answer = refused(place, *_text_source(place / "text.txt"), "calibration.num_windows=26")
    assert all(part in answer for part in ("calibration.num_windows = 26", "400 tokens", "25")), answer


@pytest.mark.parametrize(("name", "told"), [("none.txt", "no such file"), ("empty", "no .txt or .md file")])
def test_text_that_is_not_there(place: Path, name: str, told: str) -> None:
    (place / "empty").mkdir()
    (place / "empty" / "data.csv").write_text("w3")
    answer = refused(place, *_text_source(place / name))
    assert told in answer and name in answer


def test_empty_text(place: Path) -> None:
    (place / "text.txt").write_text("")
    assert "0 tokens" in refused(place, *_text_source(place / "text.txt"))


def test_text_that_is_not_utf8(place: Path) -> None:
    (place / "text.txt").write_bytes("w3 w4 façade".encode("latin-1"))
    answer = refused(place, *_text_source(place / "text.txt"))
    assert "text.txt" in answer and "UTF-8" in answer


def test_text_for_a_model_without_tokenizer(place: Path) -> None:
    for file in (place / "model").glob("*token*"):
        file.unlink()
    answer = refused(place, *_text_source(place / "text.txt"))
    assert "tokenizer" in answer and "parquet" in answer


def test_bos_from_a_tokenizer_that_has_none(place: Path) -> None:
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (place / "model" / file).exists():
            content = json.loads((place / "model" / file).read_text())
            content.pop("bos_token", None)
            (place / "model" / file).write_text(json.dumps(content))
    answer = refused(place, *_text_source(place / "text.txt"), "calibration.bos=true")
    assert "calibration.bos" in answer


@pytest.mark.parametrize(
    ("text", "told"), [("none.txt", "no such file"), ("short.txt", "3 tokens"), ("latin.txt", "UTF-8")]
)
def test_evaluation_text_that_cannot_be_used(place: Path, text: str, told: str) -> None:
    (place / "short.txt").write_text("w3 w4 w5")
    (place / "latin.txt").write_bytes("façade".encode("latin-1"))
    answer = refused(place, f"evaluation.text={place / text}")
    assert told in answer and text in answer


def test_evaluation_of_a_model_without_tokenizer(place: Path) -> None:
    for file in (place / "model").glob("*token*"):
        file.unlink()
    answer = refused(place, f"evaluation.text={place / 'text.txt'}")
    assert "evaluation.text" in answer and "tokenizer" in answer


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], "evaluation.text"),
        (["evaluation.text=none.txt"], "evaluation.window_length"),
        (["evaluation.text=none.txt", "evaluation.window_length=16"], "none.txt"),
        (["evaluation.text=none.txt", "evaluation.window_length=65"], "evaluation.window_length = 65"),
        (["pruning.sparsity=0.5"], "pruning"),
    ],
)
def test_evaluate_refuses_too(sound: Path, overrides: list[str], told: str) -> None:
    assert told in refusal("evaluate", sound / "model", *overrides)


def test_evaluate_refuses_what_is_no_model(sound: Path) -> None:
    assert "none" in refusal("evaluate", sound / "none", "evaluation.text=x", "evaluation.window_length=16")


# --- the output


def test_output_with_foreign_files(place: Path) -> None:
    (place / "other").mkdir()
    (place / "other" / "thesis.tex").write_text("")
    answer = refused(place, f"output.path={place / 'other'}")
    assert "other" in answer and "no run of shardprune" in answer


@pytest.mark.parametrize(
    "content", ["{", "just words", "model: llama\n", "resolved: {threads: two}\n", "identity: 7\n", "resolved: [1]\n"]
)
def test_output_with_a_run_yaml_of_somebody_else(place: Path, content: str) -> None:
    (place / "other").mkdir()
    (place / "other" / "run.yaml").write_text(content)
    assert "output.path" in refused(place, f"output.path={place / 'other'}")


@pytest.mark.parametrize("path", ["run.yaml", "run.yaml/out", "/proc/shardprune/out"])
def test_output_that_is_no_place_to_write(place: Path, path: str) -> None:
    answer = refused(place, f"output.path={place / path}")
    assert "output.path" in answer and path in answer


def test_output_on_a_read_only_file_system(place: Path) -> None:
    assert "output.path" in refused(place, "output.path=/sys/shardprune")


def test_output_that_is_the_model(place: Path) -> None:
    assert "output.path" in refused(place, f"output.path={place / 'model'}")


def test_output_inside_the_model(place: Path) -> None:
    """The model folder is copied from: a run inside it would be copied into itself."""
    assert "output.path" in refused(place, f"output.path={place / 'model' / 'pruned'}")


@pytest.mark.parametrize(
    ("override", "name", "before", "now"),
    [
        ("pruning.sparsity=0.6", "pruning.sparsity", "0.5", "0.6"),
        ("pruning.method={name: magnitude}", "pruning.method.name", "'wanda'", "'magnitude'"),
        ("calibration.num_windows=5", "calibration.num_windows", "6", "5"),
        ("calibration.windows=across", "calibration windows", "", ""),
        ("model.dtype=bfloat16", "model.dtype", "'float32'", "'bfloat16'"),
        ("runtime.threads=2", "runtime.threads", "1", "2"),
        ("runtime.micro_batch_tokens=16", "runtime.micro_batch_tokens (in windows)", "4", "1"),
        ("pruning.pattern='2:4'", "pruning.pattern", "'unstructured'", "'2:4'"),
    ],
)
def test_output_of_another_run(finished_run: Path, override: str, name: str, before: str, now: str) -> None:
    unchanged = digests(finished_run)
    answer = refusal("run", finished_run / "run.yaml", override)
    assert f"{name} was {before}" in answer and f"now {now}" in answer and "another run" in answer, answer
    assert digests(finished_run) == unchanged


@pytest.fixture(scope="module")
def finished_run(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "place"
    shutil.copytree(sound, folder)
    write_config(folder / "run.yaml", folder / "model", folder / "windows.parquet", folder / "out")
    assert shardprune("run", folder / "run.yaml").code == 0
    return folder


def test_output_of_a_run_of_another_model(finished_run: Path) -> None:
    answer = refusal("run", finished_run / "run.yaml", f"model.path={finished_run / 'single'}")
    assert "model (config and tensors)" in answer and "another run" in answer


# --- what only shows during the run


def _spoiled(place: Path, key: str, value: float) -> None:
    file = place / "single" / "model.safetensors"
    tensors = load_file(file)
    tensors[key].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def single(place: Path) -> Iterator[Path]:
    write_config(place / "run.yaml", place / "single", place / "windows.parquet", place / "out")
    yield place


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("magnitude", "mlp.up_proj.weight", float("nan")),
        ("wanda", "input_layernorm.weight", float("nan")),
        ("sparsegpt", "self_attn.o_proj.weight", float("-inf")),
    ],
)
def test_a_layer_that_is_not_finite(single: Path, method: str, key: str, value: float) -> None:
    _spoiled(single, f"model.layers.1.{key}", value)
    answer = refusal("run", single / "run.yaml", f"pruning.method.name={method}")
    assert f"model.layers.1.{key}" in answer and "layer 1" in answer and "NaN or Inf" in answer
    assert [file.name for file in (single / "out" / "receipts").iterdir()] == ["layer-00000.json"]
    assert not (single / "out" / "model" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("magnitude", "model.embed_tokens.weight"),
        ("wanda", "model.embed_tokens.weight"),
        ("wanda", "model.norm.weight"),
        ("sparsegpt", "lm_head.weight"),
    ],
)
def test_an_outside_that_is_not_finite(single: Path, method: str, key: str) -> None:
    _spoiled(single, key, float("nan"))
    answer = refusal("run", single / "run.yaml", f"pruning.method.name={method}")
    assert key in answer and "outside the layers" in answer and "NaN or Inf" in answer
    assert not (single / "out" / "model" / "model.safetensors.index.json").exists()


def test_activations_that_overflow_are_refused_and_not_solved(single: Path) -> None:
    """Weights that are finite can still give inputs that are not."""
    file = single / "single" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(3e38)
    save_file(tensors, file, metadata={"format": "pt"})
    for method in ("wanda", "sparsegpt"):
        overrides = [f"pruning.method.name={method}", f"output.path={single / method}", "pruning.granularity=layer"]
        answer = refusal("run", single / "run.yaml", *overrides)
        assert "model.layers.1.mlp.down_proj.weight" in answer and "NaN or Inf" in answer and "model.dtype" in answer


def test_mending_the_source_needs_a_new_output(single: Path) -> None:
    sound_bytes = (single / "single" / "model.safetensors").read_bytes()
    _spoiled(single, "model.layers.2.mlp.up_proj.weight", float("nan"))
    assert "layer 2" in refusal("run", single / "run.yaml")
    (single / "single" / "model.safetensors").write_bytes(sound_bytes)
    assert "model file model.safetensors was" in refusal("run", single / "run.yaml")
    assert shardprune("run", single / "run.yaml", f"output.path={single / 'again'}").code == 0
