"""Measures the stages of a solve: the Gram, its factor, the sweep and the error, each against this machine's own rate.

    python scripts/measure_solve.py --inputs 1024 2048 4096 --threads 1

Necessary operations, two for each product and sum: I²T for the Gram of T tokens (half of a product, since it is
symmetric), 2/3 I³ for the factor (Cholesky and a triangular inverse), O I² for the sweep, 2 O I² for the error (two
quadratic forms, half of each). The rate they are held against is that of a matrix product of 2048³ in float32,
measured between them. Medians of `--repeats`. O = output rows, I = input columns, T = tokens.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from decimal import Decimal

import torch

from pipeline.methods.sparsegpt import SparseGPT
from pipeline.numerics.solve import upper_factor
from pipeline.numerics.statistics import Gram
from pipeline.sparsity import Budget, NofM, Pattern, Unstructured

PATTERNS: dict[str, Pattern] = {"50 %": Unstructured(Decimal("0.5")), "2:4": NofM(2, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, nargs="+", default=[1024, 2048, 4096], help="columns I of the weights")
    parser.add_argument("--rows", type=float, nargs="+", default=[1.0, 4.0], help="rows O, as multiples of I")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        return print(factor_memory(args.memory_of))
    print(f"{args.threads} thread(s), medians of {args.repeats}, {args.tokens} tokens\n")
    print("| stage | O | I | seconds | GFLOP | of the rate of a product |\n|---|---|---|---|---|---|")
    for num_inputs in args.inputs:
        measure(num_inputs, [int(factor * num_inputs) for factor in args.rows], args.tokens, args.repeats)
    print("\n| I | memory of the factor beside the Gram, in units of I² floats |\n|---|---|")
    for num_inputs in args.inputs:
        command = [sys.executable, __file__, "--memory-of", str(num_inputs), "--threads", str(args.threads)]
        print(f"| {num_inputs} | {float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout):.2f} |")


def measure(num_inputs: int, rows: list[int], num_tokens: int, repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(num_tokens, num_inputs, generator=generator)
    x_TI += 2 * x_TI[:, torch.randperm(num_inputs, generator=generator)]
    gram = Gram.zeros(num_inputs, torch.device("cpu"))
    row("Gram", "", num_inputs, num_inputs**2 * num_tokens, repeats, lambda: gram.observe(x_TI))
    row("factor", "", num_inputs, 2 / 3 * num_inputs**3, repeats, lambda: upper_factor(gram.sum_II, 0.01))
    for num_outputs in rows:
        weight_OI = torch.randn(num_outputs, num_inputs, generator=generator)
        operations = num_outputs * num_inputs**2
        for name, pattern in PATTERNS.items():
            budget = Budget((pattern,), (num_outputs,))
            factor = upper_factor(gram.sum_II, 0.01)
            method = SparseGPT()
            row(
                f"sweep {name}",
                num_outputs,
                num_inputs,
                operations,
                repeats,
                lambda: method.sweep(weight_OI, gram, budget, factor),
            )
        pruned_OI = weight_OI / 2
        row(
            "error",
            num_outputs,
            num_inputs,
            2 * operations,
            repeats,
            lambda: gram.relative_error(weight_OI, pruned_OI),
        )


def row(
    stage: str, num_outputs: object, num_inputs: int, operations: float, repeats: int, run: Callable[[], object]
) -> None:
    square = torch.randn(2048, 2048)
    run()
    seconds, shares = [], []
    for _ in range(repeats):
        seconds.append(timed(run))
        rate = 2 * 2048**3 / min(timed(lambda: square @ square) for _ in range(2))
        shares.append(operations / seconds[-1] / rate)
    median, share = statistics.median(seconds), statistics.median(shares)
    print(f"| {stage} | {num_outputs} | {num_inputs} | {median:.3f} | {operations / 1e9:.1f} | {share:.0%} |", flush=True)


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def factor_memory(num_inputs: int) -> float:
    """What a factorisation adds to the peak memory of a process that holds the Gram, in units of the Gram."""
    upper_factor(torch.eye(256), 0.01)
    gram_II = torch.eye(num_inputs)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    upper_factor(gram_II, 0.01)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / gram_II.nbytes


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
