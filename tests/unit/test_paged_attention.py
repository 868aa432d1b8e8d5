"""Attending to pages through the kernels' operations gives what reconstructing and attending gives."""

import copy
import dataclasses
import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aquakv import AquaCache, WindowConfig
from aquakv.cache import paged
from aquakv.cache.fused import CodedView
from aquakv.cache.paged import PagedView, why_not_paged
from aquakv.cache.records import storage_bytes
from aquakv.cache.step import CacheStep
from aquakv.cache.tables import PageTables
from aquakv.errors import ConfigError
from aquakv.kernels import CodedAttention, hopper
from tiny_models import (
    build,
    codec_for,
    feed,
    go_on,
    guarded_codec,
    random_tokens,
    shared,
    two_stage_codec,
    wide,
)

F64 = torch.float64
PAGED = WindowConfig(sink_tokens=2, recent_window=0, block_tokens=64)
KINDS = ["llama", "llama-odd", "llama-yarn", "qwen2", "qwen3", "gemma3"]

#: The definitions compute in float32; logits reach 3.
CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(autouse=True)
def steps(monkeypatch):
    """Count the layers that attended by each path."""
    found = {"paged": 0, "fused": 0, "general": 0}

    def counting(kind, method):
        def call(*args, **kwargs):
            found[kind] += 1
            return method(*args, **kwargs)

        return call

    monkeypatch.setattr(PagedView, "attend", counting("paged", PagedView.attend))
    monkeypatch.setattr(CodedView, "attend", counting("fused", CodedView.attend))
    monkeypatch.setattr(CacheStep, "_reconstruct", counting("general", CacheStep._reconstruct))
    return found


def codec_named(name, kind="llama"):
    return guarded_codec(kind, fraction=0.05) if name == "guarded" else codec_for(kind, "decode")


def cache_of(model, codec, **changes):
    return AquaCache(model, codec, window=PAGED, **{"attention": "fused", "backend": "torch"} | changes)


def side_by_side(model, caches, tokens, sizes, mask=None):
    """Feed both caches; return all logits of each.

    They compute in different precisions, so that a code in thousands may turn. Whatever is compressed, the
    first cache goes on with the codes of the second.
    """
    mask, outputs = torch.ones_like(tokens) if mask is None else mask, []
    for size in sizes:
        outputs.append([go_on(model, cache, tokens, [size], mask) for cache in caches])
        for mine, theirs in zip(*(cache._compressed for cache in caches), strict=True):
            for ours, other in zip(mine.pages.chunks, theirs.pages.chunks, strict=True):
                for kept, expected in zip(ours.encoded, other.encoded, strict=True):
                    assert (kept.records == expected.records).float().mean() > 0.99
            mine.pages = copy.deepcopy(theirs.pages)
    return [torch.cat(parts, 1) for parts in zip(*outputs, strict=True)]


def padded(rows, columns, pads):
    tokens = random_tokens(rows, columns, seed=3)
    return tokens, torch.stack([(torch.arange(columns) >= pad).long() for pad in pads])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["decode", "guarded"])
def test_paged_is_general(kind, name, steps):
    model, codec = shared(kind, F64), codec_named(name, kind)
    tokens, sizes = random_tokens(2, 140, seed=4), [75, 1, 1, 3, *[1] * 60]
    caches = [cache_of(model, codec, attention=attention) for attention in ("fused", "general")]
    logits = side_by_side(model, caches, tokens, sizes)
    torch.testing.assert_close(*logits, **CLOSE)
    layers = len(codec.layers)
    assert steps == {"paged": 62 * layers, "fused": layers, "general": 63 * layers}


@pytest.mark.parametrize("name", ["decode", "guarded"])
def test_rows_of_unequal_length(name, steps):
    """Rows with two, one and no compressed pages, one so short that its sinks arrive while decoding."""
    model, codec, pads = shared("llama-odd", F64), codec_named(name, "llama-odd"), (0, 60, 99, 140)
    tokens, mask = padded(4, 170, pads)
    sizes = [141, *[1] * 29]
    caches = [cache_of(model, codec, attention=attention) for attention in ("fused", "general")]
    ours, theirs = side_by_side(model, caches, tokens, sizes, mask)
    for row, pad in enumerate(pads):
        torch.testing.assert_close(ours[row, pad:], theirs[row, pad:], **CLOSE)
    assert steps["paged"] == 29 * len(codec.layers)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("sinks", [False, True])
