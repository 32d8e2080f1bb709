"""The environment of llm-compressor: it wants other versions of libraries than shardprune, so it has one of its own."""

import hashlib
import subprocess
import sys
from pathlib import Path

_PINS = Path(__file__).with_name("llmcompressor-pins.txt")


def install_peer(cache: Path) -> Path:
    """Its Python, after making the environment in the cache unless a whole one with these pins is there."""
    folder = cache / f"llmcompressor-{hashlib.sha256(_PINS.read_bytes()).hexdigest()[:12]}"
    python, is_whole = folder / "bin" / "python", folder / "installed"
    if not is_whole.exists():
        print(f"installing llm-compressor into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--requirement", _PINS], check=True)
        is_whole.touch()
    return python
