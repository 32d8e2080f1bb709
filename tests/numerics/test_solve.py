"""The solver: its factor is that of the inverse, and its sweep does what removing columns one at a time does."""

from decimal import Decimal

import oracle
import pytest
import torch
from torch import Tensor

from pipeline.methods.sparsegpt import SparseGPT
from pipeline.numerics.solve import sweep, upper_factor
from pipeline.numerics.statistics import Gram
from pipeline.sparsity import Budget, NofM, Unstructured


def random_problem(num_outputs: int, num_inputs: int, num_dead: int = 0, seed: int = 0) -> tuple[Tensor, Gram]:
    """A weight and the Gram of correlated inputs of uneven scale, some of them always zero."""
    generator = torch.Generator().manual_seed(seed)
    mixed_TI = torch.randn(3 * num_inputs, num_inputs, generator=generator)
    mixing_II = torch.randn(num_inputs, num_inputs, generator=generator) / num_inputs**0.5
    x_TI = mixed_TI + 2 * mixed_TI @ mixing_II
    x_TI *= torch.randn(num_inputs, generator=generator).exp()
    x_TI[:, torch.randperm(num_inputs, generator=generator)[:num_dead]] = 0
    gram = Gram.zeros(num_inputs, torch.device("cpu"))
    gram.observe(x_TI)
    return torch.randn(num_outputs, num_inputs, generator=generator), gram


def keep_everything(score_OC: Tensor, first_column: int) -> Tensor:
    return torch.ones_like(score_OC, dtype=torch.bool)


