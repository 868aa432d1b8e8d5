"""Second stage: a linear transform of the residual, fixed (by groups) or fitted (Karhunen-Loeve)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.config import TransformConfig
from aquakv.errors import ShapeError
from aquakv.numerics import orthogonal_matrix


@dataclass(frozen=True)
class GroupTransform:
    """Multiply each group of ``group_size`` coordinates by one fixed orthogonal matrix.

    Attributes
    ----------
    features
        Length of the vectors, a multiple of ``group_size``.
    group_size
        Coordinates that are mixed, and later share a scale.
    matrix
        ``[group_size, group_size]`` float32, orthonormal; None for the identity. It follows from
        ``group_size`` by a formula and is never stored.
    """

    features: int
    group_size: int
    matrix: Tensor | None

    def forward(self, residual: Tensor) -> Tensor:
        """Return the coefficients, ``[tokens, features]``, of residuals of that shape."""
        return residual if self.matrix is None else self._apply(residual, self.matrix)

    def inverse(self, coefficients: Tensor) -> Tensor:
        """Return the residuals, ``[tokens, features]``, of coefficients of that shape."""
        return coefficients if self.matrix is None else self._apply(coefficients, self.matrix.T)

    def inverse_add(self, coefficients: Tensor, base: Tensor) -> Tensor:
        """Return ``base + inverse(coefficients)`` without an intermediate result where that is possible."""
        if self.matrix is None or self.group_size != self.features:
            return base + self.inverse(coefficients)
        return torch.addmm(base, coefficients, self.matrix.T.to(coefficients.dtype))

    def _apply(self, vectors: Tensor, matrix: Tensor) -> Tensor:
        if vectors.ndim != 2 or vectors.shape[1] != self.features:
            raise ShapeError(f"transform: expected [tokens, {self.features}], got {list(vectors.shape)}")
        groups = vectors.reshape(-1, self.group_size) @ matrix.to(vectors.dtype)
        return groups.view(-1, self.features)

    def to(self, device: torch.device | str) -> GroupTransform:
        """Return the transform on another device."""
        matrix = None if self.matrix is None else self.matrix.to(device)
        return GroupTransform(self.features, self.group_size, matrix)


@dataclass(frozen=True)
class LinearTransform:
    """A fitted transform to those coefficients that are coded at all.

    Attributes
    ----------
    analysis
        ``[features, coefficients]`` float32: coefficients of a residual are ``residual @ analysis``.
    synthesis
        ``[coefficients, features]`` float32: what coefficients stand for is ``coefficients @ synthesis``.
        With all coefficients kept the two are inverse to each other.
    """

    analysis: Tensor
    synthesis: Tensor

    def __post_init__(self) -> None:
        if self.analysis.ndim != 2 or self.synthesis.shape != self.analysis.T.shape:
            raise ShapeError(
                "transform: expected matrices [features, coefficients] and [coefficients, features], got "
                f"{list(self.analysis.shape)} and {list(self.synthesis.shape)}"
            )

    @property
    def coefficients(self) -> int:
        """Coefficients of a vector."""
        return self.analysis.shape[1]

    def forward(self, residual: Tensor) -> Tensor:
        """Return the coefficients, ``[tokens, coefficients]``, of residuals ``[tokens, features]``."""
        if residual.ndim != 2 or residual.shape[1] != self.analysis.shape[0]:
            raise ShapeError(
                f"transform: expected [tokens, {self.analysis.shape[0]}], got {list(residual.shape)}"
            )
        return residual @ self.analysis.to(residual.dtype)

    def inverse(self, coefficients: Tensor) -> Tensor:
        """Return the residuals, ``[tokens, features]``, that coefficients stand for."""
        return coefficients @ self.synthesis.to(coefficients.dtype)

    def inverse_add(self, coefficients: Tensor, base: Tensor) -> Tensor:
        """Return ``base + inverse(coefficients)``."""
        return torch.addmm(base, coefficients, self.synthesis.to(coefficients.dtype))

    def to(self, device: torch.device | str) -> LinearTransform:
        """Return the transform on another device."""
        return LinearTransform(self.analysis.to(device), self.synthesis.to(device))


def largest_group(features: int, max_group_size: int) -> int:
    """Return the largest divisor of ``features`` that is at most ``max_group_size``."""
    return next(g for g in range(min(features, max_group_size), 0, -1) if features % g == 0)


def build_transform(config: TransformConfig, features: int) -> GroupTransform:
    """Build the transform for vectors of ``features`` coordinates, on the CPU."""
    group_size = largest_group(features, config.max_group_size)
    matrix = orthogonal_matrix(group_size) if config.kind == "hadamard" else None
    return GroupTransform(features, group_size, matrix)
