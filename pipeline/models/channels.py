"""Which channels inside a decoder layer may change places without changing what the layer computes.

S = rows that write one channel (gate and up: 2), B = blocks within which channels may change places, C = channels of a
block, Q = heads that read a block, O = output rows, I = input columns.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.errors import Refusal
from pipeline.models.skeleton import Linear, LoadedLayer, Skeleton
from pipeline.sparsity import NofM

# What writes the hidden units of an MLP, and what reads them. In between every unit is by itself.
_MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("fc1",), "fc2"),
    (("fc_in",), "fc_out"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
# What writes the values of the heads, what reads them, and where the writer has them: in all rows, in its last rows
# after all queries and keys, or at the end of the rows of each key-value head.
_ATTENTIONS = (
    ("v_proj", "o_proj", "all"),
    ("v_proj", "out_proj", "all"),
    ("v_proj", "dense", "all"),
    ("qkv_proj", "o_proj", "last"),
    ("c_attn", "c_proj", "last"),
    ("query_key_value", "dense", "last of each"),
)


@dataclass(frozen=True)
class Channels:
    """The input columns of `reader`, [B, Q, C], and the rows of each of the `writers`, [S, B, C], that make them."""

    reader: Linear
    writers: tuple[tuple[Linear, Tensor], ...]
    num_blocks: int
    num_heads: int = 1

    @property
    def block_size(self) -> int:
        return self.reader.num_inputs // (self.num_blocks * self.num_heads)

    def scores_of_block(self, score_OI: Tensor, block: int) -> Tensor:
        """The scores [O x Q, C] that the reader has for the channels of a block."""
        return score_OI.view(-1, self.num_blocks, self.num_heads, self.block_size)[:, block].flatten(0, 1)

    def columns(self, order_BC: Tensor) -> Tensor:
        """The order of the columns of the reader [I] in which each block has its channels in an order of its own."""
        column_BQC = torch.arange(self.reader.num_inputs).view(self.num_blocks, self.num_heads, -1)
        return column_BQC.gather(2, order_BC[:, None].expand_as(column_BQC)).flatten()

    def reorder(self, layer: LoadedLayer, order_BC: Tensor) -> None:
        """Give the channels of each block another order, in the reader and in all that writes them."""
        column_I = self.columns(order_BC)
        _take(layer, self.reader.key, f"{self.reader.name}.weight", int(not self.reader.transposed), column_I)
        for writer, row_SBC in self.writers:
            row_O = torch.arange(writer.num_outputs)
            row_O[row_SBC.flatten()] = row_SBC.gather(2, order_BC.expand_as(row_SBC)).flatten()
            _take(layer, writer.key, f"{writer.name}.weight", int(writer.transposed), row_O)
            if writer.bias_key is not None:
                _take(layer, writer.bias_key, f"{writer.name}.bias", 0, row_O)


def check_groups(skeleton: Skeleton, pattern: NofM, permute: bool) -> None:
    """Raises Refusal where the columns of a model do not fall into groups of M, or none of them can be reordered."""
    found = False
    for layer_index in range(skeleton.num_layers):
        linears = skeleton.linears(layer_index)
        for linear in linears:
            if linear.num_inputs % pattern.m:
                raise Refusal(
                    f"pruning.pattern = {pattern}: tensor {linear.key} has {linear.num_inputs} input columns, "
                    f"not a multiple of {pattern.m}; choose an M that divides it"
                )
        found |= bool(find_channels(skeleton.layers[layer_index], linears, pattern.m))
    if permute and not found:
        raise Refusal(
            f"pruning.permute = true: no channels of model {type(skeleton.model).__name__} are known that may change "
            f"places between groups of {pattern.m}; leave it out"
        )


def find_channels(module: nn.Module, linears: list[Linear], group_size: int) -> list[Channels]:
    """The channels of a layer that are known to be free, in blocks of two or more whole groups of `group_size`.

    By the names and shapes of its linears: whether it is so, only running the layer tells.
    """
    siblings: dict[str, dict[str, Linear]] = defaultdict(dict)
    for linear in linears:
        parent, _, name = linear.name.rpartition(".")
        siblings[parent][name] = linear
    found: dict[Linear, Channels] = {}
    for parent, named in siblings.items():
        for channels in (*_heads(module.get_submodule(parent), named), *_hidden_units(named)):
            # the first that fits: a gate must not be left out
            found.setdefault(channels.reader, channels)
    return [
        channels
        for channels in found.values()
        if channels.block_size % group_size == 0 and channels.block_size > group_size
    ]


def _hidden_units(named: dict[str, Linear]) -> Iterator[Channels]:
    for names, reader_name in _MLPS:
        if reader_name in named and all(name in named for name in names):
            reader, writers = named[reader_name], [named[name] for name in names]
            if all(writer.num_outputs % reader.num_inputs == 0 for writer in writers):
                rows = [torch.arange(writer.num_outputs).view(-1, 1, reader.num_inputs) for writer in writers]
                yield Channels(reader, tuple(zip(writers, rows, strict=True)), 1)


def _heads(attention: nn.Module, named: dict[str, Linear]) -> Iterator[Channels]:
    head_size = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    if not isinstance(head_size, int):
        return
    for writer_name, reader_name, place in _ATTENTIONS:
        if writer_name in named and reader_name in named:
            writer, reader = named[writer_name], named[reader_name]
            # queries and keys together have the rows of the reader's columns and once more those of the values
            num_rows = writer.num_outputs if place == "all" else (writer.num_outputs - reader.num_inputs) // 2
            num_blocks, num_heads = num_rows // head_size, reader.num_inputs // max(num_rows, 1)
            if num_blocks > 0 and num_blocks * num_heads * head_size == reader.num_inputs:
                row_O = torch.arange(writer.num_outputs)
                row_BC = row_O.view(num_blocks, -1)[:, -head_size:] if place == "last of each" else row_O[-num_rows:]
                yield Channels(reader, ((writer, row_BC.reshape(1, num_blocks, head_size)),), num_blocks, num_heads)


def _take(layer: LoadedLayer, key: str, name: str, axis: int, order: Tensor) -> None:
    """Reorder a tensor along an axis."""
    layer.place(key, name, layer.stored[key].index_select(axis, order))
