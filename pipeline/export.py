"""Finish a model: the committed layers already are its shards, so only what surrounds them is written."""

import json

from pipeline.errors import Refusal
from pipeline.files import write_file
from pipeline.job import Job
from pipeline.models.architecture import copied_files
from pipeline.models.checkpoint import INDEX_NAME, open_file
from pipeline.models.skeleton import Skeleton
from pipeline.models.tensor_entry import TensorEntry
from pipeline.models.tensor_file import refuse_non_finite
from pipeline.storage import Location
from pipeline.store import save_tensors


def is_finished(job: Job, source: Location) -> bool:
    """Whether every layer is committed and every file of the model is there, also those copied from the source."""
    directory = job.directory
    return (
        len(directory.receipts()) == job.num_layers
        and (directory.model / INDEX_NAME).exists()
        and (directory.model / directory.outside_name).exists()
        and all(copy.exists() for _, copy in _copies(job, source))
    )


def finish_model(job: Job, skeleton: Skeleton) -> None:
    """Everything outside the layers, then config and tokenizer, then, last, the index."""
    directory, source = job.directory, skeleton.checkpoint
    if is_finished(job, source.path):
        return
    # of workers that were lost while they wrote
    directory.drop_temporaries()
    tensors = source.read(skeleton.outside_keys)
    refuse_non_finite(tensors, "outside the layers")
    save_tensors(tensors, directory.model / directory.outside_name, job.guard.check)
    for file, copy in _copies(job, source.path):
        write_file(copy, file.read_bytes())
    names = [directory.outside_name, *(directory.layer_name(index) for index in range(job.num_layers))]
    entries = _read_entries(directory.model, names)
    _compare(source.entries, entries)
    job.guard.check()
    write_file(directory.model / INDEX_NAME, index_of(entries))


def index_of(entries: dict[str, TensorEntry]) -> bytes:
    """The content of the index of a model with these tensors."""
    index = {
        "metadata": {"total_size": sum(entry.num_bytes for entry in entries.values())},
        "weight_map": {key: entries[key].file for key in sorted(entries)},
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def _copies(job: Job, source: Location) -> list[tuple[Location, Location]]:
    """The files that the model carries over, each with its place in the finished model."""
    return [(source / name, job.directory.model / name) for name in copied_files(source)]


def _read_entries(folder: Location, names: list[str]) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for name in names:
        for key, entry in open_file(folder / name).entries.items():
            if key in entries:
                raise Refusal(f"tensor {key}: is in both {entries[key].file} and {name}; start again elsewhere")
            entries[key] = entry
    return entries


def _compare(source: dict[str, TensorEntry], finished: dict[str, TensorEntry]) -> None:
    """The finished model has the source's tensors, no more and no fewer, in the same shapes and dtypes."""
    for key in source.keys() | finished.keys():
        if key not in source or key not in finished:
            raise Refusal(f"tensor {key}: is only in the {'pruned model' if key in finished else 'source'}; start over")
        before, after = source[key], finished[key]
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            raise Refusal(f"tensor {key}: changed from {before.shape} {before.dtype} to {after.shape} {after.dtype}")
