"""The layers of the dense model as a worker needs them, each read while the one before it computes."""

from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from pipeline.models.skeleton import LoadedLayer, Skeleton
from pipeline.runtime import return_memory


class Layers:
    """One at a time is read ahead."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton, self._reader = skeleton, ThreadPoolExecutor(1, "read")
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None

    def load(self, layer_index: int) -> LoadedLayer:
        return_memory()
        ahead, self._ahead = self._ahead, None
        stored = ahead[1].result() if ahead is not None and ahead[0] == layer_index else None
        return self._skeleton.load_layer(layer_index, stored)

    def read_ahead(self, layer_index: int | None) -> None:
        """Begin to read a layer, unless one is being read or there is none."""
        if self._ahead is None and layer_index is not None and layer_index < self._skeleton.num_layers:
            self._ahead = (layer_index, self._reader.submit(self._skeleton.read_layer, layer_index))
