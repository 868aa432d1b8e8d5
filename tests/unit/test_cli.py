import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aquakv._version import __version__
from aquakv.cli.main import main
from aquakv.codec import ModelCodec
from aquakv.config import PRESETS
from aquakv.evaluation import shapes
from tiny_models import build

WORDS = ["<unk>", "<eos>", *(f"w{i}" for i in range(38))]


def _text(seed, words):
    ids = torch.randint(2, 40, (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(WORDS[i] for i in ids)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a tiny model, another one of the same shape, two texts and a calibrated codec."""
    root = tmp_path_factory.mktemp("cli")
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    for name, seed in (("tiny", 0), ("twin", 1)):
        build("llama", seed=seed, max_position_embeddings=512).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "train.txt").write_text(_text(0, 2000))
    (root / "test.txt").write_text(_text(1, 2000))
    (root / "empty.txt").write_text("")
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "calibrate",
                str(root / "tiny"),
                "--out",
                str(root / "codec"),
                "--data",
                str(root / "train.txt"),
                "--samples",
                "8",
                "--seq-len",
                "160",
                "--device",
                "cpu",
                "--dtype",
                "float32",
            ]
        )
    assert stop.value.code == 0
    return root


@pytest.fixture(autouse=True)
def _in_place(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("AQUAKV_DATA_DIR", raising=False)


def _run(capsys, *arguments):
    """Run a command; return its exit code, standard output and standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def _refused(capsys, *arguments, says):
    code, out, err = _run(capsys, *arguments)
    assert (code, out) == (2, ""), err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("aquakv: ")
    for part in says if isinstance(says, tuple) else (says,):
        assert part in lines[0]


def _calibrate(place, *more, model="tiny", out="out.safetensors", data="train.txt"):
    return [
        "calibrate",
        place / model,
        "--out",
        out,
        "--data",
        place / data,
        "--samples",
        8,
        "--seq-len",
        160,
        "--device",
        "cpu",
        *list(more),
    ]


def _eval(place, *more, codec="codec", data="test.txt", seq_len=300):
    return [
        "eval",
        "perplexity",
        place / "tiny",
        "--codec",
        place / codec,
        "--data",
        place / data,
        "--samples",
        3,
        "--seq-len",
        seq_len,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        *list(more),
    ]


# --- happy paths ------------------------------------------------------------------------------------------


def test_version_and_help(capsys):
    assert _run(capsys, "--version") == (0, f"aquakv {__version__}\n", "")
    for arguments in ([], ["--help"], ["calibrate", "--help"], ["eval", "perplexity", "--help"]):
        code, out, err = _run(capsys, *arguments)
        assert (code, err) == (0, "")
        assert "Usage" in out


@pytest.mark.parametrize(("name", "bits"), [("paper", 3), ("higgs", 2), ("storage", 1.25), ("decode", 2.5)])
def test_calibrate_writes_a_codec_that_says_where_it_is_from(place, capsys, name, bits):
    code, out, err = _run(capsys, *_calibrate(place, "--preset", name, "--bits", bits))
    assert code == 0, err
    assert out.count("\n") == 1
    assert "out.safetensors" in out
    codec = ModelCodec.load("out.safetensors")
    assert (codec.config.preset, codec.config.allocation.bits) == (name, bits)
    record = codec.calibration
    digest = hashlib.sha256((place / "train.txt").read_bytes() + b"\0").hexdigest()
    assert [source["sha256"] for source in record["data"]] == [digest]
    assert (record["sequences"], record["seq_len"], record["tokens"]) == (8, 160, 1280)
    assert str(place / "tiny") in record["model"]
    assert f"{codec.bits_per_value:.3f} bits per value" in out


def test_calibrate_mixes_several_texts(place, capsys):
    code, _, err = _run(capsys, *_calibrate(place, "--data", place / "test.txt"))
    assert code == 0, err
    names = [source["name"] for source in ModelCodec.load("out.safetensors").calibration["data"]]
    assert names == [str(place / "train.txt"), str(place / "test.txt")]


def test_inspect(place, capsys):
    code, out, err = _run(capsys, "inspect", place / "codec")
    assert (code, err) == (0, "")
    for part in ("preset decode", "3 of 3 layers", "2 KV heads of 16", "1280 tokens", "train.txt"):
        assert part in " ".join(out.split())
    code, out, err = _run(capsys, "inspect", place / "codec", "--json")
    assert (code, err) == (0, "")
    content, codec = json.loads(out), ModelCodec.load(place / "codec")
    assert content["bits_per_value"] == codec.bits_per_value
    assert content["config"] == codec.config.to_dict()
    assert content["fingerprint"]["layer_hashes"] == list(codec.fingerprint.layer_hashes)
    assert len(content["calibration"]["layers"]) == 3


CONTRACT = {
    "schema_version",
    "command",
    "model",
    "codec",
    "data",
    "tokens",
    "seq_len",
    "protocol",
    "bits_per_value",
    "bits_per_value_total",
    "perplexity",
    "baseline_perplexity",
    "relative_increase",
    "mean_kl",
    "top1_agreement",
    "elapsed_s",
    "versions",
    "device",
    "git_sha",
}


@pytest.mark.parametrize("name", PRESETS)
def test_eval_perplexity_by_both_protocols(place, capsys, name):
    assert _run(capsys, *_calibrate(place, "--preset", name))[0] == 0
    results = {}
    for protocol in ("streaming", "single-pass"):
        options = ["--protocol", protocol, "--json", f"{protocol}.json"]
        code, out, err = _run(capsys, *_eval(place, *options, codec=Path.cwd() / "out.safetensors"))
        assert code == 0, err
        with open(f"{protocol}.json") as file:
            result = results[protocol] = json.load(file)
        assert set(result) >= CONTRACT
        assert (result["schema_version"], result["command"]) == (1, "eval perplexity")
        assert (result["protocol"], result["seq_len"], result["tokens"]) == (protocol, 300, 3 * 299)
        assert result["codec"] == {
            "file": "out.safetensors",
            "preset": name,
            "sha256": hashlib.sha256(Path("out.safetensors").read_bytes()).hexdigest(),
        }
        assert result["relative_increase"] == pytest.approx(
            result["perplexity"] / result["baseline_perplexity"] - 1, abs=1e-12
        )
        assert 0 < result["mean_kl"] < 1
        assert 0 < result["top1_agreement"] <= 1
        assert f"{result['perplexity']:.4f}" in out
        assert out.count("\n") == 1
    stream, single = results["streaming"], results["single-pass"]
    assert stream["baseline_perplexity"] == single["baseline_perplexity"]
    # The model runs in float32 here, so that a code in thousands may turn between the protocols.
    assert stream["perplexity"] == pytest.approx(single["perplexity"], rel=1e-3)
    assert stream["mean_kl"] == pytest.approx(single["mean_kl"], rel=0.05)
    expected = ModelCodec.load("out.safetensors").bits_per_value
    if name == "paper":
        # (4 + 2 + 2) / 3 bits and an fp16 scale for 32 values.
        assert expected == pytest.approx(8 / 3 + 0.5, abs=1e-9)
    # What entropy coding takes is known on average only. Of decode, two blocks of 128 tokens have at most an
    # outlier each at a layer: an int32 and 64 float32 beside 128 * 64 values.
    at_most = {"storage": 1.1 * expected, "decode": expected + 32 * 65 / (128 * 64)}.get(name, expected)
    at_least = 0.9 * expected if name == "storage" else expected
    assert at_least - 1e-9 <= single["bits_per_value"] <= at_most + 1e-9
    # 256 of 300 tokens are coded; streaming also holds four bytes of position for each of the 300, shared by
    # 3 layers of 64 values.
    positions = 32 * 300 / (256 * 64 * 3)
    turned = 1e-3 if name == "storage" else 1e-9
    assert stream["bits_per_value"] == pytest.approx(single["bits_per_value"] + positions, abs=turned)
    assert stream["bits_per_value_total"] > stream["bits_per_value"]
    assert stream["bits_per_value_total"] == pytest.approx(single["bits_per_value_total"], abs=turned)


def _grid_file(place, methods='"exact", "kivi:2", "quanto:2"', more=""):
    file = Path("grid.toml")
    file.write_text(
        f'models = ["{place / "tiny"}"]\nmethods = [{methods}]\n{more}\n'
        f'[[tasks]]\ntask = "perplexity"\ndata = "{place / "test.txt"}"\nsamples = 2\nseq_len = 200\n'
    )
    return file


def test_eval_grid(place, capsys):
    command = ["eval", "grid", _grid_file(place), "--out", "rows.jsonl", "--device", "cpu"]
    code, out, err = _run(capsys, *command, "--list")
    assert (code, err) == (0, "")
    assert out.count("to do") == 4
    assert "3 cells: 0 ok, 0 failed, 3 to do" in out
    assert not Path("rows.jsonl").exists()
    code, out, err = _run(capsys, *command, "--only", "kivi")
    assert code == 0, err
    assert "[1/1]" in err
    code, out, err = _run(capsys, *command, "--dtype", "auto")
    assert code == 0, err
    assert "3 cells, 0 failed; rows in rows.jsonl" in out
    assert out.count("perplexity") >= 6
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["kivi:2", "exact", "quanto:2"]
    assert all(set(row) >= CONTRACT for row in rows)
    assert all(row["status"] == "ok" and row["tokens"] == 2 * 199 for row in rows)
    code, out, err = _run(capsys, *command, "--list")
    assert "3 cells: 3 ok, 0 failed, 0 to do" in out


def test_eval_grid_refusals(place, capsys):
    command = ["eval", "grid", _grid_file(place, more="groups = 3"), "--out", "rows.jsonl"]
    _refused(capsys, *command, says=("grid.toml", "unknown key 'groups'", "group"))
    _grid_file(place)
    _refused(capsys, *command, "--only", "kiwi", says="no cell is called 'kiwi'")
    _refused(capsys, *command[:-1], "none/rows.jsonl", says="none does not exist")
    _refused(capsys, "eval", "grid", "none.toml", "--out", "rows.jsonl", says="none.toml")
    Path("rows.jsonl").write_text("something else")
    _refused(capsys, *command, says="line 1: expected a row of a grid")


@pytest.mark.parametrize("name", ["h2o", "snapkv"])
def test_eval_of_a_pruned_context(place, capsys, name):
    results = []
    for codec in (["--codec", place / "codec"], []):
        arguments = ["eval", "perplexity", place / "tiny", "--data", place / "test.txt", "--samples", 2]
        arguments += [
            "--seq-len",
            300,
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--json",
            "pruned.json",
            *codec,
        ]
        code, out, err = _run(capsys, *arguments, "--prune", name, "--keep", 0.5)
        assert code == 0, err
        with open("pruned.json") as file:
            result = json.load(file)
        assert set(result) >= CONTRACT
        assert result["pruning"].items() >= {"policy": name, "keep": 0.5, "context": 132}.items()
        assert (result["tokens"], result["protocol"]) == (2 * 167, "pruned context")
        assert result["bytes_vs_bf16"] == result["bits_per_original_value"] / 16
        assert f"{result['perplexity']:.4f} behind a pruned context" in out
        results.append(result)
    compressed, exact = results
    assert compressed["bits_per_original_value"] < exact["bits_per_original_value"]
    assert exact["bits_per_original_value"] == pytest.approx(16, rel=0.05)  # half of float32
    assert exact["bits_per_value"] is None


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--keep", 0.5], "--keep goes with --prune"),
        (["--context", 50], "--context goes with --prune"),
        (["--prune", "h2o", "--protocol", "single-pass"], "--protocol streaming"),
        (["--prune", "h2o", "--keep", 1.5], "a whole number of tokens, got 1.5"),
        (["--prune", "snapkv", "--keep", 0], "SnapKV: keep: expected"),
        (["--prune", "snapkv", "--context", 299], "a context of 1 to 298"),
    ],
)
def test_impossible_pruning(place, capsys, more, says):
    code, out, err = _run(capsys, *_eval(place, *more))
    assert (code, out) == (2, "")
    assert says in " ".join(err.split())
    assert err.count("\n") == 1


