"""The bytes that a run writes, before it does; and whether there is room for them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from pipeline.activations import Room
from pipeline.config import RunConfig
from pipeline.errors import Incomplete
from pipeline.export import index_of
from pipeline.job import segments_of
from pipeline.models.architecture import copied_files
from pipeline.models.checkpoint import INDEX_NAME
from pipeline.models.skeleton import Skeleton
from pipeline.models.tensor_entry import TensorEntry
from pipeline.planning.cost import activation_bytes
from pipeline.segments import Segment
from pipeline.storage import Location, status
from pipeline.store import RunDirectory

# safetensors puts tensors of wider numbers first
_WIDTHS = ("F64", "I64", "U64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "I8", "U8", "BOOL")
_NPY_HEADER_BYTES = 128
# of a receipt and of its row in the metrics, for each linear: about what they have
_RECEIPT_BYTES, _RECEIPT_BYTES_PER_LINEAR = 4_200, 400


def model_files(skeleton: Skeleton) -> dict[str, int]:
    """The exact size of every file of the finished model by its name."""
    source = skeleton.checkpoint
    directory = RunDirectory(Path(), skeleton.num_layers)
    keys = {directory.outside_name: skeleton.outside_keys}
    keys.update({directory.layer_name(index): each for index, each in enumerate(skeleton.layer_keys)})
    sizes = {name: _safetensors_bytes({key: source.entries[key] for key in each}) for name, each in keys.items()}
    placed = {key: replace(source.entries[key], file=name) for name, each in keys.items() for key in each}
    sizes[INDEX_NAME] = len(index_of(placed))
    return {**sizes, **{str(name): status(source.path / name).num_bytes for name in copied_files(source.path)}}


def entry_bytes(num_tokens: int, hidden_size: int, itemsize: int, num_parts: int) -> int:
    """Of the kept input of a layer, in so many files."""
    return activation_bytes(num_tokens, hidden_size, itemsize) + num_parts * _NPY_HEADER_BYTES


def receipt_bytes(num_linears: int) -> int:
    """About what a layer's receipt and metrics have."""
    return _RECEIPT_BYTES + _RECEIPT_BYTES_PER_LINEAR * num_linears


def num_entries_at_once(segments: list[Segment], keep_entry_every: int) -> int:
    """The most kept inputs that there may be: a newer one is written before an older one goes."""
    num_within = sum(2 for segment in segments if segment.stop - segment.first > keep_entry_every)
    num_dense = 0 if len(segments) == 1 else 2 + sum(segment.stop - segment.first > 1 for segment in segments)
    return num_within + num_dense


def check_room(config: RunConfig, num_replicas: int, skeleton: Skeleton) -> None:
    """Raises Incomplete where the disk has no room for twice the model and the activations; a bucket always has.

    It is no refusal: room may be made. Twice, because a model that is to be of use is copied or packed, and a disk that
    others fill up stops a run in its last layer; a source that lies on the same disk is one of the two. The disks of
    workers elsewhere are not to be seen from here.
    """
    hidden_bytes, entries_bytes = 0, 0
    if config.pruning.method.statistic.needs_inputs:
        num_tokens = config.calibration.num_windows * config.calibration.window_length
        sizes = num_tokens, skeleton.hidden_size, skeleton.dtype.itemsize
        num_entries = num_entries_at_once(segments_of(config, skeleton.num_layers), config.output.keep_entry_every)
        hidden_bytes, entries_bytes = activation_bytes(*sizes), num_entries * entry_bytes(*sizes, num_replicas)
    output = config.output.folder
    needed: list[tuple[Path, str, int]] = []
    if isinstance(output, Path):
        once = sum(model_files(skeleton).values())
        beside_source = _is_on_disk_of(skeleton.checkpoint.path, output)
        needed.append((output, "the model" if beside_source else "twice the model", once * (2 - beside_source)))
        needed.append((output, "kept inputs of layers", entries_bytes))
    if config.cluster.address == "none":
        room = Room.of(config.runtime, output / "activations")
        if hidden_bytes > room.ram_bytes:
            needed.append((room.spill_folder, "hidden states beyond runtime.ram_bytes", hidden_bytes))
    _check_free(needed)


def _check_free(needed: list[tuple[Path, str, int]]) -> None:
    by_device: dict[int, list[tuple[Path, str, int]]] = {}
    for each in needed:
        by_device.setdefault(_existing(each[0]).stat().st_dev, []).append(each)
    for parts in by_device.values():
        folder, asked = parts[0][0], sum(size for _, _, size in parts)
        disk = shutil.disk_usage(_existing(folder))
        # what has no size is no disk, and writing to it tells
        if disk.total and asked > disk.free:
            listed = ", ".join(f"{_gigabytes(size)} for {what}" for _, what, size in parts if size)
            raise Incomplete(
                f"{folder}: {_gigabytes(asked)} of disk are needed ({listed}) and {_gigabytes(disk.free)} are free; "
                f"make room for {_gigabytes(asked - disk.free)} more and run again, or give another path"
            )


def _is_on_disk_of(source: Location, output: Path) -> bool:
    return isinstance(source, Path) and source.stat().st_dev == _existing(output).stat().st_dev


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _safetensors_bytes(entries: dict[str, TensorEntry]) -> int:
    """Of a file: 8 bytes, a header that is filled up to a multiple of 8, and the tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, entry in sorted(entries.items(), key=_place):
        offsets = [start, start + entry.num_bytes]
        header[key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        start = offsets[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + start


def _place(named: tuple[str, TensorEntry]) -> tuple[int, str]:
    key, entry = named
    return _WIDTHS.index(entry.dtype) if entry.dtype in _WIDTHS else len(_WIDTHS), key
