"""Passes that reconstruct: with the kernels' operations they see what the codec reconstructs."""

import copy
import dataclasses

import pytest
import torch

from aquakv import AquaCache, WindowConfig
from aquakv.cache import reconstruct as module
from aquakv.cache.encoding import PageEncoder
from aquakv.cache.reconstruct import Reconstructor
from aquakv.cache.step import CacheStep
from aquakv.errors import ConfigError
from tiny_models import codec_for, feed, go_on, guarded_codec, random_tokens, shared, variant, wide

PAGED = WindowConfig(sink_tokens=2, recent_window=0, block_tokens=64)
KINDS = ["llama", "llama-odd", "llama-yarn", "qwen2", "qwen3", "gemma3"]
PADS = (0, 9, 75, 149)


@pytest.fixture
def calls(monkeypatch):
    """Count how often each operation reconstructs; a layer with grids counts twice."""
    found = {"reconstruct": 0, "reconstruct_grid": 0}

    def counting(name, method):
        def call(*args, **kwargs):
            found[name] += 1
            return method(*args, **kwargs)

        return call

    for name in found:
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    return found


def codec_named(name, kind):
    return guarded_codec(kind, fraction=0.05) if name == "guarded" else codec_for(kind, name)


def seen_by_attention(model, codec, backend, pads, monkeypatch):
    """Return keys and values of all layers in a pass of twenty tokens behind compressed ones."""
    rows, seen = len(pads), []

    def watch(*args, method=CacheStep.run_layer):
        seen.append(method(*args))
        return seen[-1]

    tokens = random_tokens(rows, 170, seed=3).to(model.device)
    mask = torch.stack([(torch.arange(170) >= pad).long() for pad in pads]).to(model.device)
    cache = AquaCache(model, codec, window=PAGED, attention="general", backend=backend)
    go_on(model, cache, tokens, [150], mask)
    with monkeypatch.context() as patch:
        patch.setattr(CacheStep, "run_layer", watch)
        go_on(model, cache, tokens, [20], mask)
    return seen


def assert_close(ours, theirs, pads, tolerance):
    for one, other in zip(ours, theirs, strict=True):
        for tensor, expected in zip(one, other, strict=True):
            largest = float(expected.abs().max())
            for row, pad in enumerate(pads):
                difference = (tensor[row, :, pad:] - expected[row, :, pad:]).abs().max()
                assert float(difference) <= tolerance * largest


@pytest.mark.parametrize("pads", [(0,), PADS])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["decode", "guarded", "paper"])
def test_definitions_are_what_the_codec_does(name, kind, pads, calls, monkeypatch):
    model, codec = shared(kind), codec_named(name, kind)
    theirs = seen_by_attention(model, codec, "auto", pads, monkeypatch)
    assert not any(calls.values())
    ours = seen_by_attention(model, codec, "torch", pads, monkeypatch)
    assert len(ours) == len(codec.layers)
    layers = 2 * len(ours) if name == "paper" else len(ours)
    assert calls == {
        "reconstruct": 0 if name == "paper" else layers,
        "reconstruct_grid": layers if name == "paper" else 0,
    }
    # Float32 on both ways, summed in another order, and over layers.
    assert_close(ours, theirs, pads, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["decode", "paper"])
def test_narrow_dtypes_are_no_further_off(name, dtype):
    """Against float32, from a history of the same dtype."""
    codec, random = codec_for("llama", name), torch.Generator().manual_seed(0)
    ours, theirs, exact = (), (), ()
    for index, layer in enumerate(codec.layers):
        keys, values = (torch.randn(128, 32, generator=random) for _ in range(2))
        codes, hat = layer.encode(keys, values, exact)
        kept = layer.seal(codes, 64)
        like = torch.empty(0, dtype=dtype)
        found = Reconstructor(codec, "torch").reconstruct(index, kept, 64, ours, like)
        plain = layer.reconstruct(codes, theirs, dtype)
        for one, other, true in zip(found, plain, hat, strict=True):
            assert one.dtype == dtype
            errors = [float((tensor.float() - true).square().mean().sqrt()) for tensor in (one, other)]
            assert errors[0] <= 1.1 * errors[1] + 1e-7
        ours, theirs = layer.extend(ours, found), layer.extend(theirs, plain)
        exact = layer.extend(exact, hat)


@pytest.mark.parametrize("name", ["storage", "two-stage", "decode", "paper"])
def test_what_kernels_do_not_take_is_left_to_the_codec(name, calls):
    """Other codecs; blocks that are no whole pages; float64."""
    model, codec = shared("llama"), variant(name)
    cache = AquaCache(model, codec, attention="general", backend="torch")
    assert cache.window.block_tokens % 64
    feed(model, cache, random_tokens(1, 40), [20, 20])
    assert calls == {"reconstruct": 0, "reconstruct_grid": 6 if name == "paper" else 0}
    calls["reconstruct_grid"] = 0
    cache = AquaCache(shared("llama", torch.float64), codec, window=PAGED, backend="torch")
    feed(cache._adapter.model, cache, random_tokens(1, 100), [70, 30])
    assert calls == {"reconstruct": 0, "reconstruct_grid": 0}


def test_operands_are_made_once(monkeypatch):
    model, codec, made = shared("llama"), dataclasses.replace(codec_for("llama", "decode")), []

    def counting(*args, method=module.reconstruct_operands, **kwargs):
        made.append(args)
        return method(*args, **kwargs)

    monkeypatch.setattr(module, "reconstruct_operands", counting)
    for _ in range(2):
        cache = AquaCache(model, codec, window=PAGED, backend="torch")
        feed(model, cache, random_tokens(1, 120), [70, 20, 30])
    assert len(made) == len(codec.layers)


def test_triton_is_insisted_on(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("decode", "paper"):
        cache = AquaCache(shared("llama"), codec_for("llama", name), window=PAGED, backend="triton")
        with pytest.raises(ConfigError, match="backend triton: expected tensors on a CUDA device"):
            feed(cache._adapter.model, cache, random_tokens(1, 100), [70, 30])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("pads", [(0,), PADS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["decode", "paper"])
def test_kernels_in_the_cache(name, dtype, pads, calls, monkeypatch):
    """Triton by default; what attention sees is what the definitions give, and the codec in float32."""
    model, codec = wide() if name == "decode" else (shared("llama"), codec_for("llama", "paper"))
    model = copy.deepcopy(model).to("cuda", dtype)
    monkeypatch.setattr(PageEncoder, "of", lambda *_: None)  # all reconstruct the same codes
    ours = seen_by_attention(model, codec, "auto", pads, monkeypatch)
    assert sum(calls.values()) == len(codec.layers) * (1 if name == "decode" else 2)
    theirs = seen_by_attention(model, codec, "torch", pads, monkeypatch)
    # Layers after the first see other new tokens by the rounding of what attention saw before.
    assert_close(ours, theirs, pads, 2e-5 if dtype == torch.float32 else 0.05)
    if dtype == torch.float32:
        monkeypatch.setattr(Reconstructor, "_kernels", lambda self, encoded, like: None)
        assert_close(ours, seen_by_attention(model, codec, "auto", pads, monkeypatch), pads, 2e-5)
