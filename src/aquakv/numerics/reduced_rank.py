"""Reduced-rank regression: the best map of a given rank, in a norm of the targets."""

from __future__ import annotations

import torch
from torch import Tensor

from aquakv.errors import ConfigError
from aquakv.numerics.klt import symmetric_root
from aquakv.numerics.moments import StreamingMoments


def reduce_rank(
    moments: StreamingMoments, weight: Tensor, rank: int, metric: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Split a regression's map into two factors of a given rank (reduced-rank regression, Izenman 1975).

    Of all maps of this rank, the product of the factors gives predictions nearest to those of ``weight`` on
    the inputs that the moments describe, in the norm of ``metric``.

    Parameters
    ----------
    moments : StreamingMoments
        Of the inputs.
    weight : Tensor
        ``[in_features, out_features]``, any float dtype.
    rank : int
        Up to the smaller of both.
    metric : Tensor, optional
        ``[out_features, out_features]`` float64, positive definite; the identity if None.

    Returns
    -------
    down, up : Tensor
        ``[in_features, rank]`` and ``[rank, out_features]`` float32. The latent ``x @ down`` has unit
        variance in every coordinate (zero where nothing varies) on those inputs.

    Raises
    ------
    ConfigError
        If the rank is not between 1 and the smaller of the features.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ConfigError(f"rank: expected a whole number from 1 to {min(weight.shape)}, got {rank}")
    weight = weight.double()
    identity = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
    root = identity if metric is None else symmetric_root(metric)
    unroot = identity if metric is None else symmetric_root(metric, inverse=True)
    predicted = weight @ root
    covariance = predicted.T @ moments.scatter_xx @ predicted / max(moments.count, 1)
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    values, vectors = values[-rank:].clamp_min(0), vectors[:, -rank:]
    kept = values > 1e-12 * values.max().clamp_min(1e-300)
    deviation = torch.where(kept, values, 1.0).sqrt()
    down = torch.where(kept, predicted @ vectors / deviation, 0.0)
    up = (vectors * deviation).T @ unroot
    return down.float(), up.float()
