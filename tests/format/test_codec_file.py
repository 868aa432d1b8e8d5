import copy
import dataclasses
import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny_models
from aquakv import ModelCodec, preset
from aquakv.codec import AffinePredictor, LayerCodec, ModelFingerprint
from aquakv.codec import file as codec_file
from aquakv.codec.entropy import NUM_CLASSES
from aquakv.codec.fingerprint import may_be_one, sample_of, sample_text
from aquakv.codec.model import build_published_codec
from aquakv.config import PRESETS
from aquakv.errors import CodecFileError, CodecMismatchError, OutputError
from aquakv.models.adapter import adapt
from tiny_models import build, codec_for, same_bits, variant


def _golden_codec():
    """Two layers of one KV head of 4, made by hand: every stored number is a small dyadic fraction."""
    config = dataclasses.replace(preset("paper", 3), window=tiny_models.WINDOW)
    fingerprint = ModelFingerprint("llama", 3, (0, 2), 1, 4, {"rope_theta": 10000.0}, ("00ff", "a1b2"))
    layers = []
    for index in range(2):
        codecs = {}
        for number, kind in enumerate(("keys", "values")):
            mean = torch.arange(4) / 4 + index + number
            predictor = None
            if index:
                width = 4 * (1 + number)
                weight = (torch.arange(width * 4).view(width, 4) / 8 - 1).to(torch.bfloat16)
                predictor = AffinePredictor((weight,), torch.arange(4) / 2)
            codecs[kind] = build_published_codec(config, 4, index, mean, predictor)
        layers.append(LayerCodec(codecs["keys"], codecs["values"], config.predictor))
    record = {"data": [{"name": "made up"}], "seed": None, "tokens": 12, "layers": []}
    return ModelCodec(config, fingerprint, tuple(layers), record)


GOLDEN_JSON = (
    '{"calibration": {"data": [{"name": "made up"}], "layers": [], "seed": null, "tokens": 12}, "config":'
    ' {"allocation": {"bits": 3.0, "first_layer_bits": 4.0, "importance": "equal", "importance_exponent":'
    ' 0.7, "kind": "equal", "widths": [1, 2, 3, 4, 5, 6, 7, 8]}, "guard": {"max_fraction": 0.01, '
    '"threshold": null}, "predictor": {"first_layer_values": false, "history": 1, "key_inputs": '
    '["previous_keys"], "key_rank": null, "kind": "linear", "ridge": 0.001, "value_inputs": ["keys", '
    '"previous_values"], "value_rank": null}, "preset": "paper", "quantizer": {"arithmetic": true, '
    '"grid_dim": 2, "kind": "grid", "rate_weight": 0.1}, "transform": {"first_stage": 16, "key_scope": '
    '"all-heads", "kind": "hadamard", "max_group_size": 1024, "metric_floor": 0.001, "shrinkage": 0.0, '
    '"value_scope": "all-heads"}, "window": {"block_tokens": 8, "recent_window": 0, "sink_tokens": 2}}, '
    '"fingerprint": {"architecture": "llama", "compressed_layers": [0, 2], "head_dim": 4, "layer_hashes": '
    '["00ff", "a1b2"], "num_kv_heads": 1, "num_layers": 3, "rotary": {"rope_theta": 10000.0}}, "format": '
    '"aquakv-codec", "format_version": 4}'
)
GOLDEN_CHECKSUM = "45dbf2bce96344e90fcbcf430886036e9e62fa5c56f89a119ab861c960102e30"

#: 0.5 and -2 as float32, little-endian; 1.
SAMPLES = ("0000003f000000c0", "0000803f")


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A file of format version 5: the same codec, with samples of weights."""
    path = tmp_path_factory.mktemp("golden") / "sampled.safetensors"
    codec = _golden_codec()
    fingerprint = dataclasses.replace(codec.fingerprint, layer_samples=SAMPLES)
    dataclasses.replace(codec, fingerprint=fingerprint).save(path)
    return path


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    path = tmp_path_factory.mktemp("golden") / "golden.safetensors"
    _golden_codec().save(path)
    return path


def _codes(codec):
    """Code made-up tokens; return every code tensor, sealed ones too, and every reconstruction."""
    generator = torch.Generator().manual_seed(5)
    history, found = (), []
    for layer in codec.layers:
        rows = torch.randn(2, 128, layer.features, generator=generator)
        keys, values = rows + torch.stack([layer.keys.mean, layer.values.mean])[:, None]
        codes, hat = layer.encode(keys, values, history)
        sealed = layer.seal(codes, 32)
        found += [t for part in (*codes, *sealed) for t in (*part.code_tensors, *part.scale_tensors)]
        found += [*hat, *layer.reconstruct(layer.unseal(sealed, 32), history)]
        excess = layer.excess(keys, values, hat)
        found += [] if excess is None else [excess]
        history = layer.extend(history, hat)
    return found


def _refused(path, match=None, kind=CodecFileError):
    with pytest.raises(kind, match=match) as error:
        ModelCodec.load(path)
    assert type(error.value) is kind
    text = str(error.value)
    assert text.isprintable(), text  # one line, and nothing that would play tricks on a terminal
    assert str(path) in text


def _rewrite(path, out, edit_header=lambda header: None, edit_tensors=lambda tensors: None, raw=None):
    """Write an altered codec file whose checksum is right."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["aquakv"])
    tensors = load_file(path)
    header = edit_header(header) or header
    edit_tensors(tensors)
    text = json.dumps(header, sort_keys=True) if raw is None else raw
    digest = codec_file.content_digest(text, tensors)
    save_file(tensors, out, metadata={"aquakv": text, "aquakv_sha256": digest})
    return out


