"""What a smoke run measures, and how much of it it does."""

from pathlib import Path

import pytest
from command import sentence, shardprune
from tiny import save_model, save_windows, write_config
from torch import Tensor

from pipeline.config_file import load_config
from pipeline.methods import Method
from pipeline.methods.alps import ALPS
from pipeline.methods.pruned import Pruned
from pipeline.methods.wanda import Wanda
from pipeline.numerics.statistics import Gram
from pipeline.planning import solving
from pipeline.planning.cost import Flops, GroupShape, LinearShape, of_solving
from pipeline.planning.gauge import measure
from pipeline.planning.scope import examine
from pipeline.planning.solving import rates_of_solving
from pipeline.runtime import Machine
from pipeline.sparsity import Budget

SHAPES: list[tuple[int, ...]] = []


class Noting(ALPS):
    """ALPS that notes what it is given."""

    def prune(self, weight_OI: Tensor, inputs: Gram, budget: Budget) -> Pruned:
        SHAPES.append((*weight_OI.shape, len(inputs.lower_II)))
        return super().prune(weight_OI, inputs, budget)


def a_config(folder: Path) -> Path:
    windows = save_windows(folder / "windows.parquet", 4, 32)
    return write_config(folder / "run.yaml", save_model(folder / "m", "llama"), windows, folder / "out", "sparsegpt")


def test_a_method_that_iterates_is_measured_once_and_on_few_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solving, "_MOST_COLUMNS", 12)
    config = load_config(a_config(tmp_path), [])
    pruning = config.pruning.model_copy(update={"method": Noting()})
    scope, skeleton = examine(config.model_copy(update={"pruning": pruning}), Machine(1, False))
    SHAPES.clear()
    rates = measure(scope, skeleton, tmp_path)
    # the output of the attention has the fewest rows; the first time does not count
    assert SHAPES == [(32, 12, 12)] * 2
    assert rates.method == "alps" and rates.sweep < rates.choice


@pytest.mark.parametrize("method", [ALPS(), Wanda(refit=True)])
def test_what_iterates_grows_with_the_square_of_the_columns(method: Method) -> None:
    narrow, wide = (of_solving([GroupShape((LinearShape(64, d, 0),))], method).sweep for d in (100, 300))
    assert wide == 9 * narrow > 0


def test_errors_that_are_no_operations_are_part_of_the_choice() -> None:
    assert rates_of_solving(Flops(), 1000, whole=2.0, factoring=0.0, errors=0.5)["choice"] == 500
    assert rates_of_solving(Flops(errors=9.0), 1000, whole=2.0, factoring=0.0, errors=1.0)["choice"] == 1000


def test_a_full_disk_is_no_run_that_resumes(tmp_path: Path) -> None:
    finished = shardprune("plan", a_config(tmp_path), "--calibrate-plan", max_file_bytes=1000)
    told = sentence(finished)
    assert finished.code == 2 and "--calibrate-plan" in told and str(tmp_path) in told and "resume" not in told, told
