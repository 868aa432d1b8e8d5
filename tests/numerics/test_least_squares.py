import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquakv.errors import ConfigError, InputError, ShapeError
from aquakv.numerics.least_squares import AffineMap, explained_variance, ridge
from aquakv.numerics.moments import StreamingMoments


def make_pairs(n: int, width: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator) * torch.logspace(-1, 1, width) + 20
    y = x @ torch.randn(width, 3, generator=generator) + torch.randn(n, 3, generator=generator) - 50
    return x, y


def moments_of(x: torch.Tensor, y: torch.Tensor) -> StreamingMoments:
    moments = StreamingMoments(x.shape[1], y.shape[1])
    moments.update(x, y)
    return moments


@pytest.mark.parametrize("relative_lambda", [0.0, 1e-3, 0.1, 10.0])
def test_ridge_solves_the_augmented_system(relative_lambda):
    x, y = make_pairs(500)
    centred = x.double() - x.double().mean(0)
    penalty = relative_lambda * centred.square().sum(0).mean()
    # Rows [sqrt(λ) I | 0] for the weights; the column of ones is the bias, without a row of its own.
    rows = torch.cat([x.double(), torch.ones(500, 1, dtype=torch.float64)], 1)
    extra = torch.cat([penalty.sqrt() * torch.eye(6, dtype=torch.float64), torch.zeros(6, 1)], 1)
    target = torch.cat([y.double(), torch.zeros(6, 3, dtype=torch.float64)])
    exact = torch.linalg.lstsq(torch.cat([rows, extra]), target, driver="gelsd").solution
    fitted = ridge(moments_of(x, y), relative_lambda)
    assert fitted.weight.dtype == fitted.bias.dtype == torch.float32
    assert torch.allclose(fitted.weight.double(), exact[:6], rtol=1e-4, atol=1e-5)
    assert torch.allclose(fitted.bias.double(), exact[6], rtol=1e-4, atol=1e-3)


def test_explained_variance_matches_the_data():
    x, y = make_pairs(700)
    moments = moments_of(x, y)
    for affine_map in (ridge(moments), ridge(moments, 5.0), AffineMap(torch.zeros(6, 3), torch.zeros(3))):
        residual = (y.double() - affine_map(x).double()).square().sum()
        total = (y.double() - y.double().mean(0)).square().sum()
        expected = float(1 - residual / total)
        assert explained_variance(moments, affine_map) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_smaller_penalty_fits_better():
    moments = moments_of(*make_pairs(60))
    explained = [explained_variance(moments, ridge(moments, value)) for value in (10, 1, 1e-2, 1e-4, 1e-8, 0)]
    assert all(weaker > stronger - 1e-6 for stronger, weaker in pairwise(explained))
    assert explained[-1] > 0.9


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    width=st.integers(0, 5),
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    offset=st.sampled_from([0.0, 1.0, 1e5]),
    relative_lambda=st.sampled_from([0.0, 1e-12, 1e-3, 1.0]),
    seed=st.integers(0, 100),
)
def test_never_nan_and_never_worse_than_the_mean(n, width, scale, offset, relative_lambda, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, width, generator=generator) * scale + offset).double()
    y = torch.randn(n, 2, generator=generator)
    moments = moments_of(x, y)
    fitted = ridge(moments, relative_lambda)
    assert fitted.weight.isfinite().all()
    assert fitted.bias.isfinite().all()
    if relative_lambda >= 1e-3:
        # The bias is float32: with large means it loses what large weights would need.
        slack = 1e-5 + 1e-6 * float((fitted.weight.abs().sum(0) * abs(offset)).max()) ** 2
        assert explained_variance(moments, fitted) >= -slack or n == 1


def test_constant_features_get_no_weight():
    x, y = make_pairs(200)
    x[:, 2], x[:, 4] = 1234.567, 0.0
    fitted = ridge(moments_of(x, y))
    assert fitted.weight[[2, 4]].abs().max() == 0
    others = [0, 1, 3, 5]
    alone = StreamingMoments(4, 3)
    alone.update(x[:, others], y)
    # The mean diagonal counts the constant features too.
    assert torch.allclose(fitted.weight[others], ridge(alone, 1e-3 * 4 / 6).weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [0.1, 1234.567, 1e-30, 3e7])
def test_all_constant_predicts_the_mean(value):
    y = make_pairs(50)[1]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        moments = moments_of(torch.full((50, 4), value, dtype=dtype), y)
        fitted = ridge(moments)
        assert torch.equal(fitted.weight, torch.zeros(4, 3))
        assert torch.allclose(fitted.bias, y.mean(0))
        assert explained_variance(moments, fitted) == pytest.approx(0, abs=1e-6)


def test_no_inputs():
    y = make_pairs(50)[1]
    fitted = ridge(moments_of(y[:, :0], y))
    assert fitted.weight.shape == (0, 3)
    assert torch.allclose(fitted.bias, y.mean(0))
    assert torch.equal(fitted(y[:, :0]), fitted.bias.expand(50, 3))


def test_singular_without_penalty_gives_the_least_norm():
    x, y = make_pairs(300, width=3)
    twice = torch.cat([x, x], 1)
    fitted = ridge(moments_of(twice, y), 0.0)
    single = ridge(moments_of(x, y), 0.0)
    assert torch.allclose(fitted.weight[:3], single.weight / 2, rtol=1e-3, atol=1e-4)
    assert torch.allclose(fitted.weight[3:], single.weight / 2, rtol=1e-3, atol=1e-4)


def test_constant_target():
    x = make_pairs(40)[0]
    moments = moments_of(x, torch.full((40, 2), 3.5))
    fitted = ridge(moments)
    assert explained_variance(moments, fitted) == 1.0
    assert explained_variance(moments, AffineMap(torch.zeros(6, 2), torch.zeros(2))) == -math.inf


def test_bad_input():
    x, y = make_pairs(10)
    with pytest.raises(ShapeError, match="at least one pair"):
        ridge(StreamingMoments(6, 3))
    with pytest.raises(ShapeError, match="at least one pair"):
        explained_variance(StreamingMoments(6, 3), AffineMap(torch.zeros(6, 3), torch.zeros(3)))
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="relative_lambda"):
            ridge(moments_of(x, y), value)
    with pytest.raises(ShapeError, match=r"must be \[6, 3\]"):
        explained_variance(moments_of(x, y), AffineMap(torch.zeros(6, 2), torch.zeros(2)))
    with pytest.raises(ShapeError, match="bias"):
        AffineMap(torch.zeros(6, 3), torch.zeros(2))
    with pytest.raises(ShapeError, match=r"\.\.\., 6\]"):
        AffineMap(torch.zeros(6, 3), torch.zeros(3))(torch.zeros(4))
    x[3, 1] = math.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        ridge(moments_of(x, y))
