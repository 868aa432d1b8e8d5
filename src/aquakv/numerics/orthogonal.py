"""Fixed orthogonal matrices with entries of even size."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from aquakv.errors import ConfigError


def hadamard(n: int) -> Tensor | None:
    """Construct a Hadamard matrix: entries ±1, orthogonal rows.

    Tries, in this order, Sylvester's doubling (powers of two), Paley's first and second constructions over
    fields with p or p² elements, and Kronecker products of smaller ones.

    Returns
    -------
    Tensor or None
        ``[n, n]`` int8 on the CPU, shared by all callers; None if these constructions give none of order
        ``n`` (as for 92), or none exists.

    Raises
    ------
    ConfigError
        If ``n`` is not a positive whole number.
    """
    _check_order(n)
    return _hadamard(n)


def orthogonal_matrix(
    n: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Construct a fixed orthonormal matrix Q whose entries are of even size.

    ``Q = diag(s) (H ⊗ C) / sqrt(n)``: H is the Hadamard matrix of the largest order that divides n and that
    `hadamard` can construct, C the discrete Hartley matrix ``cos(2πjk/m) + sin(2πjk/m)`` of what is left,
    and s a fixed pattern of signs (see `signs`). Where ``hadamard(n)`` exists, every entry is ``±1/sqrt(n)``;
    no entry ever exceeds ``sqrt(2/n)``. Computed by formula, so the same everywhere up to rounding.

    Rotate rows with ``x @ Q``, undo with ``z @ Q.T``: the signs fall on x, so that a constant x spreads over
    many coefficients.

    Parameters
    ----------
    n : int
        Order, at least 1.
    device : torch.device or str, optional
        The CPU by default.
    dtype : torch.dtype
        Of the result; computed in float64.

    Returns
    -------
    Tensor
        ``[n, n]``, the same object for the same arguments: do not write to it.

    Raises
    ------
    ConfigError
        If ``n`` is not a positive whole number or ``dtype`` is not a floating one.
    """
    _check_order(n)
    if not dtype.is_floating_point:
        raise ConfigError(f"dtype must be a floating one, got {dtype}")
    return _orthogonal_matrix(n, torch.device(device or "cpu"), dtype)


def signs(n: int) -> list[int]:
    """Return n fixed signs, ±1: sign i is negative if the top bit of a 32-bit hash of i is set.

    The hash starts from ``h = (i + 1) * 0x9E3779B1`` and twice does ``h ^= h >> 15; h *= 0x85EBCA77``, all
    modulo 2³². The first n signs do not depend on n.
    """
    pattern = []
    for i in range(n):
        h = (i + 1) * 0x9E3779B1 & 0xFFFFFFFF
        for _ in range(2):
            h ^= h >> 15
            h = h * 0x85EBCA77 & 0xFFFFFFFF
        pattern.append(-1 if h >> 31 else 1)
    return pattern


@lru_cache(maxsize=64)
def _orthogonal_matrix(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    order, factor = next(
        (divisor, found)
        for divisor in range(n, 0, -1)
        if n % divisor == 0 and (found := _hadamard(divisor)) is not None
    )
    rest = n // order
    index = torch.arange(rest, dtype=torch.int64)
    # Reduced modulo the period as integers: the angle keeps its precision at any order.
    angle = (index[:, None] * index % rest).to(torch.float64) * (2 * math.pi / rest)
    matrix = torch.kron(factor.to(torch.float64), angle.cos() + angle.sin()) / math.sqrt(n)
    matrix *= torch.tensor(signs(n), dtype=torch.float64)[:, None]
    return matrix.to(device=device, dtype=dtype)


@lru_cache(maxsize=256)
def _hadamard(n: int) -> Tensor | None:
    if n == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    if n == 2:
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    if n % 4:
        return None
    if n & (n - 1) == 0:
        return _kron(_hadamard(2), _hadamard(n // 2))
    if (residues := _residue_matrix(n - 1)) is not None:
        return _paley_first(residues)
    half = n // 2 - 1
    if half % 4 == 1 and (residues := _residue_matrix(half)) is not None:
        return _paley_second(residues)
    for divisor in range(2, math.isqrt(n) + 1):
        if n % divisor == 0:
            product = _kron(_hadamard(divisor), _hadamard(n // divisor))
            if product is not None:
                return product
    return None


def _paley_first(residues: Tensor) -> Tensor:
    """Return ``I + S`` with the skew conference matrix S of a field of q ≡ 3 (mod 4) elements."""
    bordered = _border(residues, left=-1)
    return bordered + torch.eye(len(bordered), dtype=torch.int8)


def _paley_second(residues: Tensor) -> Tensor:
    """Double the symmetric conference matrix of a field of q ≡ 1 (mod 4) elements."""
    bordered = _border(residues, left=1)
    identity = torch.eye(len(bordered), dtype=torch.int8)
    outer = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    inner = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(bordered, outer) + torch.kron(identity, inner)


def _border(residues: Tensor, left: int) -> Tensor:
    size = len(residues) + 1
    bordered = torch.zeros(size, size, dtype=torch.int8)
    bordered[0, 1:] = 1
    bordered[1:, 0] = left
    bordered[1:, 1:] = residues
    return bordered


def _residue_matrix(q: int) -> Tensor | None:
    """Return the quadratic character of the differences of a field's elements, ``[q, q]`` int8.

    None unless q is an odd prime or the square of one. In the field of p² elements ``a + b sqrt(g)``, g a
    non-residue of p, an element is a square exactly if its norm ``a² - g b²`` is a square modulo p.
    """
    if _is_prime(q):
        element = torch.arange(q)
        return _legendre(q)[(element[:, None] - element) % q]
    p = math.isqrt(q)
    if p * p != q or p == 2 or not _is_prime(p):
        return None
    character = _legendre(p)
    non_residue = int((character < 0).nonzero()[0])
    a, b = torch.arange(q) // p, torch.arange(q) % p
    gap_a, gap_b = a[:, None] - a, b[:, None] - b
    return character[(gap_a * gap_a - non_residue * gap_b * gap_b) % p]


def _legendre(p: int) -> Tensor:
    """Return the Legendre symbols of 0 .. p - 1, ``[p]`` int8."""
    symbols = torch.full((p,), -1, dtype=torch.int8)
    symbols[torch.arange(1, p).square() % p] = 1
    symbols[0] = 0
    return symbols


def _kron(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    return None if left is None or right is None else torch.kron(left, right)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))


def _check_order(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ConfigError(f"the order of a matrix must be a whole number of at least 1, got {n!r}")
