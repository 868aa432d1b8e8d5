"""Tests that run on a GPU, or in Triton's interpreter where TRITON_INTERPRET=1 says so."""

import os
from importlib.util import find_spec

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def on_this_device(test):
    """Mark a test of Triton kernels on `DEVICE`."""
    missing = not find_spec("triton") or not (INTERPRETED or torch.cuda.is_available())
    skip = pytest.mark.skipif(missing, reason="needs Triton and CUDA, or TRITON_INTERPRET=1")
    test = pytest.mark.interpreted(skip(test))
    return test if INTERPRETED else pytest.mark.gpu(test)
