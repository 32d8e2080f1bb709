"""Measures the stages of a solve on this machine's CPU, each against its own rate of matrix products.

    python scripts/measure_solve.py --inputs 1024 2048 4096 --threads 1

Operations, two for each product and sum: I² T for the Gram of T tokens (half of a product, since it is symmetric),
1/3 I³ for the factor (Cholesky), O I² for the sweep, and O I² for the squares that an error
is relative to (half of a product, again). The rate is that of a product of 2048 x 2048 in float32, measured beside each
run. Medians of `--repeats`; CPU seconds, too, since a machine that others use tells little by the clock. Memory is what
a stage adds to the process at its peak, in units of the Gram (Linux only). O = output rows, I = input columns.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial
from pathlib import Path

import torch

from pipeline.numerics.solve import sweep, upper_factor
from pipeline.numerics.statistics import Gram
from pipeline.sparsity import Budget, NofM, Pattern, Unstructured

PATTERNS: dict[str, Pattern] = {"50 %": Unstructured(Decimal("0.5")), "2:4": NofM(2, 4)}
BLOCK_COLUMNS = 128

Stage = tuple[str, float, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, nargs="+", default=[1024, 2048, 4096], help="columns I of the weights")
    parser.add_argument("--rows", type=float, nargs="+", default=[1.0, 4.0], help="rows O, as multiples of I")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads, {args.tokens} tokens, medians of {args.repeats}\n")
    print("| stage | O | I | seconds | CPU seconds | GFLOP | of the rate | memory |\n|---|---|---|---|---|---|---|---|")
    for num_inputs in args.inputs:
        gram = random_gram(num_inputs, args.tokens)
        print_rows("", num_inputs, stages_of_group(gram, args.tokens), args.repeats)
        for num_outputs in (int(factor * num_inputs) for factor in args.rows):
            print_rows(num_outputs, num_inputs, stages_of_weight(gram, num_outputs), args.repeats)


def random_gram(num_inputs: int, num_tokens: int) -> Gram:
    gram = Gram.zeros(num_inputs, torch.device("cpu"))
    gram.observe(random_inputs(num_inputs, num_tokens))
    return gram


def random_inputs(num_inputs: int, num_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(num_tokens, num_inputs, generator=generator)
    return x_TI + 2 * x_TI.roll(1, dims=1)


def stages_of_group(gram: Gram, num_tokens: int) -> Iterator[Stage]:
    num_inputs = len(gram.sum_I)
    x_TI, other = random_inputs(num_inputs, num_tokens), Gram.zeros(num_inputs, torch.device("cpu"))
    yield "Gram", num_tokens * num_inputs**2, lambda: other.observe(x_TI)
    yield "factor", num_inputs**3 / 3, lambda: upper_factor(gram.sum_II, 0.01)


def stages_of_weight(gram: Gram, num_outputs: int) -> Iterator[Stage]:
    num_inputs = len(gram.sum_I)
    weight_OI = torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(1))
    upper_II, _ = upper_factor(gram.sum_II, 0.01)
    for name, pattern in PATTERNS.items():
        budget = Budget((pattern,), (num_outputs,))
        choose = partial(budget.keep_in_columns, num_columns=num_inputs)
        run = partial(sweep, weight_OI, upper_II, choose, budget.group_size or BLOCK_COLUMNS)
        yield f"sweep {name}", num_outputs * num_inputs**2, run
    yield "squares", num_outputs * num_inputs**2, lambda: gram.squares(weight_OI)


def print_rows(num_outputs: object, num_inputs: int, stages: Iterator[Stage], num_repeats: int) -> None:
    square = torch.randn(2048, 2048)
    for name, operations, run in stages:
        units = peak_bytes(run) / (4 * num_inputs**2)
        walls: list[float] = []
        processors: list[float] = []
        shares: list[float] = []
        for _ in range(num_repeats):
            wall, processor = timed(run)
            rate = 2 * 2048**3 / min(timed(lambda: square @ square)[0] for _ in range(2))
            walls, processors, shares = [*walls, wall], [*processors, processor], [*shares, operations / wall / rate]
        seconds, cpu_seconds, share = map(statistics.median, (walls, processors, shares))
        print(f"| {name} | {num_outputs} | {num_inputs} | {seconds:.3f} | {cpu_seconds:.3f} ", end="")
        print(f"| {operations / 1e9:.1f} | {share:.0%} | {units:.2f} |", flush=True)


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of the processors."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processor


def peak_bytes(run: Callable[[], object]) -> int:
    """What it adds to the resident memory of this process, at most."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    run()
    return resident_bytes("VmHWM") - before


def resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
