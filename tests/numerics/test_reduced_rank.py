import pytest
import torch

from aquakv.errors import ConfigError
from aquakv.numerics import StreamingMoments, reduce_rank


def _setting(seed=0, inputs=12, outputs=9, rows=2000):
    """Return inputs of very different spread, a map, a metric of outputs, and the inputs' moments."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(rows, inputs) @ (
        torch.logspace(1, -1, inputs, dtype=torch.float64)[:, None] * normal(inputs, inputs)
    )
    weight, root = normal(inputs, outputs), normal(outputs, outputs)
    moments = StreamingMoments(inputs, outputs)
    moments.update(x + 5, x @ weight)
    return x - x.mean(0), weight, root @ root.T + 0.1 * torch.eye(outputs), moments


def _loss(x, weight, factors, metric):
    error = x @ (weight - factors[0].double() @ factors[1].double())
    return float(((error @ metric) * error).sum(1).mean())


def _truncated(weight, rank):
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_no_map_of_that_rank_predicts_better(rank, weighted):
    x, weight, metric, moments = _setting()
    metric = metric if weighted else torch.eye(9, dtype=torch.float64)
    factors = reduce_rank(moments, weight, rank, metric if weighted else None)
    assert [tuple(f.shape) for f in factors] == [(12, rank), (rank, 9)]
    assert {f.dtype for f in factors} == {torch.float32}
    loss = _loss(x, weight, factors, metric)
    # What is lost is the part of the predictions' weighted covariance beyond its largest eigenvalues.
    predictions = x @ weight @ torch.linalg.cholesky(metric)
    lost = torch.linalg.eigvalsh(predictions.T @ predictions / len(x))[: 9 - rank].sum()
    assert loss == pytest.approx(float(lost), rel=1e-3)
    assert loss < 0.9 * _loss(x, weight, _truncated(weight, rank), metric)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        nearby = [f + 0.01 * f.std() * torch.randn(f.shape, generator=generator) for f in factors]
        assert _loss(x, weight, nearby, metric) > loss


@pytest.mark.parametrize("shape", [(12, 9), (5, 9)])
@pytest.mark.parametrize("weighted", [False, True])
def test_full_rank_is_the_map_itself(shape, weighted):
    _, weight, metric, moments = _setting(inputs=shape[0])
    down, up = reduce_rank(moments, weight, min(shape), metric if weighted else None)
    svd = _truncated(weight, min(shape))
    product = down.double() @ up.double()
    torch.testing.assert_close(product, weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(product, svd[0] @ svd[1], atol=1e-4, rtol=0)


def test_latents_are_uncorrelated_and_of_unit_variance():
    x, weight, metric, moments = _setting()
    down, _ = reduce_rank(moments, weight, 4, metric)
    latent = x @ down.double()
    torch.testing.assert_close(latent.T @ latent / len(x), torch.eye(4).double(), atol=1e-3, rtol=0)


def test_latents_without_variance_are_zero():
    x, weight, _, moments = _setting()
    flat = weight[:, :2] @ torch.ones(2, 9, dtype=torch.float64).triu()
    down, up = reduce_rank(moments, flat, 4)
    latent = x @ down.double()
    assert sorted((latent.square().mean(0) > 0.5).tolist()) == [False, False, True, True]
    torch.testing.assert_close(down.double() @ up.double(), flat, atol=1e-4, rtol=0)
    nothing = reduce_rank(moments, torch.zeros(12, 9), 3)
    assert not any(f.isnan().any() for f in nothing)
    assert torch.equal(nothing[0] @ nothing[1], torch.zeros(12, 9))


@pytest.mark.parametrize("rank", [0, -1, 10])
def test_impossible_ranks(rank):
    *_, moments = _setting()
    with pytest.raises(ConfigError, match="from 1 to 9"):
        reduce_rank(moments, torch.zeros(12, 9), rank)