def test_eval_without_a_codec_measures_the_exact_cache(place, capsys):
    code, out, err = _run(
        capsys,
        *["eval", "perplexity", place / "tiny", "--data", place / "test.txt", "--samples", 2],
        *["--seq-len", 100, "--device", "cpu", "--json", "exact.json"],
    )
    assert code == 0, err
    with open("exact.json") as file:
        result = json.load(file)
    assert set(result) >= CONTRACT
    assert (result["codec"], result["bits_per_value"], result["mean_kl"]) == (None, None, 0)
    assert result["perplexity"] == result["baseline_perplexity"]
    assert "exact cache" in out


@pytest.mark.parametrize("name", ["rtn:3", "kivi:2", "rtn:2+window", "kvquant:2", "kvtc:2"])
def test_eval_of_competitors(place, capsys, name):
    more = ["--data", place / "test.txt", "--samples", 2, "--seq-len", 300, "--device", "cpu"]
    more += ["--calibration-data", place / "train.txt", "--calibration-samples", 4]
    more += ["--calibration-seq-len", 100, "--json", "out.json"]
    code, out, err = _run(capsys, "eval", "perplexity", place / "tiny", "--baseline", name, *more)
    assert code == 0, err
    with open("out.json") as file:
        result = json.load(file)
    assert set(result) >= CONTRACT
    assert (result["codec"], result["protocol"]) == (None, "streaming")
    assert result["mean_kl"] > 0
    assert result["bits_per_value_total"] >= result["bits_per_value"] > 1
    described = result["baseline"]
    assert (described["name"], described["bits"]) == (name.split(":")[0], int(name[name.index(":") + 1]))
    assert described["source"].startswith("arXiv:")
    fitted = described["name"] in ("kvquant", "kvtc")
    assert (described["calibration"] is not None) == fitted == bool(described["table_bytes"])
    assert (described["key_window"] == [4, 0, 128]) == name.endswith("+window")
    assert f"{result['bits_per_value']:.3f} bits per value" in out


