import math

import pytest
import torch

from aquakv.errors import ConfigError, ShapeError
from aquakv.numerics.grids import GaussianGrid, available_grids, load_grid

ALL = available_grids()
PAIRS = [n for dim, n in ALL if dim == 2]
SCALARS = [n for dim, n in ALL if dim == 1]
# Lloyd (1957) and Max (1960) for one dimension; arXiv:2411.17525 for two.
PUBLISHED_MSE = {
    (1, 2): 0.3634,
    (1, 4): 0.1175,
    (1, 8): 0.03454,
    (1, 16): 0.009497,
    (2, 16): 0.108,
    (2, 64): 0.0296,
    (2, 256): 0.0077,
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_force(grid: GaussianGrid, x: torch.Tensor) -> torch.Tensor:
    points = grid.points.double()
    vectors = x.double().reshape(*x.shape[:-1], -1, 1, grid.dim)
    return (vectors - points).square().sum(-1).argmin(-1).to(torch.uint8)


def test_what_there_is():
    scalars = [(1, 2**bits) for bits in range(1, 9)]
    assert available_grids() == [*scalars, (2, 16), (2, 64), (2, 256)]


@pytest.mark.parametrize(("dim", "num_points"), ALL)
def test_attributes_and_order(dim, num_points):
    grid = load_grid(dim, num_points)
    assert grid.points.shape == (num_points, dim)
    assert grid.points.dtype == torch.float32
    assert (grid.dim, grid.num_points, grid.code_width) == (dim, num_points, int(math.log2(num_points)))
    assert grid.bits_per_value == math.log2(num_points) / dim
    rows = [tuple(row) for row in grid.points.tolist()]
    assert rows == sorted(set(rows))
    assert load_grid(dim, num_points) is grid


@pytest.mark.parametrize(("dim", "num_points"), PUBLISHED_MSE)
def test_mse_is_the_published_one(dim, num_points):
    assert load_grid(dim, num_points).mse == pytest.approx(PUBLISHED_MSE[dim, num_points], rel=0.01)


@pytest.mark.parametrize("num_points", SCALARS)
def test_scalar_mse_by_integration(num_points):
    grid = load_grid(1, num_points)
    x = torch.linspace(-9, 9, 1_000_001, dtype=torch.float64)
    error = x - grid.dequantize(grid.nearest(x.float()), torch.float64)
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    assert torch.trapezoid(error.square() * density, x).item() == pytest.approx(grid.mse, rel=1e-4)


@pytest.mark.parametrize("num_points", PAIRS)
def test_pair_mse_by_monte_carlo(num_points):
    grid = load_grid(2, num_points)
    x = normal(2_000_000, 2)
    error = (x - grid.dequantize(grid.nearest(x))).double().square().mean(-1)
    standard_error = error.std().item() / math.sqrt(len(x))
    assert abs(error.mean().item() - grid.mse) < 4 * standard_error
    assert standard_error < 2e-3 * grid.mse


@pytest.mark.parametrize("num_points", PAIRS)
def test_pair_points_are_the_centroids_of_their_cells(num_points):
    grid = load_grid(2, num_points)
    x = normal(4_000_000, 2, seed=1)
    codes = grid.nearest(x).long().squeeze(-1)
    count = torch.bincount(codes, minlength=num_points)
    sums = [torch.bincount(codes, x[:, i].double(), num_points) for i in range(2)]
    gap = torch.stack(sums, -1) / count[:, None] - grid.points
    # The spread within an outer cell is below 1.
    assert torch.all(gap.abs() < 5 / count[:, None].sqrt())


@pytest.mark.parametrize(("dim", "num_points"), ALL)
def test_nearest_is_exact(dim, num_points):
    grid = load_grid(dim, num_points)
    for scale in (0.3, 1.0, 3.0, 30.0, 1e6):
        x = scale * normal(3, 5000, 4, seed=int(scale * 10))
        assert torch.equal(grid.nearest(x), brute_force(grid, x))


@pytest.mark.parametrize(("dim", "num_points"), ALL)
def test_nearest_is_exact_beside_and_on_boundaries(dim, num_points):
    grid = load_grid(dim, num_points)
    # Midpoints of all pairs of points: on or near many boundaries, moved by single roundings.
    middle = ((grid.points[:, None] + grid.points[None]) / 2).reshape(-1, dim)
    up = torch.nextafter(middle, torch.full_like(middle, math.inf))
    down = torch.nextafter(middle, torch.full_like(middle, -math.inf))
    for x in (middle, up, down, grid.points):
        # The reference cannot tell a subnormal number from 0.
        x = torch.where(x.abs() < 1e-12, 0, x)
        assert torch.equal(grid.nearest(x), brute_force(grid, x))


@pytest.mark.parametrize("num_points", PAIRS)
def test_nearest_is_exact_on_a_lattice_with_cell_corners(num_points):
    grid = load_grid(2, num_points)
    axis = (
        torch.arange(-512, 513) / 1024 * 10
    )  # every corner, edge middle and centre of the cells along one axis
    x = torch.stack(torch.meshgrid(axis, axis[::41], indexing="ij"), -1)
    x = torch.cat([x, x.flip(-1)]).reshape(-1, 2)
    assert torch.equal(grid.nearest(x), brute_force(grid, x))


def test_ties_go_to_the_lowest_code():
    points = torch.tensor([[-1.0, 0.0], [0.0, -1.0], [0.0, 1.0], [1.0, 0.0]])
    grid = GaussianGrid(points, 0.5)
    assert grid.nearest(torch.tensor([[0.0, 0.0], [1.0, 1.0], [9.0, -9.0]])).tolist() == [[0], [2], [1]]
    assert load_grid(1, 2).nearest(torch.zeros(1)).tolist() == [0]


@pytest.mark.parametrize(("dim", "num_points"), ALL)
def test_codes_of_points_are_their_indices(dim, num_points):
    grid = load_grid(dim, num_points)
    codes = torch.arange(num_points).to(torch.uint8)
    assert torch.equal(grid.nearest(grid.dequantize(codes)), codes)
    assert grid.dequantize(codes, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(grid.dequantize(codes.long()), grid.points.reshape(-1))


@pytest.mark.parametrize(("dim", "num_points"), [(1, 16), (2, 16), (2, 256)])
def test_codes_do_not_depend_on_batching(dim, num_points):
    grid = load_grid(dim, num_points)
    x = 2 * normal(40_001, 2 * dim)
    whole = grid.nearest(x)
    for size in (1009, 32_769):
        assert torch.equal(torch.cat([grid.nearest(part) for part in x.split(size)]), whole)
    assert torch.equal(torch.stack([grid.nearest(row) for row in x[:100]]), whole[:100])
    assert torch.equal(grid.nearest(x.T.contiguous().T), whole)


@pytest.mark.parametrize("num_points", SCALARS)
def test_scalar_non_finite(num_points):
    codes = load_grid(1, num_points).nearest(torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38]))
    assert codes.tolist() == [0, num_points - 1, 0, num_points - 1, 0]


