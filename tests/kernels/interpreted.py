"""Tests that run on a GPU, or in Triton's interpreter where TRITON_INTERPRET=1 says so."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def on_this_device(test):
    """Mark a test of Triton kernels on `DEVICE`."""
    missing = not find_spec("triton") or not (INTERPRETED or torch.cuda.is_available())
    skip = pytest.mark.skipif(missing, reason="needs Triton and CUDA, or TRITON_INTERPRET=1")
    return skip(test) if INTERPRETED else pytest.mark.gpu(skip(test))


def require_interpreted(file, passed, *options):
    """Run a file's tests in the interpreter, in a process of its own; so many must pass and none fail."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *options, str(file)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:]
    assert f"{passed} passed" in result.stdout
