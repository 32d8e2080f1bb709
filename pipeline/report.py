"""What came out of a run, from its receipts: the summary that is printed and kept as report.md."""

from dataclasses import asdict, fields

import pyarrow as pa

from pipeline.calibration.summary import PLOT_NAME, summarize
from pipeline.calibration.windows import digest_ids
from pipeline.evaluate import Perplexity
from pipeline.export import is_finished
from pipeline.files import read_table, write_file
from pipeline.job import Job
from pipeline.preparation import Prepared
from pipeline.store import Receipt


def read_evaluation(job: Job, prepared: Prepared) -> dict[str, Perplexity] | None:
    """What a finished run measured on the windows asked for; None where anything is still to be done."""
    file, ids_NL = job.directory.evaluation_file, prepared.evaluation_ids_NL
    if not is_finished(job, job.source):
        return None
    if ids_NL is None:
        return {}
    try:
        rows = read_table(file).to_pylist() if file.exists() else []
    except (pa.ArrowException, OSError):
        return None
    names = [field.name for field in fields(Perplexity)]
    measured = {row["model"]: Perplexity(**{name: row[name] for name in names}) for row in rows}
    is_current = all(each.windows_digest == digest_ids(ids_NL) for each in measured.values())
    return measured if measured and is_current else None


def write_report(job: Job, prepared: Prepared, perplexities: dict[str, Perplexity]) -> str:
    """Keep the figures of the evaluation and the report; returns the report, in Markdown."""
    if perplexities:
        rows = [
            {"model": name, "perplexity": measured.perplexity, **asdict(measured)}
            for name, measured in perplexities.items()
        ]
        job.directory.write_metrics("evaluation", pa.Table.from_pylist(rows), job.guard)
    report = _render(job, job.directory.receipts(), perplexities) + _render_calibration(prepared)
    write_file(job.directory.report_file, report.encode())
    return report


def _render(job: Job, receipts: list[Receipt], perplexities: dict[str, Perplexity]) -> str:
    pruning, linears = job.config.pruning, [linear for receipt in receipts for linear in receipt.linears]
    num_weights, num_pruned = sum(x.num_weights for x in linears), sum(x.num_pruned for x in linears)
    num_replayed = sum(receipt.num_layers_replayed for receipt in receipts)
    num_attempts = max(receipt.attempt for receipt in receipts)
    allocated = ""
    if pruning.allocation.statistic is not None:
        name, is_same = pruning.allocation.name, {linear.pattern for linear in linears} == {str(pruning.target)}
        allocated = f", by {name} the same in all layers" if is_same else f", shared out by {name}"
    permuted = " with channels reordered" if pruning.permute else ""
    lines = [
        f"# {pruning.method.name}, {pruning.target}{permuted}{allocated}",
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


def _render_calibration(prepared: Prepared) -> str:
    assert prepared.windows is not None
    summary = f"\n## Calibration\n\n{summarize(prepared.calibration, prepared.windows)}"
    if not prepared.calibration.generations:
        return summary
    return f"{summary}\n![perplexity of the generated texts](calibration/{PLOT_NAME})\n"


def _layer_row(receipt: Receipt) -> str:
    num_weights = sum(linear.num_weights for linear in receipt.linears)
    num_pruned = sum(linear.num_pruned for linear in receipt.linears)
    dampings = sorted({linear.damping for linear in receipt.linears if linear.damping is not None})
    return (
        f"| {receipt.layer_index} | {num_pruned / max(num_weights, 1):.4f} | {receipt.relative_error:.4f} "
        f"| {', '.join(f'{damping:g}' for damping in dampings) or '-'} | {receipt.seconds:.1f} |"
    )
