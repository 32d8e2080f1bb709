"""What came out of the calibration stage: files for the run directory, and a summary with a plot for the report."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.calibration.filters import repetition
from pipeline.calibration.generation import Generation
from pipeline.calibration.plan import Calibration
from pipeline.calibration.windows import Windows
from pipeline.files import write_table, written_whole
from pipeline.storage import Location

PLOT_NAME = "perplexity.png"
_QUANTILES = (0, 0.1, 0.5, 0.8, 0.9, 1)
_OVERLAP_LENGTHS = (2, 4, 8)


def write_calibration(calibration: Calibration, windows: Windows, folder: Location) -> None:
    """Windows, rows and the plot."""
    (folder / PLOT_NAME).unlink(missing_ok=True)
    for generation in calibration.generations:
        generation.store.write_table(generation.rows, generation.reasons)
    if calibration.generations:
        _plot(calibration.generations, folder / PLOT_NAME)
    write_table(windows.to_table(calibration.settings.seed), folder / "windows.parquet")


def summarize(calibration: Calibration, windows: Windows) -> str:
    """The summary in Markdown."""
    num_windows, window_length = windows.ids_NL.shape
    counts = ", ".join(f"{count} from {origin}" for origin, count in Counter(windows.sources).items())
    lines = [f"{num_windows} windows of {window_length} tokens: {counts}"]
    for generation in calibration.generations:
        lines += ["", *_describe(generation)]
    return "\n".join(lines) + "\n"


def overlap(texts: Iterable[NDArray[np.int32]], corpus: Iterable[NDArray[np.int32]], length: int) -> float:
    """The share of the texts' n-grams of tokens that occur in a corpus."""
    grams = np.concatenate([np.empty(0, np.uint64), *(_grams(text, length) for text in texts)])
    distinct, counts = np.unique(grams, return_counts=True)
    if not len(distinct):
        return 0.0
    is_known = np.zeros(len(distinct), bool)
    # text by text: a corpus has many more n-grams than what was generated
    for text in corpus:
        known = _grams(text, length)
        places = np.minimum(np.searchsorted(distinct, known), len(distinct) - 1)
        is_known[places[distinct[places] == known]] = True
    return float(counts[is_known].sum() / counts.sum())


def _describe(generation: Generation) -> list[str]:
    source, rows, reasons = generation.source, generation.rows, generation.reasons
    kept = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
    dropped = Counter(reason for reason in reasons if reason is not None)
    why = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common()) or "none dropped"
    continuations = [row.token_ids[row.num_prompt_tokens :] for row in kept]
    # the highest float in place of infinity, between which and others there is no quantile
    measured = np.nan_to_num([row.perplexity for row in rows])
    lines = [
        f"| selfgen ({source.preset}) | |",
        "|---|---|",
        f"| texts | {len(rows)}, of which {len(kept)} kept ({why}) |",
        f"| tokens | {sum(len(row.token_ids) for row in rows)}, kept {sum(len(row.token_ids) for row in kept)} |",
        f"| ended by the model | {sum(row.ended for row in rows) / len(rows):.1%} of the texts |",
        *(f"| perplexity, {share:.0%} quantile | {np.quantile(measured, share):.2f} |" for share in _QUANTILES),
        f"| repeated 4-grams, mean of kept texts | {np.mean([repetition(ids) for ids in continuations]):.1%} |",
    ]
    return lines + _describe_corpus(generation, continuations)


def _describe_corpus(generation: Generation, continuations: Sequence[NDArray[np.int32]]) -> list[str]:
    """What was taken from the seed corpus, and how much of it came back; nothing where there is none."""
    corpus = [ids_T.numpy() for documents in generation.corpora for ids_T in documents]
    if not corpus:
        return []
    num_prompts, num_tokens = sum(map(len, generation.prompts.corpora)), generation.source.prompt_tokens
    lines = [f"| prompts | the first {num_tokens} tokens of {num_prompts} texts of {len(corpus)} that have as many |"]
    for length in _OVERLAP_LENGTHS:
        share = overlap(continuations, corpus, length)
        lines.append(f"| {length}-grams that are in the seed corpus | {share:.1%} |")
    return lines


def _grams(text: NDArray[np.int32], length: int) -> NDArray[np.uint64]:
    """A 64-bit hash of every n-gram of a text."""
    ids = text.astype(np.uint64)
    value = np.zeros(max(0, len(ids) - length + 1), np.uint64)
    for offset in range(length):
        value = (value ^ ids[offset : offset + len(value)]) * np.uint64(0x9E3779B97F4A7C15)
        value ^= value >> np.uint64(29)
    return value


def _plot(generations: Sequence[Generation], file: Location) -> None:
    """How likely the model finds its texts, kept and dropped."""
    # a large library that nothing else needs
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6 * len(generations) + 0.6), layout="constrained")
    for axes, generation in zip(np.ravel(figure.subplots(len(generations))), generations, strict=True):
        measured = np.log10([max(row.perplexity, 1.0) for row in generation.rows])
        finite = np.isfinite(measured)
        bins = np.histogram_bin_edges(measured[finite], 40)
        is_kept = np.array([reason is None for reason in generation.reasons])
        for label, chosen, color in (("kept", is_kept, "#2a6f97"), ("dropped", ~is_kept, "#e07a5f")):
            axes.hist(measured[finite & chosen], bins, label=f"{label} ({chosen.sum()})", color=color, alpha=0.85)
        ticks = axes.get_xticks()
        axes.set_xticks(ticks, [f"{10**tick:.3g}" if tick < 300 else f"1e{tick:g}" for tick in ticks])
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="perplexity of a text under the model that wrote it", ylabel="texts")
        axes.legend(frameon=False)
    with written_whole(file) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