def test_softcap_and_sink_logits(softcap, sinks, monkeypatch):
    model, codec = shared("llama", F64), codec_named("guarded")
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=F64) if sinks else None
    for view in (PagedView, CodedView):

        def changed(self, query, scaling, *_, method=view.attend):
            return method(self, query, scaling, softcap, logits)

        monkeypatch.setattr(view, "attend", changed)
    tokens, mask = padded(2, 90, (0, 9))
    ours, theirs = (
        feed(model, cache_of(model, codec, backend=backend), tokens, [80, *[1] * 10], mask)
        for backend in ("torch", "auto")
    )
    for row, pad in enumerate((0, 9)):
        torch.testing.assert_close(ours[row, pad:], theirs[row, pad:], **CLOSE)


def test_a_row_of_padding_gets_zeros(monkeypatch):
    model, codec, found = shared("llama", F64), codec_for("llama", "decode"), []

    def watch(*args, method=PagedView.attend):
        found.append(method(*args))
        return found[-1]

    monkeypatch.setattr(PagedView, "attend", watch)
    tokens, mask = padded(2, 72, (0, 72))
    feed(model, cache_of(model, codec), tokens, [70, 1, 1], mask)
    assert len(found) == 6
    assert all((out[1] == 0).all() and out[0].abs().max() > 0 for out in found)


def test_what_is_not_a_number_stays_in_its_row(steps):
    model, codec = build("llama", dtype=F64), codec_for("llama", "decode")
    with torch.no_grad():
        model.model.embed_tokens.weight[39] = torch.nan
    tokens, mask = padded(2, 90, (0, 9))
    tokens = tokens.clamp(max=38)
    tokens[0, 5] = 39
    ours, theirs = (
        feed(model, cache_of(model, codec, attention=attention), tokens, [80, *[1] * 10], mask)
        for attention in ("fused", "general")
    )
    assert ours[0, 80:].isnan().all()
    torch.testing.assert_close(ours[1, 9:], theirs[1, 9:], **CLOSE)
    assert steps["paged"] == 30


def test_hidden_tokens_and_jumping_positions_go_another_way(steps):
    model, codec = shared("llama", F64), codec_for("llama", "decode")
    tokens, mask = padded(2, 150, (0, 9))
    holes = mask.clone()
    holes[0, 30] = 0
    ours, theirs = (
        feed(model, cache_of(model, codec, attention=attention), tokens, [80, *[1] * 70], holes)
        for attention in ("fused", "general")
    )
    seen = holes.bool()
    torch.testing.assert_close(ours[seen], theirs[seen], atol=1e-9, rtol=0)
    assert (steps["paged"], steps["fused"]) == (0, 210)

    # Positions that jump within a page, with a mask that hides nothing.
    cache = cache_of(model, codec)
    positions = torch.arange(150).expand(2, -1) + 5 * (torch.arange(150) > 30)
    with torch.no_grad():
        for part in (slice(0, 80), slice(80, 81)):
            model(tokens[:, part], position_ids=positions[:, part], past_key_values=cache)
    assert cache.layout.successive == [False, False]
    assert (steps["paged"], steps["fused"]) == (0, 213)


def test_a_hole_behind_the_pages_is_not_seen(steps):
    """Such a token is exact: its mask is looked at in every step. Once it is compressed, kernels cannot."""
    model, codec = shared("llama", F64), codec_for("llama", "decode")
    tokens, mask = padded(2, 150, (0, 9))
    mask[0, 90] = 0
    mask[1, 10] = 0  # a sink
    caches = [cache_of(model, codec, attention=attention) for attention in ("fused", "general")]
    ours, theirs = side_by_side(model, caches, tokens, [80, *[1] * 70], mask)
    seen = mask.bool()
    torch.testing.assert_close(ours[seen], theirs[seen], **CLOSE)
    layers = len(codec.layers)
    compressed_at = 2 + 64 + 64  # the pass that sees column 129 compresses column 90
    assert steps["paged"] == (compressed_at - 80) * layers
    assert steps["fused"] == (150 - compressed_at) * layers


