"""Refitting on a mask: never worse than the start, whatever the scale of a row and however singular the Gram.

O = output rows, I = input columns, T = tokens.
"""

import pytest
import torch
from torch import Tensor

from pipeline.numerics.refit import refitted, solve_on_mask
from pipeline.numerics.solve import damped

NUM_ROWS, NUM_COLUMNS = 24, 64


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_of(num_tokens: int, num_directions: int = NUM_COLUMNS) -> Tensor:
    """Of tokens that lie in so many directions."""
    x_TI = random(num_tokens, num_directions, seed=1) @ random(num_directions, NUM_COLUMNS, seed=2)
    return x_TI.T @ x_TI


def weight_and_mask() -> tuple[Tensor, Tensor]:
    return random(NUM_ROWS, NUM_COLUMNS, seed=3), random(NUM_ROWS, NUM_COLUMNS, seed=4) > 0


def errors(after_OI: Tensor, before_OI: Tensor, hessian_II: Tensor) -> Tensor:
    change_OI = (after_OI - before_OI).double()
    return ((change_OI @ hessian_II.double()) * change_OI).sum(dim=1)


@pytest.mark.parametrize("damping", [0.0, 1e-6, 0.01])
@pytest.mark.parametrize(("num_tokens", "num_directions"), [(1, NUM_COLUMNS), (40, 7), (500, NUM_COLUMNS)])
@pytest.mark.parametrize("max_iterations", [1, 10, 1000])
def test_no_row_ends_worse_than_it_began(
    max_iterations: int, num_tokens: int, num_directions: int, damping: float
) -> None:
    weight_OI, keep_OI = weight_and_mask()
    hessian_II = damped(gram_of(num_tokens, num_directions), damping)
    start_OI = weight_OI * keep_OI
    solved_OI = solve_on_mask(start_OI, weight_OI @ hessian_II, keep_OI, hessian_II, max_iterations)
    assert bool(solved_OI.isfinite().all()) and not bool(solved_OI[~keep_OI].any())
    before_O, after_O = (errors(each_OI, weight_OI, hessian_II) for each_OI in (start_OI, solved_OI))
    assert bool((after_O <= before_O * (1 + 1e-4)).all())


@pytest.mark.parametrize("scale", [1e-30, 2e-20, 1e-10, 1e10])
def test_rows_of_another_scale_are_refitted_as_they_would_be_at_this_one(scale: float) -> None:
    weight_OI, keep_OI = weight_and_mask()
    gram_II = gram_of(500)
    plain_OI, _, _ = refitted(weight_OI, keep_OI, gram_II, 0.01)
    factor_O1 = torch.ones(NUM_ROWS, 1)
    factor_O1[5:9] = scale
    scaled_OI, _, _ = refitted(weight_OI * factor_O1, keep_OI, gram_II, 0.01)
    assert float(torch.dist(scaled_OI / factor_O1, plain_OI) / plain_OI.norm()) <= 1e-5


def test_rows_of_zeros_stay_zeros() -> None:
    weight_OI, keep_OI = weight_and_mask()
    weight_OI[3] = 0
    solved_OI, _, _ = refitted(weight_OI, keep_OI, gram_of(500), 0.01)
    assert not bool(solved_OI[3].any()) and bool(solved_OI[4].any())


def test_a_gram_that_is_not_finite_is_told() -> None:
    weight_OI, keep_OI = weight_and_mask()
    with pytest.raises(ArithmeticError, match="not finite"):
        refitted(weight_OI, keep_OI, gram_of(500).fill_(torch.inf), 0.01)
