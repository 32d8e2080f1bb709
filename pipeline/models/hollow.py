"""A checkpoint of which only config.json is at hand: its tensors as transformers would save them, without numbers."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from pipeline.errors import Refusal
from pipeline.models.architecture import build_empty_model
from pipeline.models.checkpoint import Checkpoint, find_folder, has_weights, open_checkpoint
from pipeline.models.tensor_entry import TensorEntry

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_NOWHERE = "not here"


def open_or_imagine(path: str, revision: str | None, trust_remote_code: bool) -> Checkpoint:
    """The checkpoint in a folder or below a URL, or the tensors that its config.json alone tells of.

    Of a model id on the hub only config.json is fetched. Raises Refusal as `open_checkpoint` does, and where
    config.json says no dtype that models are stored in.
    """
    folder = find_folder(path, revision, allow_patterns=["config.json", "*.py"])
    if has_weights(folder):
        return open_checkpoint(path, revision)
    if not (folder / "config.json").is_file():
        raise Refusal(f"model.path = {path}: has no config.json; give a Hugging Face model folder")
    config = Checkpoint(folder, {})
    dtype = _stored_dtype(config)
    return Checkpoint(folder, dict(_entries(build_empty_model(config, dtype, trust_remote_code))))


def is_imagined(checkpoint: Checkpoint) -> bool:
    """Whether there is nothing to be read of it."""
    return checkpoint.files == [_NOWHERE]


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What config.json says under `dtype`, in older ones `torch_dtype`; without either it is float32."""
    config = checkpoint.config
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or dtype not in _NAMES:
        known = ", ".join(str(each).removeprefix("torch.") for each in _NAMES)
        raise Refusal(f"model {checkpoint.path}: config.json says dtype {name!r}; must be one of {known}")
    return dtype


def _entries(model: Any) -> Iterator[tuple[str, TensorEntry]]:
    """Every tensor once, by the key that it is saved under: of those that are tied, the first is."""
    by_identity: dict[int, tuple[str, Any]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_identity.setdefault(id(tensor), (name, tensor))
    for key, tensor in revert_weight_conversion(model, dict(by_identity.values())).items():
        num_bytes = tensor.numel() * tensor.element_size()
        yield key, TensorEntry(_NOWHERE, tuple(tensor.shape), _NAMES[tensor.dtype], num_bytes, 0)