def test_a_mask_that_changes_is_looked_at(steps):
    """On a CPU always; elsewhere after several tokens at once, or when something was compressed."""
    model, codec = shared("llama", F64), codec_for("llama", "decode")
    tokens, mask = padded(1, 90, (0,))
    cache = cache_of(model, codec)
    feed(model, cache, tokens[:, :80], [78, 1, 1], mask[:, :80])
    assert steps["paged"] == 6
    mask[0, 20] = 0
    with torch.no_grad():
        model(tokens[:, 80:81], attention_mask=mask[:, :81], past_key_values=cache)
        assert steps["paged"] == 6
        model(tokens[:, 81:82], past_key_values=cache)
    assert steps["paged"] == 9


def hide_while_decoding(model, codec, steps, caplog, **changes):
    """A mask comes to hide a compressed token: the next step notices, whatever the mask says by then."""
    tokens, mask = padded(2, 150, (0, 9))
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, layers = cache_of(model, codec, **changes), len(codec.layers)

    def step(mask):
        part = slice(cache.get_seq_length(), cache.get_seq_length() + 1)
        extra = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
        with torch.no_grad():
            model(tokens[:, part], past_key_values=cache, **extra)

    go_on(model, cache, tokens, [80, *[1] * 4], mask)
    assert steps["paged"] == 4 * layers
    hidden = mask.clone()
    hidden[1, 20] = 0
    for number, now in enumerate((hidden, mask, mask)):
        step(now)
        assert steps["paged"] == 5 * layers
        assert steps["fused"] == number * layers
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    while cache.layout.coded != [128, 64]:
        step(mask)
    assert steps["paged"] == 5 * layers
    step(mask)  # the mask was looked at when a block was compressed
    assert steps["paged"] == 6 * layers


def test_a_mask_that_changes_on_a_device_is_noticed_late(steps, caplog, monkeypatch):
    """As on a GPU, with a mask that is not to be read at once."""
    monkeypatch.setattr(paged.PagedState, "_tells_at_once", staticmethod(lambda mask: False))
    hide_while_decoding(shared("llama"), codec_for("llama", "decode"), steps, caplog)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_mask_that_changes_on_a_gpu_is_noticed_late(steps, caplog):
    model, codec = wide()
    hide_while_decoding(copy.deepcopy(model).cuda(), codec, steps, caplog, backend="auto")


def test_operations_on_the_cache(steps):
    model, codec = shared("llama", F64), codec_named("guarded")
    tokens, mask = padded(2, 240, (0, 75))

    def run(**changes):
        cache = cache_of(model, codec, **changes)
        outputs = [go_on(model, cache, tokens[:, :150], [147, 1, 1, 1], mask[:, :150])]
        twin = copy.deepcopy(cache)
        rows = [1, 0, 1]
        cache.batch_select_indices(rows)
        outputs.append(go_on(model, cache, tokens[rows], [1] * 70, mask[rows]))
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([2, 2, 1]))
        rows = [1, 1, 0]
        outputs.append(go_on(model, cache, tokens[rows], [1] * 23, mask[rows]))
        outputs.append(go_on(model, twin, tokens, [1] * 90, mask))
        cache.reset()
        outputs.append(go_on(model, cache, tokens, [110, *[1] * 10], mask))
        return [out[:, 75:] if index in (0, 4) else out for index, out in enumerate(outputs)]

    for ours, theirs in zip(run(), run(attention="general"), strict=True):
        # Hidden states differ by rounding, and blocks are encoded from them: a code in thousands may turn.
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)
    assert steps["paged"] == (3 + 70 + 23 + 90 + 10) * 3


def test_generation_and_beams(steps):
    model, codec = shared("llama", F64), codec_for("llama", "decode")
    prompt = random_tokens(2, 68, seed=7)
    for settings in ({}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}):
        outputs = [
            model.generate(
                prompt,
                past_key_values=cache_of(model, codec, attention=attention),
                max_new_tokens=24,
                do_sample=False,
                **settings,
            )
            for attention in ("fused", "general")
        ]
        assert torch.equal(*outputs)
    assert steps["paged"] > 0


