"""Writes a Llama checkpoint with random weights, and a Parquet file of random windows for it.

python scripts/random_model.py OUT --layers 8 --hidden 512 --windows 64 --window-length 512
python scripts/random_model.py OUT --layers 4 --hidden 2048 --aspect 70b
"""

import argparse
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from door import positive
from transformers import LlamaConfig, LlamaForCausalLM

# Intermediate over hidden size, and heads that share a key and a value: of something small, and of Llama 3 and 3.1.
ASPECTS = {"small": (Fraction(11, 4), 2), "8b": (Fraction(7, 2), 4), "70b": (Fraction(7, 2), 8)}
HEAD_SIZE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=positive, default=4)
    parser.add_argument("--hidden", type=positive, default=256)
    parser.add_argument("--aspect", choices=ASPECTS, default="small")
    parser.add_argument("--head-size", type=positive, default=HEAD_SIZE)
    parser.add_argument("--vocabulary", type=positive, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--windows", type=positive, default=64)
    parser.add_argument("--window-length", type=positive, default=512)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    widening, num_sharing = ASPECTS[arguments.aspect]
    heads = (arguments.hidden, arguments.head_size, num_sharing)
    if (wrong := why_no_heads(*heads)) is not None:
        parser.error(wrong)
    num_heads, num_shared = count_heads(*heads)
    torch.manual_seed(arguments.seed)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=int(arguments.hidden * widening),
        num_hidden_layers=arguments.layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_shared,
        vocab_size=arguments.vocabulary,
        max_position_embeddings=max(2048, arguments.window_length),
    )
    model = LlamaForCausalLM(config).to(getattr(torch, arguments.dtype))
    model.save_pretrained(arguments.out / "model")
    ids = torch.randint(arguments.vocabulary, (arguments.windows, arguments.window_length)).tolist()
    pq.write_table(pa.table({"input_ids": pa.array(ids, pa.list_(pa.int32()))}), arguments.out / "windows.parquet")


def count_heads(hidden: int, head_size: int, num_sharing: int, fewest: int = 1) -> tuple[int, int]:
    """How many heads there are, and how many of keys and values."""
    num_heads = max(fewest, hidden // head_size)
    return num_heads, max(1, num_heads // num_sharing)


def why_no_heads(hidden: int, head_size: int, num_sharing: int, fewest: int = 1) -> str | None:
    """Why a Llama of a hidden size cannot have them, if it cannot."""
    num_heads, num_shared = count_heads(hidden, head_size, num_sharing, fewest)
    # rotary embeddings need an even size
    if hidden % (2 * num_heads) == 0 and num_heads % num_shared == 0:
        return None
    return (
        f"--hidden {hidden}: does not make heads of one even size in groups of one size; "
        f"give a multiple of {head_size * num_sharing}"
    )


if __name__ == "__main__":
    main()
