"""The share of weights that two pruned checkpoints both keep or both prune: in q, k and v of layer 0, and in all.

python -m benchmarking.agreement MODEL MODEL
"""

import json
import sys
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

_FIRST_GROUP = tuple(f"layers.0.self_attn.{name}_proj.weight" for name in "qkv")


def main() -> None:
    first, second = (files_by_key(Path(folder)) for folder in sys.argv[1:])
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    equal, total = {True: 0, False: 0}, {True: 0, False: 0}
    for key in first:
        keep_OI, other_OI = (read(files[key], key) != 0 for files in (first, second))
        is_first = key.endswith(_FIRST_GROUP)
        equal[is_first] += int((keep_OI == other_OI).sum())
        total[is_first] += keep_OI.numel()
    print(json.dumps({"first": equal[True] / total[True], "all": sum(equal.values()) / sum(total.values())}))


def files_by_key(folder: Path) -> dict[str, Path]:
    """Where the linears of all layers are."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            keys = opened.keys()
        found |= {key: file for key in keys if key.endswith("_proj.weight")}
    return found


def read(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(key)
    return tensor


if __name__ == "__main__":
    main()
