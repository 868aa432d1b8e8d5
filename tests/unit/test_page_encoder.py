"""Encoding with the kernels' definitions gives the codes that the codec gives, up to rounding."""

import copy
import dataclasses

import pytest
import torch

from aquakv import AquaCache, WindowConfig
from aquakv.cache.encoding import PageEncoder
from aquakv.cache.paged import operands_on
from aquakv.kernels import PagedCodes, record_attended, record_planes, record_scales, unpack_pages
from aquakv.kernels.scores import next_latents
from tiny_models import codec_for, feed, random_tokens, wide

PAGED = WindowConfig(sink_tokens=2, recent_window=0, block_tokens=64)


def cache_of(model, codec, **changes):
    return AquaCache(model, codec, window=PAGED, **{"backend": "torch"} | changes)


@pytest.fixture
def encoders(monkeypatch):
    """Count the layers that were encoded through pages."""
    found, encode = [], PageEncoder.encode

    def counting(self, index, keys, values):
        found.append(index)
        return encode(self, index, keys, values)

    monkeypatch.setattr(PageEncoder, "encode", counting)
    return found


def differing(ours, theirs):
    """Return which parts of codes, scales and attended bits differ between two caches."""
    counts = torch.zeros(3, 2, dtype=torch.int64)
    for layer, one, other in zip(ours.codec.layers, ours._compressed, theirs._compressed, strict=True):
        kinds = one.pages.all().encoded, other.pages.all().encoded
        for part, a, b in zip((layer.keys, layer.values), *kinds, strict=True):
            a, b = a.records.cpu(), b.records.cpu()
            codes = [unpack_pages(record_planes(records, part.pages), part.pages) for records in (a, b)]
            scales, attended = (
                [part(records) for records in (a, b)] for part in (record_scales, record_attended)
            )
            for row, (x, y) in enumerate((codes, scales, attended)):
                counts[row] += torch.tensor([x.numel(), int((x != y).sum())])
    return (counts[:, 1] / counts[:, 0]).tolist()


def padded(columns, pads):
    tokens = random_tokens(len(pads), columns, seed=3)
    return tokens, torch.stack([(torch.arange(columns) >= pad).long() for pad in pads])


@pytest.mark.parametrize("pads", [(0,), (0, 60, 131)])
@pytest.mark.parametrize("attention", ["general", "fused"])
def test_codes_are_the_codecs(pads, attention, encoders):
    """Found: at most 3 of 10,000 codes and 9 of 10,000 scales; two equal tokens compete for one place."""
    model, codec = wide()
    tokens, mask = padded(270, pads)
    ours, theirs = (
        cache_of(model, codec, attention=attention, backend=backend) for backend in ("torch", "auto")
    )
    # In one pass: both encode the same keys and values.
    feed(model, ours, tokens, [270], mask)
    assert encoders == [0, 1, 2]
    feed(model, theirs, tokens, [270], mask)
    assert len(encoders) == 3
    codes, scales, attended = differing(ours, theirs)
    assert codes < 1e-3
    assert scales < 3e-3
    assert attended < 5e-3
    for one, other in zip(ours._compressed, theirs._compressed, strict=True):
        kept, expected = one.pages.all().outliers, other.pages.all().outliers
        assert len(kept.index) == len(expected.index) == 3 * len(ours.layout.pages)
        hidden = (~record_attended(one.pages.all().encoded.keys.records)).flatten().nonzero().flatten()
        assert torch.equal(hidden.int(), kept.index)
    assert ours.footprint().code_bytes == theirs.footprint().code_bytes


def test_latents_are_those_that_decoding_carries(monkeypatch):
    model, codec = wide()
    cache, carried, encode = cache_of(model, codec), [], PageEncoder.encode

    def keep(self, index, keys, values):
        out = encode(self, index, keys, values)
        carried.append(self._latents)
        return out

    monkeypatch.setattr(PageEncoder, "encode", keep)
    feed(model, cache, random_tokens(1, 270, seed=3), [270])
    latents, device = None, torch.device("cpu")
    pages = len(cache.layout.pages)
    table = torch.arange(pages, dtype=torch.int32)[None]
    for index, layer in enumerate(cache._compressed[:-1]):
        operands = operands_on(codec, index, 64, device, torch.float32)
        records = (kind.records for kind in layer.pages.all().encoded)
        codes = PagedCodes(*records, table, torch.tensor([64 * pages], dtype=torch.int32))
        latents = next_latents(codes, latents, operands, backend="torch")
        torch.testing.assert_close(carried[index], latents[0], atol=1e-4, rtol=1e-4)
    assert carried[-1] is None


def test_blocks_that_come_due_while_decoding(encoders):
    """What is attended to afterwards is what reconstructing gives."""
    plain, codec = wide()
    model = copy.deepcopy(plain).double()
    tokens, mask = padded(220, (0, 31))
    logits = [
        feed(model, cache_of(model, codec, attention=attention), tokens, [60, *[1] * 160], mask)
        for attention in ("fused", "general")
    ]
    assert encoders == [0, 1, 2] * 10
    for row, pad in enumerate((0, 31)):
        torch.testing.assert_close(logits[0][row, pad:], logits[1][row, pad:], atol=1e-4, rtol=0)


def test_who_is_encoded_for_by_the_codec():
    _, codec = wide()
    like = torch.zeros(1, 2, 1, 64)
    assert PageEncoder.of(codec, 64, "torch", like) is not None
    assert PageEncoder.of(codec, 64, "auto", like) is None
    assert PageEncoder.of(codec, 96, "torch", like) is None
    assert PageEncoder.of(codec_for("llama", "decode"), 64, "torch", like) is None  # heads of 16
    layers = list(codec.layers)
    guard = layers[1].values.guard
    other = dataclasses.replace(guard, roots=torch.eye(64).expand_as(guard.roots) * torch.rand(64))
    layers[1] = dataclasses.replace(layers[1], values=dataclasses.replace(layers[1].values, guard=other))
    assert PageEncoder.of(dataclasses.replace(codec, layers=tuple(layers)), 64, "torch", like) is None


# --- on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pads", [(0,), (0, 60, 131)])
def test_kernels_encode_in_the_cache(pads, dtype, encoders, monkeypatch):
    """The cache holds what the definition gives with the kernels' float16 operands, but for ties."""
    plain, codec = wide(256)
    model = copy.deepcopy(plain).to("cuda", dtype)
    tokens, mask = (tensor.cuda() for tensor in padded(270, pads))
    ours, theirs = (cache_of(model, codec, backend="auto") for _ in range(2))
    found = feed(model, ours, tokens, [270], mask)
    assert encoders == [0, 1, 2]
    definition = [PageEncoder(codec, "torch", torch.float16) for _ in range(2)]
    monkeypatch.setattr(PageEncoder, "of", lambda *_: definition.pop())
    expected = feed(model, theirs, tokens, [270], mask)
    assert torch.equal(found, expected)  # a pass attends to its own tokens exactly
    codes, scales, attended = differing(ours, theirs)
    assert codes < 2e-2
    assert scales < 3e-2
    assert attended < 2e-2
