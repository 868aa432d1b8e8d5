"""Codes kept in records of pages are the codes that are kept as rows."""

import copy
import dataclasses

import pytest
import torch

from aquakv import AquaCache, WindowConfig
from aquakv.codec import EncodedPages, LinearTransform, ScalarQuantizer, TensorCodec
from aquakv.errors import ShapeError
from aquakv.evaluation.single_pass import single_pass
from aquakv.models.adapter import adapt
from aquakv.numerics.pages import PageLayout, record_attended, record_planes, unpack_pages
from tiny_models import codec_for, feed, go_on, guarded_codec, random_tokens, shared, two_stage_codec

F64 = torch.float64
PAGED = WindowConfig(sink_tokens=2, recent_window=0, block_tokens=64)


def in_rows(codec):
    """Return a codec that keeps its codes as rows."""
    rows = dataclasses.replace(codec)
    layers = [
        dataclasses.replace(
            layer,
            keys=dataclasses.replace(layer.keys, pages=None),
            values=dataclasses.replace(layer.values, pages=None),
        )
        for layer in codec.layers
    ]
    object.__setattr__(rows, "layers", tuple(layers))
    return rows


@pytest.fixture(scope="module")
def block():
    generator = torch.Generator().manual_seed(0)
    features = codec_for("llama", "decode").layers[0].features
    return [torch.randn(192, features, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("bits", [0.05, 0.5, 2, 5])
def test_records_hold_the_codes_of_rows(block, bits):
    codec = codec_for("llama", "decode", bits)
    block[0][70, 3] = torch.nan
    history = ()
    for layer in codec.layers:
        codes, hat = layer.encode(*block, history)
        history = layer.extend(history, hat)
        kept = layer.seal(codes, 64, torch.tensor([3, 100]))
        assert all(isinstance(part, EncodedPages) for part in kept)
        assert kept.nbytes == 192 * layer.kept_bytes_per_token(64)
        assert kept.keys.records.shape == (3, layer.keys.pages.record_bytes)
        for part in kept:
            assert (~record_attended(part.records)).flatten().nonzero().flatten().tolist() == [3, 100]
        back = layer.unseal(kept, 64)
        for ours, theirs in zip(back, codes, strict=True):
            assert torch.equal(ours.words, theirs.words)
            assert torch.equal(ours.scales, theirs.scales)
        for part, one, other in zip((layer.keys, layer.values), kept, codes, strict=True):
            for dtype in (torch.float32, torch.bfloat16, F64):
                torch.testing.assert_close(
                    part.dequantize(one, dtype),
                    part.quantizer.dequantize(other, dtype),
                    atol=0,
                    rtol=0,
                    equal_nan=True,
                )


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_bytes_are_decoded_at_once_where_fields_have_one_width(heads, dtype):
    """Planes of one to eight fields; the last field of a head is not full."""
    random = torch.Generator().manual_seed(heads)
    counts = ((8, 16), (7, 16), (5, 16), (4, 48), (3, 32), (2, 80), (1, 200))
    widths = [width for width, count in counts for _ in range(count * heads)]
    groups = [head for _, count in counts for head in range(heads) for _ in range(count)]
    layout = PageLayout(tuple(widths), tuple(groups), heads)
    deviations = torch.rand(len(widths), generator=random) + 0.5
    quantizer = ScalarQuantizer(deviations, torch.tensor(widths, dtype=torch.uint8), arithmetic=True)
    transform = LinearTransform(torch.eye(len(widths)), torch.eye(len(widths)))
    codec = TensorCodec(torch.zeros(len(widths)), None, transform, quantizer, pages=layout)
    assert layout.is_uniform
    most = [len(fields) for fields in layout.fields_by_plane]
    assert min(most) == 1
    assert max(most) > 4
    codes, _ = quantizer.quantize(torch.randn(192, len(widths), generator=random))
    kept = codec.seal(codes, 64)
    planes = record_planes(kept.records, layout)
    got = codec.dequantize(kept, dtype)
    assert torch.equal(got, quantizer.dequantize(codes, dtype))
    assert torch.equal(got, quantizer.dequantize_codes(unpack_pages(planes, layout), codes.scales, dtype))


def test_other_codecs_and_blocks_keep_rows(block):
    decode = codec_for("llama", "decode")
    codecs = [codec_for("llama", "paper"), codec_for("llama", "storage"), two_stage_codec("llama")]
    for codec in codecs:
        assert all(part.pages is None for layer in codec.layers for part in (layer.keys, layer.values))
    layer = decode.layers[0]
    codes, _ = layer.encode(*block)
    assert layer.seal(codes, 96) == codes
    assert layer.kept_bytes_per_token(96) == layer.bytes_per_token
    assert codecs[2].layers[0].seal(codes, 64) == codes
    with pytest.raises(ShapeError, match="got codes in pages"):
        codecs[2].layers[0].unseal(layer.seal(codes, 64), 64)
    streams = codecs[1].layers[0]
    kept = streams.seal(streams.encode(*block)[0], 64)
    with pytest.raises(ShapeError, match="unseal them first"):
        streams.keys.dequantize(kept.keys, torch.float32)


def test_bits_are_those_of_the_kept_form():
    codec = codec_for("llama", "decode")
    wide = dataclasses.replace(codec, config=dataclasses.replace(codec.config, window=PAGED))
    kept = sum(layer.kept_bytes_per_token(64) for layer in codec.layers)
    assert wide.bits_per_value == 8 * kept / (2 * 32 * len(codec.layers)) > codec.bits_per_value


@pytest.mark.parametrize("attention", ["fused", "general"])
@pytest.mark.parametrize("name", ["decode", "guarded"])
def test_a_cache_of_pages_is_a_cache_of_rows(attention, name):
    """Through padding, many operations and copies, bit for bit."""
    model = shared("llama")
    codec = guarded_codec("llama", fraction=0.05) if name == "guarded" else codec_for("llama", "decode")
    tokens = random_tokens(2, 250, seed=3)
    mask = torch.stack([(torch.arange(250) >= pad).long() for pad in (0, 75)])

    def run(codec):
        cache = AquaCache(model, codec, window=PAGED, attention=attention)
        outputs = [go_on(model, cache, tokens, [70, 79, 1], mask)]
        twin = copy.deepcopy(cache)
        rows = [1, 0, 1]
        cache.batch_select_indices(rows)
        outputs.append(go_on(model, cache, tokens[rows], [1, 60, 4, 5], mask[rows]))
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([2, 2, 1]))
        rows = [1, 1, 0]
        outputs.append(go_on(model, cache, tokens[rows], [30, 1, 1, 1], mask[rows]))
        outputs.append(go_on(model, twin, tokens, [99, 1], mask))
        return cache, outputs

    (paged, ours), (rows, theirs) = run(codec), run(in_rows(codec))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    for index, layer in enumerate(paged._compressed):
        (chunk,) = layer.pages.chunks
        assert len(chunk.encoded.keys.records) == len(paged.layout.pages) == 7
        own = codec.layers[index]
        expected = rows._compressed[index].pages.all()
        for kept, plain in zip(own.unseal(chunk.encoded, 64), expected.encoded, strict=True):
            assert torch.equal(kept.words, plain.words)
        hidden = (~record_attended(chunk.encoded.keys.records)).flatten().nonzero().flatten()
        exact = [] if chunk.outliers is None else chunk.outliers.index.tolist()
        assert hidden.tolist() == exact
        assert len(exact) == 7 * 3 or name == "decode"
    footprint = paged.footprint()
    assert footprint.scale_bytes == 0
    assert footprint.code_bytes == sum(7 * 64 * layer.kept_bytes_per_token(64) for layer in codec.layers)
    paged.reset()
    assert paged.footprint().total_bytes == 0


def test_streaming_is_single_pass():
    model, codec = shared("llama", F64), guarded_codec("llama", fraction=0.05)
    tokens = random_tokens(2, 200, seed=7)
    cache = AquaCache(model, codec, window=PAGED)
    streamed = feed(model, cache, tokens, [60, *[1] * 140])
    with torch.no_grad(), single_pass(adapt(model), codec, PAGED) as once:
        expected = model(tokens, past_key_values=once, use_cache=True).logits
    torch.testing.assert_close(streamed, expected, atol=1e-9, rtol=0)
    found = cache.footprint()
    assert once.coded_values == found.coded_values
    assert once.coded_bytes == found.code_bytes + found.outlier_bytes
