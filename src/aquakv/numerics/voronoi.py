"""Exact nearest-point search on the line and in the plane.

On the line, values are compared with the exact midpoints. In the plane, which point is nearest is decided by
squared distances in float64, computed by the same elementwise operations for every pair, whatever path finds
the candidates. So codes depend neither on how rows are batched nor on the device. Equal distances go to the
lowest index. Pairs with a NaN or an infinity get code 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Scratch of one step of a search, in elements: small enough for a CPU's cache, large enough to fill a GPU.
_BRUTE_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}
_PAIRS_PER_CHUNK = 1 << 15
_VALUES_PER_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 22}
# Cells that more regions than this may meet lie far out; they are not worth a longer list for all.
_MAX_LIST = 4


def squared_distances(pairs: Tensor, points: Tensor) -> Tensor:
    """Compute squared distances ``[..., k]`` in float64 of ``pairs [..., 2]`` to ``points [..., k, 2]``."""
    gap = pairs[..., 0, None].to(torch.float64) - points[..., 0]
    distance = gap.mul_(gap)
    gap = pairs[..., 1, None].to(torch.float64) - points[..., 1]
    return distance.add_(gap.mul_(gap))


def nearest_brute(pairs: Tensor, points: Tensor) -> Tensor:
    """Find the nearest of ``points [n, 2]`` float64 for ``pairs [N, 2]``; return ``[N]`` uint8 codes."""
    codes = torch.empty(len(pairs), dtype=torch.uint8, device=pairs.device)
    rows = max(1, _BRUTE_ELEMENTS.get(pairs.device.type, 1 << 20) // len(points))
    for start in range(0, len(pairs), rows):
        chunk = slice(start, start + rows)
        codes[chunk] = squared_distances(pairs[chunk], points).argmin(-1).to(torch.uint8)
    return codes


class LineTable:
    """Nearest-point search on the line by a table of small intervals; for any device.

    An interval holds at most one midpoint of neighbouring points: its table entry is the code below that
    midpoint, and one comparison decides.

    Parameters
    ----------
    points : Tensor
        ``[n]`` float64, ascending, ``n`` at most 256. The table lives on their device.
    """

    def __init__(self, points: Tensor) -> None:
        exact = (points[1:] + points[:-1]) / 2
        # Rounded down to float32: x <= midpoint then holds for the same float32 x as with the exact midpoint.
        rounded = exact.to(torch.float32)
        below = torch.nextafter(rounded, torch.full_like(rounded, -math.inf))
        midpoints = torch.where(rounded.to(torch.float64) > exact, below, rounded)
        gap = float((midpoints[1:] - midpoints[:-1]).min()) if len(midpoints) > 1 else 1.0
        step = gap / 2
        self._scale = 1 / step
        self._offset = 2 - float(midpoints[0]) * self._scale
        self._size = math.ceil(float(midpoints[-1]) * self._scale + self._offset) + 2
        # Half an interval of slack on the left, so that rounding of the interval's index does no harm.
        left = (torch.arange(self._size, dtype=torch.float64) - 0.25 - self._offset) * step
        code = torch.searchsorted(midpoints.to("cpu", torch.float64), left)
        above = torch.cat([midpoints.cpu(), torch.tensor([math.inf])])
        self._codes = code.to(torch.uint8).to(points.device)
        self._midpoints = above[code].to(points.device)

    def nearest(self, values: Tensor) -> Tensor:
        """Find the nearest point of ``values [N]`` float32; return ``[N]`` uint8 codes."""
        codes = torch.empty(len(values), dtype=torch.uint8, device=values.device)
        length = _VALUES_PER_CHUNK.get(values.device.type, 1 << 20)
        for start in range(0, len(values), length):
            chunk = values[start : start + length]
            index = chunk.mul(self._scale).add_(self._offset).clamp_(0, self._size - 1).to(torch.int32)
            # A NaN becomes 0 or the lowest integer: it gets the first interval, and is not above anything.
            index.clamp_(min=0)
            above = chunk > self._midpoints.index_select(0, index)
            torch.add(self._codes.index_select(0, index), above, out=codes[start : start + length])
        return codes


class CellTable:
    """Nearest-point search by a table of small square cells; for a CPU.

    The square ``[-radius, radius]²`` is cut into ``size * size`` cells. Most lie inside one Voronoi region,
    and their entry is its code. Entries from ``num_points + 1`` on name a list of the points whose regions
    may meet the cell; only these few distances are compared. The entry ``num_points`` asks for a comparison
    with all points: it marks cells with longer lists and the outermost ones, where all strays end.

    Parameters
    ----------
    points : Tensor
        ``[n, 2]`` float64 on a CPU, ``n`` at most 256.
    radius : float
        Half the side of the square.
    size : int
        Cells per axis, a multiple of 16.
    """

    def __init__(self, points: Tensor, radius: float, size: int) -> None:
        self._points = points
        self._size = size
        self._scale = size / (2 * radius)
        self._entries, self._lists = _build(points, radius, size)
        self._list_points = points[self._lists.to(torch.int64)]

    def nearest(self, pairs: Tensor) -> Tensor:
        """Find the nearest point of ``pairs [N, 2]`` float32; return ``[N]`` uint8 codes."""
        codes = torch.empty(len(pairs), dtype=torch.uint8)
        for start in range(0, len(pairs), _PAIRS_PER_CHUNK):
            chunk = slice(start, start + _PAIRS_PER_CHUNK)
            self._nearest_chunk(pairs[chunk], codes[chunk])
        return codes

    def _nearest_chunk(self, pairs: Tensor, codes: Tensor) -> None:
        size, unique = self._size, len(self._points)
        cell = pairs.mul(self._scale).add_(size / 2).clamp_(0, size - 1).to(torch.int32)
        # A NaN becomes 0 or the lowest integer: after this clamp it is in an outermost cell like all strays.
        index = torch.add(cell[:, 1], cell[:, 0], alpha=size).clamp_(0, size * size - 1)
        entries = self._entries.index_select(0, index)
        codes.copy_(entries)
        undecided = (entries >= unique).nonzero().squeeze(1)
        if undecided.numel() == 0:
            return
        entries = entries.index_select(0, undecided)
        pairs = pairs.index_select(0, undecided)
        stray = entries == unique
        slot = entries.sub_(unique + 1).clamp_(min=0).to(torch.int32)
        distance = squared_distances(pairs, self._list_points.index_select(0, slot))
        lists = self._lists.index_select(0, slot)
        best, winner = distance[:, 0], lists[:, 0]
        # A loop over the few columns beats argmin along so short a dimension; `<` keeps the lowest index.
        for column in range(1, lists.shape[1]):
            closer = distance[:, column] < best
            winner = torch.where(closer, lists[:, column], winner)
            best = torch.where(closer, distance[:, column], best)
        if stray.any():
            winner[stray] = nearest_brute(pairs[stray], self._points)
        codes.index_copy_(0, undecided, winner)


def _build(points: Tensor, radius: float, size: int) -> tuple[Tensor, Tensor]:
    """Return the cells' entries ``[size**2]`` int16 and the lists ``[num_lists, k]`` uint8, ascending."""
    n, block = len(points), 16
    step = 2 * radius / size
    axis = (torch.arange(size, dtype=torch.float64) + 0.5) * step - radius
    centres = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
    # Candidates of whole blocks first: the cells of a block then compare these alone.
    blocks = centres.reshape(size // block, block, size // block, block, 2).transpose(1, 2).flatten(2, 3)
    everything = torch.arange(n).expand(*blocks.shape[:2], n)
    coarse = _candidates(blocks.mean(2), block * step / 2, everything, points)
    # Cells are a little larger here than there, so that rounding of the cell's index does no harm.
    each = coarse[:, :, None].expand(*blocks.shape[:3], -1)
    fine = _candidates(blocks, step / 2 * 1.001, each, points)
    num_blocks, width = size // block, fine.shape[-1]
    fine = (
        fine.reshape(num_blocks, num_blocks, block, block, width).transpose(1, 2).reshape(size, size, width)
    )
    entries = fine[..., 0].clone()
    long = (fine[..., _MAX_LIST:] != fine[..., :1]).any(-1)
    shared = (fine != fine[..., :1]).any(-1) & ~long
    lists, slot = torch.unique(fine[shared][:, :_MAX_LIST], dim=0, return_inverse=True)
    entries[shared] = slot + n + 1
    entries[long] = n
    entries[0], entries[-1], entries[:, 0], entries[:, -1] = n, n, n, n
    return entries.reshape(-1).to(torch.int16), lists.to(torch.uint8)


def _candidates(centres: Tensor, half_width: float, among: Tensor, points: Tensor) -> Tensor:
    """List the points that may be nearest somewhere in square cells.

    Takes ``centres [..., 2]`` and ascending indices ``among [..., k]``; returns ``[..., width]`` ascending
    indices, filled up with repetitions of the first.
    """
    near = points[among]
    distance = squared_distances(centres, near)
    closest, best = distance.min(-1, keepdim=True)
    # |x - p|² - |x - p_best|² is linear in x: over a cell it falls at most this far below that of its centre.
    fall = 2 * half_width * (near - points[among.gather(-1, best)]).abs().sum(-1)
    possible = distance - closest - fall <= 1e-9
    width = int(possible.sum(-1).max())
    chosen = among.masked_fill(~possible, len(points)).sort(-1).values[..., :width]
    return torch.where(chosen < len(points), chosen, chosen[..., :1])