def test_report(place, capsys, tmp_path):
    code, out, err = _run(capsys, *_eval(place, "--json", "one.json"))
    assert code == 0, err
    code, out, err = _run(
        capsys, "report", "one.json", place / "codec", "--out", "page.html", "--title", "Ours & theirs"
    )
    assert (code, err) == (0, "")
    assert out.startswith("page.html: ")
    text = Path("page.html").read_text(encoding="utf-8")
    assert "<h1>Ours &amp; theirs</h1>" in text
    assert "Codecs, layer by layer" in text
    assert "Rate and quality" in text


def test_report_of_what_is_no_result(place, capsys, tmp_path):
    Path("text.json").write_text("no result")
    Path("old.html").write_text("as it was")
    _refused(capsys, "report", "text.json", "--out", "old.html", says="text.json")
    _refused(capsys, "report", "none.json", "--out", "old.html", says=("none.json", "could not be read"))
    _refused(capsys, "report", place / "codec", "--out", "no/such/page.html", says="does not exist")
    _refused(capsys, "report", "--out", "page.html", says="INPUT")
    assert Path("old.html").read_text() == "as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.html", "text.json"]


def test_generate(place, capsys, monkeypatch):
    arguments = [
        "generate",
        place / "tiny",
        "--codec",
        place / "codec",
        "--max-new-tokens",
        8,
        "--device",
        "cpu",
    ]
    prompt = _text(5, 150)
    code, out, err = _run(capsys, *arguments, "--prompt", prompt)
    assert code == 0, err
    words = out.split()
    assert 1 <= len(words) <= 8
    assert set(words) <= set(WORDS)
    assert "cache:" in err
    assert "bits per value" in " ".join(err.split())
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    assert _run(capsys, *arguments, "--prompt", "-")[:2] == (0, out)
    sampled = [_run(capsys, *arguments, "--prompt", prompt, "--sample", "--seed", s)[1] for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    _, kept, err = _run(capsys, *arguments, "--prompt", prompt, "--keep-decoded")
    assert kept == out
    assert "kept decoded" in " ".join(err.split())
    _, kept, err = _run(capsys, *arguments, "--prompt", prompt, "--keep-latents")
    assert kept == out
    assert "keeps none, as kernels do not attend: they run on a GPU" in " ".join(err.split())


# --- mistakes ---------------------------------------------------------------------------------------------


def test_unknown_options_and_commands(place, capsys):
    _refused(capsys, "calibrate", place / "tiny", "--colour", "red", says="--colour")
    _refused(capsys, "calibrate", place / "tiny", says="--out")
    _refused(capsys, "calibrate", says="MODEL")
    _refused(capsys, "compress", says="compress")
    _refused(capsys, "eval", "beauty", says="beauty")
    _refused(capsys, *_calibrate(place, "--samples", "many"), says="--samples")
    _refused(capsys, *_calibrate(place, "--samples", 1), says="--samples")
    _refused(capsys, *_calibrate(place, "--seq-len", 0), says="--seq-len")
    _refused(capsys, *_calibrate(place, "--dtype", "int3"), says=("--dtype", "int3"))
    _refused(capsys, *_eval(place, "--protocol", "guess"), says=("--protocol", "guess"))


def test_competitors_that_cannot_be_had(place, capsys, monkeypatch):
    start = ["eval", "perplexity", place / "tiny", "--data", place / "test.txt", "--device", "cpu"]
    _refused(capsys, *_eval(place, "--baseline", "rtn"), says=("--codec or --baseline", "both"))
    _refused(capsys, *start, "--baseline", "rtm:2", says=("rtm", "kivi, kvquant"))
    _refused(capsys, *start, "--baseline", "rtn:9", says="expected bits of 1, 2")
    _refused(capsys, *start, "--baseline", "kvtc", "--protocol", "single-pass", says="--protocol streaming")
    _refused(capsys, *start, "--baseline", "kivi", "--seq-len", 128, says=("too short", "kivi"))
    _refused(
        capsys, *start, "--seq-len", 300, "--baseline", "kvquant", "--calibration-seq-len", 999, says="999"
    )
    monkeypatch.setitem(sys.modules, "optimum", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "optimum.quanto", None)
    _refused(capsys, *start, "--seq-len", 300, "--samples", 1, "--baseline", "quanto", says="aquakv[quanto]")


def test_model_that_is_not_there(place, capsys):
    _refused(capsys, *_calibrate(place, model="none"), says="none")
    _refused(capsys, "generate", "./none", "--codec", place / "codec", "--prompt", "w1", says="none")
    _refused(
        capsys, "eval", "perplexity", place / "train.txt", "--data", place / "test.txt", says="train.txt"
    )
    assert not os.listdir()


def test_codec_that_is_not_there_or_not_one(place, capsys, tmp_path):
    raw = (place / "codec").read_bytes()
    for name, content in (("cut", raw[:-1]), ("changed", raw[:-9] + b"x" + raw[-8:]), ("text", b"hello")):
        (tmp_path / name).write_bytes(content)
    for name in ("none", "cut", "changed", "text", "."):
        path = tmp_path / name
        _refused(capsys, "inspect", path, says=str(path))
        _refused(capsys, *_eval(place, codec=path), says=str(path))
        _refused(capsys, "generate", place / "tiny", "--codec", path, "--prompt", "w1", says=str(path))


def test_codec_of_another_model(place, capsys):
    more = ["--data", place / "test.txt", "--samples", 1, "--seq-len", 200, "--device", "cpu"]
    for protocol in ("streaming", "single-pass"):
        _refused(
            capsys,
            *["eval", "perplexity", place / "twin", "--codec", place / "codec", *more],
            *["--protocol", protocol],
            says=("layer_hashes[0]", "another model"),
        )
    _refused(
        capsys,
        *["generate", place / "twin", "--codec", place / "codec", "--prompt", "w1 w2", "--device", "cpu"],
        says=("layer_hashes[0]", "another model"),
    )


@pytest.mark.parametrize("bits", ["9", "nan", "inf", "0", "-3", "two"])
@pytest.mark.parametrize("name", PRESETS)
def test_impossible_bits(place, capsys, bits, name):
    _refused(capsys, *_calibrate(place, f"--bits={bits}", "--preset", name), says="bits")
    assert not os.listdir()


@pytest.mark.parametrize("name", ["paper", "higgs"])
def test_fractions_need_water_filling(place, capsys, name):
    _refused(capsys, *_calibrate(place, "--bits=2.5", "--preset", name), says=("2.5", "whole bits"))
    assert not os.listdir()


def test_unknown_preset(place, capsys):
    _refused(capsys, *_calibrate(place, "--preset", "best"), says=("best", *PRESETS))


def test_sequences_longer_than_the_models_maximum(place, capsys):
    _refused(capsys, *_calibrate(place, "--seq-len", 513), says=("513", "512"))
    _refused(capsys, *_eval(place, seq_len=513), says=("513", "512"))
    _refused(
        capsys,
        *["generate", place / "tiny", "--codec", place / "codec", "--prompt", "w1", "--max-new-tokens", 512],
        *["--device", "cpu"],
        says="512",
    )


def test_sequences_too_short_to_compress_anything(place, capsys):
    _refused(capsys, *_eval(place, "--json", "short.json", seq_len=100), says="--seq-len 100 is too short")
    assert not os.listdir(), "a refused run leaves no result file"


def test_data_that_is_missing_or_empty_or_short(place, capsys):
    for data, says in (("none.txt", "none.txt"), ("empty.txt", "empty.txt"), ("tiny", "directory")):
        _refused(capsys, *_calibrate(place, data=data), says=says)
        _refused(capsys, *_eval(place, data=data), says=says)
    _refused(capsys, *_calibrate(place, "--samples", 100), says="100 sequences")
    _refused(capsys, *_calibrate(place, "--data", place / "train.txt"), says="twice")
    assert not os.listdir()


def test_results_that_cannot_be_written(place, capsys, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    for path, says in (("none/x", "does not exist"), ("there", "directory")):
        _refused(capsys, *_calibrate(place, out=path), says=("codec", says))
        _refused(capsys, *_eval(place, "--json", path), says=("result", says))
    # Root may write everywhere, so the operating system's answer is stood in for.
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode, **more: mode != os.W_OK and access(path, mode, **more)
    )
    _refused(capsys, *_calibrate(place), says="may not be written")
    _refused(capsys, *_eval(place, "--json", "x.json"), says="may not be written")
    assert os.listdir() == ["there"]


@pytest.mark.parametrize("prompt", ["", "  \n "])
def test_empty_prompt(place, capsys, prompt):
    _refused(
        capsys, "generate", place / "tiny", "--codec", place / "codec", "--prompt", prompt, says="prompt"
    )


def test_no_chat_template(place, capsys):
    _refused(
        capsys,
        *[
            "generate",
            place / "tiny",
            "--codec",
            place / "codec",
            "--prompt",
            "w1",
            "--chat",
            "--device",
            "cpu",
        ],
        says=("chat template", "--chat"),
    )


def test_unknown_offload_and_device(place, capsys):
    _refused(capsys, *_calibrate(place, "--offload", "disk"), says="disk")
    _refused(capsys, *_calibrate(place, "--device", "toaster"), says="toaster")


def test_an_interrupt_is_one_line_and_leaves_nothing(place, capsys, monkeypatch):
    import aquakv.cli.commands.calibrate as command

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "token_sequences", interrupt)
    code, out, err = _run(capsys, *_calibrate(place))
    assert (code, out, err) == (1, "", "aquakv: interrupted\n")
    assert not os.listdir()


