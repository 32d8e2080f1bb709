"""Tensors put into modules, whatever device they were on."""

from typing import Any

import torch
from torch import Tensor, nn


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in place of a parameter or buffer, whatever device that was on."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def buffers_to(module: Any, device: torch.device) -> Any:
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            owner._buffers[name] = buffer.to(device)
    return module
