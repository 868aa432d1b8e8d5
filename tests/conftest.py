import gc
import types

import pytest
import torch

import calibrating
import tiny_models


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny products only lose by threads, and the machine has other users."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _imports_are_not_garbage():
    """Collections, which memory is measured after, pass over what imports have left: a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _quanto_is_not_compiled():
    """The only code that optimum-quanto compiles on a CPU is this, for a minute in a new environment."""
    try:
        from optimum.quanto.library.extensions import get_extension
    except ImportError:
        return

    def unpack(packed, bits):
        return torch.cat([packed >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)])

    get_extension("quanto_cpp")._lib = types.SimpleNamespace(unpack=unpack)


@pytest.fixture
def model():
    """A tiny Llama in float32 (2 KV heads of 16)."""
    return tiny_models.shared("llama")


@pytest.fixture
def model64():
    """The same in float64: what differs by rounding alone differs by 1e-15, what differs otherwise shows."""
    return tiny_models.shared("llama", torch.float64)


@pytest.fixture
def codec():
    """The published method at 2 bits, calibrated for the tiny Llama."""
    return tiny_models.codec_for("llama")


@pytest.fixture
def codec8():
    """The same at 8 bits, which is close to exact."""
    return tiny_models.codec_for("llama", bits=8)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Where checkpoints of tiny models are, by kind."""
    root = tmp_path_factory.mktemp("checkpoints")
    return lambda kind="llama": calibrating.saved(kind, root)
