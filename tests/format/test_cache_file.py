"""Files of caches: what is in them, and that damaged and hostile ones are refused with one line."""

import hashlib
import json
import struct
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from aquakv import AquaCache
from aquakv.codec import file as codec_file
from aquakv.errors import CacheFileError, OutputError
from tiny_models import codec_for, feed, random_tokens, same_bits, shared, variant, wide


def _saved(path, name="guarded", kind="llama", columns=30, **settings):
    """Save a cache of two rows, the first of which begins with three columns of padding."""
    model, codec = shared(kind), variant(name, kind)
    cache = AquaCache(model, codec)
    mask = torch.ones(2, columns, dtype=torch.long)
    mask[0, :3] = 0
    feed(model, cache, random_tokens(2, columns), [columns], mask)
    cache.save(path, **settings)
    return model, codec, cache


@pytest.fixture(scope="module", params=["guarded", "storage", "paper", "gemma3"])
def saved(request, tmp_path_factory):
    """A file, its model and its codec."""
    path = tmp_path_factory.mktemp("saved") / request.param
    hybrid = request.param == "gemma3"
    model, codec, _ = _saved(path, "decode" if hybrid else request.param, "gemma3" if hybrid else "llama")
    return path, model, codec


def _refused(path, model, codec, match=None):
    with pytest.raises(CacheFileError, match=match) as error:
        AquaCache.load(path, model, codec)
    text = str(error.value)
    assert text.isprintable(), text
    assert str(path) in text


