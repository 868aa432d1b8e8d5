"""The presets on a GPU: same protocol results, same streams, codecs calibrated there."""

import pytest
import torch

from aquakv import AquaCache, calibrate, evaluate_quality, preset
from aquakv.codec import EncodedTokens
from aquakv.codec.encoded import EncodedStreams
from tiny_models import VARIANTS, WINDOW, build, codec_for, feed, random_tokens, same_bits, variant

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.mark.parametrize("name", VARIANTS)
def test_streaming_equals_single_pass(name):
    model, codec = build("llama", dtype=torch.float64).cuda(), variant(name)
    tokens = random_tokens(3, 90, seed=5)
    stream, single = (
        evaluate_quality(model, tokens, {name: codec}, protocol=protocol)[name]
        for protocol in ("streaming", "single-pass")
    )
    assert stream.bits_per_value is not None
    # Encoding is float32: matrix products of other sizes round differently, and a code in thousands turns.
    assert stream.perplexity == pytest.approx(single.perplexity, rel=2e-3)
    assert stream.mean_kl == pytest.approx(single.mean_kl, rel=0.1)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_cache_generates_on_the_gpu(name):
    model = build("llama", dtype=torch.bfloat16).cuda()
    cache = AquaCache(model, variant(name))
    out = model.generate(
        random_tokens(2, 50).cuda(), past_key_values=cache, max_new_tokens=30, do_sample=False
    )
    assert out.shape == (2, 80)
    footprint = cache.footprint()
    assert footprint.coded_values > 0
    assert footprint.coded_bytes > 0


def test_streams_are_the_same_on_both_devices():
    codec, generator = codec_for("llama", "storage", 2.5), torch.Generator().manual_seed(0)
    history = ()
    for layer in codec.layers:
        keys, values = (torch.randn(6 * WINDOW.block_tokens, 32, generator=generator) for _ in range(2))
        codes, hat = layer.encode(keys, values, history)
        history = layer.extend(history, hat)
        here = layer.seal(codes, WINDOW.block_tokens)
        there_layer = layer.to("cuda")
        there_codes = EncodedTokens(*(type(part)(*(t.cuda() for t in part)) for part in codes))
        there = there_layer.seal(there_codes, WINDOW.block_tokens)
        for one, other in zip(here, there, strict=True):
            assert isinstance(one, EncodedStreams)
            assert same_bits(list(one), [t.cpu() for t in other])
        back = there_layer.unseal(there, WINDOW.block_tokens)
        for one, other in zip(codes, back, strict=True):
            assert same_bits(list(one), [t.cpu() for t in other])


@pytest.mark.parametrize("name", ["paper", "storage", "decode"])
def test_calibration_on_the_gpu(name):
    tokens = random_tokens(16, 64, seed=1)
    here = calibrate(build("llama"), tokens, preset(name))
    there = calibrate(build("llama").cuda(), tokens, preset(name))
    assert there.bits_per_value == pytest.approx(here.bits_per_value, rel=0.05)
    for one, other in zip(here.layers, there.layers, strict=True):
        torch.testing.assert_close(one.keys.mean, other.keys.mean, atol=1e-4, rtol=0)
    assert all(layer.keys.mean.device.type == "cpu" for layer in there.layers)


@pytest.mark.parametrize("name", ["decode", "guarded", "two-stage"])
def test_attending_to_codes_gives_what_reconstructing_gives(name):
    model, codec = build("llama-odd", dtype=torch.float64).cuda(), variant(name, "llama-odd")
    tokens = random_tokens(3, 60, seed=5).cuda()
    mask = torch.stack([(torch.arange(60) >= pad).long() for pad in (0, 7, 20)]).cuda()
    fused, general = (
        feed(model, AquaCache(model, codec, attention=attention), tokens, [30, *[1] * 30], mask)
        for attention in ("fused", "general")
    )
    for row, pad in enumerate((0, 7, 20)):
        # Codes come from float32 products of the same sizes on both ways.
        torch.testing.assert_close(fused[row, pad:], general[row, pad:], atol=1e-7, rtol=0)
