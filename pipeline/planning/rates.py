"""How fast a machine does what pruning consists of: measured once and kept in a file, or assumed and said so."""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError

from pipeline.errors import Refusal
from pipeline.files import write_file
from pipeline.settings import Settings

# So that no time is beyond a float.
Rate = Annotated[float, Field(ge=1)]
# Of every product, where nothing has been measured.
ASSUMED_EFFICIENCY = 0.5
# Hidden states from worker to worker: a local Ray, a network of 50 Gbit/s.
NETWORK_OF_CPU, NETWORK_OF_GPU = 0.3e9, 5e9
_LIBRARIES_BYTES = 480_000_000


class Rates(Settings):
    """`source` says where they come from. All are per second: of floating-point operations as cost.py counts
    them, of weights that a mask is chosen for, or of bytes.

    `choice` holds all of a method's solving that is not counted by itself; `method` is the one it was measured with,
    None where it is assumed. `load` is a layer's weights taken over for computing, `hash` a digest of a file, `network`
    hidden states from worker to worker. `start_seconds` is what a process takes before its first layer, `base_bytes`
    what it holds by then. `gpu_bytes` is the memory of the GPU, None on a CPU.
    """

    source: str
    device: Literal["cpu", "cuda"]
    method: str | None = None
    product: Rate
    forward: Rate
    statistic: Rate
    factorisation: Rate
    sweep: Rate
    errors: Rate
    choice: Rate
    load: Rate
    read: Rate
    write: Rate
    hash: Rate
    network: Rate
    start_seconds: Annotated[float, Field(ge=0, le=1e6)]
    base_bytes: Annotated[int, Field(ge=0)]
    gpu_bytes: Annotated[int, Field(ge=1)] | None = None

    @classmethod
    def of_file(cls, path: Path) -> "Rates":
        """Those that `write_to` wrote, or a user. Raises Refusal."""
        try:
            rates = cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise Refusal(f"--rates {path}: {error.strerror}; measure them with --calibrate-plan") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise Refusal(f"--rates {path}: {where}: {first['msg'].lower()}; see pipeline/planning/rates.py") from None
        except (yaml.YAMLError, ValueError, RecursionError):
            raise Refusal(f"--rates {path}: is not valid YAML; measure them anew with --calibrate-plan") from None
        if (rates.gpu_bytes is None) == (rates.device == "cuda"):
            raise Refusal(
                f"--rates {path}: gpu_bytes is {rates.gpu_bytes} on device {rates.device}; correct one of them"
            )
        return rates

    def write_to(self, path: Path) -> None:
        """Raises Refusal or Incomplete; what was there is lost only to what is whole."""
        write_file(path, yaml.safe_dump(self.model_dump(), sort_keys=False).encode())

    @classmethod
    def check_place(cls, path: Path) -> None:
        """Raises Refusal where rates could not be written, or where something else is."""
        if not path.parent.is_dir():
            raise Refusal(f"--rates {path}: is in no folder that is there; make it, or give another path")
        if path.exists():
            try:
                cls.of_file(path)
            except Refusal:
                told = f"--rates {path}: holds no rates and would be lost; delete it, or give another path"
                raise Refusal(told) from None


class _Gpu(Settings):
    """What the maker publishes: dense products per second in bfloat16 and float32, and bytes of memory per second."""

    bfloat16: float
    float32: float
    memory: float
    gpu_bytes: int


GPUS = {
    "A100": _Gpu(bfloat16=312e12, float32=19.5e12, memory=2.0e12, gpu_bytes=80 * 10**9),
    "H100": _Gpu(bfloat16=989e12, float32=67e12, memory=3.35e12, gpu_bytes=80 * 10**9),
    "H200": _Gpu(bfloat16=989e12, float32=67e12, memory=4.8e12, gpu_bytes=141 * 10**9),
}
_CORE_PRODUCT = {"float32": 80e9, "bfloat16": 160e9}
# of bfloat16 without instructions for it
_SLOW_CORE_PRODUCT = 16e9


def assumed_of_gpu(kind: str, dtype: str) -> Rates:
    """Published peaks times one efficiency. Raises Refusal for a GPU that is not known."""
    gpu = GPUS.get(kind.upper())
    if gpu is None:
        raise Refusal(f"--gpu {kind}: not known; give one of {', '.join(GPUS)}, or --rates FILE")
    of_dtype = gpu.float32 if dtype == "float32" else gpu.bfloat16
    in_float32 = gpu.float32 * ASSUMED_EFFICIENCY
    return Rates(
        source=f"assumed: {kind.upper()}'s published peaks x {ASSUMED_EFFICIENCY:g}, storage 2 GB/s, network 5 GB/s",
        device="cuda",
        product=of_dtype * ASSUMED_EFFICIENCY,
        forward=of_dtype * ASSUMED_EFFICIENCY,
        statistic=of_dtype * ASSUMED_EFFICIENCY,
        factorisation=in_float32,
        sweep=in_float32,
        errors=in_float32,
        choice=gpu.memory * ASSUMED_EFFICIENCY / 100,
        load=20e9,
        read=2e9,
        write=2e9,
        hash=1.5e9,
        network=NETWORK_OF_GPU,
        start_seconds=20.0,
        base_bytes=4 * _LIBRARIES_BYTES,
        gpu_bytes=gpu.gpu_bytes,
    )


def assumed_of_cpu(num_threads: int, dtype: str, is_slow: bool = False) -> Rates:
    """A core of today times the threads times one efficiency; `is_slow`: the processor has no products of the dtype."""
    of_core = _SLOW_CORE_PRODUCT if is_slow else _CORE_PRODUCT.get(dtype, _CORE_PRODUCT["float32"])
    product = of_core * num_threads * ASSUMED_EFFICIENCY
    in_float32 = _CORE_PRODUCT["float32"] * num_threads * ASSUMED_EFFICIENCY
    return Rates(
        source=f"assumed: {num_threads} threads of {of_core / 1e9:.0f} GFLOP/s in {dtype} x "
        f"{ASSUMED_EFFICIENCY:g}, storage 1 GB/s, network 0.3 GB/s",
        device="cpu",
        product=product,
        forward=product,
        statistic=in_float32,
        factorisation=in_float32,
        sweep=in_float32 / 2,
        errors=in_float32,
        choice=20e6 * num_threads,
        load=2e9,
        read=1e9,
        write=1e9,
        hash=1e9,
        network=NETWORK_OF_CPU,
        start_seconds=6.0,
        base_bytes=_LIBRARIES_BYTES,
    )
