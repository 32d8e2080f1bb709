"""One thread and no network, settled before torch and transformers are imported; the same examples on every run."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from s3 import Server, serving

torch.set_num_threads(1)
# a busy machine is no failure, and a failure must come back when the test is run again
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    """The one that the environment points to as soon as a test asks for it."""
    with serving() as server:
        yield server


@pytest.fixture
def s3(s3_server: Server) -> Iterator[Server]:
    """A server that behaves well at the beginning of a test, whatever the last one told it."""
    s3_server.behave("")
    yield s3_server
    s3_server.behave("")
