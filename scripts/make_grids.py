"""Compute the MSE-optimal grids for a unit Gaussian that aquakv ships, or check the shipped ones.

    python scripts/make_grids.py [--out PATH]     compute and write
    python scripts/make_grids.py --check          compute and compare with the shipped file

One dimension: Newton's method on the stationarity conditions of Lloyd and Max, with exact Gaussian integrals
in float64. Two dimensions: over-relaxed Lloyd iterations over a weighted lattice, from a number of fixed
starts; the best is polished on a finer lattice. Takes a minute or two on two cores. The same machine gives
the same file; on another one the two-dimensional search may end in another optimum of nearly the same
quality, so `--check` compares mean squared errors, and points only in one dimension.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SHIPPED = Path(__file__).parents[1] / "src/aquakv/numerics/data/grids.safetensors"
SCALAR_SIZES = [2**bits for bits in range(1, 9)]
PAIR_SIZES = [16, 64, 256]
# Number of random starts and Lloyd iterations per start, by grid size.
SEARCH = {16: (8, 100), 64: (8, 150), 256: (6, 250)}
COARSE, FINE = 512, 1536  # lattice points per axis
EXTENT = 6.2  # the lattice covers [-EXTENT, EXTENT] squared; 1e-9 of the mass lies outside
BLOCK = 16  # lattice points per side of a block that shares a list of candidate points


# --- one dimension ---------------------------------------------------------------------------------------


def normal_pdf(t: Tensor) -> Tensor:
    return torch.exp(-t * t / 2) / math.sqrt(2 * math.pi)


def cell_moments(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return inner thresholds, mass and first moment of each Voronoi cell of ascending points."""
    inner = (points[1:] + points[:-1]) / 2
    zero = points.new_zeros(1)
    pdf = torch.cat([zero, normal_pdf(inner), zero])
    # Masses come from the tail nearer to zero mass, so that outer cells keep their relative precision.
    lower = torch.cat([zero, torch.special.ndtr(inner), zero + 1])
    upper = torch.cat([zero + 1, torch.special.ndtr(-inner), zero])
    mass = torch.where(points < 0, lower[1:] - lower[:-1], upper[:-1] - upper[1:])
    return inner, mass, pdf[:-1] - pdf[1:]


def scalar_mse(points: Tensor) -> float:
    _, mass, moment = cell_moments(points)
    return float(1 - 2 * (points * moment).sum() + (points * points * mass).sum())


