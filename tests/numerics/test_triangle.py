"""What is computed of a triangle only is what the whole would be."""

import pytest
import torch
from torch import Tensor

from pipeline.numerics.triangle import add_square, mirrored, quadratic

SIZES = [1, 5, 255, 256, 700, 1030]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
def test_the_lower_triangle_of_a_square_is_that_of_the_product(size: int) -> None:
    x_TI, before_II = random(40, size), random(size, size, seed=1)
    sum_II = before_II.clone()
    add_square(sum_II, x_TI)
    wanted_II = before_II.double() + x_TI.double().T @ x_TI.double()
    torch.testing.assert_close(sum_II.tril().double(), wanted_II.tril(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_squares_of_half_precision_are_summed_in_float32(dtype: torch.dtype) -> None:
    x_TI = random(300, 600).to(dtype)
    ours_II, wanted_II = torch.zeros(600, 600), torch.zeros(600, 600)
    add_square(ours_II, x_TI)
    add_square(wanted_II, x_TI.float())
    torch.testing.assert_close(ours_II, wanted_II, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [*SIZES, 1500])
def test_mirrored_is_exactly_symmetric_and_keeps_the_lower_triangle(size: int) -> None:
    given_II = random(size, size)
    mirrored_II = mirrored(given_II.clone())
    assert torch.equal(mirrored_II, mirrored_II.T)
    assert torch.equal(mirrored_II.tril(), given_II.tril())


@pytest.mark.parametrize("size", SIZES)
def test_half_of_a_quadratic_form_is_enough(size: int) -> None:
    weight_OI, sum_II = random(7, size), mirrored(random(size, size, seed=1))
    wanted_O = (weight_OI.double() @ sum_II.double() * weight_OI).sum(dim=1)
    torch.testing.assert_close(quadratic(weight_OI, sum_II).double(), wanted_O, rtol=1e-4, atol=1e-3 * size)