# --- what the format is -----------------------------------------------------------------------------------


def test_golden_bytes(golden):
    """Read with nothing but the specification: files of today must be readable for ever."""
    raw = golden.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    metadata = header.pop("__metadata__")
    assert metadata["aquakv"] == GOLDEN_JSON
    assert set(metadata) == {"aquakv", "aquakv_sha256"}
    digest = hashlib.sha256(GOLDEN_JSON.encode())
    names = {"F32": "torch.float32", "BF16": "torch.bfloat16"}
    for name in sorted(header):
        entry = header[name]
        digest.update(f"\n{name} {names[entry['dtype']]} {entry['shape']}\n".encode())
        digest.update(data[slice(*entry["data_offsets"])])
    assert digest.hexdigest() == metadata["aquakv_sha256"] == GOLDEN_CHECKSUM
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "layers.0.keys.mean": ("F32", [4]),
        "layers.0.values.mean": ("F32", [4]),
        "layers.1.keys.mean": ("F32", [4]),
        "layers.1.keys.predictor.bias": ("F32", [4]),
        "layers.1.keys.predictor.weight": ("BF16", [4, 4]),
        "layers.1.values.mean": ("F32", [4]),
        "layers.1.values.predictor.bias": ("F32", [4]),
        "layers.1.values.predictor.weight": ("BF16", [8, 4]),
    }
    first = data[slice(*header["layers.1.values.mean"]["data_offsets"])]
    assert struct.unpack("<4f", first) == (2.0, 2.25, 2.5, 2.75)


@pytest.fixture(scope="module", params=PRESETS)
def fitted(request, tmp_path_factory):
    """A codec file of each preset, made by calibration."""
    path = tmp_path_factory.mktemp("fitted") / request.param
    codec_for("llama", request.param).save(path)
    return path


def test_files_of_version_5_have_samples_and_those_of_version_4_have_none(golden, sampled, tmp_path):
    """Both are read, and written as they were read, so that checksums stay what they are."""
    text = GOLDEN_JSON.replace(
        '"num_kv_heads"', '"layer_samples": ["' + '", "'.join(SAMPLES) + '"], "num_kv_heads"'
    )
    text = text.replace('"format_version": 4', '"format_version": 5')
    for path, expected in ((golden, GOLDEN_JSON), (sampled, text)):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        assert metadata["aquakv"] == expected
        codec = ModelCodec.load(path)
        assert codec.digest == metadata["aquakv_sha256"]
        codec.save(tmp_path / "again")
        with safe_open(tmp_path / "again", framework="pt") as file:
            assert file.metadata() == metadata
    assert codec.fingerprint.layer_samples == SAMPLES
    assert codec.fingerprint == ModelCodec.load(golden).fingerprint


def test_versions_and_samples_that_do_not_fit(golden, sampled, tmp_path):
    for path, version, there in ((golden, 5, "missing"), (sampled, 4, "unexpected")):
        bad = _rewrite(path, tmp_path / "bad", lambda h, v=version: h.update(format_version=v))
        _refused(bad, f"layer_samples is {there}; update aquakv or calibrate again")


@pytest.mark.parametrize(
    "samples",
    [
        None,
        {},
        "0000803f",
        ["0000803f"],
        ["0000803f"] * 3,
        ["0000803f", 7],
        ["0000803f", None],
        ["0000803f", "0000803"],
        ["0000803f", "0000803F"],
        ["0000803f", "0000803f "],
        ["0000803f", "zzzzzzzz"],
        ["0000803f", "\ud800" * 8],
        ["0000803f", "٠" * 8],
        ["0000803f", "00" * 260],
    ],
)
def test_impossible_samples(sampled, tmp_path, samples):
    _refused(_rewrite(sampled, tmp_path / "bad", lambda h: h["fingerprint"].update(layer_samples=samples)))