def test_tables_and_operands_are_made_once(monkeypatch):
    model, codec = shared("llama"), dataclasses.replace(codec_named("guarded"))
    made = {"tables": 0, "updates": 0, "operands": 0, "outliers": 0}

    def counting(name, method):
        def call(*args, **kwargs):
            made[name] += 1
            return method(*args, **kwargs)

        return call

    monkeypatch.setattr(PageTables, "build", counting("tables", PageTables.build))
    monkeypatch.setattr(PageTables, "update", counting("updates", PageTables.update))
    monkeypatch.setattr(PageTables, "group", counting("outliers", PageTables.group))
    monkeypatch.setattr(paged, "decode_operands", counting("operands", paged.decode_operands))
    tokens, cache = random_tokens(2, 140, seed=3), cache_of(model, codec)
    feed(model, cache, tokens[:, :129], [70, *[1] * 59])
    assert made == {"tables": 1, "updates": 1, "operands": 3, "outliers": 3}
    feed(model, cache, tokens[:, 129:134], [1] * 5)  # the first of these compresses
    assert made == {"tables": 1, "updates": 2, "operands": 3, "outliers": 6}
    assert cache.footprint().position_bytes > cache.layout.positions.nbytes
    cache.reorder_cache(torch.tensor([1, 0]))
    feed(model, cache, tokens[[1, 0], 134:], [1] * 6)
    assert made == {"tables": 2, "updates": 3, "operands": 3, "outliers": 9}
    feed(model, cache_of(model, codec), tokens[:, :72], [70, 1, 1])
    assert made == {"tables": 3, "updates": 4, "operands": 3, "outliers": 12}


class Turning:
    """Stands in for operands that make turns of pages: their cosines."""

    @staticmethod
    def page_turns(rotary):
        return rotary.page_cos.clone()


def test_page_turns_of_hopper_kernels():
    """They lie beside the rotary tables, count and change with them, and go with them."""
    model, codec = shared("llama"), codec_for("llama", "decode")
    cache = cache_of(model, codec)
    feed(model, cache, random_tokens(1, 129), [70, *[1] * 59])
    before = cache.footprint().position_bytes
    (tables,) = cache._state._tables.values()
    turns = Turning.page_turns(tables.rotary)
    hopper._turns[tables.rotary] = {"any": (Turning, turns)}
    assert cache.footprint().position_bytes == before + turns.nbytes
    kept = len(hopper._turns)
    assert not turns[0, 1].any()
    feed(model, cache, random_tokens(1, 2), [1, 1])  # the first of these compresses
    assert turns[0, 1].any()
    assert torch.equal(turns, tables.rotary.page_cos)
    del tables
    cache.batch_repeat_interleave(2)
    feed(model, cache, random_tokens(2, 1), [1])
    gc.collect()
    assert len(hopper._turns) == kept - 1


def test_room_for_more(steps):
    """It is made ahead, for all layers alike; bits are those of what is in use."""
    model, codec = shared("llama"), codec_named("guarded")
    cache, general = cache_of(model, codec), cache_of(model, codec, attention="general")
    for one in (cache, general):
        feed(model, one, random_tokens(2, 200), [140, *[1] * 60])
    found, exact = cache.footprint(), general.footprint()
    assert (found.code_bytes, found.outlier_bytes) == (exact.code_bytes, exact.outlier_bytes)
    assert exact.spare_bytes == 0
    # Room for eight blocks was made, two have come.
    assert found.spare_bytes == 6 * (found.code_bytes + found.outlier_bytes) / 6
    assert (
        found.total_bytes
        == found.held_bytes
        == found.coded_bytes + sum((found.spare_bytes, found.sink_bytes, found.tail_bytes))
    )
    everything = [
        *cache._state.tensors,
        *(tables.block_rows for tables in cache._state._tables.values()),
        *(tensor for layer in cache._compressed for tensor in layer.pages.records.tensors),
        *(tensor for layer in cache._compressed for tensor in layer.exact.tensors),
        cache.layout.positions,
    ]
    assert found.total_bytes == storage_bytes(*everything)
    tables = found.position_bytes - exact.position_bytes
    assert found.bits_per_value == 8 * (exact.coded_bytes + tables) / exact.coded_values


def test_the_default_on_a_cpu_is_the_other_way(steps):
    model, codec = shared("llama"), codec_for("llama", "decode")
    feed(model, cache_of(model, codec, backend="auto"), random_tokens(1, 80), [78, 1, 1])
    assert (steps["paged"], steps["fused"]) == (0, 6)


