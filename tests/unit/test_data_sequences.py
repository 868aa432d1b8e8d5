import json
import logging

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from aquakv.data import token_sequences
from aquakv.errors import DataError


def _tokenizer(eos_token="<eos>", **kwargs):
    """Words w0…w999 and x0…x999, each one token; a blank line is one token too."""
    words = ["<unk>", "<eos>", "\n\n"] + [f"{letter}{i}" for letter in "wx" for i in range(1000)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token=eos_token, **kwargs)


def _words(letter, start, stop):
    return " ".join(f"{letter}{i}" for i in range(start, stop))


@pytest.fixture
def texts(tmp_path):
    """Two single documents of 100 and 23 tokens, and one JSONL of three documents of 5."""
    (tmp_path / "w.txt").write_text(_words("w", 0, 100), encoding="utf-8")
    (tmp_path / "x.txt").write_text(_words("x", 0, 23), encoding="utf-8")
    records = [{"text": _words("w", 5 * i, 5 * i + 5)} for i in range(3)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return tmp_path


def test_one_document_is_cut_in_text_order(texts):
    tokenizer = _tokenizer()
    sequences = token_sequences([str(texts / "w.txt")], tokenizer, 14, 7)
    plain = tokenizer((texts / "w.txt").read_text(encoding="utf-8"))["input_ids"]
    assert sequences.shape == (14, 7)
    assert sequences.dtype == torch.int64
    assert sequences.flatten().tolist() == plain[:98]


@pytest.mark.parametrize(("eos", "separator"), [("<eos>", 1), (None, 2)])
def test_documents_are_joined_by_eos_or_a_blank_line(texts, eos, separator):
    tokenizer = _tokenizer(eos_token=eos)
    stream = token_sequences([str(texts / "d.jsonl")], tokenizer, 1, 17).flatten().tolist()
    words = [tokenizer.convert_tokens_to_ids(f"w{i}") for i in range(15)]
    assert stream == [*words[:5], separator, *words[5:10], separator, *words[10:]]


def test_sequences_begin_with_what_the_tokenizer_puts_first(texts):
    plain, tokenizer = _tokenizer(bos_token="<eos>"), _tokenizer(bos_token="<unk>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", tokenizer.bos_token_id)]
    )
    path = str(texts / "w.txt")
    text = token_sequences([path], plain, 4, 6)
    found = token_sequences([path], tokenizer, 4, 7)
    assert (found[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(found[:, 1:], text)
    assert (text[:, 0] != plain.bos_token_id).all()  # it has one, but does not put it first
    with pytest.raises(DataError):
        token_sequences([path], tokenizer, 1, 1)


def test_sources_take_turns_and_the_first_gets_the_remainder(texts):
    tokenizer = _tokenizer()
    w, x = str(texts / "w.txt"), str(texts / "x.txt")
    mixed = token_sequences([w, x], tokenizer, 5, 4)
    assert torch.equal(mixed[0::2], token_sequences([w], tokenizer, 3, 4))
    assert torch.equal(mixed[1::2], token_sequences([x], tokenizer, 2, 4))


def test_a_source_without_a_turn_is_not_read(texts):
    (texts / "bad.txt").write_bytes(b"\xff")
    assert token_sequences([str(texts / "w.txt"), str(texts / "bad.txt")], _tokenizer(), 1, 4).shape == (1, 4)


def test_too_little_text_says_how_much_there_is_and_what_fits(texts):
    tokenizer = _tokenizer()
    specs = [str(texts / "w.txt"), str(texts / "x.txt")]
    with pytest.raises(DataError, match=r"x\.txt has 2 of 4 needed.*number of samples to 5") as error:
        token_sequences(specs, tokenizer, 8, 10)
    assert "\n" not in str(error.value)
    assert token_sequences(specs, tokenizer, 5, 10).shape == (5, 10)
    with pytest.raises(DataError, match="lower the sequence length"):
        token_sequences(specs[1:], tokenizer, 1, 24)


def test_exactly_enough_text_is_enough(texts):
    assert token_sequences([str(texts / "x.txt")], _tokenizer(), 23, 1).shape == (23, 1)
    assert token_sequences([str(texts / "x.txt")], _tokenizer(), 1, 23).shape == (1, 23)


def test_the_same_source_twice_is_refused(texts, monkeypatch):
    monkeypatch.chdir(texts)
    with pytest.raises(DataError, match="named twice"):
        token_sequences(["w.txt", str(texts / "w.txt")], _tokenizer(), 2, 4)


@pytest.mark.parametrize(
    ("num_samples", "seq_len"), [(0, 4), (2, 0), (-1, 4), (2, 2.5), (True, 4), (None, 4), (2, "8")]
)
def test_impossible_sizes_are_refused(texts, num_samples, seq_len):
    with pytest.raises(DataError, match="at least 1"):
        token_sequences([str(texts / "w.txt")], _tokenizer(), num_samples, seq_len)


def test_no_source_is_refused():
    with pytest.raises(DataError, match="at least one data source"):
        token_sequences([], _tokenizer(), 1, 4)


def test_only_as_many_documents_are_tokenised_as_needed(texts):
    tokenizer, seen = _tokenizer(), []

    class Counting:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, **kwargs):
            seen.append(text)
            return tokenizer(text, **kwargs)

    token_sequences([str(texts / "d.jsonl")], Counting(), 2, 4)
    assert len(seen) == 2
    seen.clear()
    token_sequences(["stdlib:train"], Counting(), 1, 64)
    assert len(seen) <= 3


def test_length_warning_truncation_and_special_tokens_stay_off(texts, caplog):
    tokenizer = _tokenizer(model_max_length=8)
    tokenizer.backend_tokenizer.enable_truncation(8)
    # transformers does not pass its records on to the root logger, where caplog listens.
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        sequences = token_sequences([str(texts / "w.txt")], tokenizer, 1, 100)
    finally:
        library.removeHandler(caplog.handler)
    assert 1 not in sequences
    assert "longer than" not in caplog.text