@pytest.mark.parametrize("num_inputs", [1, 2, 17, 128, 200])
@pytest.mark.parametrize("num_dead", [0, 3])
def test_the_factor_is_that_of_the_damped_gram(num_inputs: int, num_dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # the widest is reversed in three pieces
    monkeypatch.setattr("pipeline.numerics.solve._NUMBERS_AT_ONCE", 7000)
    _, gram = random_problem(1, num_inputs, min(num_dead, num_inputs - 1))
    upper_II, damping = upper_factor(gram.sum_II, 0.01)
    assert damping == 0.01
    assert torch.equal(upper_II, upper_II.triu())
    assert (upper_II.diagonal() > 0).all()
    hessian_II = torch.from_numpy(oracle.damped(gram.sum_II.double().numpy(), 0.01))
    scale_I = hessian_II.diagonal().sqrt()
    wrong_II = (upper_II.double() @ upper_II.double().T - hessian_II) / scale_I[:, None] / scale_I
    assert wrong_II.abs().max() <= 1e-5
    # as the paper has it: the factor of the inverse is the inverse of the factor
    of_inverse_II = torch.linalg.cholesky(torch.linalg.inv(hessian_II), upper=True)
    torch.testing.assert_close(1 / upper_II.diagonal().double(), of_inverse_II.diagonal(), rtol=1e-4, atol=0)


def test_factoring_leaves_the_gram_alone() -> None:
    _, gram = random_problem(1, 20, 2)
    before_II = gram.sum_II.clone()
    upper_factor(gram.sum_II, 0.01)
    assert torch.equal(gram.sum_II, before_II)


@pytest.mark.parametrize(("off_diagonal", "start", "needed"), [(0.5, 0.01, 0.01), (-0.05, 0.0, 1e-1), (1.5, 0.01, 1.0)])
def test_damping_is_raised_until_the_gram_is_positive_definite(
    off_diagonal: float, start: float, needed: float
) -> None:
    """The lowest eigenvalue is 1 - off-diagonal, or 1 + 20 x off-diagonal where that is negative: -0.05 gives -0.05."""
    gram_II = torch.full((22, 22), off_diagonal).fill_diagonal_(1.0)
    upper_II, damping = upper_factor(gram_II, start)
    assert damping == pytest.approx(needed)
    assert upper_II.isfinite().all()


def test_a_raised_damping_is_reported_and_the_weights_are_finite() -> None:
    weight_OI, _ = random_problem(8, 24)
    indefinite = Gram(100, torch.zeros(24), torch.full((24, 24), 1.5).fill_diagonal_(1.0))
    pruned = SparseGPT().prune(weight_OI, indefinite, Budget((Unstructured(Decimal("0.5")),), (8,)))
    assert pruned.damping == pytest.approx(1.0)
    assert pruned.weight_OI.isfinite().all()
    assert int(pruned.keep_OI.sum()) == 96


def test_fewer_tokens_than_columns_and_no_damping_is_solved_all_the_same() -> None:
    x_TI = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    gram = Gram.zeros(40, torch.device("cpu"))
    gram.observe(x_TI)
    weight_OI = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    pruned = SparseGPT(damping=0).prune(weight_OI, gram, Budget((NofM(2, 4),), (6,)))
    assert pruned.damping is not None and 0 < pruned.damping <= 0.01
    assert pruned.weight_OI.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gram_that_is_not_finite_is_an_error(bad: float) -> None:
    gram_II = torch.eye(4)
    gram_II[1, 2] = gram_II[2, 1] = bad
    with pytest.raises(ArithmeticError, match="not finite"):
        upper_factor(gram_II, 0.01)


def test_inputs_that_are_all_dead_lose_weights_without_any_update() -> None:
    weight_OI, _ = random_problem(4, 20)
    pruned = SparseGPT().prune(weight_OI, Gram(10, torch.zeros(20), torch.zeros(20, 20)), Budget((NofM(2, 4),), (4,)))
    assert torch.equal(pruned.weight_OI, weight_OI.masked_fill(~pruned.keep_OI, 0))


@pytest.mark.parametrize("step", [1, 4, 20, 128, 1000])
def test_keeping_everything_changes_nothing(step: int) -> None:
    weight_OI, gram = random_problem(8, 50)
    swept_OI, keep_OI, _ = sweep(weight_OI, upper_factor(gram.sum_II, 0.01)[0], keep_everything, step)
    assert keep_OI.all()
    assert torch.equal(swept_OI, weight_OI)


@pytest.mark.parametrize("step", [1, 3, 7, 12, 16, 20, 33, 128])
@pytest.mark.parametrize("num_columns", [1, 15, 16, 17, 50, 96])
def test_every_column_is_offered_once_in_order(step: int, num_columns: int) -> None:
    weight_OI, gram = random_problem(2, num_columns)
    offered: list[tuple[int, int]] = []

    def choose(score_OC: Tensor, first_column: int) -> Tensor:
        offered.append((first_column, first_column + score_OC.shape[1]))
        return keep_everything(score_OC, first_column)

    before_OI = weight_OI.clone()
    sweep(weight_OI, upper_factor(gram.sum_II, 0.01)[0], choose, step)
    assert offered == [(start, min(start + step, num_columns)) for start in range(0, num_columns, step)]
    assert torch.equal(weight_OI, before_OI)


@pytest.mark.parametrize(
    ("num_outputs", "stored_transposed"),
    [(6, False), (6, True), (1, False)],
)
def test_sweeping_leaves_the_weight_alone(num_outputs: int, stored_transposed: bool) -> None:
    weight_OI, gram = random_problem(num_outputs, 40)
    if stored_transposed:
        weight_OI = weight_OI.T.contiguous().T
    before_OI = weight_OI.clone()
    SparseGPT().prune(weight_OI, gram, Budget((NofM(2, 4),), (num_outputs,)))
    assert torch.equal(weight_OI, before_OI)


@pytest.mark.parametrize(
    ("num_outputs", "num_inputs", "num_dead", "block", "sparsity"),
    [
        (24, 64, 0, 128, "0.5"),
        (7, 33, 0, 1, "0.3"),
        (40, 50, 4, 20, "0.7"),
        (16, 96, 0, 17, "0.5"),
        (12, 200, 5, 64, "0.9"),
        (48, 320, 3, 128, "0.5"),
        (20, 264, 0, 128, "0.7"),
    ],
)
def test_unstructured_as_the_slow_oracle(
    num_outputs: int, num_inputs: int, num_dead: int, block: int, sparsity: str
) -> None:
    weight_OI, gram = random_problem(num_outputs, num_inputs, num_dead)
    budget = Budget((Unstructured(Decimal(sparsity)),), (num_outputs,))
    pruned = SparseGPT(block_columns=block).prune(weight_OI, gram, budget)
    slow = oracle.sparsegpt_unstructured(
        weight_OI.double().numpy(), gram.sum_II.double().numpy(), 0.01, sparsity, block
    )
    assert_agree(pruned.weight_OI, pruned.keep_OI, *map(torch.from_numpy, slow))


@pytest.mark.parametrize(
    ("num_outputs", "num_inputs", "num_dead", "n", "m"),
    [
        (24, 64, 0, 2, 4),
        (16, 96, 3, 4, 8),
        (10, 51, 2, 1, 3),
        (8, 200, 0, 3, 20),
        (32, 320, 4, 2, 4),
        (4, 34, 0, 5, 17),
    ],
)
def test_n_of_m_as_the_slow_oracle(num_outputs: int, num_inputs: int, num_dead: int, n: int, m: int) -> None:
    weight_OI, gram = random_problem(num_outputs, num_inputs, num_dead)
    pruned = SparseGPT().prune(weight_OI, gram, Budget((NofM(n, m),), (num_outputs,)))
    slow = oracle.sparsegpt_n_of_m(weight_OI.double().numpy(), gram.sum_II.double().numpy(), 0.01, n, m)
    assert_agree(pruned.weight_OI, pruned.keep_OI, *map(torch.from_numpy, slow))


def assert_agree(weight_OI: Tensor, keep_OI: Tensor, slow_weight_OI: Tensor, slow_keep_OI: Tensor) -> None:
    """Masks may differ where float32 cannot tell two scores apart, and a row with such a weight in its updates."""
    assert int(keep_OI.sum()) == int(slow_keep_OI.sum())
    assert float((keep_OI == slow_keep_OI).double().mean()) >= 0.9995
    same_O = (keep_OI == slow_keep_OI).all(dim=1)
    print(
        "AGREE",
        float((keep_OI == slow_keep_OI).double().mean()),
        float(torch.dist(weight_OI[same_O].double(), slow_weight_OI[same_O]) / slow_weight_OI[same_O].norm()),
    )
    change = torch.dist(weight_OI[same_O].double(), slow_weight_OI[same_O])
    assert change <= 1e-5 * slow_weight_OI[same_O].norm()


@pytest.mark.parametrize("num_dead", [0, 5])
@pytest.mark.parametrize("pattern", [Unstructured(Decimal("0.5")), NofM(2, 4)], ids=str)
@pytest.mark.parametrize("damping", [1e-4, 0.01, 1.0])
def test_the_change_that_the_sweep_knows_is_that_of_the_outputs(
    num_dead: int, pattern: Unstructured | NofM, damping: float
) -> None:
    weight_OI, gram = random_problem(20, 264, num_dead)
    pruned = SparseGPT(damping=damping).prune(weight_OI, gram, Budget((pattern,), (20,)))
    change_OI = (pruned.weight_OI - weight_OI).double()
    wanted_O = (change_OI @ gram.sum_II.double() * change_OI).sum(dim=1)
    assert pruned.change_O is not None
    torch.testing.assert_close(pruned.change_O.double(), wanted_O, rtol=1e-3, atol=0)