def test_tensors_of_every_preset(fitted):
    """All of `docs/format.md`: names, dtypes and shapes, n being the number of coefficients."""
    d, tensors = 32, load_file(fitted)
    linear = {"storage": (2, 3, 7), "decode": (1, 1, 1), "paper": (1, 1, 2), "higgs": (0, 1, 0)}
    per_layer, history, _ = linear[fitted.name]
    expected = {}
    for layer in range(3):
        for kind in ("keys", "values"):
            at = f"layers.{layer}.{kind}."
            expected[at + "mean"] = (torch.float32, [d])
            width = d * per_layer * min(layer, history)
            if kind == "values":
                own = fitted.name != "higgs" and (layer > 0 or fitted.name in ("storage", "decode"))
                width = d * own + (0 if fitted.name == "decode" else width)
            if width:
                expected[at + "predictor.bias"] = (torch.float32, [d])
                if fitted.name == "decode" and kind == "keys":
                    expected[at + "predictor.down"] = (torch.bfloat16, [width, d])
                    expected[at + "predictor.up"] = (torch.bfloat16, [d, d])
                else:
                    expected[at + "predictor.weight"] = (torch.bfloat16, [width, d])
            if fitted.name not in ("storage", "decode"):
                continue
            n = tensors[at + "deviations"].numel()
            expected[at + "analysis"] = (torch.float32, [d, n])
            expected[at + "synthesis"] = (torch.float32, [n, d])
            expected[at + "deviations"] = (torch.float32, [n])
            expected[at + "guard.roots"] = (torch.float32, [2, 16, 16])
            expected[at + "guard.limit"] = (torch.float32, [1])
            if fitted.name == "decode":
                expected[at + "widths"] = (torch.uint8, [n])
            else:
                expected[at + "classes"] = (torch.uint8, [n])
                expected[at + "step"] = expected[at + "rate_bits"] = (torch.float32, [1])
    if fitted.name == "storage":
        expected["entropy.frequencies"] = (torch.int32, [29, 255])
        expected["entropy.points"] = (torch.float32, [29, 128])
    assert {name: (t.dtype, list(t.shape)) for name, t in tensors.items()} == expected


@pytest.mark.parametrize("kind", ["llama", "llama-odd", "gemma3"])
@pytest.mark.parametrize(
    ("name", "bits"), [("paper", 2), ("higgs", 5), ("storage", 1.25), ("decode", 2), ("decode", 0.6)]
)
def test_round_trip_is_bit_for_bit(tmp_path, kind, name, bits):
    codec, path = codec_for(kind, name, bits), tmp_path / "c.safetensors"
    codec.save(path)
    loaded = ModelCodec.load(path)
    assert loaded.config == codec.config
    assert loaded.fingerprint == codec.fingerprint
    assert loaded.calibration == codec.calibration
    assert loaded.bits_per_value == codec.bits_per_value
    mine = _codes(codec)
    assert all(t.isfinite().all() for t in mine if t.dtype == torch.float32)
    assert same_bits(_codes(loaded), mine)
    loaded.save(tmp_path / "again")
    # The header's entries may come in any order (safetensors keeps metadata in a hash table).
    assert same_bits(
        [t for _, t in sorted(load_file(tmp_path / "again").items())],
        [t for _, t in sorted(load_file(path).items())],
    )
    loaded.fingerprint.require_match(adapt(build(kind)).fingerprint())


def test_saved_twice_from_a_str_path_over_an_older_file(tmp_path):
    path = tmp_path / "c.safetensors"
    path.write_text("older")
    codec_for("llama").save(str(path))
    assert ModelCodec.load(str(path)).config == codec_for("llama").config
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


# --- damage -----------------------------------------------------------------------------------------------


def test_truncated_at_any_length(golden, tmp_path):
    raw, path = golden.read_bytes(), tmp_path / "cut"
    for size in [0, 1, 7, 8, 9, *range(10, len(raw), 37), len(raw) - 2, len(raw) - 1]:
        path.write_bytes(raw[:size])
        _refused(path)


def test_lengthened(golden, tmp_path):
    path = tmp_path / "long"
    for more in (b"\0", b"\0" * 8, b"x" * 1000):
        path.write_bytes(golden.read_bytes() + more)
        _refused(path)


def test_any_flipped_bit_is_noticed(golden, tmp_path):
    raw, path = golden.read_bytes(), tmp_path / "flipped"
    size = len(raw)
    (header,) = struct.unpack("<Q", raw[:8])
    bits = [(i, b) for i in range(8) for b in range(8)]  # the header's length: all
    bits += [(i, (3 * i) % 8) for i in range(8, 8 + header, 5)]  # the header
    bits += [(i, b) for i in range(8 + header, size) for b in (0, 7)]  # the tensors: low and high bits
    assert len(bits) > 500
    for position, bit in bits:
        damaged = bytearray(raw)
        damaged[position] ^= 1 << bit
        path.write_bytes(damaged)
        _refused(path)


def test_every_bit_of_the_tensors_names_and_types(golden, tmp_path):
    """Where a flip can give another valid safetensors file: names, dtypes, shapes and the metadata."""
    raw, path = golden.read_bytes(), tmp_path / "flipped"
    for word in (b"layers.0.keys.mean", b'"F32"', b'"BF16"', b"[8,4]", b"aquakv_sha256", b"__metadata__"):
        start = raw.index(word)
        for position in range(start, start + len(word)):
            for bit in range(8):
                damaged = bytearray(raw)
                damaged[position] ^= 1 << bit
                path.write_bytes(damaged)
                _refused(path)


