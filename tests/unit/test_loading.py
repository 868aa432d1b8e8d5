import errno
import json
import logging

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from aquakv.errors import ModelError
from aquakv.models.loading import load_model


@pytest.fixture
def checkpoint(tmp_path):
    """A two-layer llama in bfloat16 with a two-word tokenizer."""
    directory = tmp_path / "tiny"
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(directory)
    return directory


def _edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _refused(model, message, **settings):
    with pytest.raises(ModelError, match=message) as error:
        load_model(str(model), **settings)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 700


def test_loads_quietly_in_the_checkpoints_dtype_ready_to_run(checkpoint, capfd):
    loaded = load_model(str(checkpoint), device="cpu")
    assert loaded.model.dtype == torch.bfloat16
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer("a")["input_ids"] == [1]
    assert (loaded.name, loaded.path) == (str(checkpoint), str(checkpoint))
    assert capfd.readouterr() == ("", "")


def test_dtype_and_attention_are_passed_on(checkpoint):
    loaded = load_model(str(checkpoint), dtype="float32", device="cpu", attn_implementation="eager")
    assert loaded.model.dtype == torch.float32
    assert loaded.model.config._attn_implementation == "eager"


def test_logging_is_restored_after_success_and_failure(checkpoint):
    before = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.set_verbosity(logging.INFO)
        load_model(str(checkpoint), device="cpu")
        (checkpoint / "model.safetensors").unlink()
        _refused(checkpoint, "weights")
        assert transformers_logging.get_verbosity() == logging.INFO
        assert transformers_logging.is_progress_bar_enabled() == bars
    finally:
        transformers_logging.set_verbosity(before)


def test_bad_settings_are_refused_before_anything_is_read():
    _refused("nowhere", "float32, bfloat16, float16", dtype="int8")
    _refused("nowhere", "auto, cpu, cuda", device="toaster")
    _refused("nowhere", "holds weights", device="meta")
    _refused("nowhere", "CUDA devices", device="cuda:99")


def test_bad_attention_names_ones_that_work(checkpoint):
    _refused(checkpoint, "sdpa or eager", attn_implementation="psychic")


@pytest.mark.parametrize(
    "model", ["/no/such/dir", "./none", "a/b/c", "a b", "nul\0byte", "~no-such-user-here/x"]
)
def test_missing_directory(model):
    _refused(model, "expected")


def test_empty_name():
    _refused(" ", "local directory")


def test_file_or_directory_without_config(checkpoint):
    _refused(checkpoint / "config.json", "found a file")
    (checkpoint / "config.json").unlink()
    _refused(checkpoint, r"no config\.json")


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"{}", b'{"model_type": "no-such-kind"}'])
def test_damaged_config(checkpoint, content):
    (checkpoint / "config.json").write_bytes(content)
    _refused(checkpoint, "configuration")


@pytest.mark.parametrize("kind", ["t5", "vit"])
def test_not_a_causal_language_model(checkpoint, kind):
    (checkpoint / "config.json").write_text(json.dumps({"model_type": kind}))
    _refused(checkpoint, f"causal.*{kind}")


@pytest.mark.parametrize("size", [0, 5, 100, 2000])
def test_damaged_weights(checkpoint, size):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    _refused(checkpoint, "weights")


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 3}, {"intermediate_size": 25}])
def test_weights_that_do_not_fill_the_model(checkpoint, changes):
    _edit_config(checkpoint, **changes)
    _refused(checkpoint, "incomplete")


def test_missing_or_damaged_tokenizer(checkpoint):
    (checkpoint / "tokenizer.json").write_text("{}")
    _refused(checkpoint, "tokenizer")
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    _refused(checkpoint, "tokenizer")


def test_hub_without_connection(monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files\n and so on")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    _refused("some-org/some-model", "connection.*or use demo")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space.*HF_HOME"),
        (MemoryError(), "does not fit in memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "does not fit in memory"),
    ],
)
def test_no_room(checkpoint, monkeypatch, failure, message):
    def fail(*_args, **_kwargs):
        raise failure

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    _refused(checkpoint, message)