# --- bench ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "extra", "column"),
    [
        ("decode", ["--steps", "2", "--keep-latents", "--backend", "torch"], "median_ms"),
        ("encode", ["--repeats", "2"], "encoding_share"),
        ("memory", ["--keep-latents", "--backend", "torch"], "peak_bytes"),
    ],
)
def test_bench(place, capsys, name, extra, column):
    code, out, err = _run(
        capsys, "bench", name, place / "tiny", "--codec", place / "codec", "--data", place / "test.txt",
        "--context", 150, "--context", 200, "--rows", 2, "--device", "cpu", "--json", "out.json", *extra,
    )  # fmt: skip
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["context", "cache"]
    assert sum("exact" in line for line in lines[1:]) == 2
    result = json.loads(Path("out.json").read_text())
    assert (result["schema_version"], result["command"]) == (1, f"bench {name}")
    assert result["codecs"][0]["sha256"] == hashlib.sha256((place / "codec").read_bytes()).hexdigest()
    assert {row["context"] for row in result["rows"]} == {150, 200}
    assert all(column in row for row in result["rows"])
    assert result["backend"] == ("torch" if "torch" in extra else "auto")
    kept = [row for row in result["rows"] if row["contestant"].endswith("latents kept")]
    assert len(kept) == 2 * ("--keep-latents" in extra)
    if name == "memory":
        assert all(row["latent_bytes"] > 0 for row in kept)
        assert "latents, bytes" in lines[0]
    assert {"versions", "device", "git_sha", "model", "data"} <= set(result)


