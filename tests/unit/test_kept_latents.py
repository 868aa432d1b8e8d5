"""Latents that are kept between steps are those that every step would make."""

import copy

import pytest
import torch

from aquakv import AquaCache, WindowConfig
from aquakv.cache import kept_latents, paged
from aquakv.cache.evicting import Eviction
from aquakv.cache.storage import CodedPages
from aquakv.errors import ConfigError
from aquakv.eviction import H2O
from aquakv.kernels import attend_codes, carry_latents
from aquakv.kernels.from_codec import decode_operands
from tiny_models import codec_for, feed, go_on, guarded_codec, random_tokens, shared, variant

PAGED = WindowConfig(sink_tokens=2, recent_window=0, block_tokens=64)


def cache_of(model, codec, **changes):
    return AquaCache(model, codec, window=PAGED, **{"attention": "fused", "backend": "torch"} | changes)


def padded(rows, columns, pads):
    tokens = random_tokens(rows, columns, seed=3)
    return tokens, torch.stack([(torch.arange(columns) >= pad).long() for pad in pads])


@pytest.fixture
def carried(monkeypatch):
    """Count where latents are made."""
    found = {"in steps": 0, "behind steps": 0}

    def attending(*args, carry, method=attend_codes, **kwargs):
        found["in steps"] += carry
        return method(*args, carry=carry, **kwargs)

    def renewing(*args, method=carry_latents, **kwargs):
        found["behind steps"] += 1
        return method(*args, **kwargs)

    monkeypatch.setattr(paged, "attend_codes", attending)
    monkeypatch.setattr(kept_latents, "carry_latents", renewing)
    return found


def test_made_once_for_each_state_of_pages(carried):
    model, codec = shared("llama"), codec_for("llama", "decode")
    tokens, layers = random_tokens(2, 200, seed=4), len(codec.layers)
    sizes = [75, *[1] * 125]
    expected = feed(model, cache_of(model, codec), tokens, sizes)
    assert carried == {"in steps": 125 * layers, "behind steps": 0}
    cache = cache_of(model, codec, keep_latents=True)
    assert torch.equal(feed(model, cache, tokens, sizes), expected)
    # The first step makes its own, which are kept; they are made anew behind the two blocks at 130 and 194.
    assert carried == {"in steps": (125 + 1) * layers, "behind steps": 2 * (layers - 1)}
    held = cache.footprint()
    capacity = cache._state.tables(
        cache.layout, cache._adapter, 0, torch.device("cpu"), cache._compressed[0].pages.records
    ).table.numel()
    widths = [
        decode_operands(
            layer, codec.layers[order + 1], num_kv_heads=codec.fingerprint.num_kv_heads, rotary_dim=8
        ).next_width
        for order, layer in enumerate(codec.layers[:-1])
    ]
    assert held.latent_bytes == capacity * 64 * sum(widths) * 4 > 0  # float32 by definition
    without = cache_of(model, codec)
    feed(model, without, tokens, sizes)
    assert held.total_bytes - held.latent_bytes == without.footprint().total_bytes
    assert held.bits_per_value == without.footprint().bits_per_value
    assert held.bits_per_value_total > without.footprint().bits_per_value_total
    assert f"latents {held.latent_bytes / 2**20:.2f}" in str(held)


def test_operations_on_the_cache(carried):
    model, codec = shared("llama"), guarded_codec("llama", fraction=0.05)
    tokens, mask = padded(2, 240, (0, 75))

    def run(keep):
        cache = cache_of(model, codec, keep_latents=keep)
        outputs = [go_on(model, cache, tokens[:, :150], [147, 1, 1, 1], mask[:, :150])]
        twin = copy.deepcopy(cache)
        rows = [1, 0, 1]
        cache.batch_select_indices(rows)
        outputs.append(go_on(model, cache, tokens[rows], [1] * 50, mask[rows]))
        outputs.append(go_on(model, cache, tokens[rows], [3, *[1] * 5], mask[rows]))
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([2, 2, 1]))
        rows = [1, 1, 0]
        outputs.append(go_on(model, cache, tokens[rows], [1] * 23, mask[rows]))
        outputs.append(go_on(model, twin, tokens, [1] * 70, mask))
        cache.reset()
        assert not cache.footprint().latent_bytes
        outputs.append(go_on(model, cache, tokens, [110, *[1] * 10], mask))
        evicted = torch.ones(2, 120, dtype=torch.bool)
        evicted[:, 100:110] = False
        cache.evict(evicted)
        outputs.append(go_on(model, cache, tokens, [1] * 30, mask))
        return outputs

    theirs = run(False)
    before = carried["in steps"]
    for ours, expected in zip(run(True), theirs, strict=True):
        assert torch.equal(ours, expected)
    assert before > 10 * (carried["in steps"] - before) > 0