def scalar_grid(num_points: int) -> tuple[Tensor, float]:
    rank = (torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points
    points = math.sqrt(3) * torch.special.ndtri(rank)  # the optimal density of points is that of N(0, 3)
    for _ in range(50):
        _, mass, moment = cell_moments(points)
        points = moment / mass
    for _ in range(100):
        inner, mass, moment = cell_moments(points)
        gradient = points * mass - moment
        coupling = normal_pdf(inner) * (points[1:] - points[:-1]) / 4
        diagonal = mass.clone()
        diagonal[1:] -= coupling
        diagonal[:-1] -= coupling
        hessian = torch.diag(diagonal) - torch.diag(coupling, 1) - torch.diag(coupling, -1)
        step = torch.linalg.solve(hessian, gradient)
        points = points - step
        points = (points - points.flip(0)) / 2
        if step.abs().max() < 1e-11:
            break
    else:
        sys.exit(f"Newton's method did not converge for {num_points} points")
    points = points.to(torch.float32)
    return points[:, None], scalar_mse(points.to(torch.float64))


# --- two dimensions --------------------------------------------------------------------------------------


class Lattice:
    """A square lattice with Gaussian weights, in blocks that share their candidate points."""

    def __init__(self, size: int) -> None:
        blocks = size // BLOCK
        step = 2 * EXTENT / size
        axis = (torch.arange(size, dtype=torch.float64) + 0.5) * step - EXTENT
        x, y = torch.meshgrid(axis, axis, indexing="ij")
        sites = torch.stack([x, y], -1).reshape(blocks, BLOCK, blocks, BLOCK, 2).transpose(1, 2)
        self.sites = sites.reshape(blocks * blocks, BLOCK * BLOCK, 2).contiguous()
        weights = torch.exp(-self.sites.square().sum(-1) / 2)
        self.weights = weights / weights.sum()
        self.moment = float((self.weights * self.sites.square().sum(-1)).sum())
        self.centres = self.sites.mean(1)
        self.half_width = (BLOCK - 1) / 2 * step

    def cell_sums(self, points: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return each point's mass ``[n]``, first moment ``[n, 2]`` and the MSE per coordinate."""
        n = len(points)
        # Point j can be nearest to a site of a block only if it beats the point nearest to the centre there.
        distance = torch.cdist(self.centres, points).square()
        best = distance.argmin(1, keepdim=True)
        gap = points[None] - points[best]
        reach = 2 * self.half_width * gap.abs().sum(-1)
        beaten_by = distance - distance.gather(1, best) - reach
        width = int((beaten_by <= 1e-9).sum(1).max())
        candidates = beaten_by.topk(width, largest=False).indices
        near = points[candidates]
        score = torch.baddbmm(near.square().sum(-1)[:, None] / 2, self.sites, near.transpose(1, 2), alpha=-1)
        codes = candidates.gather(1, score.argmin(-1)).reshape(-1)
        weights = self.weights.reshape(-1)
        mass = torch.bincount(codes, weights, n)
        sites = self.sites.reshape(-1, 2)
        moment = torch.stack([torch.bincount(codes, weights * sites[:, i], n) for i in range(2)], -1)
        error = (
            self.moment - 2 * float((points * moment).sum()) + float((points.square().sum(-1) * mass).sum())
        )
        return mass, moment, error / 2


def lloyd(lattice: Lattice, points: Tensor, iterations: int, relaxation: float) -> tuple[Tensor, float]:
    """Iterate until the MSE stops changing or ``iterations`` have passed; return the best points seen."""
    best, best_mse, stalled = points, math.inf, 0
    for _ in range(iterations):
        mass, moment, mse = lattice.cell_sums(points)
        stalled = stalled + 1 if mse > best_mse * (1 - 1e-8) else 0
        if mse < best_mse:
            best, best_mse = points, mse
        if stalled >= 8:
            break
        centroid = moment / mass.clamp_min(1e-300)[:, None]
        points = torch.where(mass[:, None] > 0, points + relaxation * (centroid - points), points)
    return best, best_mse


def starts(num_points: int, num_random: int) -> list[Tensor]:
    """Return spirals and random points with the optimal density, that of N(0, 2)."""
    generator = torch.Generator().manual_seed(num_points)
    rank = (torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points
    radius = 2 * (-torch.log1p(-rank)).sqrt()
    angle = torch.arange(num_points, dtype=torch.float64) * math.pi * (3 - math.sqrt(5))
    spiral = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    drawn = [
        math.sqrt(2) * torch.randn(num_points, 2, dtype=torch.float64, generator=generator)
        for _ in range(num_random)
    ]
    return [spiral, *drawn]


def pair_grid(num_points: int, coarse: Lattice, fine: Lattice) -> tuple[Tensor, float]:
    num_random, iterations = SEARCH[num_points]
    found = [lloyd(coarse, start, iterations, 1.7) for start in starts(num_points, num_random)]
    found.sort(key=lambda pair: pair[1])
    points, _ = min((lloyd(coarse, p, 8 * iterations, 1.7) for p, _ in found[:2]), key=lambda pair: pair[1])
    points, _ = lloyd(fine, points, 60, 1.5)
    points, _ = lloyd(fine, points, 20, 1.0)
    points = points.to(torch.float32)
    order = sorted(range(num_points), key=lambda i: tuple(points[i].tolist()))
    points = points[order]
    return points, fine.cell_sums(points.to(torch.float64))[2]


# --- file ------------------------------------------------------------------------------------------------


def grid_name(dim: int, num_points: int) -> str:
    return f"gaussian_d{dim}_n{num_points}"


def compute() -> tuple[dict[str, Tensor], dict[str, float]]:
    points: dict[str, Tensor] = {}
    mse: dict[str, float] = {}
    coarse, fine = Lattice(COARSE), Lattice(FINE)
    for dim, num_points in [(1, n) for n in SCALAR_SIZES] + [(2, n) for n in PAIR_SIZES]:
        start = time.perf_counter()
        name = grid_name(dim, num_points)
        points[name], mse[name] = scalar_grid(num_points) if dim == 1 else pair_grid(num_points, coarse, fine)
        print(f"{name:20} mse {mse[name]:.8f}  {time.perf_counter() - start:6.1f} s", flush=True)
    return points, mse


def check(points: dict[str, Tensor], mse: dict[str, float]) -> int:
    """Compare with the shipped file; return the number of grids that differ."""
    wrong = 0
    fine = Lattice(FINE)
    with safe_open(SHIPPED, "pt") as file:
        shipped_mse = json.loads(file.metadata()["mse"])
        shipped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in sorted(points.keys() | shipped.keys()):
        if name not in points or name not in shipped:
            print(f"{name}: only in the {'shipped' if name in shipped else 'computed'} grids")
            wrong += 1
            continue
        exact = shipped[name].to(torch.float64)
        own = scalar_mse(exact[:, 0]) if exact.shape[1] == 1 else fine.cell_sums(exact)[2]
        same = abs(own / shipped_mse[name] - 1) < 1e-6 and abs(mse[name] / own - 1) < 2e-3
        if exact.shape[1] == 1:
            same = same and bool((exact - points[name]).abs().max() < 1e-6)
        print(
            f"{name:20} stored {shipped_mse[name]:.8f} measured {own:.8f} recomputed {mse[name]:.8f}", end=" "
        )
        print("ok" if same else "DIFFERS")
        wrong += not same
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=SHIPPED, help="file to write (default: the shipped one)")
    parser.add_argument("--check", action="store_true", help="compare with the shipped file, write nothing")
    arguments = parser.parse_args()
    points, mse = compute()
    if arguments.check:
        return 1 if check(points, mse) else 0
    save_file(points, arguments.out, metadata={"mse": json.dumps(mse, sort_keys=True)})
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
