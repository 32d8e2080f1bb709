"""One thread and no network, settled before torch and transformers are imported; the same examples on every run."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from hypothesis import settings

torch.set_num_threads(1)
# a busy machine is no failure, and a failure must come back when the test is run again
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
