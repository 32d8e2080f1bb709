"""Every script starts and says what it is for."""

import runpy
import sys
from pathlib import Path

import pytest

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
