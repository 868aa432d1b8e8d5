import pytest
import torch
from transformers import DynamicCache

from aquakv import AquaCache
from aquakv.baselines import BaselineCache
from aquakv.errors import CodecFileError, ConfigError
from aquakv.evaluation.methods import fresh_cache, held_by, needs_text, prepare
from aquakv.evaluation.tasks import Perplexity, task_of
from tiny_models import build, codec_for, random_tokens


def test_methods_by_specification(tmp_path):
    model = build()
    path = tmp_path / "codec"
    codec_for("llama", "decode").save(path)
    specs = ["exact", "storage 2", "decode 2.3", "kivi:2", "kvquant:2", "kvquant:3+window", str(path)]
    found = prepare(specs, model, random_tokens(8, 160))
    assert list(found) == specs
    assert found["exact"] is None
    assert [found[name].config.preset for name in ("storage 2", "decode 2.3", str(path))] == [
        "storage",
        "decode",
        "decode",
    ]
    two, three = found["kvquant:2"], found["kvquant:3+window"]
    assert (two.label, three.label) == ("kvquant:2", "kvquant:3+window")
    kinds = [DynamicCache, AquaCache, AquaCache, *[BaselineCache] * 3, AquaCache]
    for method, kind in zip(found.values(), kinds, strict=True):
        cache = fresh_cache(model, method)
        assert isinstance(cache, kind)
        with torch.no_grad():
            model(random_tokens(1, 300), past_key_values=cache)
        held = held_by(method, cache)
        assert (held is None) == (method is None)
        assert held is None or held.coded_values > 0


def test_specifications_that_are_none(tmp_path):
    model = build()
    assert not needs_text(["exact", "kivi:2", "none.safetensors"])
    assert needs_text(["kvquant:2"])
    assert needs_text(["exact", "decode 2"])
    with pytest.raises(ConfigError, match="text to calibrate on"):
        prepare(["decode 2"], model)
    with pytest.raises(ConfigError, match=r"exact, a preset .* got 'kiwi:2'"):
        prepare(["kiwi:2"], model)
    with pytest.raises(ConfigError, match="such as 'decode 2', got 'decode two'"):
        prepare(["decode two"], model)
    with pytest.raises(CodecFileError, match="none"):
        prepare([str(tmp_path / "none.safetensors")], model)


def test_tasks_by_configuration():
    assert task_of({"task": "perplexity", "samples": 3}) == Perplexity(samples=3)
    with pytest.raises(ConfigError, match=r"expected a task of perplexity.*got 'beauty'"):
        task_of({"task": "beauty"})
    with pytest.raises(ConfigError, match="expected a task of"):
        task_of({})
    with pytest.raises(ConfigError, match="unknown setting 'sample'; expected some of data, samples"):
        task_of({"task": "perplexity", "sample": 3})
    with pytest.raises(ConfigError, match="single-pass, auto, got 'guess'"):
        task_of({"task": "perplexity", "protocol": "guess"})
