"""Everything of a model that is not a decoder layer, run by the model's own forward with its layers replaced.

B = windows in a micro-batch, L = tokens in a window, H = hidden size, V = vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import Refusal


@dataclass(frozen=True)
class Call:
    """The arguments that a layer gets beside the hidden state; `positional` says how it gets the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    positional: bool

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, "Call"]:
        """The hidden state and the rest."""
        if args:
            return args[0], cls(args[1:], kwargs, True)
        rest = dict(kwargs)
        return rest.pop("hidden_states"), cls((), rest, False)

    def apply(self, layer: Any, hidden_BLH: Tensor) -> Tensor:
        """The output [B, L, H] of a layer for this call."""
        output = (
            layer(hidden_BLH, *self.args, **self.kwargs)
            if self.positional
            else layer(hidden_states=hidden_BLH, **self.kwargs)
        )
        result = output[0] if isinstance(output, tuple) else output
        assert isinstance(result, Tensor)
        return result

    def same_as(self, other: "Call") -> bool:
        return _same((self.args, self.kwargs), (other.args, other.kwargs))


class _Stop(Exception):
    """Ends a forward whose rest is not needed."""


class _WrongReply(Exception):
    """The model takes another reply from its layers than it got."""


class Outside:
    """A model whose layers only record or reply; the outside may be real or hollow (zeros that take no memory)."""

    def __init__(self, model: Any, layers: Any) -> None:
        self._model, self._layers = model, layers
        self._wrap: Callable[[Tensor], Any] = _plain

    def record(self, ids_BL: Tensor) -> tuple[Tensor, list[Call]]:
        """The input of the first layer [B, L, H] and the call of every layer."""
        try:
            return self._record(ids_BL)
        except _WrongReply:
            self._wrap = _in_tuple
            return self._record(ids_BL)

    def logits(self, ids_BL: Tensor, hidden_BLH: Tensor) -> Tensor:
        """The logits [B, L, V] for the output of the last layer."""
        logits = self._logits(ids_BL, hidden_BLH)
        if logits.shape[:2] != ids_BL.shape:
            self._wrap = _in_tuple
            logits = self._logits(ids_BL, hidden_BLH)
        assert logits.shape[:2] == ids_BL.shape
        return logits

    def _logits(self, ids_BL: Tensor, hidden_BLH: Tensor) -> Tensor:
        with self._replaced_layers(lambda *args, **kwargs: self._wrap(hidden_BLH)):
            logits = self._model(input_ids=ids_BL, use_cache=False).logits
        assert isinstance(logits, Tensor)
        return logits

    def _record(self, ids_BL: Tensor) -> tuple[Tensor, list[Call]]:
        entries: list[Tensor] = []
        calls: list[Call] = []

        def recorder(*args: Any, **kwargs: Any) -> Any:
            hidden, call = Call.split(args, kwargs)
            if entries and hidden.shape != entries[0].shape:
                raise _WrongReply
            entries.append(hidden)
            calls.append(call)
            if len(calls) == len(self._layers):
                raise _Stop
            return self._wrap(hidden)

        with self._replaced_layers(recorder):
            try:
                self._model(input_ids=ids_BL, use_cache=False)
            except _Stop:
                return entries[0], calls
        name = type(self._model).__name__
        raise Refusal(f"model {name}: its forward does not run each of its layers once; it is not supported")

    @contextmanager
    def _replaced_layers(self, forward: Callable[..., Any]) -> Iterator[None]:
        for layer in self._layers:
            layer.forward = forward
        try:
            with torch.no_grad():
                yield
        finally:
            for layer in self._layers:
                del layer.forward


def _plain(hidden: Tensor) -> Tensor:
    return hidden


def _in_tuple(hidden: Tensor) -> tuple[Tensor]:
    """For models that expect a tuple from a layer: of a tensor they would take the first window."""
    return (hidden,)


def _same(left: Any, right: Any) -> bool:
    """Whether two arguments agree; caches, configs and the like count as equal when they are of one type."""
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right) if isinstance(left, str | int | float | bool) else True
