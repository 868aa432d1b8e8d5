"""A cache that comes back from a file goes on as if it had never been away."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from aquakv import AquaCache, ModelCodec, WindowConfig
from aquakv.errors import CacheFileError, CacheStateError, CodecMismatchError
from tiny_models import (
    VARIANTS,
    WINDOW,
    begins_with,
    build,
    codec_for,
    feed,
    go_on,
    guarded_codec,
    random_tokens,
    row_codes,
    same_bits,
    shared,
    variant,
    wide,
)


def _again(cache, model, path, **settings):
    cache.save(path)
    return AquaCache.load(path, model, cache.codec, **settings)


def _held(cache):
    """Return everything that layers hold, without room for more."""
    found = [cache.layout.positions]
    for layer in cache.layers:
        if not hasattr(layer, "pages"):
            found += [layer.keys, layer.values]
            continue
        found += [
            layer.exact.sink_keys,
            layer.exact.sink_values,
            layer.exact.tail_keys,
            layer.exact.tail_values,
        ]
        if layer.pages.chunks:
            chunk = layer.pages.all()
            found += [tensor for kind in chunk.encoded for tensor in kind]
            found += [] if chunk.outliers is None else chunk.outliers.tensors
    return found


def _padded(pads, columns):
    return torch.stack([(torch.arange(columns) >= pad).long() for pad in pads])


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_conversation_goes_on_token_by_token(tmp_path, kind, name):
    """Generation from a file gives the tokens that it gives without one."""
    model, codec = shared(kind), variant(name, kind)
    prompt = random_tokens(2, 37, seed=3)
    cache = AquaCache(model, codec)
    held = model.generate(prompt, past_key_values=cache, max_new_tokens=6, do_sample=False)
    loaded = _again(cache, model, tmp_path / "cache")
    turn = torch.cat([held, random_tokens(2, 5, seed=4)], 1)
    expected = model.generate(turn, past_key_values=cache, max_new_tokens=24, do_sample=False)
    found = model.generate(turn, past_key_values=loaded, max_new_tokens=24, do_sample=False)
    assert torch.equal(found, expected)
    assert same_bits(_held(loaded), _held(cache))


@pytest.mark.parametrize("kind", ["llama", "llama-odd", "gemma3"])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("columns", [1, 9, 10, 45])
def test_padded_rows_go_on_bit_for_bit(tmp_path, kind, name, columns):
    model, codec, pads = shared(kind), variant(name, kind), [11, 0, 4]
    tokens, mask = random_tokens(3, columns + 22, seed=5), _padded(pads, columns + 22)
    cache = AquaCache(model, codec)
    feed(model, cache, tokens[:, :columns], [columns], mask[:, :columns])
    loaded = _again(cache, model, tmp_path / "cache")
    assert dataclasses.replace(loaded.layout, version=0, _positions=None) == dataclasses.replace(
        cache.layout, version=0, _positions=None
    )
    assert same_bits(_held(loaded), _held(cache))
    sizes = [1, 1, 12, 8]
    expected = go_on(model, cache, tokens, sizes, mask)
    assert torch.equal(go_on(model, loaded, tokens, sizes, mask), expected)
    for row in range(3):
        assert same_bits(row_codes(loaded, row), row_codes(cache, row))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["paper", "storage", "guarded"])
def test_every_dtype(tmp_path, name, dtype):
    model, codec, tokens = shared("llama", dtype), variant(name), random_tokens(2, 60)
    cache = AquaCache(model, codec)
    feed(model, cache, tokens[:, :40], [40])
    loaded = _again(cache, model, tmp_path / "cache")
    assert same_bits(_held(loaded), _held(cache))
    expected = feed(model, cache, tokens[:, 40:], [1] * 20)
    assert torch.equal(feed(model, loaded, tokens[:, 40:], [1] * 20), expected)


def test_records_that_kernels_attend_to_go_on(tmp_path):
    """Codes in pages with room for more, tables and spare columns: none of that is in the file."""
    model, codec = wide()
    tokens = random_tokens(2, 290, seed=6)
    cache = AquaCache(model, codec, backend="torch")
    feed(model, cache, tokens[:, :200], [190, *[1] * 10])
    assert cache.footprint().spare_bytes > 0
    loaded = _again(cache, model, tmp_path / "cache", backend="torch")
    assert loaded.footprint().spare_bytes == 0
    assert same_bits(_held(loaded), _held(cache))
    expected = feed(model, cache, tokens[:, 200:], [1] * 90)
    found = feed(model, loaded, tokens[:, 200:], [1] * 90)
    # Sums have other orders where there is another amount of room; the 58th token compresses the next block,
    # and some code may then fall on the other side.
    torch.testing.assert_close(found[:, :58], expected[:, :58], atol=1e-5, rtol=0)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert len(loaded.layout.pages) > 4


def test_after_rows_were_chosen_and_tokens_taken_back(tmp_path):
    model, codec, tokens = shared("llama"), guarded_codec(), random_tokens(2, 70)
    cache = AquaCache(model, codec)
    pads = [9, 0]
    mask = _padded(pads, 70)
    feed(model, cache, tokens[:, :41], [41], mask[:, :41])
    cache.batch_select_indices([1, 1])
    cache.crop(-3)
    loaded = _again(cache, model, tmp_path / "cache")
    both, mask = tokens[[1, 1]], mask[[1, 1]]
    expected = go_on(model, cache, both, [1, 20], mask)
    assert torch.equal(go_on(model, loaded, both, [1, 20], mask), expected)


def test_windows_that_record_the_past(tmp_path):
    model, codec = shared("gemma3"), codec_for("gemma3", "decode", window=WindowConfig(2, 8, 8))
    tokens = random_tokens(1, 60)
    cache = AquaCache(model, codec)
    feed(model, cache, tokens[:, :30], [30])
    for layer in cache.layers:
        if layer.is_sliding:
            layer.activate_past_recording()
    feed(model, cache, tokens[:, 30:36], [6])
    loaded = _again(cache, model, tmp_path / "cache")
    for one in (cache, loaded):
        one.crop(-4)
    expected = feed(model, cache, tokens[:, 32:], [1, 27])
    assert torch.equal(feed(model, loaded, tokens[:, 32:], [1, 27]), expected)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_an_empty_cache(tmp_path, kind):
    model, codec, tokens = shared(kind), codec_for(kind), random_tokens(2, 30)
    cache = AquaCache(model, codec)
    loaded = _again(cache, model, tmp_path / "cache")
    assert loaded.get_seq_length() == 0
    cache = AquaCache(model, codec)
    assert torch.equal(feed(model, loaded, tokens, [30]), feed(model, cache, tokens, [30]))


def test_a_cache_cropped_to_nothing(tmp_path):
    model, codec, tokens = shared("llama"), codec_for("llama"), random_tokens(2, 30)
    cache = AquaCache(model, codec)
    feed(model, cache, tokens[:, :5], [5])
    cache.crop(-5)
    loaded = _again(cache, model, tmp_path / "cache")
    assert torch.equal(feed(model, loaded, tokens, [30]), feed(model, AquaCache(model, codec), tokens, [30]))


def test_a_copy_and_a_file_of_a_file(tmp_path):
    model, codec, tokens = shared("llama"), variant("storage"), random_tokens(1, 60)
    cache = AquaCache(model, codec)
    feed(model, cache, tokens[:, :40], [1] * 40)
    once = _again(cache, model, tmp_path / "one")
    twice = _again(once, model, tmp_path / "two")
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert list(one) == list(two)
    assert same_bits(list(one.values()), list(two.values()))
    feed(model, twice, tokens[:, 40:], [20])
    feed(model, cache, tokens[:, 40:], [20])
    assert begins_with(row_codes(twice, 0), row_codes(once, 0))
    assert same_bits(row_codes(twice, 0), row_codes(cache, 0))


# --- the codec ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["paper", "decode", "storage"])
def test_the_codec_can_be_in_the_file(tmp_path, name):
    # From a file: calibration's matrices can have other strides, on which the last bits of products depend.
    codec_for("llama", name).save(tmp_path / "codec")
    model, codec, tokens = shared("llama"), ModelCodec.load(tmp_path / "codec"), random_tokens(1, 60)
    cache = AquaCache(model, codec, window=WindowConfig(1, 3, 8))
    feed(model, cache, tokens[:, :40], [40])
    cache.save(tmp_path / "cache", include_codec=True)
    loaded = AquaCache.load(tmp_path / "cache", model)
    assert loaded.window == cache.window
    assert loaded.codec.digest == codec.digest
    expected = feed(model, cache, tokens[:, 40:], [1] * 20)
    assert torch.equal(feed(model, loaded, tokens[:, 40:], [1] * 20), expected)


def test_the_codec_must_be_the_one_it_was_saved_with(tmp_path):
    model, codec = shared("llama"), codec_for("llama")
    cache = AquaCache(model, codec)
    feed(model, cache, random_tokens(1, 30), [30])
    cache.save(tmp_path / "cache")
    codec.save(tmp_path / "codec")
    assert AquaCache.load(tmp_path / "cache", model, tmp_path / "codec").get_seq_length() == 30
    with pytest.raises(CacheFileError, match="holds no codec, only the checksum"):
        AquaCache.load(tmp_path / "cache", model)
    with pytest.raises(CacheFileError, match=f"expected the codec with checksum {codec.digest[:16]}"):
        AquaCache.load(tmp_path / "cache", model, codec_for("llama", bits=8))
    with pytest.raises(CodecMismatchError, match="another model"):
        AquaCache.load(tmp_path / "cache", build("llama", seed=1), codec)


def test_a_loaded_cache_wants_the_dtype_that_it_has(tmp_path):
    cache = AquaCache(shared("llama"), codec_for("llama"))
    feed(shared("llama"), cache, random_tokens(1, 30), [30])
    model = shared("llama", torch.float64)
    loaded = _again(cache, model, tmp_path / "cache")
    with pytest.raises(CacheStateError, match=r"holds torch\.float32, but got keys of torch\.float64"):
        feed(model, loaded, random_tokens(1, 1), [1])


def test_nothing_is_saved_halfway(tmp_path):
    model, codec = build("llama"), codec_for("llama")
    cache = AquaCache(model, codec)
    feed(model, cache, random_tokens(1, 30), [30])

    def fail(*_args):
        raise InterruptedError

    model.model.layers[1].self_attn.register_forward_pre_hook(fail)
    with pytest.raises(InterruptedError):
        feed(model, cache, random_tokens(1, 1), [1])
    with pytest.raises(CacheStateError, match="reset"):
        cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


# --- size ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["paper", "storage", "decode"])
def test_the_file_is_as_large_as_what_is_held(tmp_path, name):
    model, codec = wide()
    window = WindowConfig(sink_tokens=4, recent_window=0, block_tokens=128)
    if name != "decode":
        codec = codec_for("llama", name, window=window)
        model = build("llama", max_position_embeddings=16384)
    cache = AquaCache(model, codec, window=window)
    tokens = random_tokens(2, 8000)
    feed(model, cache, tokens, [4000, 3995, *[1] * 5])
    cache.save(tmp_path / "cache")
    held = cache.footprint()
    size, least = (tmp_path / "cache").stat().st_size, held.total_bytes - held.spare_bytes
    assert size < 1.02 * least
    assert held.coded_values > 0.9 * held.total_values


def test_window_is_that_of_the_file(tmp_path):
    model, codec = shared("llama"), codec_for("llama")
    cache = AquaCache(model, codec, window=WindowConfig(3, 1, 5))
    feed(model, cache, random_tokens(1, 30), [30])
    assert codec.config.window == WINDOW
    assert _again(cache, model, tmp_path / "cache").window == WindowConfig(3, 1, 5)


def test_frequencies_that_change_are_remembered(tmp_path):
    """Loaded tokens were rotated by the frequencies of short sequences; they cannot go on past the change."""
    kind = "phi3-longrope"
    model, codec = shared(kind), codec_for(kind, "paper")
    cache = AquaCache(model, codec)
    tokens = random_tokens(1, 140)
    feed(model, cache, tokens[:, :100], [100])
    cache.save(tmp_path / "cache.safetensors")
    loaded = AquaCache.load(tmp_path / "cache.safetensors", model, codec)
    with pytest.raises(CacheStateError, match="changes its frequencies"):
        feed(model, loaded, tokens[:, 100:], [40])
