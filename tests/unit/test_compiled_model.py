"""A model compiled by torch.compile attends through the cache as it does uncompiled, between graph breaks."""

import pytest
import torch

from aquakv import AquaCache, WindowConfig
from tiny_models import build, feed, guarded_codec, random_tokens, variant


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "settings", "in_place"),
    [
        ("guarded", {"attention": "fused", "backend": "torch"}, True),
        ("guarded", {"attention": "fused"}, False),
        ("paper", {}, True),
    ],
)
def test_a_compiled_model_gives_the_same(name, settings, in_place):
    model = build("llama")
    codec = guarded_codec("llama", fraction=0.05) if name == "guarded" else variant(name)
    window = WindowConfig(sink_tokens=2, recent_window=0, block_tokens=64)
    tokens, sizes = random_tokens(2, 140, seed=4), [115, 1, 1, 3, *[1] * 20]
    expected = feed(model, AquaCache(model, codec, window=window, **settings), tokens, sizes)
    cache = AquaCache(model, codec, window=window, **settings)
    compiled = model
    if in_place:
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    assert torch.equal(feed(compiled, cache, tokens, sizes), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
