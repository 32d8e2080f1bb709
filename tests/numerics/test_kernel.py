"""The kernel of the sweep does what the column loop does: on a GPU where there is one, else in Triton's interpreter."""

import os
from decimal import Decimal

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="triton is not installed: pip install -e .[kernels]")

from pipeline.methods.sparsegpt import SparseGPT  # noqa: E402
from pipeline.numerics import kernel  # noqa: E402
from pipeline.numerics.masks import keep_highest  # noqa: E402
from pipeline.numerics.solve import NumKept, _by_halves, _sweep_choosing, sweep, sweep_columns  # noqa: E402
from pipeline.numerics.statistics import ColumnSums, Gram  # noqa: E402
from pipeline.sparsity import Budget, NofM, Unstructured  # noqa: E402

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


def inverse(upper_II: torch.Tensor) -> torch.Tensor:
    """R of a U."""
    return torch.linalg.inv(upper_II.double()).triu().float()


@pytest.mark.parametrize("num_rows", [1, 32, 77])
@pytest.mark.parametrize("num_columns", [1, 4, 20, 128])
@pytest.mark.parametrize("by_columns", [False, True])
def test_the_kernel_is_the_column_loop(num_columns: int, num_rows: int, by_columns: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    upper_II = torch.randn(200, 200, generator=generator).triu() / 20 + torch.eye(200)
    upper_CC = (upper_II.T.contiguous().T if by_columns else upper_II)[10 : 10 + num_columns, 10 : 10 + num_columns]
    weight_CO = torch.randn(num_columns, num_rows, generator=generator)
    is_pruned_CO = torch.rand(num_columns, num_rows, generator=generator) < 0.5
    error_CO = is_pruned_CO / upper_CC.diagonal()[:, None]
    ours = [tensor.clone().to(DEVICE) for tensor in (weight_CO, error_CO)]
    kernel.sweep_columns(*ours, upper_CC.to(DEVICE))
    sweep_columns(weight_CO, error_CO, upper_CC)
    for our, wanted in zip(ours, (weight_CO, error_CO), strict=True):
        torch.testing.assert_close(our.cpu(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
@pytest.mark.parametrize("pattern", [Unstructured(Decimal("0.5")), NofM(2, 4)], ids=str)
def test_a_gpu_prunes_as_the_cpu_does(pattern: Unstructured | NofM) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(2000, 700, generator=generator).bfloat16()
    weight_OI = torch.randn(96, 700, generator=generator)
    pruned = {}
    for device in ("cpu", "cuda"):
        gram = Gram.zeros(700, torch.device(device))
        gram.observe(x_TI.to(device))
        assert gram.sum_II.dtype == torch.float32
        pruned[device] = SparseGPT().prune(weight_OI.to(device), gram, Budget((pattern,), (96,)))
    keep_OI = pruned["cuda"].keep_OI.cpu()
    assert float((keep_OI == pruned["cpu"].keep_OI).double().mean()) >= 0.999
    same_O = (keep_OI == pruned["cpu"].keep_OI).all(dim=1)
    torch.testing.assert_close(
        pruned["cuda"].weight_OI.cpu()[same_O], pruned["cpu"].weight_OI[same_O], rtol=1e-3, atol=1e-4
    )


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
@pytest.mark.parametrize("shape", [(1, 3000), (5, 3000), (1, 300_000)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
def test_a_gpu_chooses_as_the_cpu_does(shape: tuple[int, int], share: float) -> None:
    num_pruned = int(share * shape[1])
    for numbers in (torch.randint(0, 50, shape).float(), torch.rand(shape)):
        assert torch.equal(keep_highest(numbers.cuda(), num_pruned).cpu(), keep_highest(numbers, num_pruned))
    numbers[-1, 7] = torch.nan
    if num_pruned:
        with pytest.raises(AssertionError, match="number"):
            keep_highest(numbers.cuda(), num_pruned)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_sums_up_as_the_cpu_does(dtype: torch.dtype) -> None:
    """Wide enough to be split into the products of a triangle."""
    x_TI = torch.randn(500, 4100, generator=torch.Generator().manual_seed(0)).to(dtype)
    for kind in (Gram, ColumnSums):
        ours, wanted = (kind.zeros(4100, torch.device(device)) for device in ("cuda", "cpu"))
        ours.observe(x_TI.cuda())
        wanted.observe(x_TI)
        torch.testing.assert_close(ours.sum_I.cpu(), wanted.sum_I, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(ours.sum_squares_I.cpu(), wanted.sum_squares_I, rtol=1e-4, atol=0)
        if isinstance(ours, Gram) and isinstance(wanted, Gram):
            torch.testing.assert_close(ours.sum_II.cpu(), wanted.sum_II, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("num_rows", [1, 77])
@pytest.mark.parametrize(("num_columns", "m"), [(4, 4), (120, 4), (128, 4), (24, 8), (9, 3)])
def test_the_kernel_chooses_as_the_torch_version(num_columns: int, m: int, num_rows: int) -> None:
    """Also where scores tie, where columns are dead, and where matrices of a group keep another n."""
    generator = torch.Generator().manual_seed(0)
    upper_CC = torch.randn(num_columns, num_columns, generator=generator).triu(1) / 20 + torch.eye(num_columns)
    weight_OC = torch.randn(num_rows, num_columns, generator=generator)
    weight_OC[:, :2], is_dead_C = 0.0, torch.rand(num_columns, generator=generator) < 0.2
    num_rows_of = (num_rows // 2, num_rows - num_rows // 2)
    budget = Budget((NofM(1, m), NofM(2, m)), num_rows_of)

    def choose(score_OC: torch.Tensor, first: int) -> torch.Tensor:
        return budget.keep_in_columns(score_OC.masked_fill(is_dead_C[first : first + m], -1), first, num_columns)

    wanted_OC, wanted_keep_OC, wanted_loss_O = sweep(weight_OC, inverse(upper_CC), choose, m)
    weight_CO, error_CO, keep_CO = (
        weight_OC.T.contiguous().to(DEVICE),
        torch.full((num_columns, num_rows), torch.nan, device=DEVICE),
        torch.zeros((num_columns, num_rows), dtype=torch.bool, device=DEVICE),
    )
    num_kept_O = budget.num_kept_of_m(DEVICE)
    kernel.choose_and_sweep_columns(
        weight_CO, error_CO, keep_CO, upper_CC.to(DEVICE), is_dead_C.to(DEVICE), num_kept_O, m
    )
    assert torch.equal(keep_CO.T.cpu(), wanted_keep_OC)
    torch.testing.assert_close(weight_CO.T.cpu(), wanted_OC, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(error_CO.square().sum(dim=0).cpu(), wanted_loss_O, rtol=1e-5, atol=1e-5)


def test_its_blocks_make_the_whole_sweep() -> None:
    """As a GPU goes within a block, and with one block for all: errors are spread, as in the paper, and not changes."""
    generator = torch.Generator().manual_seed(0)
    upper_II = torch.randn(300, 300, generator=generator).triu(1) / 40 + torch.eye(300)
    weight_OI, is_dead_I = torch.randn(40, 300, generator=generator), torch.rand(300, generator=generator) < 0.1
    budget = Budget((NofM(2, 4),), (40,))

    def choose(score_OC: torch.Tensor, first: int) -> torch.Tensor:
        return budget.keep_in_columns(score_OC.masked_fill(is_dead_I[first : first + 4], -1), first, 300)

    wanted_OI, wanted_keep_OI, wanted_loss_O = sweep(weight_OI, inverse(upper_II), choose, 4)
    weight_IO, error_IO = weight_OI.T.contiguous().to(DEVICE), torch.empty(300, 40, device=DEVICE)
    keep_IO, upper_there_II = torch.empty(300, 40, dtype=torch.bool, device=DEVICE), upper_II.to(DEVICE)
    each = NumKept(4, budget.num_kept_of_m(DEVICE), is_dead_I.to(DEVICE))

    def spread(start: int, middle: int, stop: int) -> None:
        there_II = upper_there_II[start:middle, middle:stop]
        weight_IO[middle:stop].addmm_(there_II.T, error_IO[start:middle], alpha=-1)

    def sweep_some(start: int, stop: int) -> None:
        here = slice(start, stop)
        _sweep_choosing(weight_IO[here], error_IO[here], keep_IO[here], upper_there_II[here, here], start, each)

    _by_halves(0, 300, kernel.MOST_COLUMNS, sweep_some, spread)
    assert torch.equal(keep_IO.T.cpu(), wanted_keep_OI)
    torch.testing.assert_close(weight_IO.T.cpu(), wanted_OI, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(error_IO.square().sum(dim=0).cpu(), wanted_loss_O, rtol=1e-4, atol=1e-4)
