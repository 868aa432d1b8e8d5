"""Documents say what the committed results say."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiny_models import build, codec_for

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"


@pytest.mark.parametrize("script", ["make_tables.py", "make_results.py"])
def test_documents_are_those_of_the_committed_results(script, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    runpy.run_path(str(SCRIPTS / script), run_name="__main__")  # exits if they are not


def test_results_say_what_was_not_run():
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert "no Llama weights" in text.split("## What was not run")[1]


def test_readme_holds_every_table():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- table:(\w+) -->\n(.*?)<!-- end -->", readme, flags=re.DOTALL)
    assert [name for name, _ in blocks] == ["quality", "speed", "pruning"]
    assert all(body.startswith("|") and "table:" not in body for _, body in blocks)


def test_readmes_program_runs_as_written(tmp_path, monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    program, evicting = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    words = {word: number for number, word in enumerate(["[UNK]", "The", "quick", "brown", "fox"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    build("llama").save_pretrained(tmp_path)
    codec_for("llama", "decode").save(tmp_path / "codec.safetensors")
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(tmp_path)}
    exec(program, names)
    assert names["output"].shape == (1, 4 + 32)
    assert names["cache"].get_seq_length() == 4 + 31
    assert capsys.readouterr().out.startswith("The quick brown fox")
    exec(evicting, names)
    assert names["cache"].get_seq_length() == 4 + 31
    assert int(names["cache"].layout.held_columns().sum()) == 4 + 31 - 10