def test_swapped_tensors_of_equal_shape(golden, tmp_path):
    raw = golden.read_bytes()
    swapped = raw.replace(b"layers.0.keys.mean", b"layers.0.xxxx.mean")
    swapped = swapped.replace(b"layers.1.keys.mean", b"layers.0.keys.mean")
    swapped = swapped.replace(b"layers.0.xxxx.mean", b"layers.1.keys.mean")
    assert len(swapped) == len(raw)
    path = tmp_path / "swapped"
    path.write_bytes(swapped)
    _refused(path, "checksum")


def test_other_files(golden, tmp_path):
    path = tmp_path / "other"
    generator = torch.Generator().manual_seed(0)
    for size in (10, 1000, 100_000):
        path.write_bytes(bytes(torch.randint(0, 256, (size,), generator=generator).tolist()))
        _refused(path)
    path.write_bytes(b"\0" * 4096)
    _refused(path)
    path.write_text("to be or not to be " * 10)
    _refused(path, "safetensors")


class _Bomb:
    def __reduce__(self):
        return (os.mkdir, ("bomb",))


def test_a_pickle_is_refused_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "codec.pt"
    path.write_bytes(pickle.dumps(_Bomb()))
    _refused(path)
    torch.save({"bomb": _Bomb(), "weights": torch.zeros(3)}, path)
    _refused(path)
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 2**32, 10**8 + 1, 10**9])
def test_a_huge_declared_header(golden, tmp_path, length):
    path = tmp_path / "huge"
    path.write_bytes(struct.pack("<Q", length) + golden.read_bytes()[8:])
    started = time.perf_counter()
    _refused(path)
    assert time.perf_counter() - started < 1


def test_tensors_that_lie_outside_the_file_or_on_each_other(golden, tmp_path):
    raw, path = golden.read_bytes(), tmp_path / "bad"
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    for change in (
        {"data_offsets": [0, 2**40], "shape": [2**38]},
        {"shape": [2**62]},
        {"shape": [2**33, 2**33]},
        {"shape": [-4]},
        {"data_offsets": [16, 0]},
        {"dtype": "F128"},
        {"dtype": "F8_E4M3", "shape": [16]},
        {"dtype": "F4", "shape": [32]},
        {"dtype": "C64", "shape": [2]},
        {"dtype": "U16", "shape": [8]},
        {"dtype": "BOOL", "shape": [16]},
        {"shape": [0, 2**60]},
    ):
        broken = copy.deepcopy(header)
        broken["layers.0.keys.mean"].update(change)
        text = json.dumps(broken).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
        _refused(path)


def test_missing_file_directory_and_impossible_names(tmp_path):
    _refused(tmp_path / "none", "does not exist")
    _refused(tmp_path, "directory")
    _refused(tmp_path / "none" / "none", "does not exist")
    with pytest.raises(CodecFileError):
        ModelCodec.load("nul\0byte")
    with pytest.raises(CodecFileError):
        ModelCodec.load("x" * 5000)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(golden, tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(golden.read_bytes())
    path.chmod(0)
    _refused(path)


# --- hostile files with a right checksum ------------------------------------------------------------------


def test_safetensors_without_our_header(golden, tmp_path):
    path = tmp_path / "plain"
    save_file(load_file(golden), path)
    _refused(path, "not an aquakv codec")
    save_file(load_file(golden), path, metadata={"format": "pt"})
    _refused(path, "not an aquakv codec")
    save_file(load_file(golden), path, metadata={"aquakv": GOLDEN_JSON})
    _refused(path, "not an aquakv codec")
    save_file(load_file(golden), path, metadata={"aquakv": GOLDEN_JSON, "aquakv_sha256": ""})
    _refused(path, "checksum")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "1",
        '"aquakv-codec"',
        "{" * 1000,
        "[" * 200_000,
        '{"a":' * 100_000,
        '{"format": "aquakv-codec", "format_version": ' + "1" * 5000 + "}",
        "\ud7ff",
        '{"format": "other", "format_version": 1}',
    ],
    ids=lambda text: f"{text[:12]}-{len(text)}",
)
def test_metadata_that_is_no_header(golden, tmp_path, text):
    _refused(_rewrite(golden, tmp_path / "bad", raw=text))


@pytest.mark.parametrize("version", [0, 1, 2, 3, 5, -1, "4", None, [], 10**30, 1.5])
def test_other_format_version(golden, tmp_path, version):
    path = _rewrite(golden, tmp_path / "bad", lambda h: h.update(format_version=version))
    _refused(path, "version.*update aquakv or calibrate again")


def _at(header, dotted):
    *path, last = dotted.split(".")
    for key in path:
        header = header[key]
    return header, last


