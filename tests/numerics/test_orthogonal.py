import hashlib
import math

import pytest
import torch

from aquakv.errors import ConfigError
from aquakv.numerics.orthogonal import hadamard, orthogonal_matrix, signs

BIG = [192, 255, 257, 384, 576, 1000, 1024]
# Orders below 200 that Sylvester, Paley over p and p², and products do not reach.
UNREACHED = {92, 116, 156, 172, 184, 188}


def test_hadamard_orders():
    for n in range(1, 200):
        matrix = hadamard(n)
        if (n > 2 and n % 4) or n in UNREACHED:
            assert matrix is None
            continue
        assert matrix is not None, n
        assert matrix.dtype == torch.int8
        assert matrix.abs().eq(1).all()
        exact = matrix.double()
        assert torch.equal(exact @ exact.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [36, 52, 96, 100, 192, 384, 576, 1024])
def test_large_orders_are_hadamard(n):
    matrix = hadamard(n)
    assert matrix is not None
    assert matrix.abs().eq(1).all()
    exact = matrix.double()
    assert torch.equal(exact @ exact.T, n * torch.eye(n, dtype=torch.float64))
    assert torch.allclose(orthogonal_matrix(n).abs(), torch.tensor(1 / math.sqrt(n)))


@pytest.mark.parametrize("n", [*range(1, 131), *BIG])
def test_orthonormal_and_flat(n):
    matrix = orthogonal_matrix(n)
    assert matrix.shape == (n, n)
    assert matrix.dtype == torch.float32
    exact = matrix.double()
    assert (exact @ exact.T - torch.eye(n)).abs().max() < 1e-6
    assert matrix.abs().max() <= math.sqrt(2 / n) * (1 + 1e-6)


@pytest.mark.parametrize("n", [12, 36, 64, 77, 92, 97, 128, *BIG])
def test_a_constant_vector_spreads(n):
    coefficients = orthogonal_matrix(n).sum(0) / math.sqrt(n)
    # Even a lucky random pattern leaves about sqrt(2 ln n / n).
    assert coefficients.abs().max() < 2 * math.sqrt(2 * math.log(n) / n)


def test_determinism():
    digest = hashlib.sha256(bytes(sign & 0xFF for sign in signs(192))).hexdigest()
    assert digest.startswith("1c3e99745d8b67b5")
    assert signs(192)[:50] == signs(50)
    assert signs(8) == [1, -1, -1, 1, 1, 1, 1, 1]
    matrix = orthogonal_matrix(192)
    assert orthogonal_matrix(192) is matrix
    assert hadamard(192) is hadamard(192)


def test_dtypes():
    exact = orthogonal_matrix(24, dtype=torch.float64)
    assert (exact @ exact.T - torch.eye(24)).abs().max() < 1e-14
    assert torch.equal(orthogonal_matrix(24, "cpu", torch.bfloat16), exact.to(torch.bfloat16))


@pytest.mark.parametrize("n", [0, -4, 2.0, True, None])
def test_bad_order(n):
    with pytest.raises(ConfigError, match="at least 1"):
        orthogonal_matrix(n)
    with pytest.raises(ConfigError, match="at least 1"):
        hadamard(n)


def test_bad_dtype():
    with pytest.raises(ConfigError, match="floating"):
        orthogonal_matrix(4, dtype=torch.int32)
