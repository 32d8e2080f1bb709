"""What travels through Ray Data: results and refusals alike, pickled.

Ray Data would turn lists of one length into tensors, and an exception of a worker into text.
"""

import pickle
from collections.abc import Callable
from typing import Any

from pipeline.errors import Incomplete, Refusal


def packed(make: Callable[[], Any]) -> bytes:
    """What a function gives, or what it refused."""
    try:
        return pickle.dumps(make())
    except (Refusal, Incomplete) as error:
        return pickle.dumps(error)


def unpacked(parcel: bytes) -> Any:
    """What `packed` was given. Raises what it refused."""
    result = pickle.loads(parcel)
    if isinstance(result, Refusal | Incomplete):
        raise result
    return result
