"""Tokens that are evicted are gone, from attention and from memory; the others stay what they were."""

import copy

import pytest
import torch
from test_decode_graph import Recorded, stepwise
from test_paged_attention import cache_of, codec_named
from transformers import DynamicCache

from aquakv import AquaCache, DecodeGraph, WindowConfig
from aquakv.cache.fused import CodedView
from aquakv.cache.paged import PagedView
from aquakv.errors import CacheFileError, CacheStateError, ShapeError
from tiny_models import VARIANTS, codec_for, feed, go_on, random_tokens, shared, variant

F64 = torch.float64
ALL_EXACT = WindowConfig(sink_tokens=2, recent_window=1000, block_tokens=8)


def _drawn(rows, columns, seed=0, share=0.5):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < share


def _padded(rows, columns, pads):
    return torch.stack([(torch.arange(columns) >= pad).long() for pad in pads[:rows]])


# --- what is attended to ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3", "phi", "smollm3"])
@pytest.mark.parametrize("attention", ["auto", "general"])
def test_an_exact_cache_is_one_that_masks_what_was_evicted(kind, attention):
    """Nothing is compressed: then an exact cache whose mask hides the same tokens gives the same logits."""
    model, tokens, mask = shared(kind, F64), random_tokens(3, 60, seed=2), _padded(3, 60, [7, 0, 3])
    cache = AquaCache(model, codec_for(kind, "decode", 8), window=ALL_EXACT, attention=attention)
    exact, hidden = DynamicCache(config=model.config), mask.clone()
    for one in (cache, exact):
        feed(model, one, tokens[:, :40], [40], mask[:, :40])
    position = (mask.cumsum(1) - 1).clamp(min=0)
    for start, end, seed in ((40, 41, 1), (41, 49, 2), (49, 60, 3)):
        keep = _drawn(3, start, seed, 0.7)
        cache.evict(keep)
        hidden[:, :start] *= keep
        assert cache.get_seq_length() == start
        with torch.no_grad():
            found, expected = (
                model(
                    tokens[:, start:end],
                    past_key_values=one,
                    attention_mask=seen[:, :end],
                    position_ids=position[:, start:end],
                ).logits
                for one, seen in ((cache, mask), (exact, hidden))
            )
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    assert cache.layout.held_columns().sum() == hidden.sum()


@pytest.mark.parametrize("name", VARIANTS)
def test_masks_of_four_dimensions(name):
    """Of either kind, they hide what was evicted beside what they hide anyway."""
    model, tokens = shared("llama", F64), random_tokens(2, 46, seed=3)
    cache = AquaCache(model, variant(name))
    feed(model, cache, tokens[:, :40], [40])
    cache.evict(_drawn(2, 40))
    seen = torch.arange(46) <= torch.arange(40, 46)[:, None]
    seen = seen.expand(2, 1, -1, -1).clone()
    plain = torch.ones(2, 46, dtype=torch.long)
    plain[:, 5:9], seen[..., 5:9] = 0, False
    added = torch.zeros(seen.shape, dtype=F64).masked_fill(~seen, torch.finfo(F64).min)
    outs = []
    for given in (plain, seen, added):
        one = copy.deepcopy(cache)
        with torch.no_grad():
            outs.append(model(tokens[:, 40:], past_key_values=one, attention_mask=given).logits)
    torch.testing.assert_close(outs[1], outs[0], atol=1e-6, rtol=0)
    assert torch.equal(outs[2], outs[1])


def test_masks_that_cannot_be_changed_are_refused():
    model, cache = shared("gemma3"), AquaCache(shared("gemma3"), codec_for("gemma3", "decode"))
    feed(model, cache, random_tokens(1, 20), [20])
    cache.evict(torch.arange(20) > 4)
    masks = {"full_attention": None, "sliding_attention": None}
    with pytest.raises(CacheStateError, match=r"tokens were evicted, so expected .* got dict"):
        model(random_tokens(1, 1), past_key_values=cache, attention_mask=masks)
    with pytest.raises(CacheStateError, match=r"got \[1, 5\]"):
        model(random_tokens(1, 1), past_key_values=cache, attention_mask=torch.ones(1, 5, dtype=torch.long))
    feed(model, cache, random_tokens(1, 9), [9])


