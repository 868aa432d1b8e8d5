"""First stage: predict a layer's keys or values from what the decoder has already reconstructed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.errors import ShapeError


@dataclass(frozen=True)
class AffinePredictor:
    """Affine map from reconstructions to a prediction (arXiv:2501.19392 §3).

    Attributes
    ----------
    weight
        ``[in_features, out_features]`` bfloat16. Stored narrow because whatever rounding costs in prediction
        is in the residual that is coded anyway; and encoder and decoder then agree whatever the precision the
        decoder computes in.
    bias
        ``[out_features]`` float32.
    """

    weight: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.bias.shape != self.weight.shape[1:]:
            raise ShapeError(
                "predictor: expected weight [in_features, out_features] and bias [out_features], got "
                f"{tuple(self.weight.shape)} and {tuple(self.bias.shape)}"
            )

    @property
    def in_features(self) -> int:
        """Length of the vectors that the prediction is made from."""
        return self.weight.shape[0]

    def predict(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the prediction, ``[tokens, out_features]``, in the dtype of ``inputs``.

        ``inputs`` are blocks ``[tokens, width]`` of one dtype whose widths sum to ``in_features``.
        """
        widths = [block.shape[-1] for block in inputs]
        if sum(widths) != self.in_features:
            raise ShapeError(
                f"predictor: expected inputs of {self.in_features} features in all, got {widths}"
            )
        dtype = inputs[0].dtype
        prediction = self.bias.to(dtype).expand(inputs[0].shape[0], -1)
        for block, weight in zip(inputs, self.weight.split(widths), strict=True):
            prediction = torch.addmm(prediction, block, weight.to(dtype))
        return prediction

    def to(self, device: torch.device | str) -> AffinePredictor:
        """Return the predictor on another device."""
        return AffinePredictor(self.weight.to(device), self.bias.to(device))
