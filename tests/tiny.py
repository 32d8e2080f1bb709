"""Small checkpoints, windows, texts and configs for tests: real files, random numbers, made in milliseconds.

N = windows, L = tokens in a window, V = vocabulary.
"""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from pipeline.activations import split_windows
from pipeline.calibration.generation import GenerationTask
from pipeline.calibration.reading import Reader
from pipeline.calibration.selfgen import Sampling, TransformersEngine
from pipeline.calibration.vocabulary import Vocabulary
from pipeline.config import RunConfig
from pipeline.job import Resolved
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.skeleton import LoadedLayer, Skeleton
from pipeline.sparsity import Pattern

logging.disable_progress_bar()

VOCABULARY = 96
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    **_TOKENS,
}
_NEOX = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_BLOOM = {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY, **_TOKENS}

# Nothing is warped: the model's own distribution.
SAMPLING: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "max_new_tokens": 20,
}

# One model type per way of building a decoder that a checkpoint may come with.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 8},
    "qwen2": {**_LLAMA, "tie_word_embeddings": True},
    "qwen3": {**_LLAMA, "head_dim": 8},
    "gemma2": {**_LLAMA, "head_dim": 8, "sliding_window": 8},
    "gemma3_text": {
        **_LLAMA,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": _LLAMA,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        **_TOKENS,
    },
    "gpt_neox": _NEOX,
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64, **_TOKENS},
    "olmo2": _LLAMA,
    "falcon": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        **_TOKENS,
    },
    "bloom": _BLOOM,
}


def build_model(family: str, **config: Any) -> Any:
    """A random model in float32 in which no parameter is a constant: norms and biases count too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**FAMILIES[family], **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def save_model(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **config: Any
) -> Path:
    """A random checkpoint of a family; `max_shard_size="30KB"` gives several files and an index."""
    build_model(family, **config).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def everywhere(layer: LoadedLayer, pattern: Pattern) -> dict[str, Pattern]:
    """One pattern for all linears of a layer."""
    return {linear.key: pattern for linear in layer.linears}


def save_tokenizer(folder: Path, num_entries: int = VOCABULARY, *, adds_bos: bool = False) -> Path:
    """A tokenizer whose words are w3, w4 ...: token id 17 is the word w17."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, num_entries)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def random_ids(num_windows: int, length: int, vocabulary: int = VOCABULARY, seed: int = 0) -> Tensor:
    """Token ids [N, L], none of them a special token."""
    return torch.randint(3, vocabulary, (num_windows, length), generator=torch.Generator().manual_seed(seed))


def save_text(path: Path, num_tokens: int, seed: int = 0) -> Path:
    """A text of the words that `save_tokenizer` knows."""
    path.write_text(" ".join(f"w{token}" for token in random_ids(1, num_tokens, seed=seed)[0].tolist()))
    return path


def save_windows(path: Path, num_windows: int, length: int, vocabulary: int = VOCABULARY, seed: int = 0) -> Path:
    """Windows in a Parquet file as any other program would write them: a plain column of lists of int32."""
    ids_NL = random_ids(num_windows, length, vocabulary, seed)
    pq.write_table(pa.table({"input_ids": pa.array(ids_NL.tolist(), pa.list_(pa.int32()))}), path)
    return path


def write_config(
    path: Path,
    model: Path,
    windows: Path,
    output: Path,
    method: str = "wanda",
    sparsity: float | None = 0.5,
    **settings: Any,
) -> Path:
    """A config that prunes on all the windows of a Parquet file; `settings` are more, by dotted key."""
    ids = pq.read_table(windows)["input_ids"]
    values: dict[str, Any] = {
        "model": {"path": str(model)},
        "calibration": {
            "source": {"name": "parquet", "path": str(windows)},
            "num_windows": len(ids),
            "window_length": len(ids[0]),
        },
        "pruning": {"method": {"name": method}, "sparsity": sparsity},
        "runtime": {"threads": 1, "device": "cpu", "micro_batch_tokens": 64},
        "output": {"path": str(output)},
    }
    for key, value in settings.items():
        *parents, leaf = key.split(".")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    path.write_text(yaml.safe_dump(values))
    return path


def build_reader(
    model: Path,
    folder: Path,
    calibration: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    eos_tokens: tuple[int, ...] = (2,),
    **config: Any,
) -> Reader:
    """What plans calibration data for a checkpoint, with its run in `folder`."""
    values = {"model": {"path": str(model)}, "calibration": calibration, "output": {"path": str(folder)}, **config}
    skeleton = Skeleton(open_checkpoint(str(model)), torch.float32, torch.device("cpu"))
    return Reader(
        RunConfig.model_validate(values),
        Resolved(dtype="float32", device="cpu", threads=1, windows_per_micro_batch=4),
        skeleton,
        Vocabulary(skeleton.vocabulary_size, tokenizer, None, eos_tokens),
        "digest of the model",
        folder / "calibration",
    )


def selfgen(prompts: Any = "bos", **settings: Any) -> dict[str, Any]:
    """A source whose texts are short and few; what `sampling` leaves out is the model's own distribution."""
    sampling = {**SAMPLING, **settings.pop("sampling", {})}
    return {
        "name": "selfgen",
        "prompts": prompts,
        "num_texts": 12,
        "batch_size": 4,
        "sampling": sampling,
        **settings,
    }


def build_task(model: Path, sampling: dict[str, Any] | None = None, **settings: Any) -> GenerationTask:
    """What a generator of float32 texts needs to know, four rows at a time."""
    values: dict[str, Any] = {
        "source": model,
        "model_path": str(model),
        "is_from_hub": False,
        "trust_remote_code": False,
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "engine": TransformersEngine(),
        "sampling": Sampling(**{**SAMPLING, **(sampling or {})}),
        "seed": 0,
        "batch_size": 4,
        "pad_token": 2,
        "eos_tokens": (2,),
    }
    return GenerationTask(**{**values, **settings})


def save_documents(path: Path, num_documents: int, num_tokens: int, seed: int = 0) -> Path:
    """A text file of documents with a blank line between them."""
    rows = random_ids(num_documents, num_tokens, seed=seed).tolist()
    path.write_text("\n\n".join(" ".join(f"w{token}" for token in row) for row in rows))
    return path


def run_layers(skeleton: Skeleton, ids_NL: Tensor, windows_per_micro_batch: int) -> Tensor:
    """The logits [N, L, V] of a model of which one layer at a time is in memory."""
    outside, micro_batches = skeleton.outside(), split_windows(len(ids_NL), windows_per_micro_batch)
    hidden = [outside.record(ids_NL[windows])[0] for windows in micro_batches]
    for layer_index in range(skeleton.num_layers):
        layer = skeleton.load_layer(layer_index)
        hidden = [layer.run(h_BLH, skeleton.calls(tuple(h_BLH.shape[:2]))[layer_index]) for h_BLH in hidden]
    pairs = zip(micro_batches, hidden, strict=True)
    return torch.cat([outside.logits(ids_NL[windows], hidden_BLH) for windows, hidden_BLH in pairs])


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, but not of the leases of a run, which tell of processes."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.parent != folder / "lease"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def modified_ns(folder: Path) -> dict[str, int]:
    """When each file below a folder was last written."""
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
