"""First and second moments of pairs of vectors, gathered in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from aquakv.errors import ShapeError

_CHUNK_ROWS = 4096


class StreamingMoments:
    """Means and centred second moments of pairs (x, y), from any number of batches.

    Keys have means many times their standard deviation, arrive in bfloat16 and come by the hundred million.
    Sums of raw products would cancel catastrophically, and float32 sums would stop growing. So each chunk of
    at most 4096 rows is centred with its own mean *before* anything is multiplied; the products of a chunk
    run in true float32, where rounding is relative to the spread and not to the mean; and the results are
    merged into float64 sums with the exact correction for the two means (Chan, Golub and LeVeque, 1979).
    That is as good as float64 for fitting, at the speed of float32.

    Parameters
    ----------
    in_features, out_features : int
        Widths of x and y; either may be 0.
    device : torch.device or str, optional
        Where sums live and batches must be.
    full_y : bool, optional
        Gather the whole scatter of y; otherwise its diagonal only.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str = "cpu",
        *,
        full_y: bool = False,
    ) -> None:
        if in_features < 0 or out_features < 0:
            raise ShapeError(f"feature counts must not be negative, got {in_features} and {out_features}")
        self.in_features = in_features
        self.out_features = out_features
        self.full_y = full_y
        self._count = 0
        self._mean_x = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._mean_y = torch.zeros(out_features, dtype=torch.float64, device=device)
        self._scatter_xx = self._mean_x.new_zeros(in_features, in_features)
        self._scatter_xy = self._mean_x.new_zeros(in_features, out_features)
        shape_yy = (out_features, out_features) if full_y else (out_features,)
        self._scatter_yy = self._mean_x.new_zeros(shape_yy)

    @classmethod
    def of_parts(
        cls,
        count: int,
        mean_x: Tensor,
        mean_y: Tensor,
        scatter_xx: Tensor,
        scatter_xy: Tensor,
        scatter_yy: Tensor,
    ) -> StreamingMoments:
        """Make moments of sums that were gathered elsewhere, all float64 on one device, ``scatter_yy`` full.

        Raises
        ------
        ShapeError
            If the shapes do not fit together.
        """
        moments = cls(len(mean_x), len(mean_y), mean_x.device, full_y=True)
        parts = {"_scatter_xx": scatter_xx, "_scatter_xy": scatter_xy, "_scatter_yy": scatter_yy}
        for name, part in parts.items():
            wanted = getattr(moments, name).shape
            if part.shape != wanted:
                raise ShapeError(f"moments: expected {name[1:]} {list(wanted)}, got {list(part.shape)}")
            setattr(moments, name, part)
        moments._count, moments._mean_x, moments._mean_y = count, mean_x, mean_y
        return moments

    @property
    def device(self) -> torch.device:
        """Where the sums live."""
        return self._mean_x.device

    @property
    def count(self) -> int:
        """Number of pairs seen."""
        return self._count

    @property
    def mean_x(self) -> Tensor:
        """Mean of x, ``[in_features]`` float64; zero before the first pair."""
        return self._mean_x

    @property
    def mean_y(self) -> Tensor:
        """Mean of y, ``[out_features]`` float64; zero before the first pair."""
        return self._mean_y

    @property
    def scatter_xx(self) -> Tensor:
        """Sum of ``(x - mean)(x - mean)ᵀ``, ``[in_features, in_features]`` float64."""
        return self._scatter_xx

    @property
    def scatter_xy(self) -> Tensor:
        """Sum of ``(x - mean)(y - mean)ᵀ``, ``[in_features, out_features]`` float64."""
        return self._scatter_xy

    @property
    def scatter_yy(self) -> Tensor:
        """Sum of ``(y - mean)(y - mean)ᵀ``, ``[out_features, out_features]`` float64.

        Raises
        ------
        ShapeError
            If it was not gathered.
        """
        if not self.full_y:
            raise ShapeError("the full scatter of y was not gathered; make StreamingMoments with full_y=True")
        return self._scatter_yy

    @property
    def variance_y(self) -> Tensor:
        """Variance of each feature of y (divided by ``count``), ``[out_features]`` float64."""
        diagonal = self._scatter_yy.diagonal() if self.full_y else self._scatter_yy
        return diagonal / max(self._count, 1)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add pairs.

        Parameters
        ----------
        x : Tensor
            ``[num_pairs, in_features]``, any floating dtype, any strides.
        y : Tensor
            ``[num_pairs, out_features]``, likewise.

        Raises
        ------
        ShapeError
            If a shape, dtype or device does not fit. Nothing is added then.
        """
        self._check("x", x, self.in_features)
        self._check("y", y, self.out_features)
        if len(x) != len(y):
            raise ShapeError(f"x and y must have as many rows as each other, got {len(x)} and {len(y)}")
        with torch.no_grad(), true_float32_products():
            for start in range(0, len(x), _CHUNK_ROWS):
                rows = slice(start, start + _CHUNK_ROWS)
                self._add_chunk(x[rows], y[rows])

    def merge(self, other: StreamingMoments) -> None:
        """Add the pairs that another object has seen, from any device.

        Raises
        ------
        ShapeError
            If the two differ in features or in ``full_y``.
        """
        mine = (self.in_features, self.out_features, self.full_y)
        theirs = (other.in_features, other.out_features, other.full_y)
        if mine != theirs:
            raise ShapeError(
                f"expected moments with (in, out, full_y) = {mine}, got {theirs}; merge only alike"
            )
        scatters = (other._scatter_xx, other._scatter_xy, other._scatter_yy)
        to = self.device
        self._merge(
            other._count, other._mean_x.to(to), other._mean_y.to(to), *(part.to(to) for part in scatters)
        )

    def _add_chunk(self, x: Tensor, y: Tensor) -> None:
        count = len(x)
        x, mean_x = _centre(x)
        y, mean_y = _centre(y)
        scatter_yy = y.T @ y if self.full_y else y.square().sum(0, dtype=torch.float64)
        self._merge(
            count, mean_x, mean_y, (x.T @ x).to(torch.float64), (x.T @ y).to(torch.float64), scatter_yy
        )

    def _merge(self, count: int, mean_x: Tensor, mean_y: Tensor, xx: Tensor, xy: Tensor, yy: Tensor) -> None:
        if count == 0:
            return
        total = self._count + count
        gap_x, gap_y = mean_x - self._mean_x, mean_y - self._mean_y
        weight = self._count * count / total
        self._scatter_xx += xx
        self._scatter_xy += xy
        self._scatter_yy += yy
        self._scatter_xx.addr_(gap_x, gap_x, alpha=weight)
        self._scatter_xy.addr_(gap_x, gap_y, alpha=weight)
        if self.full_y:
            self._scatter_yy.addr_(gap_y, gap_y, alpha=weight)
        else:
            self._scatter_yy.addcmul_(gap_y, gap_y, value=weight)
        self._mean_x = self._mean_x + gap_x * (count / total)
        self._mean_y = self._mean_y + gap_y * (count / total)
        self._count = total

    def _check(self, name: str, tensor: Tensor, features: int) -> None:
        if tensor.dim() != 2 or tensor.shape[1] != features or not tensor.is_floating_point():
            raise ShapeError(
                f"{name} must be a floating tensor [num_pairs, {features}], "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.device != self.device:
            raise ShapeError(
                f"{name} must be on {self.device} like the sums, got {tensor.device}; move it there"
            )


def _centre(chunk: Tensor) -> tuple[Tensor, Tensor]:
    """Return a chunk less its mean, in float32, and the mean in float64.

    What float32 cannot say of the mean is far below the spread of the chunk, or the chunk is constant: the
    products need no further correction.
    """
    mean = chunk.mean(0, dtype=torch.float64)
    if chunk.dtype == torch.float64:
        return (chunk - mean).to(torch.float32), mean
    # The mean goes in two steps: its nearest float32 first, then what is left of it.
    rounded = mean.to(torch.float32)
    centred = chunk.to(torch.float32) - rounded
    return centred.sub_((mean - rounded).to(torch.float32)), mean


def true_float32_products() -> AbstractContextManager[None]:
    """Keep float32 matrix products from running in TF32 or bfloat16, whatever the caller has allowed."""
    return _float32_products("ieee", "highest")


def tensor_core_products() -> AbstractContextManager[None]:
    """Let a GPU's tensor cores multiply float32 matrices: factors of TF32's eleven bits, sums in float32.

    For moments of centred vectors only: rounding then adds noise of 2^-25 of each feature's variance, where
    keys and values come with bfloat16's 2^-19 of their *whole* square, mean included, and a ridge of 2^-10 is
    added. On a CPU the products are those of `true_float32_products`.
    """
    return _float32_products("tf32", "high")


@contextmanager
def _float32_products(gpu: str, older: str) -> Iterator[None]:
    places: list[tuple[Any, str, Any]] = []
    if hasattr(
        torch.backends.cuda.matmul, "fp32_precision"
    ):  # torch >= 2.9; the older switches clash with it
        places.append((torch.backends.cuda.matmul, "fp32_precision", gpu))
        places.append((torch.backends.mkldnn.matmul, "fp32_precision", "ieee"))  # type: ignore[attr-defined]
        saved = [getattr(place, name) for place, name, _ in places]
        try:
            for place, name, value in places:
                setattr(place, name, value)
            yield
        finally:
            for (place, name, _), value in zip(places, saved, strict=True):
                setattr(place, name, value)
        return
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(older)
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
