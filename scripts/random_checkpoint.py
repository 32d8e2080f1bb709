"""Random weights of any shape, written to disk one layer at a time, and random windows."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from random_model import count_heads, why_no_heads
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, LlamaConfig, PreTrainedTokenizerFast

from pipeline.errors import Refusal
from pipeline.export import index_of
from pipeline.models.checkpoint import INDEX_NAME, open_file
from pipeline.models.skeleton import Skeleton

HEAD_SIZE, NUM_SHARING, VOCABULARY = 128, 8, 1024


def write_shape(model: Path, num_layers: int, hidden_size: int, intermediate_size: int, window_length: int) -> None:
    """Of a Llama: config.json, and a tokenizer whose words are w3, w4 ...; a model that is there must be the same.

    Raises Refusal where it is not, and for a hidden size that makes no heads, before anything is written.
    """
    heads = (hidden_size, HEAD_SIZE, NUM_SHARING, NUM_SHARING)
    if (wrong := why_no_heads(*heads)) is not None:
        raise Refusal(wrong)
    num_heads, num_shared = count_heads(*heads)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_shared,
        vocab_size=VOCABULARY,
        max_position_embeddings=max(2048, window_length),
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    if (model / INDEX_NAME).exists():
        there = AutoConfig.from_pretrained(model)
        names = ("hidden_size", "intermediate_size", "num_hidden_layers")
        if any(getattr(there, name) != getattr(config, name) for name in names):
            raise Refusal(f"{model}: is a model of another shape; give another folder")
    config.save_pretrained(model)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(model)


def write_weights(model: Path, hollow: Skeleton) -> None:
    """Random weights, one layer at a time; the index last, since it says that all are there."""
    generator, placed = torch.Generator().manual_seed(0), {}
    shards = [hollow.outside_keys, *hollow.layer_keys]
    for number, keys in enumerate(shards, 1):
        file = model / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for key in keys:
            entry = hollow.checkpoint.entries[key]
            numbers = torch.empty(entry.shape, dtype=entry.torch_dtype)
            scales = key.endswith("weight") and len(entry.shape) == 1
            tensors[key] = numbers.fill_(1) if scales else numbers.normal_(0, 0.02, generator=generator)
        save_file(tensors, file, metadata={"format": "pt"})
        placed.update(open_file(file).entries)
    (model / INDEX_NAME).write_bytes(index_of(placed))


def write_windows(file: Path, num_windows: int, window_length: int, vocabulary: int, words: torch.Generator) -> None:
    """Each a row of token ids; the first three of a vocabulary are often special, and left out."""
    ids = torch.randint(3, vocabulary, (num_windows, window_length), generator=words).tolist()
    pq.write_table(pa.table({"input_ids": pa.array(ids, pa.list_(pa.int32()))}), file)
