"""Models whose weights lie elsewhere between calls, as accelerate's hooks have it."""

import dataclasses

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module

from aquakv import AquaCache, DecodeGraph, calibrate, evaluate_quality, preset
from aquakv.calibration.metrics import value_weight
from aquakv.errors import ConfigError, UnsupportedModelError
from aquakv.models.adapter import adapt
from aquakv.models.placement import callable_alone, execution_device, weight_of
from tiny_models import WINDOW, build, codec_for, feed, random_tokens, same_bits, shared, wide

CPU = torch.device("cpu")
SIZES = [25, 1, 1, 5, 8]


def _by_modules(model, folder):
    cpu_offload(model, CPU)


def _by_layers(model, folder):
    cpu_offload(
        model, CPU, offload_buffers=True, preload_module_classes=[type(model.model.layers[0]).__name__]
    )


def _all_layers(model, folder):
    cpu_offload(model, CPU, preload_module_classes=[type(model.model).__name__])


def _whole(model, folder):
    cpu_offload(model, CPU, preload_module_classes=[type(model).__name__])


def _to_disk(model, folder):
    disk_offload(model, folder, CPU)


def _by_map(model, folder):
    """As ``device_map`` does it: some layers stay, others are on the disk between calls."""
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    for index in range(len(model.model.layers)):
        places[f"model.layers.{index}"] = ("disk", "cpu")[index % 2]
    dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


WAYS = {
    "modules": _by_modules,
    "layers": _by_layers,
    "all layers": _all_layers,
    "whole": _whole,
    "disk": _to_disk,
    "map": _by_map,
}


@pytest.fixture(params=WAYS)
def offload(request, tmp_path):
    """Return what offloads a model's weights, in place."""

    def run(model):
        WAYS[request.param](model, str(tmp_path))
        assert _all_offloaded(model)
        return model

    return run


def _all_offloaded(model):
    return all(parameter.device.type == "meta" for parameter in model.model.layers[0].parameters())


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_cache_gives_what_it_gives_with_weights_at_hand(offload, kind):
    model, codec, tokens = offload(build(kind)), codec_for(kind, "decode", 8), random_tokens(2, 40, seed=3)
    assert adapt(model).fingerprint() == adapt(shared(kind)).fingerprint()
    for attention in ("fused", "general"):
        got = feed(model, AquaCache(model, codec, attention=attention), tokens, SIZES)
        assert torch.equal(
            got, feed(shared(kind), AquaCache(shared(kind), codec, attention=attention), tokens, SIZES)
        )
    assert _all_offloaded(model)


def test_generation_goes_on_from_a_file(offload, tmp_path):
    model, codec, tokens = offload(build()), codec_for("llama", "storage"), random_tokens(1, 30, seed=4)
    cache = AquaCache(model, codec)
    feed(model, cache, tokens, [30])
    cache.save(tmp_path / "cache.safetensors")
    loaded = AquaCache.load(tmp_path / "cache.safetensors", model, codec)
    assert {layer.device for layer in loaded.layers} == {CPU}
    more = random_tokens(1, 5, seed=5)
    assert torch.equal(feed(model, loaded, more, [5]), feed(model, cache, more, [5]))


@pytest.mark.parametrize("name", ["paper", "decode"])
def test_calibration_is_that_of_weights_at_hand(offload, name):
    config = dataclasses.replace(preset(name), window=WINDOW)
    codecs = [calibrate(model, random_tokens(8, 48, seed=1), config) for model in (offload(build()), build())]
    mine, theirs = (codec.content()[1] for codec in codecs)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert codecs[0].calibration["device"] == "cpu"


def test_evaluation(offload):
    model, codec, tokens = offload(build()), codec_for("llama", "decode"), random_tokens(2, 40, seed=5)
    for protocol in ("streaming", "single-pass"):
        mine, theirs = (
            evaluate_quality(one, tokens, {"codec": codec}, protocol=protocol)["codec"].mean_kl
            for one in (model, build())
        )
        assert mine == theirs


def test_the_weight_of_values_is_read(offload):
    model = offload(build())
    assert torch.equal(value_weight(adapt(model), 1), value_weight(adapt(shared()), 1))
    assert _all_offloaded(model)


def test_kernels_definitions():
    model, codec = wide()
    model, plain = build("llama", hidden_size=64, head_dim=64, vocab_size=300), model
    cpu_offload(model, CPU)
    tokens = random_tokens(1, 150, seed=6)
    caches = [AquaCache(one, codec, backend="torch") for one in (model, plain)]
    got, expected = (feed(c._adapter.model, c, tokens, [140, *[1] * 10]) for c in caches)
    assert torch.equal(got, expected)


def test_another_models_codec_is_refused(offload):
    model = offload(build(seed=1))
    with pytest.raises(Exception, match=r"layer_hashes\[0\]"):
        AquaCache(model, codec_for())


def test_weights_that_nothing_loads_are_refused():
    model = build().to("meta")
    with pytest.raises(UnsupportedModelError, match="layer 0 are on no device, and no hook"):
        AquaCache(model, codec_for())
    partly = build()
    partly.model.layers[1].input_layernorm.to("meta")
    with pytest.raises(UnsupportedModelError, match=r"input_layernorm\.weight of layer 1 is on no device"):
        AquaCache(partly, codec_for())


def test_graphs_are_refused(offload):
    model, codec = wide()
    model = offload(build("llama", hidden_size=64, head_dim=64, vocab_size=300))
    with pytest.raises(ConfigError, match="weights are offloaded"):
        DecodeGraph(model, AquaCache(model, codec, backend="torch"), capture=lambda step: step)


def test_several_hooks_on_a_module():
    """The last of them decides where inputs go; one that does nothing of the kind does not."""
    model = build()
    cpu_offload(model, CPU)
    for name in ("self_attn.q_proj", "input_layernorm"):
        add_hook_to_module(model.model.layers[0].get_submodule(name), ModelHook(), append=True)
    assert adapt(model).layer_device(0) == CPU
    assert adapt(model).fingerprint() == adapt(shared()).fingerprint()
    found = model.model.layers[0].self_attn
    assert execution_device(model, found) == CPU
    with callable_alone(model, "model.layers.0.self_attn.q_proj") as module:
        assert module.weight.device.type == "meta"  # it loads by itself when it is called
    with weight_of(model, "model.layers.0.self_attn.q_proj.bias") as nothing:
        assert nothing is None
    with weight_of(model, "model.layers.0.self_attn.q_proj.weight") as weight:
        assert same_bits([weight], [shared().model.layers[0].self_attn.q_proj.weight])