def test_pages_that_another_pass_adds_where_tables_had_room(carried):
    model, codec = shared("llama"), codec_for("llama", "decode")
    tokens, layers = random_tokens(1, 200, seed=4), len(codec.layers)
    sizes = [120, *[1] * 6, 4, *[1] * 70]  # the table has room from the first step on, and is not made anew
    expected = feed(model, cache_of(model, codec), tokens, sizes)
    carried.update({"in steps": 0, "behind steps": 0})
    cache = cache_of(model, codec, keep_latents=True)
    shapes = []
    for begin, size in zip(torch.tensor([0, *sizes[:-1]]).cumsum(0).tolist(), sizes, strict=True):
        part = feed(model, cache, tokens[:, begin : begin + size], [size])
        assert torch.equal(part, expected[:, begin : begin + size])
        if size == 1:
            shapes.append(cache._state.kept_latents._made_of[2])
    assert len(set(shapes[:7])) == 1
    assert carried == {"in steps": 2 * layers, "behind steps": layers - 1}


def test_beams_and_shortened_sequences_make_them_in_the_step_alone(carried):
    model, codec = shared("llama"), codec_for("llama", "decode")
    tokens, layers = random_tokens(2, 140, seed=4), len(codec.layers)
    window = WindowConfig(sink_tokens=2, recent_window=8, block_tokens=64)
    outputs = []
    for keep in (False, True):
        carried.update({"in steps": 0, "behind steps": 0})
        cache = AquaCache(model, codec, window=window, backend="torch", attention="fused", keep_latents=keep)
        parts = [feed(model, cache, tokens[:, :102], [99, 1, 1, 1])]
        cache.crop(-2)
        parts.append(feed(model, cache, tokens[:, 100:103], [1, 1, 1]))
        for step in range(3):
            cache.reorder_cache(torch.tensor([1, 1]) if step == 0 else torch.tensor([1, 0]))
            assert not cache.footprint().latent_bytes
            parts.append(feed(model, cache, tokens[:, 103 + step : 104 + step], [1]))
            assert (cache.footprint().latent_bytes > 0) == keep
        outputs.append(torch.cat(parts, 1))
    assert torch.equal(*outputs)
    assert carried == {"in steps": 4 * layers, "behind steps": 0}


def test_made_by_the_kernels_of_steps(monkeypatch):
    asked = []

    def renewing(*args, query, **kwargs):
        asked.append((tuple(query.shape), query.dtype))
        return carry_latents(*args, query=query, **kwargs)

    monkeypatch.setattr(kept_latents, "carry_latents", renewing)
    model, codec = shared("llama"), codec_for("llama", "decode")
    cache = cache_of(model, codec, keep_latents=True)
    feed(model, cache, random_tokens(2, 140, seed=4), [120, *[1] * 20])
    config = model.config
    heads, dim = config.num_attention_heads, codec.fingerprint.head_dim
    assert asked == [((2, heads, dim), torch.float32)] * (len(codec.layers) - 1)


def test_a_cache_that_was_put_aside(tmp_path):
    model, codec = shared("llama"), codec_for("llama", "decode")
    tokens = random_tokens(1, 160, seed=4)
    cache = cache_of(model, codec, keep_latents=True)
    feed(model, cache, tokens[:, :150], [148, 1, 1])
    cache.save(tmp_path / "cache.safetensors")
    again = AquaCache.load(
        tmp_path / "cache.safetensors",
        model,
        codec,
        attention="fused",
        backend="torch",
        keep_latents=True,
    )
    assert not again.footprint().latent_bytes  # made anew when they are needed, not written
    parts = [feed(model, one, tokens[:, 150:], [1] * 10) for one in (again, cache)]
    assert torch.equal(*parts)
    assert again.footprint().latent_bytes == cache.footprint().latent_bytes