@pytest.mark.parametrize(
    "where",
    [
        "config",
        "fingerprint",
        "calibration",
        "config.window",
        "config.window.sink_tokens",
        "config.predictor.kind",
        "config.preset",
        "fingerprint.rotary",
        "fingerprint.layer_hashes",
    ],
)
def test_missing_keys(golden, tmp_path, where):
    def drop(header):
        parent, key = _at(header, where)
        del parent[key]

    _refused(_rewrite(golden, tmp_path / "bad", drop), where.split(".")[-1])


@pytest.mark.parametrize("parent", ["", "config", "config.allocation", "fingerprint"])
@pytest.mark.parametrize("name", ["colour", "", "a\nb\x1b[2J", "\ud800", "x" * 300])
def test_unknown_keys(golden, tmp_path, parent, name):
    def add(header):
        where, key = _at(header, f"{parent}.x" if parent else "x")
        where[name] = 1
        assert key == "x"

    _refused(_rewrite(golden, tmp_path / "bad", add), "unknown")


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("config", []),
        ("config", None),
        ("fingerprint", "llama"),
        ("calibration", []),
        ("config.preset", 3),
        ("config.predictor.kind", "magic\n"),
        ("config.predictor.kind", "dense"),
        ("config.predictor.kind", ["linear"]),
        ("config.predictor.kind", "mean"),
        ("config.predictor.history", 0),
        ("config.predictor.history", 9),
        ("config.predictor.key_rank", 1),
        ("config.predictor.first_layer_values", True),
        ("config.transform.kind", "klt"),
        ("config.allocation.kind", "water-filling"),
        ("config.quantizer.kind", "entropy"),
        ("config.quantizer.kind", "scalar"),
        ("config.guard.threshold", 1.0),
        ("config.guard.max_fraction", 0),
        ("config.predictor.value_inputs", []),
        ("config.predictor.value_inputs", ["keys", "keys"]),
        ("config.predictor.value_inputs", "keys"),
        ("config.predictor.ridge", -1),
        ("config.predictor.ridge", float("nan")),
        ("config.predictor.ridge", float("inf")),
        ("config.predictor.ridge", 10**400),
        ("config.allocation.bits", 0),
        ("config.allocation.bits", 2.5),
        ("config.allocation.bits", 9),
        ("config.allocation.bits", True),
        ("config.allocation.bits", "2"),
        ("config.allocation.first_layer_bits", 10**400),
        ("config.quantizer.grid_dim", 3),
        ("config.quantizer.grid_dim", 2.0),
        ("config.transform.max_group_size", 0),
        ("config.transform.max_group_size", 4097),
        ("config.transform.max_group_size", -(10**9)),
        ("config.window.block_tokens", 0),
        ("config.window.sink_tokens", -1),
        ("config.window.sink_tokens", 1e3),
        ("fingerprint.num_kv_heads", 10**9),
        ("fingerprint.num_kv_heads", 10**400),
        ("fingerprint.num_kv_heads", 0),
        ("fingerprint.num_kv_heads", -1),
        ("fingerprint.num_kv_heads", True),
        ("fingerprint.head_dim", 10**12),
        ("fingerprint.head_dim", 2),
        ("fingerprint.compressed_layers", []),
        ("fingerprint.compressed_layers", list(range(1000))),
        ("fingerprint.compressed_layers", ["0", "2"]),
        ("fingerprint.layer_hashes", ["00ff"]),
        ("fingerprint.layer_hashes", [1, 2]),
        ("fingerprint.rotary", []),
    ],
)
def test_impossible_values(golden, tmp_path, where, value):
    def put(header):
        parent, key = _at(header, where)
        parent[key] = value

    path = _rewrite(golden, tmp_path / "bad", put)
    started = time.perf_counter()
    _refused(path)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("layers.0.keys.mean", torch.zeros(3)),
        ("layers.0.keys.mean", torch.zeros(1, 4)),
        ("layers.0.keys.mean", torch.zeros(4, dtype=torch.float64)),
        ("layers.0.keys.mean", torch.zeros(4, dtype=torch.int32)),
        ("layers.0.keys.mean", torch.zeros(())),
        ("layers.0.keys.mean", torch.zeros(0)),
        ("layers.0.keys.mean", torch.tensor([0, 0, 0, torch.nan])),
        ("layers.1.values.predictor.bias", torch.tensor([0, 0, 0, torch.inf])),
        ("layers.1.values.predictor.weight", torch.zeros(4, 4, dtype=torch.bfloat16)),
        ("layers.1.values.predictor.weight", torch.zeros(4, 8, dtype=torch.bfloat16)),
        ("layers.1.values.predictor.weight", torch.zeros(8, 4, dtype=torch.float16)),
        ("layers.1.values.predictor.weight", torch.full((8, 4), -torch.inf, dtype=torch.bfloat16)),
        ("layers.0.keys.predictor.weight", torch.zeros(4, 4, dtype=torch.bfloat16)),
        ("layers.2.keys.mean", torch.zeros(4)),
        ("extra\nline", torch.zeros(1)),
    ],
)
def test_wrong_or_extra_tensors(golden, tmp_path, name, tensor):
    path = _rewrite(golden, tmp_path / "bad", edit_tensors=lambda tensors: tensors.update({name: tensor}))
    _refused(path, "tensor")