def _rewrite(path, out, edit_header=lambda header: None, edit_tensors=lambda tensors: None):
    """Write an altered file whose checksum is right."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["aquakv"])
    tensors = load_file(path)
    edit_header(header)
    edit_tensors(tensors)
    text = json.dumps(header, sort_keys=True)
    digest = codec_file.content_digest(text, tensors)
    save_file(tensors, out, metadata={"aquakv": text, "aquakv_sha256": digest})
    return out


def test_contents(tmp_path):
    """Read with nothing but the specification."""
    path = tmp_path / "cache"
    _, codec, cache = _saved(path)
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert json.loads(metadata["aquakv"]) == {
        "format": "aquakv-cache",
        "format_version": 2,
        "codec": None,
        "codec_sha256": codec.digest,
        "window": {"sink_tokens": 2, "recent_window": 0, "block_tokens": 8},
        "columns": 30,
        "seen": 30,
        "starts": [3, 0],
        "recording": [],
    }
    digest = hashlib.sha256(metadata["aquakv"].encode())
    tensors = load_file(path)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    assert digest.hexdigest() == metadata["aquakv_sha256"]
    layer = {"keys.words", "keys.scales", "values.words", "values.scales", "tail.keys", "tail.values"}
    layer |= {"sinks.keys", "sinks.values", "outliers.index", "outliers.keys", "outliers.values"}
    names = {f"layers.{index}.{name}" for index in range(3) for name in layer}
    assert set(tensors) == names | {"layout.positions", "layout.pages"}
    assert tensors["layout.pages"].tolist() == [[0, 5], [0, 13], [0, 21], [1, 2], [1, 10], [1, 18]]
    assert tensors["layout.positions"][0].tolist() == [0, 0, 0, *range(27)]
    assert tensors["layers.0.tail.keys"].shape == (2, 4, 2, 16)
    found = [tensors["layers.1.outliers.index"], tensors["layers.1.outliers.keys"]]
    held = cache.layers[1].pages.all().outliers
    assert same_bits(found, [held.index, held.keys])


def test_the_codecs_checksum_is_its_files(tmp_path):
    codec = codec_for("llama", "storage")
    codec.save(tmp_path / "codec")
    with safe_open(tmp_path / "codec", framework="pt") as file:
        assert file.metadata()["aquakv_sha256"] == codec.digest


def test_missing_other_and_older_files(tmp_path):
    model, codec = shared("llama"), codec_for("llama")
    _refused(tmp_path / "none", model, codec, r"does not exist; write one with AquaCache\.save")
    _refused(tmp_path, model, codec, "is a directory")
    (tmp_path / "text").write_text("text")
    _refused(tmp_path / "text", model, codec, "expected a cache file")
    codec.save(tmp_path / "codec")
    _refused(tmp_path / "codec", model, codec, "expected format 'aquakv-cache'")
    path = tmp_path / "cache"
    _saved(path, "paper")
    other = _rewrite(path, tmp_path / "other", lambda h: h.update(format_version=1))
    _refused(other, model, codec, "format version 1; this aquakv reads version 2: update aquakv, or feed")


def test_truncated_and_flipped(tmp_path):
    path = tmp_path / "cache"
    model, codec, _ = _saved(path)
    raw, bad = path.read_bytes(), tmp_path / "bad"
    for length in (0, 7, 8, 100, len(raw) // 2, len(raw) - 1):
        bad.write_bytes(raw[:length])
        _refused(bad, model, codec)
    for place in range(0, len(raw), 997):
        changed = bytearray(raw)
        changed[place] ^= 1 << place % 8
        bad.write_bytes(changed)
        _refused(bad, model, codec)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("columns", -1),
        ("columns", 31),
        ("columns", 29),
        ("columns", 10**30),
        ("columns", 30.0),
        ("columns", True),
        ("columns", None),
        ("seen", 29),
        ("seen", 31),
        ("seen", -1),
        ("seen", None),
        ("starts", []),
        ("starts", [0]),
        ("starts", [3, 0, 0]),
        ("starts", [3, 31]),
        ("starts", [3, -1]),
        ("starts", [0, 3]),
        ("starts", ["3", "0"]),
        ("starts", {}),
        ("recording", [1]),
        ("recording", [99]),
        ("recording", [True]),
        ("recording", 0),
        ("window", {}),
        ("window", None),
        ("window", {"sink_tokens": 10**9, "recent_window": 0, "block_tokens": 8}),
        ("window", {"sink_tokens": 2, "recent_window": 0, "block_tokens": 10**9}),
        ("window", {"sink_tokens": 2, "recent_window": 0, "block_tokens": 4}),
        ("window", {"sink_tokens": 2, "recent_window": -1, "block_tokens": 8}),
        ("codec", {}),
        ("codec", []),
        ("codec", {"config": {}, "fingerprint": {}, "calibration": {}}),
        ("codec_sha256", "0" * 64),
        ("codec_sha256", None),
        ("codec_sha256", 5),
        ("extra", 1),
    ],
)
def test_impossible_headers(saved, tmp_path, entry, value):
    path, model, codec = saved
    bad = _rewrite(path, tmp_path / "bad", lambda h: h.update({entry: value}))
    started = time.perf_counter()
    # A codec that is given makes the one in the file unnecessary, which is not looked at then.
    _refused(bad, model, None if entry == "codec" else codec)
    assert time.perf_counter() - started < 1


SHAPES = {
    "rank": lambda t: t[None],
    "short": lambda t: t[:-1],
    "long": lambda t: torch.cat([t, t[:1]]),
    "narrow": lambda t: t[..., :-1],
    "wide": lambda t: torch.cat([t, t[..., :1]], -1),
    "missing": None,
    "double": lambda t: t.to(torch.complex64),
    "int": lambda t: t.to(torch.int64),
    "empty": lambda t: t[:0],
}


def test_every_tensor_is_needed_as_it_is(saved, tmp_path):
    path, model, codec = saved
    for name, tensor in load_file(path).items():
        for what, change in SHAPES.items():
            if what in ("narrow", "wide") and not tensor.shape[-1]:
                continue

            def edit(tensors, name=name, change=change):
                found = tensors.pop(name)
                if change is not None:
                    tensors[name] = change(found).contiguous()

            bad = _rewrite(path, tmp_path / "bad", edit_tensors=edit)
            with pytest.raises(CacheFileError, match=str(bad)):
                pytest.fail(f"{name} {what} was taken: {AquaCache.load(bad, model, codec)}")
    for name in ("extra", "layers.9.keys.words", "codec.extra", "layers.0.window.extra"):
        bad = _rewrite(path, tmp_path / "bad", edit_tensors=lambda t, n=name: t.update({n: torch.ones(1)}))
        _refused(bad, model, codec, "unexpected tensor")


def _with(tensor, index, value):
    changed = tensor.clone()
    changed[index] = value
    return changed


@pytest.mark.parametrize(
    ("variant_name", "name", "change"),
    [
        ("guarded", "layout.pages", lambda t: _with(t, (0, 0), 2)),
        ("guarded", "layout.pages", lambda t: _with(t, (0, 0), -1)),
        ("guarded", "layout.pages", lambda t: _with(t, (0, 1), 6)),
        ("guarded", "layout.pages", lambda t: _with(t, (5, 1), 2**31 - 1)),
        ("guarded", "layout.pages", lambda t: t.flip(0)),
        ("guarded", "layout.pages", lambda t: t[:-1]),
        ("guarded", "layout.pages", lambda t: t[[0, 0, 1, 2, 3, 4]]),
        ("guarded", "layers.0.outliers.index", lambda t: _with(t, 0, -1)),
        ("guarded", "layers.0.outliers.index", lambda t: _with(t, -1, 48)),
        ("guarded", "layers.0.outliers.index", lambda t: _with(t, 0, t[1])),
        ("guarded", "layers.0.outliers.index", lambda t: torch.arange(len(t), dtype=t.dtype)),
        ("storage", "layers.0.keys.lengths", lambda t: _with(t, 0, t[0] + 1)),
        ("storage", "layers.0.keys.lengths", lambda t: _with(_with(t, 0, -1), 1, t[0] + t[1] + 1)),
        ("storage", "layers.2.values.states", lambda t: _with(t, (0, 0), 5)),
    ],
)
def test_impossible_numbers(tmp_path, variant_name, name, change):
    path = tmp_path / "cache"
    model, codec, _ = _saved(path, variant_name)
    before = load_file(path)[name]
    assert not torch.equal(change(before), before)
    bad = _rewrite(path, tmp_path / "bad", edit_tensors=lambda t: t.update({name: change(t[name])}))
    _refused(bad, model, codec, "expected")


def test_a_codec_in_the_file_is_checked(tmp_path):
    path = tmp_path / "cache"
    model, _, _ = _saved(path, "paper", include_codec=True)
    name = "codec.layers.0.keys.mean"
    bad = _rewrite(path, tmp_path / "bad", edit_tensors=lambda t: t.update({name: t[name] + 1}))
    _refused(bad, model, None, "expected the codec with checksum")
    bad = _rewrite(path, tmp_path / "bad", edit_tensors=lambda t: t.pop(name))
    _refused(bad, model, None, "its codec: not a codec this version can use")


def test_damaged_streams_are_found_at_the_latest_when_they_are_read(tmp_path):
    """Streams that fit their lengths but not their states: refused by the decoder, not decoded wrongly."""
    path = tmp_path / "cache"
    model, codec, _ = _saved(path, "storage")
    name = "layers.0.keys.words"
    bad = _rewrite(path, tmp_path / "bad", edit_tensors=lambda t: t.update({name: torch.zeros_like(t[name])}))
    loaded = AquaCache.load(bad, model, codec)
    with pytest.raises(ValueError, match="damaged"):
        feed(model, loaded, random_tokens(2, 1), [1])


def test_records_are_those_of_whole_pages(tmp_path):
    model, codec = wide()
    cache = AquaCache(model, codec)
    feed(model, cache, random_tokens(1, 200), [200])
    path = tmp_path / "cache"
    cache.save(path)
    name = "layers.1.keys.records"
    assert load_file(path)[name].shape[0] == 3
    for change in (lambda t: t[:, :-1], lambda t: t[:-1], lambda t: t.to(torch.int8)):
        bad = _rewrite(
            path, tmp_path / "bad", edit_tensors=lambda t, c=change: t.update({name: c(t[name]).contiguous()})
        )
        _refused(bad, model, codec, f"{name}: expected torch.uint8")


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError()]
)
def test_a_failing_save_leaves_the_older_file_and_the_cache(tmp_path, monkeypatch, failure):
    path = tmp_path / "cache"
    model, codec, cache = _saved(path)
    raw = path.read_bytes()

    def fail(tensors, filename, metadata):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(codec_file, "save_file", fail)
        with pytest.raises(OutputError if isinstance(failure, OSError) else type(failure)):
            cache.save(path)
    assert path.read_bytes() == raw
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
    loaded = AquaCache.load(path, model, codec)
    tokens = random_tokens(2, 12, seed=2)
    assert torch.equal(feed(model, loaded, tokens, [12]), feed(model, cache, tokens, [12]))
    with pytest.raises(OutputError, match="cannot write cache"):
        cache.save(tmp_path / "none" / "cache")
