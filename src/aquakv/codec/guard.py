"""The outlier guard: which compressed tokens are so far off that attention should see them exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.errors import ShapeError

#: Heads are padded to a multiple of this for products.
_DIM_QUANTUM = 16


@dataclass(frozen=True)
class OutlierGuard:
    """Measure errors as attention feels them, relative to what is tolerated.

    Attributes
    ----------
    roots
        ``[num_kv_heads, head_dim, head_dim]`` float32: symmetric root of each head's weight.
    limit
        ``[1]`` float32: squared weighted error that makes a token an outlier.
    """

    roots: Tensor
    limit: Tensor

    def __post_init__(self) -> None:
        if self.roots.ndim != 3 or self.roots.shape[1] != self.roots.shape[2] or self.limit.shape != (1,):
            raise ShapeError(
                "guard: expected roots [heads, head_dim, head_dim] and a limit [1], got "
                f"{list(self.roots.shape)} and {list(self.limit.shape)}"
            )

    def weighted_error(self, error: Tensor) -> Tensor:
        """Return the squared weighted length, ``[tokens]``, of errors ``[tokens, heads * head_dim]``."""
        heads, dim, _ = self.roots.shape
        # Products of odd small matrices, and sums over dimensions that lie apart, can depend on where in the
        # block a row stands; a token's figure must not.
        missing = -dim % _DIM_QUANTUM
        by_head = torch.nn.functional.pad(error.float().view(-1, heads, dim), (0, missing)).transpose(0, 1)
        roots = torch.nn.functional.pad(self.roots, (0, missing, 0, missing))
        squares = torch.bmm(by_head, roots).square_().transpose(0, 1).flatten(1)
        return squares.sum(1, dtype=torch.float64).float()

    def excess(self, error: Tensor) -> Tensor:
        """Return the squared weighted error over the limit, ``[tokens]``; above 1 for outliers."""
        return self.weighted_error(error) / self.limit

    def to(self, device: torch.device | str) -> OutlierGuard:
        """Return the guard on another device."""
        return OutlierGuard(self.roots.to(device), self.limit.to(device))


def choose_outliers(excess: Tensor, block_tokens: int, most: int) -> Tensor:
    """Return the indices, int64 in rising order, of the tokens to keep exact; waits for their number.

    Parameters as for `which_are_outliers`, of ``[tokens]``.
    """
    return which_are_outliers(excess, block_tokens, most).nonzero().squeeze(1)


def which_are_outliers(excess: Tensor, block_tokens: int, most: int) -> Tensor:
    """Tell which tokens to keep exact, as bools in the shape of ``excess``; waits for nothing.

    Parameters
    ----------
    excess
        ``[…, tokens]``, whole blocks: by how much each token exceeds its limit. Not-a-number never counts.
    block_tokens
        Tokens of a block; blocks do not influence each other.
    most
        Tokens of a block at most: those with the largest excess, the earlier one where two are equal.
    """
    blocks = excess.reshape(-1, block_tokens).nan_to_num(0.0, posinf=torch.finfo(excess.dtype).max)
    largest, order = blocks.sort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(blocks, dtype=torch.bool)
    chosen.scatter_(1, order[:, :most], largest[:, :most] > 1)
    return chosen.view(excess.shape)
