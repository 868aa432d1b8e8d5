"""Karhunen-Loeve transform in the norm of a metric: decorrelates, and measures what matters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.errors import ConfigError, InputError, ShapeError

# Moments whose products were summed in float32 may have eigenvalues this far below zero, relative to the
# largest or to the mean over all blocks; anything lower is no covariance.
_NEGATIVE = 1e-4

# Eigenvalues below this part of the largest are zero but for rounding in float64.
_SINGULAR = 1e-13


@dataclass(frozen=True, eq=False)
class WeightedKlt:
    """A pair of linear maps between vectors and uncorrelated coefficients.

    In terms of the covariance C and the normalised metric M: ``A = M^{1/2}``, ``A C A = V diag(λ) Vᵀ``,
    ``forward = A V``, ``inverse = Vᵀ A⁻¹``. The metric's squared error of a vector is the plain squared error
    of its coefficients.

    Attributes
    ----------
    forward : Tensor
        ``[n, n]`` float32; the coefficients of row vectors ``x`` are ``x @ forward``.
    inverse : Tensor
        ``[n, n]`` float32; ``z @ inverse`` undoes that.
    variances : Tensor
        ``[n]`` float64, of the coefficients, not negative, descending.
    block_of : Tensor
        ``[n]`` int64: the diagonal block in which each coefficient lives. Outside of it the coefficient's
        column of ``forward`` and row of ``inverse`` are zero.
    """

    forward: Tensor
    inverse: Tensor
    variances: Tensor
    block_of: Tensor


def symmetric_root(matrix: Tensor, inverse: bool = False) -> Tensor:
    """Compute the symmetric square root of a positive semi-definite matrix.

    Parameters
    ----------
    matrix : Tensor
        ``[n, n]`` float64, symmetric up to rounding. Slightly negative eigenvalues count as zero.
    inverse : bool
        Return the (pseudo-)inverse of the root instead: directions that the matrix maps to zero, it does too.

    Returns
    -------
    Tensor
        ``[n, n]`` float64, symmetric, positive semi-definite.

    Raises
    ------
    ShapeError
        If the matrix is not square or not float64.
    InputError
        If it holds NaN or infinity, or is clearly not positive semi-definite.
    """
    values, vectors = _spectrum(matrix, "matrix")
    return _power(values, vectors, -0.5 if inverse else 0.5)


def weighted_klt(
    covariance: Tensor, metric: Tensor, blocks: int | None = None, floor: float = 1e-3
) -> WeightedKlt:
    """Compute the transform that decorrelates vectors and turns the metric's error into a plain one.

    The metric is first divided by its mean diagonal (over all blocks together, so that the weights of heads
    relative to each other stay) and ``floor`` times the identity is added, which keeps directions without
    weight invertible. A metric of zeros counts as the identity. Signs of eigenvectors are fixed: the entry of
    largest magnitude of each column of ``forward`` is positive.

    Parameters
    ----------
    covariance : Tensor
        ``[n, n]`` float64, of the vectors.
    metric : Tensor
        ``[n, n]`` float64, positive semi-definite: the error e weighs ``eᵀ M e``. Same device.
    blocks : int, optional
        Restrict covariance and metric to this many equal diagonal blocks, so that every coefficient stays
        within one (per-head transform). None for one block.
    floor : float
        Identity added to the normalised metric, greater than 0.

    Raises
    ------
    ConfigError
        If ``blocks`` is not a divisor of ``n``, or ``floor`` is not greater than 0.
    ShapeError
        If a matrix is not square, not float64, empty, or the two differ in shape or device.
    InputError
        If a matrix holds NaN or infinity, or is clearly not positive semi-definite.
    """
    count = _check_arguments(covariance, metric, blocks, floor)
    metric = _normalised(metric)
    mean_variance = float(covariance.diagonal().mean())
    forward, inverse = torch.zeros_like(metric), torch.zeros_like(metric)
    variances = metric.new_zeros(len(metric))
    width = len(metric) // count
    for block in range(count):
        part = slice(block * width, (block + 1) * width)
        root, unroot = _floored_roots(metric[part, part], floor)
        spectrum, basis = _spectrum(root @ covariance[part, part] @ root, "covariance", mean_variance)
        forward[part, part] = root @ basis
        inverse[part, part] = basis.T @ unroot
        variances[part] = spectrum
    return _ordered(forward, inverse, variances, torch.arange(len(metric), device=metric.device) // width)


def two_stage_klt(
    covariance: Tensor, metric: Tensor, blocks: int, first: int, floor: float = 1e-3
) -> WeightedKlt:
    """Compute a transform of ``first`` coefficients over all blocks, then block by block of what they leave.

    The first stage takes what heads have in common; all further coefficients stay within a head. There are
    ``first`` coefficients more than coordinates: ``x @ forward @ inverse`` is x, not the other way round.
    Errors of coefficients that are uncorrelated still add up in the metric: the squared error is the sum of
    theirs, as every row of ``inverse`` has length 1 in the metric.

    Parameters
    ----------
    covariance, metric, floor
        As for `weighted_klt`.
    blocks
        Equal diagonal blocks (heads) that the second stage stays in.
    first
        Coefficients of the first stage, from 0 to ``n``.

    Returns
    -------
    WeightedKlt
        ``forward`` ``[n, first + n]``, ``inverse`` ``[first + n, n]``, ``variances`` ``[first + n]``
        descending; ``block_of`` is -1 for coefficients of the first stage.

    Raises
    ------
    ConfigError, ShapeError, InputError
        As `weighted_klt`; ConfigError also if ``first`` is out of range.
    """
    count = _check_arguments(covariance, metric, blocks, floor)
    size = len(metric)
    if not 0 <= first <= size:
        raise ConfigError(f"klt: expected a first stage of 0 to {size} coefficients, got {first}")
    metric = _normalised(metric)
    width = size // count
    roots = [
        _floored_roots(metric[part, part], floor)
        for part in (slice(start, start + width) for start in range(0, size, width))
    ]
    root, unroot = (torch.block_diag(*parts) for parts in zip(*roots, strict=True))
    white = root @ covariance @ root
    spectrum, basis = _spectrum(white, "covariance", float(covariance.diagonal().mean()))
    common = basis[:, size - first :]
    rest = torch.eye(size, dtype=torch.float64, device=metric.device) - common @ common.T
    left = rest @ white @ rest
    forward, inverse = [root @ common], [common.T @ unroot]
    variances, block_of = [spectrum[size - first :]], [torch.full((first,), -1, device=metric.device)]
    for block in range(count):
        part = slice(block * width, (block + 1) * width)
        own, vectors = _spectrum(left[part, part], "covariance", float(white.diagonal().mean()))
        forward.append(root @ rest[:, part] @ vectors)
        inverse.append(vectors.T @ unroot[part])
        variances.append(own)
        block_of.append(torch.full((width,), block, device=metric.device))
    return _ordered(torch.cat(forward, 1), torch.cat(inverse), torch.cat(variances), torch.cat(block_of))


def _check_arguments(covariance: Tensor, metric: Tensor, blocks: int | None, floor: float) -> int:
    """Return the number of blocks."""
    if not (math.isfinite(floor) and floor > 0):
        raise ConfigError(f"klt: expected a floor > 0, got {floor}")
    if covariance.shape != metric.shape or covariance.device != metric.device:
        raise ShapeError(
            f"klt: expected covariance and metric of one shape and device, got {_describe(covariance)} on "
            f"{covariance.device} and {_describe(metric)} on {metric.device}"
        )
    for name, matrix in (("covariance", covariance), ("metric", metric)):
        _check(matrix, name)
    size = len(covariance)
    if size == 0:
        raise ShapeError("klt: expected matrices of at least one row, got [0, 0]")
    count = 1 if blocks is None else blocks
    if count < 1 or size % count:
        raise ConfigError(f"klt: expected blocks that divide {size} coordinates, got {blocks}")
    return count


def _normalised(metric: Tensor) -> Tensor:
    """Return a metric over its mean diagonal; the identity for zeros."""
    if not bool(metric.any()):
        return torch.eye(len(metric), dtype=torch.float64, device=metric.device)
    scale = float(metric.diagonal().mean())
    return metric / scale if scale > 0 else metric


def _floored_roots(metric: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Return root and inverse root of a block of a normalised metric plus ``floor`` times the identity."""
    # Validated before the floor is added, which would hide a negative metric.
    values, vectors = _spectrum(metric, "metric", 1.0)
    return _power(values + floor, vectors, 0.5), _power(values + floor, vectors, -0.5)


