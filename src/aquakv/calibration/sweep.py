"""What one sweep over a layer's batches learns beside the reconstructions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from aquakv.calibration.group import Group
from aquakv.codec import TensorCodec


@dataclass(frozen=True)
class Split:
    """Which sequences of each batch are fitted; the others are held out.

    Attributes
    ----------
    fitted
        For every batch, how many of its first sequences are fitted.
    """

    fitted: tuple[int, ...]

    @classmethod
    def of(cls, batch_sizes: Sequence[int], held_out: int) -> Split:
        """Hold out the last ``held_out`` sequences."""
        left = sum(batch_sizes) - held_out
        fitted = []
        for size in batch_sizes:
            fitted.append(max(0, min(size, left)))
            left -= size
        return cls(tuple(fitted))

    def share(self, group: Group) -> Split:
        """Return the split of the batches that are one process's own: every ``size``-th of all."""
        return Split(self.fitted[group.rank :: group.size])


@dataclass
class Sweep:
    """Sums over the tokens of a sweep.

    Attributes
    ----------
    total, residual, error
        Squares over held-out tokens: of the centred vectors, of what predictors leave, of what codes miss.
    weighted_error, fitted_tokens
        Weighted errors of fitted tokens, and how many these are.
    code_bits, held_out_tokens
        Bits of held-out tokens' codes, and how many these are.
    """

    total: float = 0.0
    residual: float = 0.0
    error: float = 0.0
    weighted_error: float = 0.0
    fitted_tokens: float = 0
    code_bits: float = 0.0
    held_out_tokens: float = 0

    def count_errors(
        self, codec: TensorCodec, centred: Tensor, residual: Tensor, hat: Tensor, mean: Tensor, first: int
    ) -> None:
        """Add a batch's rows ``[tokens, features]``, of which the ``first`` are fitted."""
        held = slice(first, None)
        self.total += _square_sum(centred[held] + codec.mean - mean)
        self.residual += _square_sum(residual[held])
        self.error += _square_sum(centred[held] - hat[held])
        self.fitted_tokens += first
        self.held_out_tokens += len(centred) - first
        if codec.guard is not None and first:
            errors = codec.guard.weighted_error((centred - hat)[:first])
            self.weighted_error += float(errors.double().sum())

    def share(self, group: Group) -> None:
        """Add what the other processes of a group have summed."""
        names = [field.name for field in fields(self)]
        sums = group.add_numbers(*(getattr(self, name) for name in names))
        for name, total in zip(names, sums, strict=True):
            setattr(self, name, total)

    def figures(self) -> dict[str, float]:
        """Return fractions of the held-out variance."""
        total = max(self.total, 1e-30)
        return {
            "explained_variance": 1 - self.residual / total,
            "reconstruction_error": self.error / total,
        }


def _square_sum(tensor: Tensor) -> float:
    return float(tensor.square().sum(dtype=torch.float64))
