"""Every script starts and says what it is for; those that run for hours do not waste them."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import measure_plan
import pytest
from tiny import save_windows, write_config

SCRIPTS = [path for path in sorted(Path(__file__).parent.parent.glob("scripts/*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_tells_what_it_measures(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    opening = script.read_text().removeprefix('"""').partition("\n")[0]
    assert opening in capsys.readouterr().out


def stand_in(program: str) -> list[str]:
    """A command of a few lines of Python."""
    return [sys.executable, "-c", f"import json, os, signal, sys; {program}"]


def test_the_plan_is_measured_where_the_runs_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "told.json"
    program = f"json.dump(sys.argv, open({str(told)!r}, 'w')); sys.exit(1)"
    monkeypatch.setattr(measure_plan, "COMMAND", stand_in(program))
    windows = save_windows(tmp_path / "windows.parquet", 2, 16)
    config = write_config(tmp_path / "run.yaml", tmp_path / "model", windows, tmp_path / "elsewhere")
    with pytest.raises(subprocess.CalledProcessError):
        measure_plan.compare(config, [], 1, tmp_path / "work")
    assert f"output.path={tmp_path}/work/plan" in json.loads(told.read_text())