def test_missing_tensors(golden, tmp_path):
    for name in load_file(golden):
        path = _rewrite(golden, tmp_path / "bad", edit_tensors=lambda tensors, name=name: tensors.pop(name))
        _refused(path, f"{name} is missing")
    _refused(_rewrite(golden, tmp_path / "bad", edit_tensors=lambda tensors: tensors.clear()), "missing")


# Rank and length wrong, and at both ends one too few and one too many.
SHAPES = {
    "rank": lambda t: t[None],
    "short": lambda t: t[:-1],
    "long": lambda t: torch.cat([t, t[:1]]),
    "narrow": lambda t: t[..., :-1],
    "wide": lambda t: torch.cat([t, t[..., :1]], -1),
}


def test_every_tensor_is_needed_as_it_is(fitted, tmp_path):
    changes = {
        **SHAPES,
        "missing": None,
        "double": lambda t: t.double(),
        "int": lambda t: t.to(torch.int64),
        "half": lambda t: t.half(),
        "nan": lambda t: t.clone().index_fill_(-1, torch.tensor([0]), torch.nan),
        "inf": lambda t: t.clone().index_fill_(-1, torch.tensor([t.shape[-1] - 1]), -torch.inf),
    }
    for name, tensor in load_file(fitted).items():
        for what, change in changes.items():
            if what in ("nan", "inf") and not tensor.is_floating_point():
                continue

            def edit(tensors, name=name, change=change):
                found = tensors.pop(name)
                if change is not None:
                    tensors[name] = change(found).contiguous()

            _refused(_rewrite(fitted, tmp_path / "bad", edit_tensors=edit), "tensor ")
    _refused(_rewrite(fitted, tmp_path / "bad", edit_tensors=lambda tensors: tensors.clear()), "missing")


@pytest.mark.parametrize(
    "name",
    [
        "extra",
        "layers.3.keys.mean",
        "layers.0.keys.predictor.weight",
        "layers.1.values.predictor.down",
        "layers.0.keys.scales",
        "entropy.extra",
        "guard.limit",
    ],
)
def test_every_preset_refuses_further_tensors(fitted, tmp_path, name):
    path = _rewrite(fitted, tmp_path / "bad", edit_tensors=lambda t: t.update({name: torch.ones(1)}))
    _refused(path, f"unexpected tensor '{name}'")


def _flip(tensor, index, value):
    changed = tensor.clone()
    changed[index] = value
    return changed


def _move(frequencies):
    """Make a frequency negative but leave the sum."""
    row = frequencies[3]
    lowest, highest = int(row.argmin()), int(row.argmax())
    changed = _flip(frequencies, (3, lowest), -1)
    changed[3, highest] += row[lowest] + 1
    assert changed.sum() == frequencies.sum()
    return changed


@pytest.mark.parametrize(
    ("preset_name", "name", "change"),
    [
        ("storage", "entropy.frequencies", lambda t: _flip(t, (0, 127), t[0, 127] + 1)),
        ("storage", "entropy.frequencies", lambda t: _flip(t, (28, 127), t[28, 127] - 1)),
        ("storage", "entropy.frequencies", torch.zeros_like),
        ("storage", "entropy.frequencies", _move),
        ("storage", "layers.0.keys.classes", lambda t: _flip(t, 0, NUM_CLASSES)),
        ("storage", "layers.2.values.classes", lambda t: _flip(t, -1, 255)),
        ("storage", "layers.0.values.step", lambda t: 0 * t),
        ("storage", "layers.0.values.step", lambda t: -t),
        ("storage", "layers.1.values.rate_bits", lambda t: 0 * t),
        ("storage", "layers.1.values.rate_bits", lambda t: -t),
        ("storage", "layers.2.keys.deviations", lambda t: _flip(t, -1, 0)),
        ("storage", "layers.2.keys.deviations", lambda t: _flip(t, 0, -1)),
        ("decode", "layers.2.keys.deviations", lambda t: _flip(t, -1, 0)),
        ("decode", "layers.2.keys.deviations", lambda t: _flip(t, 0, -1)),
        ("decode", "layers.1.keys.guard.limit", lambda t: 0 * t),
        ("decode", "layers.1.keys.guard.limit", lambda t: -t),
        ("decode", "layers.0.keys.widths", lambda t: _flip(t, 0, 3)),
        ("decode", "layers.0.keys.widths", lambda t: _flip(t, -1, 0)),
        ("decode", "layers.0.keys.widths", lambda t: _flip(t, -1, t[-1] + 1)),
        ("decode", "layers.0.keys.widths", lambda t: _flip(t, -1, t[-1] - 1)),
        ("decode", "layers.0.values.widths", lambda t: _flip(t, -1, t[-1] - 1)),
        ("decode", "layers.0.keys.widths", lambda t: _flip(t, 0, 2 * t[0] % 15)),
    ],
)
def test_impossible_numbers(tmp_path, preset_name, name, change):
    source = tmp_path / "good"
    codec_for("llama", preset_name).save(source)
    before = load_file(source)[name]
    assert not torch.equal(change(before), before)
    path = _rewrite(source, tmp_path / "bad", edit_tensors=lambda t: t.update({name: change(t[name])}))
    _refused(path)


