"""Measures what a token costs in the forward of a Llama layer, by the size of micro-batches: one table.

    python scripts/measure_micro_batch.py --hidden 512 1024 2048 --threads 1 2

Microseconds of CPU time a token, over all threads, the median of some turns, each of which tries all sizes; with one
thread they hardly change where others use the machine too. In brackets as a multiple of the usual size.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from random_model import ASPECTS, HEAD_SIZE
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from pipeline.runtime import keeping_freed_memory, resolve_micro_batch

NUM_TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
USUAL = resolve_micro_batch("auto", "cpu", 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--aspect", choices=ASPECTS, default="8b")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"| threads | hidden | dtype | {' | '.join(f'{size} tokens' for size in NUM_TOKENS)} |")
    print("|" + "---|" * (3 + len(NUM_TOKENS)))
    for threads, hidden, dtype in itertools.product(arguments.threads, arguments.hidden, arguments.dtypes):
        torch.set_num_threads(threads)
        forward = build(hidden, arguments.aspect, getattr(torch, dtype), arguments.window_length)
        found = measure(forward, arguments.window_length, arguments.repeats)
        cells = [f"{seconds * 1e6:.1f} ({seconds / found[USUAL]:.2f})" for seconds in found.values()]
        print(f"| {threads} | {hidden} | {dtype} | {' | '.join(cells)} |", flush=True)


def build(hidden: int, aspect: str, dtype: torch.dtype, window_length: int) -> Callable[[int], float]:
    """A forward of so many windows through a layer with random weights, which tells its CPU seconds."""
    widening, num_sharing = ASPECTS[aspect]
    num_heads = max(1, hidden // HEAD_SIZE)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=int(hidden * widening),
        num_attention_heads=num_heads,
        num_key_value_heads=max(1, num_heads // num_sharing),
        attn_implementation="sdpa",
    )
    layer = LlamaDecoderLayer(config, 0).to(dtype).eval().requires_grad_(False)
    rotary = LlamaRotaryEmbedding(config)

    def forward(num_windows: int) -> float:
        hidden_BLH = torch.randn(num_windows, window_length, hidden).to(dtype)
        positions = rotary(hidden_BLH, torch.arange(window_length)[None])
        started = time.process_time()
        layer(hidden_BLH, position_embeddings=positions)
        return time.process_time() - started

    return forward


def measure(forward: Callable[[int], float], window_length: int, repeats: int) -> dict[int, float]:
    """CPU seconds for one token, by the tokens of a micro-batch; the first turn counts for nothing."""
    found: dict[int, list[float]] = {size: [] for size in NUM_TOKENS}
    with torch.no_grad(), keeping_freed_memory() as kept:
        for turn in range(repeats + 1):
            for size, seconds in found.items():
                # small ones several times, so that a turn takes about as long for each
                times = max(1, USUAL // size)
                taken = sum(forward(size // window_length) for _ in range(times))
                kept.limit()
                if turn:
                    seconds.append(taken / (times * size))
    return {size: statistics.median(seconds) for size, seconds in found.items()}


if __name__ == "__main__":
    main()
