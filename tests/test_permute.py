"""Reordering channels: the layer computes what it did, its tensors are the same numbers, and N:M keeps more of them.

B = windows, L = tokens in a window, H = hidden size, O = output rows, I = input columns, T = tokens.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, build_model, random_ids, run_layers, save_model
from torch import Tensor, nn

from pipeline.errors import Refusal
from pipeline.groups import Group
from pipeline.layer import prune_layer
from pipeline.methods import ALPS, RIA, DSnoT, Magnitude, Method, SparseGPT, Wanda
from pipeline.methods.masked import MaskMethod
from pipeline.models.channels import find_channels
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.outside import Call
from pipeline.models.skeleton import LoadedLayer, Skeleton
from pipeline.numerics.permutation import kept_score
from pipeline.numerics.statistics import ColumnSums, Gram, TokenCount
from pipeline.observe import observe, without_inputs
from pipeline.permute import permute_channels
from pipeline.sparsity import Budget, NofM, Pattern, parse_pattern

# Every way in which a layer has its values and hidden units: one name per family, or several where settings matter.
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with one key-value head": ("llama", {"num_key_value_heads": 1}),
    "llama without shared heads": ("llama", {"num_key_value_heads": 4}),
    "falcon with key-value heads": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon without shared heads": ("falcon", {"multi_query": False}),
}
METHODS = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "ria": RIA(),
    "wanda_refit": Wanda(refit=True),
    "dsnot": DSnoT(refine="all", update_threshold=0),
    "sparsegpt": SparseGPT(),
    "alps": ALPS(),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
Inputs = list[tuple[Tensor, Call]]


def skeleton_of(folder: Path, layout: str, dtype: torch.dtype = torch.float32) -> Skeleton:
    family, config = LAYOUTS[layout]
    return Skeleton(open_checkpoint(str(save_model(folder, family, dtype, **config))), dtype, torch.device("cpu"))


def inputs_of(skeleton: Skeleton, layer_index: int) -> Inputs:
    hidden_BLH = torch.randn(4, 12, skeleton.hidden_size, generator=torch.Generator().manual_seed(3))
    return [(hidden_BLH.to(skeleton.dtype), skeleton.calls((4, 12))[layer_index])]


def everywhere(layer: LoadedLayer, pattern: str) -> dict[str, Pattern]:
    return {linear.key: parse_pattern(pattern, None) for linear in layer.linears}


def loaded(skeleton: Skeleton, layer_index: int, method: Method) -> tuple[LoadedLayer, list[Group]]:
    layer = skeleton.load_layer(layer_index)
    if method.statistic is TokenCount:
        return layer, without_inputs(layer, TokenCount)
    return layer, observe(layer, inputs_of(skeleton, layer_index), method.statistic, 48)


def permuted(
    skeleton: Skeleton, layer_index: int = 1, method: Method = METHODS["sparsegpt"], pattern: str = "2:4"
) -> tuple[LoadedLayer, list[Group]]:
    layer, groups = loaded(skeleton, layer_index, method)
    permute_channels(skeleton, layer, groups, method, everywhere(layer, pattern))
    return layer, groups


def moved_keys(layer: LoadedLayer, dense: LoadedLayer) -> set[str]:
    return {key for key, tensor in layer.stored.items() if not torch.equal(tensor, dense.stored[key])}


@every_layout
def test_the_model_computes_what_it_did_and_its_channels_have_moved(layout: str, tmp_path: Path) -> None:
    skeleton, ids_NL = skeleton_of(tmp_path, layout), random_ids(2, 24)
    family, config = LAYOUTS[layout]
    model = build_model(family, **config)
    state = model.state_dict()
    for layer_index in range(skeleton.num_layers):
        layer, dense = permuted(skeleton, layer_index, pattern="1:2")[0], skeleton.load_layer(layer_index)
        channels = find_channels(layer.module, layer.linears, 2)
        assert len(channels) == 2, "of the MLP and of the heads"
        written = {writer for each in channels for writer, _ in each.writers}
        readers = {each.reader.key for each in channels}
        biases = {writer.bias_key for writer in written if writer.bias_key}
        assert moved_keys(layer, dense) == {writer.key for writer in written} | readers | biases
        for hidden_BLH, call in inputs_of(skeleton, layer_index):
            torch.testing.assert_close(layer.run(hidden_BLH, call), dense.run(hidden_BLH, call), rtol=1e-5, atol=1e-5)
        names = skeleton.layer_keys[layer_index]
        for key, name in names.items():
            state[f"{skeleton.layers_name}.{layer_index}.{name}"] = layer.stored[key]
    wanted = run_layers(skeleton, ids_NL, 2)
    model.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model(ids_NL, use_cache=False).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_layout
def test_tensors_hold_the_same_numbers_as_stored(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family, config = LAYOUTS[layout]
    checkpoint = open_checkpoint(str(save_model(tmp_path, family, dtype, **config)))
    skeleton = Skeleton(checkpoint, torch.float32 if dtype == torch.float16 else dtype, torch.device("cpu"))
    layer, dense = permuted(skeleton)[0], skeleton.load_layer(1)
    assert layer.stored.keys() == dense.stored.keys() and moved_keys(layer, dense)
    state = layer.module.state_dict()
    for key, name in skeleton.layer_keys[1].items():
        before, after = dense.stored[key], layer.stored[key]
        assert (after.dtype, after.shape, after.is_contiguous()) == (dtype, before.shape, True)
        assert torch.equal(after.flatten().sort().values, before.flatten().sort().values)
        assert torch.equal(state[name], after.to(state[name].dtype))


@pytest.mark.parametrize("statistic", [ColumnSums, Gram])
@every_layout
def test_statistics_are_those_of_the_reordered_inputs(layout: str, statistic: Any, tmp_path: Path) -> None:
    skeleton = skeleton_of(tmp_path, layout)
    layer, groups = permuted(skeleton, method=Wanda() if statistic is ColumnSums else SparseGPT())
    again = observe(layer, inputs_of(skeleton, 1), statistic, 48)
    for group, observed in zip(groups, again, strict=True):
        assert group.linears == observed.linears
        for name, value in vars(observed.statistic).items():
            torch.testing.assert_close(getattr(group.statistic, name), value, rtol=1e-4, atol=1e-4)


@every_layout
def test_heads_that_share_values_share_an_order(layout: str, tmp_path: Path) -> None:
    """Every query head reads each channel where its key-value head has it, and channels stay in their head."""
    skeleton = skeleton_of(tmp_path, layout)
    layer = skeleton.load_layer(1)
    heads = next(each for each in find_channels(layer.module, layer.linears, 4) if each.num_blocks * each.num_heads > 1)
    generator = torch.Generator().manual_seed(0)
    order_BC = torch.stack([torch.randperm(8, generator=generator) for _ in range(heads.num_blocks)])
    column_BQC = heads.columns(order_BC).view(heads.num_blocks, heads.num_heads, 8)
    assert torch.equal(column_BQC % 8, order_BC[:, None].expand_as(column_BQC))
    assert torch.equal(
        column_BQC // 8, torch.arange(4).view(heads.num_blocks, heads.num_heads, 1).expand_as(column_BQC)
    )


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:2"])
@every_method
def test_pruned_it_has_the_pattern_in_the_order_it_is_stored_in(method: Method, pattern: str, tmp_path: Path) -> None:
    layer, groups = permuted(skeleton_of(tmp_path, "llama"), 1, method, pattern)
    prune_layer(layer, groups, method, everywhere(layer, pattern))
    n, m = map(int, pattern.split(":"))
    for linear in layer.linears:
        kept_OGM = layer.stored[linear.key].view(linear.num_outputs, -1, m) != 0
        assert bool((kept_OGM.sum(dim=2) == n).all()), linear.key


@pytest.mark.parametrize("name", ["magnitude", "wanda", "ria"])
def test_more_of_what_the_method_goes_by_is_kept(name: str, tmp_path: Path) -> None:
    """In the linears that read reordered channels. What it goes by is what it would have gone by."""
    method = METHODS[name]
    assert isinstance(method, MaskMethod)
    skeleton = skeleton_of(tmp_path, "llama")
    kept: list[dict[str, float]] = []
    for layer, groups in (loaded(skeleton, 1, method), permuted(skeleton, 1, method)):
        kept.append({})
        for group in groups:
            (reader, *others) = group.linears
            if not others and reader.name.endswith(("o_proj", "down_proj")):
                budget = Budget((NofM(2, 4),), (reader.num_outputs,))
                score_OI = method.score(layer.weight_OI(reader), group.statistic, budget)
                kept[-1][reader.name] = kept_score(score_OI, 2, 4)
    before, after = kept
    assert after["self_attn.o_proj"] >= before["self_attn.o_proj"]
    assert after["mlp.down_proj"] > 1.01 * before["mlp.down_proj"]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "alps"])
def test_linears_that_only_write_channels_lose_what_they_did(name: str, tmp_path: Path) -> None:
    """Rows in another order are pruned as they would have been; but for ALPS, in which rounding is chaotic."""
    skeleton, method = skeleton_of(tmp_path, "llama"), METHODS[name]
    errors = []
    for layer, groups in (loaded(skeleton, 1, method), permuted(skeleton, 1, method)):
        results = prune_layer(layer, groups, method, everywhere(layer, "2:4"))
        errors.append({result.name.split(".")[-1]: result.relative_error for result in results})
    for linear in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        assert errors[0][linear] == pytest.approx(errors[1][linear], rel=1e-4), linear
    assert errors[0]["down_proj"] != errors[1]["down_proj"]


# --- layers in which channels are not free


class NormedMLP(nn.Module):
    """A norm with a gain per hidden unit stands before the last linear."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = inner.gate_proj, inner.up_proj, inner.down_proj
        self.norm = nn.RMSNorm(self.down_proj.in_features)
        self.norm.weight.data.uniform_(0.9, 1.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.gate_proj(x).sigmoid() * self.up_proj(x)
        return self.down_proj(self.norm(hidden))  # type: ignore[no-any-return]


class WatchedMLP(NormedMLP):
    """The first hidden unit goes into the output by another way too."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.gate_proj(x).sigmoid() * self.up_proj(x)
        return self.down_proj(hidden) + hidden[..., :1]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("mlp", "told"),
    [
        (NormedMLP, "the input of tensor model.layers.1.mlp.down_proj.weight changes"),
        (WatchedMLP, "its output changes"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_that_would_compute_something_else_is_refused(
    mlp: type[NormedMLP], told: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    skeleton = skeleton_of(tmp_path, "llama", dtype)
    layer = skeleton.load_layer(1)
    layer.module.mlp = mlp(layer.module.mlp).to(dtype)  # type: ignore[assignment,arg-type]
    with pytest.raises(Refusal) as refused:
        groups = without_inputs(layer, TokenCount)
        permute_channels(skeleton, layer, groups, Magnitude(), everywhere(layer, "2:4"))
    assert "pruning.permute = true: layer 1" in str(refused.value) and told in str(refused.value)


@pytest.mark.parametrize("family", ["bitnet", "diffllama"])
def test_families_whose_heads_are_not_free_are_refused(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms with gains before the last linears, and heads that read the values in pairs."""
    monkeypatch.setitem(FAMILIES, family, FAMILIES["llama"])
    monkeypatch.setitem(LAYOUTS, family, (family, {}))
    with pytest.raises(Refusal, match=r"the input of tensor model\.layers\.1\.self_attn\.o_proj\.weight changes"):
        permuted(skeleton_of(tmp_path, family))


def test_inputs_that_another_linear_reads_too_are_refused(tmp_path: Path) -> None:
    skeleton = skeleton_of(tmp_path, "llama")
    layer, groups = loaded(skeleton, 1, Wanda())
    groups[-1].linears.append(groups[0].linears[0])
    with pytest.raises(Refusal, match=r"another linear reads the inputs of tensor model\.layers\.1\.mlp\.down_proj"):
        permute_channels(skeleton, layer, groups, Wanda(), everywhere(layer, "2:4"))


def test_only_blocks_of_several_whole_groups_are_reordered(tmp_path: Path) -> None:
    """Heads of 8 channels, 64 hidden units."""
    layer = skeleton_of(tmp_path, "llama").load_layer(1)
    found = {m: [each.reader.name for each in find_channels(layer.module, layer.linears, m)] for m in (4, 8, 16, 64)}
    assert found == {4: ["self_attn.o_proj", "mlp.down_proj"], 8: ["mlp.down_proj"], 16: ["mlp.down_proj"], 64: []}


def test_a_gate_is_not_left_out_and_unknown_names_have_no_free_channels(tmp_path: Path) -> None:
    layer = skeleton_of(tmp_path, "llama").load_layer(1)
    (mlp,) = (each for each in find_channels(layer.module, layer.linears, 4) if each.reader.name == "mlp.down_proj")
    assert [writer.name for writer, _ in mlp.writers] == ["mlp.gate_proj", "mlp.up_proj"]
    known = ("gate_proj", "o_proj")
    rest = [linear for linear in layer.linears if linear.name.split(".")[-1] in known]
    assert find_channels(layer.module, rest, 4) == []