def _ordered(forward: Tensor, inverse: Tensor, variances: Tensor, block_of: Tensor) -> WeightedKlt:
    """Sort coefficients by variance and fix their signs."""
    peak = forward.gather(0, forward.abs().argmax(0, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(torch.float64)
    order = variances.argsort(descending=True, stable=True)
    return WeightedKlt(
        forward=(forward * sign)[:, order].to(torch.float32),
        inverse=(inverse * sign.T)[order].to(torch.float32),
        variances=variances[order],
        block_of=block_of[order],
    )


def shrink_covariance(covariance: Tensor, amount: float) -> Tensor:
    """Mix a covariance ``[n, n]`` with the multiple of the identity that has the same trace.

    Returns
    -------
    Tensor
        ``(1 - amount) * covariance + amount * mean(diagonal) * identity``, same shape and dtype.

    Raises
    ------
    ConfigError
        If ``amount`` is not in 0..1.
    ShapeError
        If the matrix is not square or not float64.
    InputError
        If it holds NaN or infinity.
    """
    if not 0 <= amount <= 1:
        raise ConfigError(f"klt: expected an amount of shrinkage in 0..1, got {amount}")
    _check(covariance, "covariance")
    shrunk = (1 - amount) * covariance
    if len(covariance):
        shrunk.diagonal().add_(amount * covariance.diagonal().mean())
    return shrunk


def _spectrum(matrix: Tensor, name: str, typical: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, clamped at zero, and eigenvectors of a positive semi-definite matrix.

    ``typical`` is the size of the entries on the diagonal of the matrix of which this one is a block.
    """
    _check(matrix, name)
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    if len(values) and float(values[0]) < -_NEGATIVE * max(float(values[-1].abs()), typical):
        raise InputError(
            f"klt: expected a positive semi-definite {name}, got eigenvalues from {float(values[0]):.3g} to "
            f"{float(values[-1]):.3g}"
        )
    return values.clamp_min(0), vectors


def _power(values: Tensor, vectors: Tensor, exponent: float) -> Tensor:
    kept = values > _SINGULAR * (values.max() if len(values) else 0.0)
    powers = torch.where(kept, torch.where(kept, values, 1.0) ** exponent, 0.0)
    return (vectors * powers) @ vectors.T


def _check(matrix: Tensor, name: str) -> None:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or matrix.dtype != torch.float64:
        raise ShapeError(f"klt: expected a {name} of float64 [n, n], got {_describe(matrix)}")
    if not bool(matrix.isfinite().all()):
        raise InputError(f"klt: the {name} holds NaN or infinity; expected finite numbers")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
