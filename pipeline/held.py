"""How much memory a forward of a layer holds while it stands before a group of linears."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.groups import Group
from pipeline.models.outside import Call
from pipeline.models.skeleton import Linear, LoadedLayer
from pipeline.observe import run_hooked


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, every operation's new memory is noted; views and what is written in place make none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_bytes: dict[Any, int] = {}

    @property
    def bytes_in_use(self) -> int:
        """Of what has been made so far, what has not been freed."""
        return sum(size for storage, size in self._num_bytes.items() if not storage.expired())

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage for storage, _ in _storages((args, kwargs))}
        result = operation(*args, **(kwargs or {}))
        self._num_bytes.update((storage, size) for storage, size in _storages(result) if storage not in given)
        return result


class Held:
    """What the forwards of layers hold. Layers with the same linears hold the same, so only the first is measured."""

    def __init__(self) -> None:
        self._measured: dict[tuple[Linear, ...], list[int]] = {}

    def before(self, layer: LoadedLayer, groups: list[Group], hidden: Tensor, call: Call) -> list[int]:
        """Of each group, the bytes that a forward of some hidden states holds when it comes to the group."""
        linears = tuple(replace(linear, key="", bias_key=None) for group in groups for linear in group.linears)
        if linears not in self._measured:
            self._measured[linears] = measure_held(layer, groups, hidden, call)
        return self._measured[linears]


def measure_held(layer: LoadedLayer, groups: list[Group], hidden: Tensor, call: Call) -> list[int]:
    """Of each group, the bytes that a forward has made and still needs when it comes to the group.

    It is a forward for nothing else: operations that are watched need not round as they do otherwise.
    """
    num_bytes = [0] * len(groups)
    made = _Made()

    def hook(position: int) -> Any:
        def on_call(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            num_bytes[position] = made.bytes_in_use

        return on_call

    with torch.no_grad(), made:
        run_hooked(layer, hidden, call, {group.linears[0].name: hook(at) for at, group in enumerate(groups)})
    return num_bytes


def _storages(values: Any) -> list[tuple[Any, int]]:
    """A weak reference to the memory of every tensor among some values, with its size."""
    weakly: Any = StorageWeakRef
    storages = [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]
    return [(weakly(storage), storage.nbytes()) for storage in storages]
