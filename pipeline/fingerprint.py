"""The fingerprint of a run: the same fingerprint means the same bytes, on one kind of machine."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from pipeline.calibration.generation import Generation
from pipeline.config import RunConfig
from pipeline.job import Resolved
from pipeline.sparsity import Unstructured

WINDOWS = "calibration windows"
MICRO_BATCH = "runtime.micro_batch_tokens (in windows)"


def identify(
    config: RunConfig,
    resolved: Resolved,
    header_digest: str,
    source_files: dict[str, Any],
    generations: Sequence[Generation],
) -> dict[str, Any]:
    """Everything that the bytes of the pruned model depend on, flat, by the names that users know.

    The digest of the windows is added under WINDOWS once they are known; what generated texts depend on is told before,
    so that a changed setting shows before hours are spent on it.

    Output, evaluation, address, number of workers and, unless the propagation is `shard`, of shards are left out: a run
    may go on with others.
    """
    pruning = config.pruning.model_dump(mode="json", exclude={"granularity"})
    target = config.pruning.target
    pruning["sparsity"] = float(target.fraction) if isinstance(target, Unstructured) else "that of the pattern"
    return {
        "calibration.num_windows": config.calibration.num_windows,
        "calibration.window_length": config.calibration.window_length,
        "model (config and tensors)": header_digest,
        **{f"model file {name}": content for name, content in content_ids(source_files).items()},
        **{
            f"calibration.source{f' {index}' * (len(generations) > 1)}.{name}": value
            for index, generation in enumerate(generations)
            for name, value in _flat_generation(generation).items()
        },
        "model.dtype": resolved.dtype,
        **_flatten("pruning", pruning),
        **({"cluster.num_shards": config.cluster.num_shards} if config.pruning.propagation == "shard" else {}),
        "pruning.granularity": resolved.granularity,
        "runtime.device": resolved.device,
        "runtime.threads": resolved.threads,
        MICRO_BATCH: resolved.windows_per_micro_batch,
        "cluster.num_replicas": resolved.num_replicas,
    }


def content_ids(source_files: dict[str, Any]) -> dict[str, str]:
    """What tells the content of each file: its sha256, or on an object store its size and ETag."""
    return {
        name: known["sha256"] if "sha256" in known else f"{known['num_bytes']} bytes, ETag {known['etag']}"
        for name, known in source_files.items()
    }


def with_allocation(identity: dict[str, Any], measured: Sequence[float]) -> dict[str, Any]:
    """With what the allocation measured of every layer, if it did."""
    return {**identity, "pruning.allocation (measured)": list(measured)} if measured else identity


def digest(identity: dict[str, Any]) -> str:
    """sha256 of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def difference(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    """In which settings two identities differ, empty if in none; windows that are not known yet differ from none."""
    known = {name: earlier[name] for name in earlier if name != WINDOWS or name in now}
    names = [name for name in {**known, **now} if known.get(name) != now.get(name)]
    return ", ".join(f"{name} was {_shown(earlier.get(name))}, now {_shown(now.get(name))}" for name in names)


def _flat_generation(generation: Generation) -> dict[str, Any]:
    """What only the generated texts depend on, and which of them are kept."""
    identity, source = generation.store.identity, generation.source
    written = {name: identity[name] for name in ("prompts", "sampling", "seed", "batch_size", "threads", "engine")}
    chosen = {"num_texts": source.num_texts, "filter": source.filter.model_dump(mode="json")}
    flat = [_flatten(name, value) for name, value in {**written, **chosen}.items()]
    return {name: value for part in flat for name, value in part.items()}


def _flatten(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: leaf for name, inner in value.items() for key, leaf in _flatten(f"{prefix}.{name}", inner).items()}


def _shown(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)
