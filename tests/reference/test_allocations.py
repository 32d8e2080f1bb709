"""Our shares of layers beside those of the official code of OWL and AlphaPruning."""

import json
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from official_allocations import OfficialOwl, layer_fractions
from safetensors.torch import load_file
from test_official import HERE, LINEAR, linear_keys, observed, official_keep, prune_model, windows_file
from torch import Tensor

from pipeline.allocation.alphapruning import AlphaPruning
from pipeline.allocation.owl import Owl
from pipeline.methods import Wanda
from pipeline.numerics.power_law import fitted_exponent, histogram_peak
from pipeline.numerics.statistics import ColumnSums
from pipeline.sparsity import Budget, Unstructured

__all__ = ["windows_file"]

OFFICIAL = json.loads((HERE / "allocations.json").read_text())
OWL = load_file(HERE / "owl.safetensors")
DENSE = load_file(HERE / "model" / "model.safetensors")
SEVENTY = Unstructured(Decimal("0.7"))


def blocks() -> list[list[Tensor]]:
    """The one linear cut by rows into four layers of two linears."""
    weight_OI = LINEAR["input.weight"]
    return [[weight_OI[slice(*rows)] for rows in block] for block in OFFICIAL["linear"]["row_slices"]]


def sizes_of(layers: list[list[Tensor]]) -> list[list[int]]:
    return [[weight_OI.numel() for weight_OI in layer] for layer in layers]


def test_owl_measures_and_shares_like_the_official_code() -> None:
    inputs = observed(ColumnSums)
    measured = [Owl().measure([(weight_OI, inputs) for weight_OI in layer]) for layer in blocks()]
    assert measured == pytest.approx(OFFICIAL["linear"]["owl_0.7_outlier_ratio_percent"], abs=1e-9)
    fractions = layer_fractions(Owl(), SEVENTY, sizes_of(blocks()), measured)
    assert list(map(float, fractions)) == pytest.approx(OFFICIAL["linear"]["owl_0.7_layer_sparsity"], abs=1e-9)


def test_wanda_by_owl_has_the_official_masks() -> None:
    measured = OFFICIAL["linear"]["owl_0.7_outlier_ratio_percent"]
    patterns = OfficialOwl().allocate(SEVENTY, sizes_of(blocks()), measured)
    keeps = [
        Wanda().prune(weight_OI, observed(ColumnSums), Budget((pattern,), (len(weight_OI),))).keep_OI
        for layer, chosen in zip(blocks(), patterns, strict=True)
        for weight_OI, pattern in zip(layer, chosen, strict=True)
    ]
    assert torch.equal(torch.cat(keeps), official_keep("owl_0.7", LINEAR["input.weight"].shape, OWL))


def test_a_model_pruned_by_wanda_and_owl_is_the_official_one(tmp_path: Path, windows_file: Path) -> None:
    pruned = prune_model(tmp_path / "run", windows_file, Wanda(), "0.6", 1, OfficialOwl())
    allocation = json.loads((tmp_path / "run" / "allocation.json").read_text())
    assert allocation["measured"] == pytest.approx(OFFICIAL["model"]["owl_0.6_outlier_ratio_percent"], abs=1e-9)
    for key in linear_keys(pruned):
        keep_OI = official_keep(f"owl_wanda_0.6.{key}", pruned[key].shape, OWL)
        assert torch.equal(pruned[key], DENSE[key].masked_fill(~keep_OI, 0)), key


def spectrum(weight_OI: Tensor) -> Tensor:
    return torch.linalg.svdvals(weight_OI).square().double().sort().values


def official_exponent(sorted_E: Tensor) -> float:
    """The official lower bound is a logarithm that is compared with an eigenvalue, so it hardly binds."""
    peak = histogram_peak(sorted_E)
    return fitted_exponent(sorted_E, float(torch.tensor(0.95 * peak).log10()), 1.5 * peak)


def middle_exponent(sorted_E: Tensor) -> float:
    middle = float(sorted_E[len(sorted_E) // 2])
    return fitted_exponent(sorted_E, middle, middle)


@pytest.mark.parametrize("where", ["linear", "model"])
@pytest.mark.parametrize("way", ["xmin_peak", "xmin_mid"])
def test_tail_exponents_are_the_official_ones(where: str, way: str) -> None:
    weights = (
        [weight_OI for layer in blocks() for weight_OI in layer]
        if where == "linear"
        else [DENSE[f"model.layers.{name}.weight"] for name in OFFICIAL["model"]["alphapruning_names"]]
    )
    exponent = official_exponent if way == "xmin_peak" else middle_exponent
    found = [exponent(spectrum(weight_OI)) for weight_OI in weights]
    assert found == pytest.approx(OFFICIAL[where][f"alphapruning_alpha_{way}"], abs=1e-4)


@pytest.mark.parametrize("where", ["linear", "model"])
def test_alphapruning_shares_like_the_official_code(where: str) -> None:
    num_linears, num_weights = (2, 10) if where == "linear" else (7, 50176 // 7)
    alphas = OFFICIAL[where]["alphapruning_alpha_xmin_peak"]
    layers = [alphas[first : first + num_linears] for first in range(0, len(alphas), num_linears)]
    measured = [sum(layer) / num_linears for layer in layers]
    sizes = [[num_weights] * num_linears for _ in layers]
    wanted = OFFICIAL[where]["alphapruning_0.7_sparsity_xmin_peak_block_wise"][::num_linears]
    assert list(map(float, layer_fractions(AlphaPruning(), SEVENTY, sizes, measured))) == pytest.approx(
        wanted, abs=1e-4
    )