def test_widths_that_the_configuration_does_not_have(tmp_path):
    source = tmp_path / "good"
    codec_for("llama", "decode").save(source)
    used = set(load_file(source)["layers.1.values.widths"].tolist())
    for width in used:
        widths = [w for w in range(1, 9) if w != width]
        path = _rewrite(
            source, tmp_path / "bad", lambda h, w=widths: h["config"]["allocation"].update(widths=w)
        )
        _refused(path, "widths: expected only")


@pytest.mark.parametrize("preset_name", ["storage", "decode"])
def test_no_more_coefficients_than_features(tmp_path, preset_name):
    source, at = tmp_path / "good", "layers.1.keys."
    codec_for("llama", preset_name).save(source)

    def widen(tensors):
        tensors[at + "analysis"] = torch.ones(32, 40)
        tensors[at + "synthesis"] = torch.ones(40, 32)
        tensors[at + "deviations"] = torch.ones(40)
        last = "widths" if preset_name == "decode" else "classes"
        tensors[at + last] = torch.ones(40, dtype=torch.uint8)

    _refused(_rewrite(source, tmp_path / "bad", edit_tensors=widen), "at most 32 coefficients, got 40")


def test_two_stages_can_have_as_many_more_as_the_first_one_has(tmp_path):
    variant("two-stage").save(tmp_path / "good")
    loaded = ModelCodec.load(tmp_path / "good")
    assert loaded.config.transform.most_coefficients("keys", 32) == 32 + 5
    assert loaded.config.transform.most_coefficients("values", 32) == 32

    def widen(tensors):
        for name, shape in (("analysis", (32, 38)), ("synthesis", (38, 32)), ("deviations", (38,))):
            tensors[f"layers.1.keys.{name}"] = torch.ones(shape)
        tensors["layers.1.keys.widths"] = torch.ones(38, dtype=torch.uint8)

    _refused(
        _rewrite(tmp_path / "good", tmp_path / "bad", edit_tensors=widen), "at most 37 coefficients, got 38"
    )


def test_a_small_file_cannot_make_huge_matrices(golden, tmp_path):
    """A few MB of means and a group as large must not become a matrix of that size squared."""
    features = 1_000_000

    def header(h):
        h["config"]["predictor"]["kind"] = "mean"
        h["config"]["transform"]["max_group_size"] = features
        h["fingerprint"].update(compressed_layers=[0], layer_hashes=["00"], num_kv_heads=1, head_dim=features)

    def tensors(t):
        t.clear()
        t.update({f"layers.0.{kind}.mean": torch.zeros(features) for kind in ("keys", "values")})

    path = _rewrite(golden, tmp_path / "bad", header, tensors)
    started = time.perf_counter()
    _refused(path)
    assert time.perf_counter() - started < 5


# --- saving -----------------------------------------------------------------------------------------------


def _refuses_to_save(codec, path, match):
    with pytest.raises(OutputError, match=match) as error:
        codec.save(path)
    assert str(error.value).isprintable()


def test_saving_where_nothing_can_be_written(tmp_path):
    codec = _golden_codec()
    _refuses_to_save(codec, tmp_path / "none" / "c", "No such file")
    (tmp_path / "c").mkdir()
    _refuses_to_save(codec, tmp_path / "c", "directory")
    (tmp_path / "file").write_text("")
    _refuses_to_save(codec, tmp_path / "file" / "c", "directory")
    _refuses_to_save(codec, tmp_path / ("x" * 300), "name too long")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_saving_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    _refuses_to_save(_golden_codec(), tmp_path / "c", "Permission")


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError()]
)
def test_a_failing_save_leaves_the_older_file(golden, tmp_path, monkeypatch, failure):
    path = tmp_path / "c.safetensors"
    path.write_bytes(golden.read_bytes())

    def fail(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise failure

    monkeypatch.setattr(codec_file, "save_file", fail)
    expected = OutputError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected):
        _golden_codec().save(path)
    assert path.read_bytes() == golden.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


