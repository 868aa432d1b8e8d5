"""First stage: predict a layer's keys or values from what the decoder has already reconstructed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from aquakv.errors import ShapeError


@dataclass(frozen=True)
class AffinePredictor:
    """Affine map from reconstructions to a prediction (arXiv:2501.19392 §3).

    Attributes
    ----------
    factors
        One matrix ``[in_features, out_features]``, or two, ``[in_features, rank]`` and ``[rank,
        out_features]``, whose product is the map; bfloat16. Stored narrow because whatever rounding costs in
        prediction is in the residual that is coded anyway; and encoder and decoder then agree whatever the
        precision the decoder computes in.
    bias
        ``[out_features]`` float32.
    """

    factors: tuple[Tensor, ...]
    bias: Tensor

    def __post_init__(self) -> None:
        shapes = [tuple(factor.shape) for factor in self.factors]
        chain = all(len(shape) == 2 for shape in shapes) and len(shapes) in (1, 2)
        chain = chain and all(a[1] == b[0] for a, b in pairwise(shapes))
        if not chain or tuple(self.bias.shape) != shapes[-1][1:]:
            raise ShapeError(
                "predictor: expected factors [in_features, out_features] or [in_features, rank] and [rank, "
                f"out_features], and bias [out_features]; got {shapes} and {tuple(self.bias.shape)}"
            )

    @property
    def in_features(self) -> int:
        """Length of the vectors that the prediction is made from."""
        return self.factors[0].shape[0]

    @property
    def rank(self) -> int | None:
        """Length of the latent that the map goes through; None for a dense map."""
        return self.factors[0].shape[1] if len(self.factors) == 2 else None

    def predict(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the prediction, ``[tokens, out_features]``, in the dtype of ``inputs``.

        ``inputs`` are blocks ``[tokens, width]`` of one dtype whose widths sum to ``in_features``.
        """
        dtype = inputs[0].dtype
        bias = self.bias.to(dtype).expand(inputs[0].shape[0], -1)
        if self.rank is None:
            return self._multiply(inputs, bias)
        return torch.addmm(bias, self.latent(inputs), self.factors[1].to(dtype))

    def latent(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the latents ``[tokens, rank]`` of a low-rank map, in the dtype of ``inputs``."""
        if self.rank is None:
            raise ShapeError("predictor: a dense map has no latent; expected a key_rank or value_rank")
        return self._multiply(inputs, inputs[0].new_zeros(inputs[0].shape[0], self.rank))

    def _multiply(self, inputs: tuple[Tensor, ...], start: Tensor) -> Tensor:
        widths = [block.shape[-1] for block in inputs]
        if sum(widths) != self.in_features:
            raise ShapeError(
                f"predictor: expected inputs of {self.in_features} features in all, got {widths}"
            )
        for block, weight in zip(inputs, self.factors[0].split(widths), strict=True):
            start = torch.addmm(start, block, weight.to(block.dtype))
        return start

    def to(self, device: torch.device | str) -> AffinePredictor:
        """Return the predictor on another device."""
        return AffinePredictor(tuple(factor.to(device) for factor in self.factors), self.bias.to(device))
