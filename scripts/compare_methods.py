"""Perplexity of the quickstart model after each method, at several sparsities, over calibration seeds.

    python scripts/compare_methods.py --seeds 3

Runs `shardprune run` in one process for every combination, reads what it measured, and prints a Markdown table of mean
and, behind it, the spread over seeds (highest - lowest). Finished runs below --out are not run again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

METHODS = ["magnitude", "wanda", "sparsegpt"]
TARGETS = {
    "50 %": ["pruning.sparsity=0.5"],
    "60 %": ["pruning.sparsity=0.6"],
    "70 %": ["pruning.sparsity=0.7"],
    "2:4": ["pruning.sparsity=null", "pruning.pattern='2:4'"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart/run.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="settings, as for shardprune run")
    arguments = parser.parse_args()
    print(f"| method | {' | '.join(TARGETS)} |\n|---|{'---|' * len(TARGETS)}")
    dense = set()
    for method in METHODS:
        cells = []
        for target, overrides in TARGETS.items():
            # magnitude looks at no data, so that seeds say nothing
            seeds = range(1 if method == "magnitude" else arguments.seeds)
            measured = [
                run(
                    arguments.config,
                    arguments.out / f"{method}-{target.replace(' %', '').replace(':', '-')}-seed-{seed}",
                    f"pruning.method.name={method}",
                    f"calibration.seed={seed}",
                    *overrides,
                    *arguments.overrides,
                )
                for seed in seeds
            ]
            dense |= {round(each["dense"], 2) for each in measured}
            pruned = [each["pruned"] for each in measured]
            spread = f" ± {max(pruned) - min(pruned):.2f}" if len(pruned) > 1 else ""
            cells.append(f"{sum(pruned) / len(pruned):.2f}{spread}")
        print(f"| {method} | {' | '.join(cells)} |", flush=True)
    print(f"\ndense: {', '.join(map(str, sorted(dense)))}")


def run(config: str, out: Path, *overrides: str) -> dict[str, float]:
    """Perplexity of the dense and of the pruned model."""
    shardprune = Path(sys.executable).parent / "shardprune"
    command = [shardprune, "run", config, "cluster.address=none", "cluster.num_shards=auto", f"output.path={out}"]
    result = subprocess.run([*command, *overrides], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{out}: {result.stderr}")
    return {
        row["model"]: row["perplexity"] for row in pq.read_table(out / "metrics" / "evaluation.parquet").to_pylist()
    }


if __name__ == "__main__":
    main()