def test_freed_when_other_passes_have_added_pages():
    model, codec = shared("llama"), codec_for("llama", "decode")
    tokens, mask = random_tokens(1, 240, seed=4), torch.ones(1, 240, dtype=torch.long)
    cache = cache_of(model, codec, keep_latents=True)
    go_on(model, cache, tokens, [75, 1], mask)
    held = cache.footprint().latent_bytes
    go_on(model, cache, tokens, [3], mask)
    assert cache.footprint().latent_bytes == held > 0  # no page came or went
    go_on(model, cache, tokens, [60], mask)
    assert not cache.footprint().latent_bytes
    go_on(model, cache, tokens, [1], mask)
    assert cache.footprint().latent_bytes > 0
    # Behind a hole that was compressed kernels no longer attend.
    mask[0, 145] = 0
    go_on(model, cache, tokens, [10, *[1] * 60], mask)
    assert len(cache.layout.pages) == 3
    assert not cache.footprint().latent_bytes


def test_freed_before_rows_are_copied(monkeypatch):
    model, codec = shared("llama"), codec_for("llama", "decode")
    cache = cache_of(model, codec, keep_latents=True)
    held = []

    def noting(method):
        def copying(*args, **kwargs):
            held.append(cache._state.kept_latents.footprint())
            return method(*args, **kwargs)

        return copying

    for kind, name in ((CodedPages, "select"), (Eviction, "apply_to_codes")):
        monkeypatch.setattr(kind, name, noting(getattr(kind, name)))
    for change in (
        lambda: cache.batch_select_indices([1, 0]),
        lambda: cache.evict(torch.arange(cache.get_seq_length()) != 30),
    ):
        feed(model, cache, random_tokens(2, 100, seed=4), [99, 1])
        assert cache.footprint().latent_bytes > 0
        change()
        cache.reset()
    assert len(held) >= 2 * len(codec.layers)
    assert not any(held)


def test_freed_while_a_mask_hides_compressed_tokens():
    model, codec = shared("llama"), codec_for("llama", "decode")
    tokens, mask = random_tokens(1, 120, seed=4), torch.ones(1, 120, dtype=torch.long)
    cache = cache_of(model, codec, keep_latents=True)
    go_on(model, cache, tokens, [75, 1], mask)
    held = cache.footprint().latent_bytes
    assert held > 0
    hiding = mask.clone()
    hiding[0, 20] = 0
    go_on(model, cache, tokens, [1, 1], hiding)
    assert not cache.footprint().latent_bytes
    go_on(model, cache, tokens, [1], mask)
    assert cache.footprint().latent_bytes == held
    columns = cache.get_seq_length()
    custom = torch.ones(1, 1, 1, columns + 1, dtype=torch.bool)
    with torch.no_grad():
        model(tokens[:, columns : columns + 1], past_key_values=cache, attention_mask=custom)
    assert not cache.footprint().latent_bytes


def test_who_cannot():
    model = shared("llama")
    watching = cache_of(model, codec_for("llama", "decode"), eviction=H2O(100))
    assert "every step" in watching.why_no_kernels()
    watching.eviction = None
    assert watching.why_no_kernels() is None
    with pytest.raises(ConfigError, match=r"keep_latents: .* its quantiser is entropy"):
        cache_of(model, variant("storage"), attention="auto", keep_latents=True)
    with pytest.raises(ConfigError, match=r"keep_latents: .* are reconstructed"):
        cache_of(model, codec_for("llama", "decode"), attention="general", keep_latents=True)
    with pytest.raises(ConfigError, match=r"keep_latents: .* no whole pages"):
        AquaCache(
            model, codec_for("llama", "decode"), window=WindowConfig(block_tokens=32), keep_latents=True
        )
