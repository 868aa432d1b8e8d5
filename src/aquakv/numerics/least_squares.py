"""Ridge least squares from moments."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.errors import ConfigError, InputError, ShapeError
from aquakv.numerics.moments import StreamingMoments

# A feature whose standard deviation is below this part of its mean is constant but for rounding in float64.
_CONSTANT = 1e-12

# Relative accuracy of second moments whose products were summed in float32.
_ACCURACY = 2.0**-20


@dataclass(frozen=True, eq=False)
class AffineMap:
    """The map ``x @ weight + bias``.

    Attributes
    ----------
    weight : Tensor
        ``[in_features, out_features]`` float32.
    bias : Tensor
        ``[out_features]`` float32.
    """

    weight: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or self.bias.shape != self.weight.shape[1:]:
            raise ShapeError(
                "expected weight [in_features, out_features] and bias [out_features], "
                f"got {list(self.weight.shape)} and {list(self.bias.shape)}"
            )

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.weight.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``; both float32."""
        if x.dim() == 0 or x.shape[-1] != self.in_features or x.dtype != self.weight.dtype:
            raise ShapeError(
                f"x must be {self.weight.dtype} [..., {self.in_features}], got {x.dtype} {list(x.shape)}"
            )
        return x @ self.weight + self.bias


def ridge(moments: StreamingMoments, relative_lambda: float = 1e-3) -> AffineMap:
    """Fit y to x by ridge least squares with an unpenalised bias (arXiv:2501.19392 §3).

    Minimises ``Σ ||x W + b - y||² + λ ||W||²`` with ``λ = relative_lambda`` times the mean diagonal of the
    centred ``XᵀX``, in float64 by Cholesky's factorisation. Constant features get zero weights. Where the
    matrix is singular within the accuracy of the moments, which takes a ``relative_lambda`` below 1e-6, the
    result is the least-squares solution of least norm.

    Parameters
    ----------
    moments : StreamingMoments
        Of x and y, at least one pair.
    relative_lambda : float
        Strength of the penalty, not negative.

    Returns
    -------
    AffineMap
        On the device of the moments; always finite.

    Raises
    ------
    ConfigError
        If ``relative_lambda`` is negative or not finite.
    ShapeError
        If there are no pairs.
    InputError
        If NaN or infinity was among the pairs.
    """
    if not (math.isfinite(relative_lambda) and relative_lambda >= 0):
        raise ConfigError(f"relative_lambda must be finite and not negative, got {relative_lambda}")
    if moments.count == 0:
        raise ShapeError("expected moments of at least one pair to fit, got none; call update first")
    scatter, cross = moments.scatter_xx, moments.scatter_xy
    if not all(bool(part.isfinite().all()) for part in (scatter, cross, moments.mean_x, moments.mean_y)):
        raise InputError(
            "the pairs to fit hold NaN or infinity; expected finite numbers, leave such pairs out"
        )
    deviation = (scatter.diagonal() / moments.count).clamp_min(0).sqrt()
    varies = (deviation > _CONSTANT * moments.mean_x.abs()).to(torch.float64)
    scatter = scatter * varies * varies[:, None]
    weight = _solve(scatter, cross * varies[:, None], relative_lambda)
    bias = moments.mean_y - moments.mean_x @ weight
    return AffineMap(weight.to(torch.float32), bias.to(torch.float32))


def explained_variance(moments: StreamingMoments, affine_map: AffineMap) -> float:
    """Compute the part of y's variance that a map of x explains, from the moments alone.

    Returns
    -------
    float
        One minus the residual's sum of squares over that of the centred y, both summed over features. At
        most 1 up to rounding; negative if the map is worse than y's mean. If y is constant: 1 if the map
        hits it up to float32 rounding, else minus infinity.

    Raises
    ------
    ShapeError
        If the features differ or there are no pairs.
    """
    expected = [moments.in_features, moments.out_features]
    if list(affine_map.weight.shape) != expected:
        raise ShapeError(f"the map's weight must be {expected}, got {list(affine_map.weight.shape)}")
    if moments.count == 0:
        raise ShapeError("expected moments of at least one pair, got none; call update first")
    weight = affine_map.weight.to(moments.device, torch.float64)
    bias = affine_map.bias.to(moments.device, torch.float64)
    total = float(moments.variance_y.sum()) * moments.count
    fitted = float((weight * (moments.scatter_xx @ weight - 2 * moments.scatter_xy)).sum())
    offset = float((moments.mean_x @ weight + bias - moments.mean_y).square().sum()) * moments.count
    residual = total + fitted + offset
    rounding = 1e-12 * float(moments.mean_y.square().sum()) * moments.count
    if total <= rounding * _CONSTANT:
        return 1.0 if residual <= rounding else -math.inf
    return 1 - residual / total


def _solve(scatter: Tensor, cross: Tensor, relative_lambda: float) -> Tensor:
    """Solve ``(scatter + λ I) weight = cross`` in float64 for a scatter that may be singular."""
    scale = float(scatter.diagonal().mean()) if len(scatter) else 0.0
    if scale <= 0:
        return torch.zeros_like(cross)
    # In units of the mean diagonal, so that neither tiny nor huge features leave float64's range.
    scatter = scatter / scale
    cross = cross / scale
    penalised = scatter.clone()
    penalised.diagonal().add_(relative_lambda)
    factor, info = torch.linalg.cholesky_ex(penalised)
    # A pivot is what the features before leave of a feature; without a penalty, only noise may be left.
    pivots = factor.diagonal().square() / penalised.diagonal().clamp_min(torch.finfo(torch.float64).tiny)
    enough_penalty = relative_lambda >= _ACCURACY
    if int(info) == 0 and (enough_penalty or float(pivots.min()) > _ACCURACY):
        return torch.cholesky_solve(cross, factor)
    values, vectors = torch.linalg.eigh(scatter)
    values = values.clamp_min(0) + relative_lambda
    kept = values > (0.0 if enough_penalty else _ACCURACY * float(values[-1]))
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    return vectors @ (inverse[:, None] * (vectors.T @ cross))
