"""Layers that come and go, interruptions, several processes: the codec is that of an ordinary run."""

import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import calibrating
from aquakv import calibrate, calibrate_many
from aquakv.calibration import RunStore
from aquakv.errors import CheckpointError, ConfigError, DataError, ModelError, UnsupportedModelError
from aquakv.models.streaming import stream_directory
from aquakv.models.weights import StreamedWeights
from calibrating import (
    TOKENS,
    Killed,
    assert_codec_of_one_process,
    config,
    killer,
    same_codec,
    streamed,
    together,
)
from tiny_models import build, random_tokens

CPU = torch.device("cpu")


# --- layers that come and go ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3-moe", "gpt-oss", "phi", "cohere", "llama-yarn"])
def test_streaming_gives_the_same_codec(kind, checkpoint):
    directory = checkpoint(kind)
    adapter = streamed(directory)
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    configs = {"paper": config("paper"), "storage": config("storage")}
    ours = calibrate_many(adapter, TOKENS, configs, batch_size=5)
    theirs = calibrate_many(loaded, TOKENS, configs, batch_size=5)
    for name in configs:
        assert same_codec(ours[name], theirs[name])
        assert ours[name].fingerprint == theirs[name].fingerprint
        assert ours[name].calibration["layers"] == theirs[name].calibration["layers"]
    assert all(p.device.type == "meta" for p in adapter.model.parameters())


def test_never_more_than_two_layers_are_in_memory(checkpoint):
    adapter, most = streamed(checkpoint()), []

    def count(_):
        layers = adapter.layers
        most.append(sum(all(p.device.type != "meta" for p in layer.parameters()) for layer in layers))

    calibrate(adapter, TOKENS, config("decode"), progress=count)
    assert max(most) <= 2 < len(adapter.layers)


def test_dtype_is_the_checkpoints_unless_asked_for(checkpoint):
    directory = checkpoint()
    settings = AutoConfig.from_pretrained(directory)
    assert streamed(directory).model.dtype == torch.float32
    adapter = stream_directory(directory, settings, "bfloat16", CPU)
    with adapter.weights.holding(0):
        assert adapter.layers[0].self_attn.k_proj.weight.dtype == torch.bfloat16


def test_checkpoints_that_cannot_be_read_are_refused(checkpoint, tmp_path):
    with pytest.raises(ModelError, match="found neither"):
        stream_directory(tmp_path, AutoConfig.from_pretrained(checkpoint()), "auto", CPU)
    build().save_pretrained(tmp_path, max_shard_size="20KB")
    settings, index = AutoConfig.from_pretrained(tmp_path), tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    name, file = next(item for item in listed["weight_map"].items() if "k_proj" in item[0])
    del listed["weight_map"][name]
    index.write_text(json.dumps(listed))
    with pytest.raises(ModelError, match="1 tensors are missing"):
        stream_directory(tmp_path, settings, "auto", CPU)
    listed["weight_map"][name] = "elsewhere.safetensors"
    index.write_text(json.dumps(listed))
    with pytest.raises(ModelError, match=r"1 files are missing .first elsewhere"):
        stream_directory(tmp_path, settings, "auto", CPU)
    listed["weight_map"][name] = file
    index.write_text(json.dumps(listed))
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        calibrate(stream_directory(tmp_path, settings, "auto", CPU), TOKENS, config("paper"))
    settings.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(UnsupportedModelError, match="quantised"):
        stream_directory(tmp_path, settings, "auto", CPU)


