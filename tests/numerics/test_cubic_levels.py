import math

import pytest
import torch

from aquakv.errors import ConfigError
from aquakv.numerics import cubic_level_table, cubic_levels, load_grid, nearest_cubic_level


def squared_error(width, linear, cubic):
    """Integrate over a unit Gaussian what going to the nearest level leaves."""
    code = torch.arange(2**width, dtype=torch.float64) - (2**width - 1) / 2
    levels = code * (linear + cubic * code**2)
    x = torch.linspace(-9, 9, 400_001, dtype=torch.float64)
    weight = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    nearest = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
    return float(((x - nearest).square() * weight).sum())


@pytest.mark.parametrize("width", range(1, 9))
def test_no_levels_of_the_form_are_better_and_the_error_is_what_integration_gives(width):
    linear, cubic, mse = cubic_levels(width)
    assert squared_error(width, linear, cubic) == pytest.approx(mse, rel=1e-5)
    # What one coefficient loses the other cannot make up for: all directions go up.
    for angle in torch.arange(0, 2 * math.pi, math.pi / 8).tolist():
        moved = linear * (1 + 0.01 * math.cos(angle)), cubic * (1 + 0.01 * math.sin(angle))
        assert squared_error(width, *moved) > mse * (1 - 1e-5)
    best = load_grid(1, 1 << width).mse
    assert (
        best * (1 - 1e-6) <= mse < best * {1: 1.0001, 2: 1.012, 3: 1.003, 4: 1.02, 5: 1.06}.get(width, 1.25)
    )


@pytest.mark.parametrize(("width", "step"), [(1, 1.5958), (2, 0.9957)])
def test_narrow_levels_are_the_published_uniform_ones(width, step):
    # J. Max, Quantizing for minimum distortion, 1960, table II.
    assert cubic_levels(width)[:2] == pytest.approx((step, 0.0), abs=6e-5)


@pytest.mark.parametrize("width", range(1, 9))
def test_nearest_level(width):
    levels = cubic_level_table(width)
    assert levels.dtype == torch.float32
    assert torch.equal(levels, -levels.flip(0))
    assert (levels.diff() > 0).all()
    assert torch.equal(nearest_cubic_level(levels, width), torch.arange(2**width, dtype=torch.uint8))
    x = torch.linspace(-6, 6, 20_001)
    codes = nearest_cubic_level(x, width)
    assert codes.dtype == torch.uint8
    errors = (x[:, None] - levels).abs()
    chosen = errors.gather(1, codes.long()[:, None])[:, 0]
    assert torch.allclose(chosen, errors.min(1).values, atol=1e-6)
    bounds = ((levels[1:].double() + levels[:-1].double()) / 2).float()
    half = 2 ** (width - 1)
    outer = torch.cat([torch.arange(half - 1), torch.arange(half, 2**width)])
    if width > 2:  # exactly half-way: the outer level, or the positive one
        assert torch.equal(nearest_cubic_level(bounds, width).long(), outer)
    assert nearest_cubic_level(torch.tensor([0.0, -0.0]), width).tolist() == [half, half]
    far = torch.tensor([-3e38, -1e30, 1e30, 3e38])
    assert nearest_cubic_level(far, width).tolist() == [0, 0, 2**width - 1, 2**width - 1]
    shaped = nearest_cubic_level(x[:20_000].view(100, 200).T, width)
    assert torch.equal(shaped, codes[:20_000].view(100, 200).T)


def test_other_widths_are_refused():
    for width in (0, 9, -1):
        with pytest.raises(ConfigError, match="1 to 8"):
            cubic_levels(width)
