"""Commands that measure a method by a task."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from aquakv.cli.main import main
from aquakv.evaluation.ruler import KINDS
from byte_tokenizer import VOCAB, byte_tokenizer
from tiny_models import build

CONTRACT = {
    "schema_version",
    "command",
    "model",
    "codec",
    "baseline",
    "data",
    "samples",
    "seed",
    "bits_per_value",
    "bits_per_value_total",
    "elapsed_s",
    "versions",
    "device",
    "git_sha",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a tiny model that takes bytes, and its codec."""
    root = tmp_path_factory.mktemp("tasks")
    build(vocab_size=VOCAB, max_position_embeddings=1024).save_pretrained(root / "tiny")
    byte_tokenizer().save_pretrained(root / "tiny")
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "calibrate", str(root / "tiny"), "--out", str(root / "codec"), "--preset", "paper",
                "--samples", "4", "--seq-len", "160", "--device", "cpu", "--dtype", "float32",
            ]
        )  # fmt: skip
    assert stop.value.code == 0
    return root


@pytest.fixture(autouse=True)
def _in_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("AQUAKV_DATA_DIR", raising=False)


def _run(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


SHORT = {
    "needle": ["--length", 400, "--depth", 0, "--depth", 50, "--samples", 2, "--max-new-tokens", 4],
    "ruler": [
        "--task",
        "niah_single_1",
        "--task",
        "vt",
        "--length",
        500,
        "--samples",
        1,
        "--max-new-tokens",
        4,
    ],
    "drift": ["--prompt-tokens", 150, "--new-tokens", 150, "--bin-tokens", 50],
}
CPU = ["--device", "cpu", "--dtype", "float32"]


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("method", ["exact", "codec", "kivi:2"])
def test_results(place, capsys, name, method):
    chosen = {"exact": [], "codec": ["--codec", place / "codec"]}.get(method, ["--baseline", method])
    code, out, err = _run(
        capsys, "eval", name, place / "tiny", *chosen, *SHORT[name], *CPU, "--json", "out.json"
    )
    assert (code, err) == (0, "")
    result = json.loads(Path("out.json").read_text())
    assert set(result) >= CONTRACT
    assert (result["schema_version"], result["command"]) == (1, f"eval {name}")
    assert (result["data"], result["seed"]) == ("pydoc:test", 0)
    if method == "exact":
        assert result["codec"] is result["baseline"] is result["bits_per_value"] is None
        assert "exact cache" in out
    else:
        assert result["bits_per_value_total"] > 0
        assert result["bits_per_value"] > 2
        assert f"{result['bits_per_value']:.3f} bits per value" in out
    if method == "codec":
        digest = hashlib.sha256((place / "codec").read_bytes()).hexdigest()
        assert result["codec"] == {"file": "codec", "preset": "paper", "sha256": digest}
    if method == "kivi:2":
        assert (result["baseline"]["name"], result["baseline"]["bits"]) == ("kivi", 2)
    _check(name, method, result, out)


def _check(name, method, result, out):
    if name == "needle":
        assert [(cell["length"], cell["depth"]) for cell in result["cells"]] == [(400, 0), (400, 50)]
        assert set(result["cells"][0]) >= {"accuracy", "answer_nll", "exact_answer_nll"}
        assert {"accuracy", "baseline_accuracy"} <= set(result)
        assert (result["answer_nll"] == result["exact_answer_nll"]) == (method == "exact")
        assert out.count("\n") == 3
    elif name == "ruler":
        assert [(row["task"], row["length"]) for row in result["rows"]] == [
            ("niah_single_1", 500),
            ("vt", 500),
        ]
        assert set(result["rows"][0]) >= {"score", "baseline_score"}
        assert result["max_new_tokens"] == {"niah_single_1": 4, "vt": 4}
        assert out.count("\n") == 3
    else:
        assert [(one["start"], one["end"]) for one in result["bins"]] == [(0, 50), (50, 100), (100, 150)]
        assert (result["mean_kl"] > 0) == (method != "exact")
        assert "last quarter" in out or method == "exact"
        assert out.count("\n") == 1


def test_help_names_what_may_be_chosen(capsys):
    for name in SHORT:
        code, out, err = _run(capsys, "eval", name, "--help")
        assert (code, err) == (0, "")
        assert "--baseline" in out
    assert all(name in KINDS for name in ("vt", "cwe", "fwe"))


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("needle", ["--length", 2000], ("2000 tokens", "maximum of 1024", "lengths of 1008 or less")),
        ("needle", ["--length", 0], ("task needle", "lengths", "got 0")),
        ("needle", ["--length", 100], ("length 100 is too short",)),
        ("needle", ["--depth", 101, "--length", 400], ("depths", "up to 100", "got 101")),
        ("needle", ["--samples", 0], ("samples", "got 0")),
        ("needle", ["--data", "none.txt", "--length", 400], ("none.txt",)),
        ("needle", ["--length", 400, "--baseline", "kiwi:2"], ("kiwi",)),
        ("ruler", ["--task", "qa"], ("niah_single_1", "'qa'")),
        ("ruler", [], ("prompts of 4096 tokens", "maximum of 1024", "896 or less")),
        ("ruler", ["--length", 300, "--task", "cwe"], ("task ruler: cwe", "too short")),
        ("ruler", ["--max-new-tokens", 0], ("max_new_tokens", "got 0")),
        ("drift", [], ("512 tokens and 4096 new ones", "maximum of 1024")),
        ("drift", ["--new-tokens", 0], ("new_tokens", "got 0")),
        ("drift", ["--temperature", -1], ("temperature", "got -1")),
        ("drift", ["--prompt-tokens", 20, "--new-tokens", 20, "--baseline", "kivi"], ("too short", "kivi")),
        ("drift", ["--prompt-tokens", 20, "--new-tokens", 20, "--json", "no/x"], ("does not exist",)),
    ],
)
def test_mistakes(place, capsys, name, more, says):
    arguments = [] if "--json" in more else ["--json", "out.json"]
    code, out, err = _run(capsys, "eval", name, place / "tiny", *more, *CPU, *arguments)
    assert (code, out) == (2, ""), err
    assert err.startswith("aquakv: ")
    assert err.count("\n") == 1
    for part in says:
        assert part in err
    assert not os.listdir()


def test_contexts_of_which_nothing_would_be_compressed(place, capsys):
    # 200 tokens, of which the question takes some 70.
    more = ["--codec", place / "codec", "--length", 200, "--data", "noise", *CPU]
    code, _, err = _run(capsys, "eval", "needle", place / "tiny", *more)
    assert code == 2
    assert "too short" in err
