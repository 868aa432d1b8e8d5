import pytest
import torch

from aquakv.errors import ShapeError
from aquakv.numerics.moments import StreamingMoments, true_float32_products


def make_pairs(n: int, seed: int = 0, offset: float = 300.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 7, generator=generator) @ torch.randn(7, 7, generator=generator)
    y = x @ torch.randn(7, 5, generator=generator) + torch.randn(n, 5, generator=generator)
    return x + offset * torch.randn(7, generator=generator), y - offset


# 4096 products are summed in float32. Values of a coarse dtype repeat, so roundings do not average out.
REL = 2e-5


def assert_matches(moments: StreamingMoments, x: torch.Tensor, y: torch.Tensor) -> None:
    x, y = x.double(), y.double()
    x_centred, y_centred = x - x.mean(0), y - y.mean(0)
    assert moments.count == len(x)
    for ours, exact in (
        (moments.mean_x, x.mean(0)),
        (moments.mean_y, y.mean(0)),
        (moments.scatter_xx, x_centred.T @ x_centred),
        (moments.scatter_xy, x_centred.T @ y_centred),
        (moments.variance_y, y_centred.square().mean(0)),
    ):
        assert ours.dtype == torch.float64
        assert (ours - exact).abs().max() <= REL * exact.abs().max()


@pytest.mark.parametrize("sizes", [[10_000], [1] * 20 + [9_980], [4097, 4095, 1808], [3, 0, 9_997]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_moments_with_large_means(sizes, dtype):
    x, y = (part.to(dtype) for part in make_pairs(10_000))
    moments = StreamingMoments(7, 5)
    for x_part, y_part in zip(x.split(sizes), y.split(sizes), strict=True):
        moments.update(x_part, y_part)
    assert_matches(moments, x, y)


def test_means_a_million_spreads_away():
    x, y = make_pairs(5000, offset=0.0)
    x, y = x.double() + 1e6, y.double() - 1e7
    moments = StreamingMoments(7, 5)
    moments.update(x, y)
    assert_matches(moments, x, y)


def test_drifting_means():
    x, y = make_pairs(9000)
    drift = torch.linspace(0, 1000, 9000)[:, None]
    moments = StreamingMoments(7, 5)
    for x_part, y_part in zip((x + drift).split(777), (y - drift).split(777), strict=True):
        moments.update(x_part, y_part)
    assert_matches(moments, x + drift, y - drift)


@pytest.mark.parametrize("full_y", [False, True])
def test_merge(full_y):
    x, y = make_pairs(3000)
    parts = [StreamingMoments(7, 5, full_y=full_y) for _ in range(3)]
    for part, x_part, y_part in zip(parts, x.split([100, 2899, 1]), y.split([100, 2899, 1]), strict=True):
        part.update(x_part, y_part)
    merged = StreamingMoments(7, 5, full_y=full_y)
    for part in parts:
        merged.merge(part)
    merged.merge(StreamingMoments(7, 5, full_y=full_y))
    assert_matches(merged, x, y)
    if full_y:
        centred = y.double() - y.double().mean(0)
        assert torch.allclose(merged.scatter_yy, centred.T @ centred, rtol=1e-5, atol=1e-2)
    assert parts[1].count == 2899


def test_full_y_is_optional():
    x, y = make_pairs(50)
    moments = StreamingMoments(7, 5)
    moments.update(x, y)
    with pytest.raises(ShapeError, match="full_y=True"):
        _ = moments.scatter_yy


def test_non_contiguous_and_empty_updates():
    x, y = make_pairs(400)
    plain, odd = StreamingMoments(7, 5), StreamingMoments(7, 5)
    plain.update(x[::2], y[::2])
    odd.update(x[:0], y[:0])
    odd.update(x[::2].T.contiguous().T, y.repeat_interleave(2, 1)[::2, ::2])
    assert_matches(odd, x[::2], y[::2])
    assert torch.allclose(plain.scatter_xy, odd.scatter_xy, rtol=1e-5, atol=1e-3)


def test_no_input_features():
    moments = StreamingMoments(0, 5)
    _, y = make_pairs(100)
    moments.update(y[:, :0], y)
    assert moments.scatter_xy.shape == (0, 5)
    assert torch.allclose(moments.mean_y, y.double().mean(0))


def test_gradients_are_not_recorded():
    x, y = make_pairs(10)
    moments = StreamingMoments(7, 5)
    moments.update(x.requires_grad_(), y)
    assert not moments.scatter_xx.requires_grad
    assert not moments.mean_x.requires_grad


def test_bad_input_adds_nothing():
    x, y = make_pairs(10)
    moments = StreamingMoments(7, 5)
    for bad_x, bad_y, match in (
        (x[:, :6], y, r"x must be .* \[num_pairs, 7\]"),
        (x, y[0], r"y must be .* \[num_pairs, 5\]"),
        (x[:9], y, "9 and 10"),
        (x.long(), y, "floating"),
        (torch.empty(10, 7, device="meta"), y, "must be on cpu"),
    ):
        with pytest.raises(ShapeError, match=match):
            moments.update(bad_x, bad_y)
    with pytest.raises(ShapeError, match="merge only alike"):
        moments.merge(StreamingMoments(7, 4))
    with pytest.raises(ShapeError, match="negative"):
        StreamingMoments(-1, 4)
    assert moments.count == 0


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_products_stay_float32(precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with true_float32_products():
            pass
        x, y = make_pairs(4000)
        moments = StreamingMoments(7, 5)
        moments.update(x, y)
        assert_matches(moments, x, y)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_cuda(precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        x, y = make_pairs(10_000)
        moments, elsewhere = StreamingMoments(7, 5, "cuda:0"), StreamingMoments(7, 5)
        moments.update(x.cuda(), y.cuda())
        elsewhere.merge(moments)
        assert_matches(elsewhere, x, y)
    finally:
        torch.set_float32_matmul_precision(before)


def test_moments_of_parts_go_on_as_if_they_had_seen_the_pairs():
    x, y = make_pairs(3000)
    seen, rest = StreamingMoments(7, 5, full_y=True), StreamingMoments(7, 5, full_y=True)
    seen.update(x[:2000], y[:2000])
    rest.update(x[2000:], y[2000:])
    parts = StreamingMoments.of_parts(
        seen.count, seen.mean_x, seen.mean_y, seen.scatter_xx, seen.scatter_xy, seen.scatter_yy
    )
    assert_matches(parts, x[:2000], y[:2000])
    parts.merge(rest)
    assert_matches(parts, x, y)


def test_parts_must_fit_together():
    x, y = torch.zeros(7, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    good = {"scatter_xx": (7, 7), "scatter_xy": (7, 5), "scatter_yy": (5, 5)}
    for name, shape in (("scatter_xx", (7, 5)), ("scatter_xy", (5, 7)), ("scatter_yy", (5,))):
        parts = {n: torch.zeros(s).double() for n, s in {**good, name: shape}.items()}
        with pytest.raises(ShapeError, match=name):
            StreamingMoments.of_parts(3, x, y, **parts)
