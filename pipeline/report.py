"""What came out of a run, from its receipts: the summary that is printed and kept as report.md."""

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.evaluate import Perplexity
from pipeline.files import write_file
from pipeline.job import Job
from pipeline.models.checkpoint import INDEX_NAME
from pipeline.preparation import Prepared
from pipeline.store import Receipt


def read_evaluation(job: Job, prepared: Prepared) -> dict[str, Perplexity] | None:
    """What a finished run measured on the windows asked for; None where anything is still to be done."""
    file, ids_NL = job.directory.evaluation_file, prepared.evaluation_ids_NL
    if not (job.directory.model / INDEX_NAME).exists():
        return None
    if ids_NL is None:
        return {}
    rows = pq.read_table(file).to_pylist() if file.exists() else []
    wanted = [
        row for row in rows if (row["text"], row["window_length"]) == (job.config.evaluation.text, ids_NL.shape[1])
    ]
    measured = {row["model"]: Perplexity(row["nll"], row["num_windows"], row["window_length"]) for row in wanted}
    return measured or None


def write_report(job: Job, perplexities: dict[str, Perplexity]) -> str:
    """Keep the figures of the evaluation and the report; returns the report, in Markdown."""
    if perplexities:
        rows = [
            {
                "model": name,
                "text": job.config.evaluation.text,
                "window_length": measured.window_length,
                "num_windows": measured.num_windows,
                "nll": measured.nll,
                "perplexity": measured.perplexity,
            }
            for name, measured in perplexities.items()
        ]
        job.directory.write_metrics("evaluation", pa.Table.from_pylist(rows))
    report = _render(job, job.directory.receipts(), perplexities)
    write_file(job.directory.path / "report.md", report.encode())
    return report


def _render(job: Job, receipts: list[Receipt], perplexities: dict[str, Perplexity]) -> str:
    pruning, linears = job.config.pruning, [linear for receipt in receipts for linear in receipt.linears]
    num_weights, num_pruned = sum(x.num_weights for x in linears), sum(x.num_pruned for x in linears)
    num_replayed = sum(receipt.num_layers_replayed for receipt in receipts)
    num_attempts = max(receipt.attempt for receipt in receipts)
    lines = [
        f"# {pruning.method.name}, {linears[0].pattern}",
        "",
        f"{num_pruned:,} of {num_weights:,} weights of {len(linears)} linears pruned ({num_pruned / num_weights:.4f}); "
        f"{sum(x.num_zeros_in_source for x in linears):,} were zero in the source.",
        f"{len(receipts)} layers, each committed once, in {num_attempts} attempt{'s' * (num_attempts > 1)}; "
        f"{num_replayed} layers run again after restarts.",
        "",
        "| layer | sparsity | relative error | damping | seconds |",
        "|---|---|---|---|---|",
        *map(_layer_row, receipts),
    ]
    if perplexities:
        lines += ["", f"Perplexity on {job.config.evaluation.text}:", ""]
        lines += ["| model | perplexity | windows |", "|---|---|---|"]
        lines += [
            f"| {name} | {measured.perplexity:.3f} | {measured.num_windows} of {measured.window_length} tokens |"
            for name, measured in perplexities.items()
        ]
    return "\n".join(lines) + "\n"


def _layer_row(receipt: Receipt) -> str:
    num_weights = sum(linear.num_weights for linear in receipt.linears)
    num_pruned = sum(linear.num_pruned for linear in receipt.linears)
    dampings = sorted({linear.damping for linear in receipt.linears if linear.damping is not None})
    return (
        f"| {receipt.layer_index} | {num_pruned / num_weights:.4f} | {receipt.relative_error:.4f} "
        f"| {', '.join(f'{damping:g}' for damping in dampings) or '-'} | {receipt.seconds:.1f} |"
    )
