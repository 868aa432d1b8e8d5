"""MSE-optimal quantiser grids for a unit Gaussian (HIGGS, arXiv:2411.17525; scalar: Lloyd and Max).

The points are computed by ``scripts/make_grids.py`` and ship in ``data/grids.safetensors``. They are sorted
by their first coordinate, then by their second: a code is an index into that order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources

import torch
from safetensors import safe_open
from torch import Tensor

from aquakv.errors import ConfigError, ShapeError
from aquakv.numerics.packing import gather_rows
from aquakv.numerics.voronoi import CellTable, LineTable, nearest_brute


@dataclass(frozen=True, eq=False)
class GaussianGrid:
    """A vector quantiser for independent unit Gaussian coordinates.

    Attributes
    ----------
    points : Tensor
        ``[num_points, dim]`` float32; ``dim`` is 1 or 2. Shared by all users: do not write to it.
    mse : float
        Expected squared error per coordinate on unit Gaussian input.
    """

    points: Tensor
    mse: float

    @property
    def num_points(self) -> int:
        """Number of points, a power of two up to 256."""
        return self.points.shape[0]

    @property
    def dim(self) -> int:
        """Coordinates coded together."""
        return self.points.shape[1]

    @property
    def code_width(self) -> int:
        """Bits of one code."""
        return self.num_points.bit_length() - 1

    @property
    def bits_per_value(self) -> float:
        """Bits per coordinate."""
        return self.code_width / self.dim

    def nearest(self, x: Tensor) -> Tensor:
        """Round to the nearest points, exactly; equal distances go to the lowest code.

        Each code depends on its own coordinates alone, not on how rows are batched nor on the device.

        Parameters
        ----------
        x : Tensor
            ``[..., m * dim]`` float32 on the grid's device, any strides; ``dim`` neighbouring values make one
            code.

        Returns
        -------
        Tensor
            ``[..., m]`` uint8 codes. NaN gets code 0. An infinity gets the outermost code in one dimension;
            in two, a pair that has one gets code 0.

        Raises
        ------
        ShapeError
            If ``x`` is not float32, on another device, or its last dimension is not a multiple of ``dim``.
        """
        if x.dtype != torch.float32 or x.dim() == 0 or x.shape[-1] % self.dim:
            raise ShapeError(
                f"x must be float32 [..., m * {self.dim}], got {x.dtype} {list(x.shape)}; convert it"
            )
        if x.device != self.points.device:
            raise ShapeError(
                f"x must be on {self.points.device} like the grid, got {x.device}; load the grid there"
            )
        shape = (*x.shape[:-1], x.shape[-1] // self.dim)
        x = x.detach()
        if self.dim == 1:
            return self._line.nearest(x.reshape(-1)).reshape(shape)
        if x.device.type == "cpu":
            return self._cells.nearest(x.reshape(-1, 2)).reshape(shape)
        return nearest_brute(x.reshape(-1, 2), self._exact_points).reshape(shape)

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the points of codes.

        Parameters
        ----------
        codes : Tensor
            ``[..., m]``, any integer dtype, values below ``num_points``, on the grid's device.
        dtype : torch.dtype
            Of the result.

        Returns
        -------
        Tensor
            ``[..., m * dim]``.

        Raises
        ------
        ShapeError
            If ``codes`` is not an integer tensor or on another device.
        """
        if codes.dim() == 0 or codes.is_floating_point() or codes.dtype == torch.bool:
            raise ShapeError(f"codes must be integers [..., m], got {codes.dtype} {list(codes.shape)}")
        if codes.device != self.points.device:
            raise ShapeError(f"codes must be on {self.points.device} like the grid, got {codes.device}")
        values = gather_rows(self.points.to(dtype), codes.reshape(-1).to(torch.int32))
        return values.reshape(*codes.shape[:-1], codes.shape[-1] * self.dim)

    @cached_property
    def _line(self) -> LineTable:
        return LineTable(self._exact_points[:, 0])

    @cached_property
    def _exact_points(self) -> Tensor:
        return self.points.to(torch.float64)

    @cached_property
    def _cells(self) -> CellTable:
        return CellTable(self._exact_points, radius=5.0, size=512)


def available_grids() -> list[tuple[int, int]]:
    """List the ``(dim, num_points)`` of every grid that there is."""
    return sorted(_read_file())


def load_grid(dim: int, num_points: int, device: torch.device | str | None = None) -> GaussianGrid:
    """Load a shipped grid; the same object for the same arguments.

    Parameters
    ----------
    dim : int
        Coordinates coded together: 1 or 2.
    num_points : int
        Size of the grid.
    device : torch.device or str, optional
        Where its points live and its input will; the CPU by default.

    Raises
    ------
    ConfigError
        If there is no such grid.
    """
    return _load_grid(dim, num_points, _with_index(torch.device(device or "cpu")))


@lru_cache(maxsize=64)
def _load_grid(dim: int, num_points: int, device: torch.device) -> GaussianGrid:
    grids = _read_file()
    if (dim, num_points) not in grids:
        have = ", ".join(f"({d}, {n})" for d, n in sorted(grids))
        raise ConfigError(f"no grid with (dim, num_points) = ({dim}, {num_points}); choose one of {have}")
    points, mse = grids[dim, num_points]
    return GaussianGrid(points.to(device), mse)


@lru_cache(maxsize=1)
def _read_file() -> dict[tuple[int, int], tuple[Tensor, float]]:
    source = resources.files("aquakv.numerics") / "data" / "grids.safetensors"
    grids = {}
    with resources.as_file(source) as path, safe_open(path, "pt") as file:
        mse = json.loads(file.metadata()["mse"])
        for name in file.keys():  # noqa: SIM118 - the handle is no mapping
            points = file.get_tensor(name)
            num_points, dim = points.shape
            grids[dim, num_points] = points, mse[name]
    return grids


def _with_index(device: torch.device) -> torch.device:
    """Name the current CUDA device in full: tensors say ``cuda:0`` where callers say ``cuda``."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