_SAVE_ON_A_FULL_DISK = """
import resource, signal, sys
from aquakv import ModelCodec
from aquakv.errors import OutputError
codec = ModelCodec.load(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    codec.save(sys.argv[2])
except OutputError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("limit", [0, 1000])
def test_full_disk(golden, tmp_path, limit):
    path = tmp_path / "c.safetensors"
    path.write_text("older")
    assert golden.stat().st_size > limit
    done = subprocess.run(
        [sys.executable, "-c", _SAVE_ON_A_FULL_DISK, str(golden), str(path), str(limit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("refused: cannot write codec")
    assert done.stdout.count("\n") == 1
    assert path.read_text() == "older"
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_record_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    codec = dataclasses.replace(_golden_codec(), calibration={"loss": float("nan")})
    with pytest.raises(ValueError):
        codec.save(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


# --- the fingerprint --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "architecture is 'llama' in the codec but 'qwen2'"),
        ({"num_layers": 4, "num_kv_heads": 7}, "num_layers is 3 in the codec but 4"),
        ({"compressed_layers": (0, 1)}, r"compressed_layers\[1\] is 2 in the codec but 1"),
        ({"compressed_layers": (0,)}, r"compressed_layers is \(0, 2\) in the codec but \(0,\)"),
        ({"num_kv_heads": 2}, "num_kv_heads is 1 in the codec but 2"),
        ({"head_dim": 8}, "head_dim is 4 in the codec but 8"),
        ({"rotary": {"rope_theta": 5e5}}, r"rotary\.rope_theta is 10000\.0 in the codec but 500000\.0"),
        (
            {"rotary": {"rope_theta": 10000.0, "factor": 2.0}},
            r"rotary\.factor is None in the codec but 2\.0",
        ),
        ({"layer_hashes": ("00ff", "ffff")}, r"layer_hashes\[1\] is 'a1b2' in the codec but 'ffff'"),
    ],
)
def test_a_mismatch_names_the_first_differing_field(changes, message):
    ours = _golden_codec().fingerprint
    with pytest.raises(CodecMismatchError, match=message) as error:
        ours.require_match(dataclasses.replace(ours, **changes), "x.safetensors")
    assert str(error.value).isprintable()
    assert "x.safetensors" in str(error.value)
    ours.require_match(ours)


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("of", DTYPES)
@pytest.mark.parametrize("to", DTYPES)
def test_copies_of_a_model_in_other_types_are_recognised(seed, of, to):
    """And copies of copies: a float16 checkpoint is read as float32."""
    ours, theirs = (build("llama-odd", seed=seed, dtype=dtype) for dtype in (of, to))
    fingerprint = adapt(ours).fingerprint()
    fingerprint.require_match(adapt(theirs).fingerprint())
    fingerprint.require_match(adapt(theirs.to(torch.float32)).fingerprint())


def test_hashes_alone_do_not_recognise_a_float16_copy():
    """Rounded twice, to float16 and to bfloat16, some numbers are others than rounded once."""
    differ = 0
    for seed in range(3):
        ours, theirs = (
            adapt(build("llama-odd", seed=seed, dtype=dtype)).fingerprint()
            for dtype in (torch.float32, torch.float16)
        )
        differ += ours != theirs
        bare = dataclasses.replace(ours, layer_samples=())
        if ours != theirs:
            with pytest.raises(CodecMismatchError, match="layer_hashes"):
                bare.require_match(theirs)
    assert differ


def test_samples_have_to_be_roundings_of_the_same_numbers():
    weight = torch.randn(500, generator=torch.Generator().manual_seed(0))
    weight[:3] = torch.tensor([0.0, -0.0, 3e-7])  # the last is a subnormal number of float16

    def sample(numbers):
        return sample_of(sample_text(numbers))

    assert len(sample(weight)) == 64
    assert torch.equal(sample(weight[:10]), weight[:10].double())
    assert may_be_one(sample(weight), sample(weight.half()))
    assert may_be_one(sample(weight.bfloat16()), sample(weight.half()))
    assert not may_be_one(sample(weight), sample(weight[:63]))
    # In one type there is nothing to forgive, between two not a whole unit of the coarser.
    for kind in (torch.float32, torch.float16, torch.bfloat16):
        one = weight.to(kind).clone()
        index = 7 * 500 // 64
        one[index] = torch.nextafter(one[index], one[index].new_tensor(torch.inf))
        assert not may_be_one(sample(weight.to(kind)), sample(one))
        if kind != torch.float32:
            further = torch.nextafter(one[index], one[index].new_tensor(torch.inf))
            one[index] = further
            assert not may_be_one(sample(weight), sample(one))
    for bad in (torch.inf, torch.nan):
        broken = weight.clone()
        broken[0] = bad
        assert not may_be_one(sample(broken), sample(broken))
    assert sample_text(weight[:0]) == ""
    assert len(sample_of("")) == 0


def test_a_models_fingerprint_tells_weights_and_rotation_apart():
    base = adapt(build("llama")).fingerprint()
    assert adapt(build("llama")).fingerprint() == base
    assert adapt(build("llama", dtype=torch.float64)).fingerprint() == base
    assert adapt(build("llama", dtype=torch.bfloat16)).fingerprint() == base
    other_weights = adapt(build("llama", seed=1)).fingerprint()
    assert other_weights.layer_hashes != base.layer_hashes
    assert adapt(build("llama-yarn")).fingerprint().rotary != base.rotary
    one = build("llama")
    one.model.layers[2].input_layernorm.weight.mul_(1.5)
    with pytest.raises(CodecMismatchError, match=r"layer_hashes\[2\]"):
        base.require_match(adapt(one).fingerprint())