@pytest.mark.parametrize("name", ["decode", "guarded", "two-stage"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_codes_are_attended_to_as_they_are_reconstructed(name, kind, monkeypatch):
    model, codec, tokens = shared(kind, F64), variant(name, kind), random_tokens(3, 75, seed=4)
    mask, calls = _padded(3, 75, [7, 0, 3]), []
    attend = CodedView.attend
    monkeypatch.setattr(CodedView, "attend", lambda *args: calls.append(None) or attend(*args))
    outs = []
    for attention in ("fused", "general"):
        cache = AquaCache(model, codec, attention=attention)
        feed(model, cache, tokens[:, :40], [40], mask[:, :40])
        cache.evict(_drawn(3, 40, 5))
        first = go_on(model, cache, tokens, [1, 3, 1, 8, 1, 1], mask)
        cache.evict(_drawn(3, 55, 6, 0.8))
        outs.append(torch.cat([first, go_on(model, cache, tokens, [1] * 20, mask)], 1))
    torch.testing.assert_close(*outs, atol=1e-5, rtol=0)
    assert len(calls) == 26 * len(codec.layers)


def _count_paged(monkeypatch):
    calls, attend = [], PagedView.attend
    monkeypatch.setattr(PagedView, "attend", lambda *args: calls.append(None) or attend(*args))
    return calls


@pytest.mark.parametrize("name", ["decode", "guarded"])
@pytest.mark.parametrize("what", ["whole blocks", "tail", "packed successively", "a sink"])
def test_kernels_go_on_where_positions_follow_each_other(name, what, monkeypatch):
    model, codec, tokens = shared("llama", F64), codec_named(name), random_tokens(2, 300, seed=5)
    column, calls = torch.arange(270), _count_paged(monkeypatch)
    keep = {
        "whole blocks": (column < 2) | (column >= 130),
        "tail": column < 262,
        # The end of one block and the beginning of the next, in which outliers of both come together.
        "packed successively": ((column < 2) | (column >= 34)) & ((column < 98) | (column >= 130)),
        "a sink": column != 1,
    }[what]
    outs = []
    for attention in ("fused", "general"):
        cache = cache_of(model, codec, attention=attention)
        feed(model, cache, tokens[:, :270], [270])
        cache.evict(keep)
        assert all(cache.layout.successive)
        outs.append(feed(model, cache, tokens[:, 270:], [1] * 30))
    torch.testing.assert_close(*outs, atol=1e-5, rtol=0)
    assert len(calls) == 30 * len(codec.layers)


@pytest.mark.parametrize(
    ("keep", "again"),
    [
        ((torch.arange(140) < 2) | (torch.arange(140) >= 66), 1),
        (torch.arange(140) >= 66, 0),  # sinks that are gone are hidden by a mask that the next step has not
        (torch.arange(140) % 2 > 0, 0),
    ],
)
def test_graphs_are_captured_anew_or_not_at_all(keep, again):
    """A step that was captured before something was evicted is not repeated."""
    model, codec, tokens = shared("llama"), codec_for("llama", "decode"), random_tokens(2, 180, seed=6)
    outs, caches = [], [cache_of(model, codec) for _ in range(2)]
    recorded = Recorded()
    graph = DecodeGraph(model, caches[0], capture=recorded)
    for cache in caches:
        steps = graph if cache is caches[0] else None
        feed(model, cache, tokens[:, :130], [130])
        first = (
            stepwise(graph, tokens[:, :140], 130)
            if steps
            else feed(model, cache, tokens[:, 130:140], [1] * 10)
        )
        captured = recorded.captures
        cache.evict(keep)
        rest = stepwise(graph, tokens, 140) if steps else feed(model, cache, tokens[:, 140:], [1] * 40)
        outs.append(torch.cat([first, rest], 1))
        if steps:
            assert recorded.captures == captured + again
    torch.testing.assert_close(*outs, atol=1e-5, rtol=0)


def test_a_graph_asks_for_the_position_behind_a_newest_token_that_is_gone():
    model, cache = shared("llama"), cache_of(shared("llama"), codec_for("llama", "decode"))
    tokens = random_tokens(2, 100)
    feed(model, cache, tokens[:, :80], [80])
    keep = torch.ones(2, 80, dtype=torch.bool)
    keep[1, -1] = False
    cache.evict(keep)
    graph = DecodeGraph(model, cache, capture=Recorded())
    with pytest.raises(CacheStateError, match="newest token was evicted"):
        graph.step(tokens[:, 80:81])
    graph.step(tokens[:, 80:81], position_ids=torch.tensor([[80], [80]]))
    graph.step(tokens[:, 81:82])


def test_generation_goes_on_at_the_right_positions():
    model, codec, tokens = shared("llama"), codec_for("llama", "decode", 8), random_tokens(2, 40, seed=7)
    mask = _padded(2, 40, [6, 0])
    by_hand, by_model = (AquaCache(model, codec) for _ in range(2))
    for cache in (by_hand, by_model):
        feed(model, cache, tokens[:, :39], [39], mask[:, :39])
        cache.evict(_drawn(2, 39, 8))
    out = model.generate(
        tokens, attention_mask=mask, past_key_values=by_model, max_new_tokens=20, do_sample=False
    )
    mask = torch.nn.functional.pad(mask, (0, 19), value=1)
    logits = go_on(model, by_hand, out, [1] * 20, mask)
    assert torch.equal(logits.argmax(-1), out[:, 40:])


def test_a_rows_first_tokens_are_no_padding_once_they_are_gone():
    """Another row keeps all of its tokens, so that columns are as many as before."""
    model, tokens = shared("llama", F64), random_tokens(2, 20, seed=7)
    cache, exact = AquaCache(model, codec_for()), DynamicCache(config=model.config)
    for one in (cache, exact):
        feed(model, one, tokens[:, :5], [5])
    keep = torch.ones(2, 5, dtype=torch.bool)
    keep[0, :3] = False
    cache.evict(keep)
    hidden = torch.nn.functional.pad(keep.long(), (0, 15), value=1)[:, :9]
    with torch.no_grad():
        found = model(tokens[:, 5:9], past_key_values=cache).logits
        expected = model(
            tokens[:, 5:9],
            past_key_values=exact,
            attention_mask=hidden,
            position_ids=torch.arange(5, 9)[None],
        ).logits
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


# --- what is held -----------------------------------------------------------------------------------------


def _codes_by_column(cache, row):
    """Return by column of a row what is kept of a compressed token at each layer, as rows of codes."""
    found, layout = {}, cache.layout
    columns = layout.holes.columns_of_slots(layout.columns) if layout.holes else None
    for index, (own, first) in enumerate(layout.pages):
        for offset in range(cache.window.block_tokens):
            slot = first + offset
            column = slot if columns is None else int(columns[own, slot])
            if own == row and column >= 0:
                found[column] = index * cache.window.block_tokens + offset
    codes = {column: [] for column in found}
    for layer, codec in zip(cache._compressed, cache.codec.layers, strict=True):
        if not found:
            continue
        rows = codec.unseal(layer.pages.all().encoded, cache.window.block_tokens)
        for column, place in found.items():
            codes[column] += [tensor[place] for kind in rows for tensor in kind]
    return codes


@pytest.mark.parametrize("name", VARIANTS)
def test_codes_move_as_they_are(name):
    model, cache = shared(), AquaCache(shared(), variant(name))
    feed(model, cache, random_tokens(2, 60, seed=1), [60])
    before, keep = [_codes_by_column(cache, row) for row in (0, 1)], _drawn(2, 60, 9)
    cache.evict(keep)
    for row in (0, 1):
        after = _codes_by_column(cache, row)
        assert set(after) == {column for column in before[row] if keep[row, column]}
        for column, codes in after.items():
            assert all(torch.equal(*pair) for pair in zip(codes, before[row][column], strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_bytes_go_with_the_tokens(name):
    cache = AquaCache(shared(), variant(name))
    feed(shared(), cache, random_tokens(2, 66, seed=1), [66])  # sinks and eight blocks: no tail
    before, blocks = cache.footprint(), len(cache.layout.pages)
    assert before.original_values == before.total_values
    cache.evict(torch.arange(66) % 2 < 1)
    half = cache.footprint()
    assert half.coded_values * 2 == before.coded_values
    assert len(cache.layout.pages) * 2 == blocks
    assert half.original_values == before.original_values
    # How many bytes outliers and entropy coding take depends on the tokens.
    varies = 0.15 if name in ("storage", "guarded") else 0
    parts = half.code_bytes + half.scale_bytes, before.code_bytes + before.scale_bytes
    assert parts[0] == pytest.approx(parts[1] / 2, rel=varies)
    assert half.total_bytes - half.sink_bytes < 0.6 * (before.total_bytes - before.sink_bytes)
    cache.evict(torch.arange(66) < 1)
    least = cache.footprint()
    assert (least.code_bytes, least.scale_bytes, least.outlier_bytes, least.coded_values) == (0, 0, 0, 0)
    assert least.tail_bytes == 0
    cache.evict(torch.zeros(66, dtype=torch.bool))
    assert cache.footprint().total_values == 0
    assert all(not layer.exact.sink_keys.any() for layer in cache.layers)
    feed(shared(), cache, random_tokens(2, 30, seed=2), [30])


def test_padding_is_not_counted_as_held():
    cache, tokens = AquaCache(shared(), codec_for()), random_tokens(2, 60)
    mask = _padded(2, 60, [0, 40])
    feed(shared(), cache, tokens[:, :30], [30], mask[:, :30])  # of the second row nothing but padding
    cache.evict(torch.arange(30) >= 4)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, 30:]
    with torch.no_grad():
        shared()(tokens[:, 30:], attention_mask=mask, position_ids=positions, past_key_values=cache)
    assert cache.layout.held_tokens() == 60 - 4 + 20


def test_records_shrink():
    cache = cache_of(shared(), codec_for("llama", "decode"))
    feed(shared(), cache, random_tokens(2, 200), [199, 1])
    before = cache.footprint()
    cache.evict(torch.arange(200) >= 66)
    after = cache.footprint()
    assert after.code_bytes * 3 == before.code_bytes * 2
    assert after.total_bytes < before.total_bytes


def test_nothing_to_evict_changes_nothing():
    cache = AquaCache(shared(), codec_for())
    cache.evict(torch.ones(0, dtype=torch.bool))
    feed(shared(), cache, random_tokens(2, 30), [30], _padded(2, 30, [4, 0]))
    keep = torch.ones(2, 30, dtype=torch.bool)
    for own in (keep[0], keep, keep & _padded(2, 30, [4, 0]).bool()):
        cache.evict(own)
        assert cache.layout.holes is None


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (torch.ones(2, 30), "bool tensor .* got torch.float32"),
        ([True] * 30, "bool tensor .* got list"),
        (torch.ones(2, 29, dtype=torch.bool), r"shape \[2, 30\] or \[30\].* got \[2, 29\]"),
        (torch.ones(3, 30, dtype=torch.bool), r"got \[3, 30\]"),
        (torch.ones(1, 30, dtype=torch.bool), r"got \[1, 30\]"),
    ],
)
def test_wrong_masks(keep, says):
    cache = AquaCache(shared(), codec_for())
    feed(shared(), cache, random_tokens(2, 30), [30])
    with pytest.raises(ShapeError, match=says):
        cache.evict(keep)
    feed(shared(), cache, random_tokens(2, 3), [3])


def test_not_in_the_middle_of_a_pass():
    cache, tokens = AquaCache(shared(), codec_for()), random_tokens(1, 30)
    feed(shared(), cache, tokens, [30])

    def evict(*_):
        cache.evict(torch.arange(30) > 9)

    handle = shared().model.layers[1].register_forward_pre_hook(evict)
    try:
        with pytest.raises(CacheStateError, match="reset"):
            feed(shared(), cache, tokens, [30])
    finally:
        handle.remove()


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("name", VARIANTS)
def test_saved_and_loaded(tmp_path, kind, name):
    model, tokens, mask = shared(kind), random_tokens(3, 70, seed=2), _padded(3, 70, [9, 0, 4])
    cache = AquaCache(model, variant(name, kind))
    feed(model, cache, tokens[:, :45], [45], mask[:, :45])
    cache.evict(_drawn(3, 45, 3))
    go_on(model, cache, tokens, [3], mask)
    cache.save(tmp_path / "cache")
    loaded = AquaCache.load(tmp_path / "cache", model, cache.codec)
    assert loaded.layout.seen == 48
    assert torch.equal(loaded.layout.held_columns(), cache.layout.held_columns())
    assert loaded.layout.successive == cache.layout.successive
    found, expected = (go_on(model, one, tokens, [1, 12, 9], mask) for one in (loaded, cache))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda origins: origins.fill_(-2),
        lambda origins: origins.fill_(5),
        lambda origins: origins[:, -1].fill_(45),
        lambda origins: origins[:, -1].fill_(-1),
        lambda origins: origins[:, -2].copy_(origins[:, -1]),
    ],
)
def test_hostile_origins(tmp_path, spoil):
    model, cache = shared(), AquaCache(shared(), codec_for())
    feed(model, cache, random_tokens(2, 45), [45])
    cache.evict(_drawn(2, 45, 3))
    spoil(cache.layout.holes.origins)
    cache.save(tmp_path / "cache")
    with pytest.raises(CacheFileError, match=r"layout\.origins: expected"):
        AquaCache.load(tmp_path / "cache", model, cache.codec)
