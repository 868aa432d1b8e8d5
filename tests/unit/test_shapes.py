"""Models of random weights and stand-in codecs: right in form, which is all that memory depends on."""

import pytest
import torch

from aquakv import AquaCache, preset
from aquakv.errors import ConfigError
from aquakv.evaluation.bench import bench_memory
from aquakv.evaluation.shapes import random_model, random_tokens, stand_in_codec
from tiny_models import feed

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
}


def small(layers=5, dtype=torch.float32, **changes):
    return random_model("llama-3.1-8b", layers=layers, dtype=dtype, **SMALL | changes)


def test_a_model_has_its_shape():
    one, other = small(), small()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert len(one.model.layers) == 5
    assert one.config.rope_parameters["rope_type"] == "llama3"
    assert small(dtype=torch.bfloat16).dtype == torch.bfloat16
    with torch.device("meta"):
        whole = random_model("llama-3.1-8b", device="meta")
    attention = whole.model.layers[31].self_attn
    assert (attention.k_proj.weight.shape, whole.dtype) == ((1024, 4096), torch.bfloat16)
    with pytest.raises(ConfigError, match=r"unknown shape 'llama'; expected one of: llama-3.1-8b, "):
        random_model("llama")
    tokens = random_tokens(one, 2, 9)
    assert tokens.shape == (2, 9)
    assert not torch.equal(tokens, random_tokens(one, 2, 9, seed=1))


@pytest.mark.parametrize("name", ["decode", "paper", "storage", "higgs"])
@pytest.mark.parametrize("layers", [1, 5])
def test_a_codec_stands_in(name, layers):
    model = small(layers)
    codec = stand_in_codec(model, preset(name))
    assert len(codec.layers) == layers
    cache = AquaCache(model, codec)
    assert feed(model, cache, random_tokens(model, 2, 300), [150, 150]).isfinite().all()
    assert cache.footprint().coded_values == 2 * 256 * layers * 2 * 32
    if codec.config.guard.threshold is not None:
        assert [len(layer.pages.all().outliers.index) for layer in cache._compressed] == [4] * layers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 8])
def test_a_decode_step_takes_little_beside_the_codes(rows):
    """With Llama 3.1 8B's cache, 32768 tokens, all outliers there, a block compressed meanwhile."""
    model = random_model("llama-3.1-8b", device="cuda", intermediate_size=1024)
    codec = stand_in_codec(model, preset("decode"))
    tokens = random_tokens(model, rows, 32768 + 130)
    found = bench_memory(model, {"decode": codec}, tokens, [32768], steps=130, prefill_chunk=2048)
    row = next(row for row in found if row["contestant"] == "decode, fused path")
    codes = row["code_bytes"] - row["outlier_bytes"]
    assert codes / (rows * 32640 * 32) == pytest.approx(2048 * codec.bits_per_value / 8, rel=0.01)
    assert row["peak_bytes"] <= 1.25 * codes
    assert row["steady_bytes"] <= 1.15 * codes