def test_bench_memory_of_random_weights(place, capsys, monkeypatch):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 8, "head_dim": 16}
    monkeypatch.setitem(shapes.SHAPES, "llama-3.1-8b", {**shapes.SHAPES["llama-3.1-8b"], **small})
    code, out, err = _run(
        capsys, "bench", "memory", "shape:llama-3.1-8b", "--layers", 3, "--context", 150, "--device", "cpu",
        "--preset", "paper", "--steps", 3, "--prefill-chunk", 100, "--json", "out.json",
    )  # fmt: skip
    assert (code, err) == (0, "calibrating a codec for random weights\n")
    assert "paper, general path" in out
    result = json.loads(Path("out.json").read_text())
    assert result["model"] == "shape:llama-3.1-8b, 3 layers, random weights"
    assert result["codecs"] == [{"contestant": "paper", "file": None, "preset": "paper", "sha256": None}]
    assert [(row["steps"], row["prefill_chunk"], row["dtype"]) for row in result["rows"]] == [
        (3, 100, "bfloat16")
    ] * 2


def test_bench_refuses(place, capsys):
    tiny, codec = place / "tiny", ["--codec", place / "codec"]
    _refused(capsys, "bench", "decode", tiny, *codec, "--context", 600, says="512")
    _refused(capsys, "bench", "decode", tiny, *codec, *codec, says="different names")
    _refused(capsys, "bench", "memory", tiny, says="--codec")
    _refused(capsys, "bench", "memory", tiny, "--codec", "nowhere", says="nowhere")
    _refused(capsys, "bench", "memory", tiny, *codec, "--layers", 2, says="--layers")
    _refused(capsys, "bench", "memory", "shape:llama-3.1-8b", *codec, says="--codec")
    _refused(capsys, "bench", "memory", "shape:nothing", says="llama-3.1-8b")
    assert not Path("out.json").exists()