@pytest.mark.parametrize("num_points", PAIRS)
def test_pair_non_finite(num_points):
    nan, inf = math.nan, math.inf
    x = torch.tensor([[nan, 1.0], [1.0, nan], [nan, nan], [inf, 1.0], [-1.0, -inf], [inf, nan]])
    grid = load_grid(2, num_points)
    assert grid.nearest(x).flatten().tolist() == [0] * 6
    huge = torch.tensor([[3e38, -3e38]])
    assert torch.equal(grid.nearest(huge), brute_force(grid, huge))


@pytest.mark.parametrize("dim", [1, 2])
def test_empty(dim):
    grid = load_grid(dim, 16)
    assert grid.nearest(torch.empty(0, 3 * dim)).shape == (0, 3)
    assert grid.nearest(torch.empty(3, 0)).shape == (3, 0)
    assert grid.dequantize(torch.empty(0, 3, dtype=torch.uint8)).shape == (0, 3 * dim)


def test_bad_input():
    grid = load_grid(2, 16)
    with pytest.raises(ShapeError, match=r"m \* 2"):
        grid.nearest(torch.zeros(3))
    with pytest.raises(ShapeError, match="float32"):
        grid.nearest(torch.zeros(4, dtype=torch.float64))
    with pytest.raises(ShapeError, match="load the grid there"):
        grid.nearest(torch.empty(4, device="meta"))
    with pytest.raises(ShapeError, match="integers"):
        grid.dequantize(torch.zeros(4))
    with pytest.raises(ConfigError, match=r"choose one of \(1, 2\)"):
        load_grid(2, 32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("dim", "num_points"), ALL)
def test_cuda_equals_cpu(dim, num_points):
    x = 2 * normal(100_003, 2 * dim)
    x[0, 0], x[1, 0] = math.nan, math.inf
    here, there = load_grid(dim, num_points), load_grid(dim, num_points, "cuda")
    codes = there.nearest(x.cuda())
    assert torch.equal(codes.cpu(), here.nearest(x))
    assert torch.equal(there.dequantize(codes).cpu(), here.dequantize(codes.cpu()))