def test_tensors_that_make_several_are_refused(checkpoint, monkeypatch):
    from transformers.core_model_loading import Chunk, WeightConverter

    rule = WeightConverter("mlp.gate_proj.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(0)])
    mapping = importlib.import_module("transformers.conversion_mapping")
    monkeypatch.setattr(mapping, "get_model_conversion_mapping", lambda model: [rule])
    with pytest.raises(UnsupportedModelError, match="--no-stream"):
        streamed(checkpoint())


# --- interruptions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("snapshots", [True, False])
@pytest.mark.parametrize("names", [("paper",), ("storage", "decode")])
def test_going_on_gives_the_same_codec(names, snapshots, tmp_path, monkeypatch, checkpoint):
    monkeypatch.setattr("aquakv.calibration.store._PATIENCE", 0 if snapshots else 1e9)
    monkeypatch.setattr("aquakv.calibration.workload.MOST_OBSERVED_BYTES", 1)
    monkeypatch.setattr("aquakv.calibration.workload.MOST_NEEDED_BYTES", 1)
    configs, seen = {name: config(name) for name in names}, []
    model = streamed(checkpoint())
    whole = calibrate_many(model, TOKENS, configs, progress=seen.append)
    total = seen[-1].total
    fits = [n for n, state in enumerate(seen, 1) if state.phase == "fit"]
    # In the plan, in the middle of the first and of the second layer, and between layers.
    for when in {total // 9, fits[1], fits[-1] - 2, fits[-4 * len(names)] - 3}:
        directory = tmp_path / str(when)
        with pytest.raises(Killed):
            calibrate_many(model, TOKENS, configs, progress=killer(when), store=RunStore(directory))
        store, again = RunStore(directory, resume=True), []
        codecs = calibrate_many(streamed(checkpoint()), TOKENS, configs, progress=again.append, store=store)
        for name in names:
            assert same_codec(codecs[name], whole[name])
            assert codecs[name].calibration["layers"] == whole[name].calibration["layers"]
        assert sum(state.phase == "fit" for state in again) <= len(fits)
        assert again[-1].done == len(again)
        store.discard()
        assert not directory.exists()


def test_nothing_is_done_again_if_only_the_codec_was_not_written(tmp_path, checkpoint):
    codec = calibrate(streamed(checkpoint()), TOKENS, config("decode"), store=RunStore(tmp_path / "run"))
    seen, store = [], RunStore(tmp_path / "run", resume=True)
    again = calibrate(streamed(checkpoint()), TOKENS, config("decode"), progress=seen.append, store=store)
    assert same_codec(again, codec)
    assert again.fingerprint == codec.fingerprint
    assert not seen


def test_kill_minus_nine(tmp_path, checkpoint):
    directory, out = checkpoint(), tmp_path / "run"
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {os.path.dirname(calibrating.__file__)!r})
        import calibrating as tests
        from aquakv import calibrate
        from aquakv.calibration import RunStore
        def report(state):
            if state.phase == "fit" and state.layer == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        calibrate(tests.streamed(Path({str(directory)!r})), tests.TOKENS, tests.config("paper"),
                  progress=report, store=RunStore(Path({str(out)!r})))
        """
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == -signal.SIGKILL
    assert (out / "layer-00000.safetensors").is_file()
    seen = []
    codec = calibrate(
        streamed(directory), TOKENS, config("paper"), progress=seen.append, store=RunStore(out, resume=True)
    )
    assert {state.layer for state in seen if state.phase == "fit"} == {1, 2}
    assert same_codec(codec, calibrate(streamed(directory), TOKENS, config("paper")))


def test_what_another_run_left_is_not_taken_for_ones_own(tmp_path, checkpoint):
    model, store = streamed(checkpoint()), RunStore(tmp_path / "run")
    with pytest.raises(Killed):
        calibrate(model, TOKENS, config("paper"), progress=killer(12), store=store)
    with pytest.raises(CheckpointError, match="--resume"):
        calibrate(model, TOKENS, config("paper"), store=RunStore(tmp_path / "run"))
    again = RunStore(tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="tokens was"):
        calibrate(model, random_tokens(12, 48, seed=2), config("paper"), store=again)
    with pytest.raises(CheckpointError, match="configs was"):
        calibrate(model, TOKENS, config("higgs"), store=again)
    other = build()
    with torch.no_grad():
        for parameter in other.model.layers.parameters():
            parameter += torch.linspace(0, 0.1, parameter.shape[-1])
    with pytest.raises(CheckpointError, match=r"layer . differs"):
        calibrate(other, TOKENS, config("paper"), store=again)
    path = tmp_path / "run" / "layer-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        calibrate(model, TOKENS, config("paper"), store=again)


# --- several processes ------------------------------------------------------------------------------------


def test_two_processes_give_the_codec_of_one(tmp_path, checkpoint):
    found = together(checkpoint(), tmp_path, ["paper", "decode"])
    for (name, _), codecs in found.items():
        assert_codec_of_one_process(codecs, name, checkpoint())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_gpus_give_the_codec_of_one(tmp_path, checkpoint):
    found = together(checkpoint(), tmp_path, ["paper", "decode"], "cuda", overlaps=(False, True))
    for (name, _), codecs in found.items():
        assert_codec_of_one_process(codecs, name, checkpoint(), torch.device("cuda"))


def test_more_processes_than_batches_are_refused(monkeypatch, checkpoint):
    from aquakv.calibration.group import Group

    monkeypatch.setattr(Group, "current", classmethod(lambda cls, device: cls(0, 4, device)))
    with pytest.raises(DataError, match="each of 4 processes"):
        calibrate(streamed(checkpoint()), TOKENS, config("paper"), batch_size=4)


def test_unknown_offload_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="none, hidden, all"):
        calibrate(streamed(checkpoint()), TOKENS, config("paper"), offload="disk")


def test_weights_prefetched_but_not_wanted_do_no_harm(checkpoint):
    weights = streamed(checkpoint()).weights
    assert isinstance(weights, StreamedWeights)
    for _ in range(2):
        with weights.holding(0, then=1):
            pass
    with weights.holding(1), weights.holding(1):
        pass
    with weights.holding("input", then=0):
        pass
    with weights.holding(2):
        pass
    assert all(p.device.type == "meta" for p in weights.model.parameters())


def test_every_layer_is_read_once(checkpoint, monkeypatch):
    adapter, read = streamed(checkpoint()), []
    own = adapter.weights._materialise
    monkeypatch.setattr(
        adapter.weights, "_materialise", lambda names, reader: (read.append(names[0]), own(names, reader))
    )
    calibrate(adapter, TOKENS, config("paper"))
    layers = [name for name in read if ".layers." in name]
    assert len(layers) == len(set(layers)) == len(adapter.layers)


# --- on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["paper", "decode", "storage"])
def test_a_gpu_gives_the_same_codec_wherever_batches_wait(name, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("aquakv.calibration.store._PATIENCE", 0)
    monkeypatch.setattr("aquakv.calibration.workload.MOST_OBSERVED_BYTES", 1)
    monkeypatch.setattr("aquakv.calibration.workload.MOST_NEEDED_BYTES", 1)
    directory, cuda = checkpoint("llama"), torch.device("cuda")
    loaded = AutoModelForCausalLM.from_pretrained(directory).to(cuda)
    seen = []
    whole = calibrate(loaded, TOKENS, config(name), progress=seen.append)
    settings = AutoConfig.from_pretrained(directory)
    for offload in ("none", "hidden", "all"):
        adapter = stream_directory(directory, settings, "auto", cuda)
        assert same_codec(calibrate(adapter, TOKENS, config(name), offload=offload), whole)
        path = tmp_path / offload
        kill, store = killer(seen[-1].total - 4), RunStore(path)
        with pytest.raises(Killed):
            calibrate(adapter, TOKENS, config(name), offload=offload, progress=kill, store=store)
        adapter = stream_directory(directory, settings, "auto", cuda)
        again = calibrate(adapter, TOKENS, config(name), offload=offload, store=RunStore(path, resume=True))
        assert same_codec(again, whole)
