"""All tests of Triton kernels that `interpreted.on_this_device` marks, without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from codec_cases import LAYERS
from decode_cases import SHAPES
from interpreted import INTERPRETED
from test_exact import CASES
from test_reconstruct import GRIDS

#: How many tests each file has; of attention to exact tokens half of all combinations, and one more a case.
EXPECTED = {
    "test_triton.py": len(SHAPES),
    "test_encode_triton.py": 2 * len(LAYERS) + 5,
    "test_exact.py": 3 * len(CASES),
    "test_reconstruct.py": 3 * len(LAYERS) + 2 * len(GRIDS) + 1,
}


@pytest.mark.skipif(INTERPRETED, reason="runs these tests interpreted")
def test_kernels_interpreted():
    """In a process of its own so many tests pass, and none fails."""
    pytest.importorskip("triton", reason="needs triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    files = [str(Path(__file__).parent / name) for name in EXPECTED]
    options = ["-x", "-rp", "-p", "no:cacheprovider", "-m", "interpreted"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:]
    passed = [line for line in result.stdout.splitlines() if line.startswith("PASSED ")]
    assert {name: sum(f"/{name}::" in line for line in passed) for name in EXPECTED} == EXPECTED