def test_who_cannot(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model, codec = shared("llama"), codec_for("llama", "decode")
    assert why_not_paged(codec, 64) is None
    assert "no whole pages of 64" in why_not_paged(codec, 96)
    assert "rows of tokens" in why_not_paged(two_stage_codec("llama"), 64)
    cache = cache_of(model, codec, backend="triton")
    feed(model, cache, random_tokens(1, 70), [70])
    with pytest.raises(ConfigError, match="backend triton: expected tensors on a CUDA device"):
        feed(model, cache, random_tokens(1, 1), [1])
    with pytest.raises(ConfigError, match="one of auto, torch, triton"):
        cache_of(model, codec, backend="cuda")


class Forbidding(TorchDispatchMode):
    """Fails on what would wait for a GPU: numbers for the host, sizes by content, tensors of host numbers."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "bincount",
        "_unique",
        "equal",
        "lift_fresh",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        assert not name.startswith(self.WAITING), f"{func} in a decode step"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pads", [(0,), (0, 60, 131)])
def test_nothing_waits_for_the_device(pads, steps, monkeypatch):
    """The definitions stand aside; the kernels have such a test on a GPU."""
    model, codec, rows = shared("llama"), codec_named("guarded"), len(pads)
    calls = []

    def nothing(query, codes, latents, operands, rotary, **_):
        calls.append(1)
        out = torch.zeros(query.shape, dtype=torch.float32)
        return CodedAttention(out, out[..., 0], out)

    tokens, mask = padded(rows, 150, pads)
    cache = cache_of(model, codec)
    go_on(model, cache, tokens, [139, 1], mask)
    # As on a GPU: a mask that lies there is looked at when something was compressed.
    monkeypatch.setattr(paged, "attend_codes", nothing)
    monkeypatch.setattr(paged.PagedState, "sees_all", lambda self, layout, mask: self._unmasked)
    update, attend = AquaCache.update, PagedView.attend

    def guarded(method):
        def call(*args, **kwargs):
            with Forbidding():
                return method(*args, **kwargs)

        return call

    monkeypatch.setattr(AquaCache, "update", guarded(update))
    monkeypatch.setattr(PagedView, "attend", guarded(attend))
    go_on(model, cache, tokens, [1] * 10, mask)
    assert len(calls) == 30


# --- on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pads", [(0,), (0, 60, 131)])
def test_wide_heads(pads, steps):
    model, codec = wide()
    tokens, mask = padded(len(pads), 150, pads)
    ours, theirs = (
        go_on(model, cache_of(model, codec, attention=attention), tokens, [139, *[1] * 11], mask)
        for attention in ("fused", "general")
    )
    for row, pad in enumerate(pads):
        torch.testing.assert_close(ours[row, pad:], theirs[row, pad:], **CLOSE)
    assert steps["paged"] == 11 * len(codec.layers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("pads", [None, (0,), (0, 60, 131)])
def test_kernels_in_the_cache_never_wait(pads, steps, monkeypatch):
    """Until the next block is due nothing waits, and logits are those of reconstructed keys and values."""
    model, codec = wide()
    there, rows = copy.deepcopy(model).cuda(), 1 if pads is None else len(pads)
    tokens, mask = padded(rows, 150, pads or (0,))
    on_device = {"tokens": tokens.cuda(), "mask": mask.cuda()}
    caches = [AquaCache(there, codec, window=PAGED, attention=name) for name in ("fused", "general")]

    def step(cache, size):
        part = slice(cache.get_seq_length(), cache.get_seq_length() + size)
        extra = {}
        if pads is not None:
            positions = (on_device["mask"].cumsum(1) - 1).clamp(min=0)
            extra = {"attention_mask": on_device["mask"][:, : part.stop], "position_ids": positions[:, part]}
        with torch.no_grad():
            return there(on_device["tokens"][:, part], past_key_values=cache, **extra).logits

    for cache in caches:
        for size in (139, 1):
            step(cache, size)

    def strict(method):
        def call(*args, **kwargs):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return method(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    with monkeypatch.context() as patch:
        patch.setattr(AquaCache, "update", strict(AquaCache.update))
        patch.setattr(PagedView, "attend", strict(PagedView.attend))
        ours = [step(caches[0], 1) for _ in range(10)]
    theirs = [step(caches[1], 1) for _ in range(10)]
    layers = len(codec.layers)
    assert (steps["paged"], steps["fused"]) == (11 * layers, 0)
    for one, other in zip(ours, theirs, strict=True):
        # Float16 operands: scores are off by a thousandth.
        torch.testing.assert_close(one, other, atol=2e-2, rtol=0)
