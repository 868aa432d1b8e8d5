"""What generated prompts hold, and where."""

import re
import string
from collections import Counter
from itertools import pairwise
from random import Random

import pytest
import torch

from aquakv.errors import ConfigError, DataError
from aquakv.evaluation.prompts import Haystack, PromptWriter, Wording
from aquakv.evaluation.ruler import KINDS, Materials, found_strings
from aquakv.evaluation.ruler.lists import zeta_counts
from aquakv.evaluation.tasks import Needle, Ruler, Setting
from aquakv.evaluation.tasks.needle import retrieved
from byte_tokenizer import CHAT, EOS, byte_tokenizer, loaded

WORDING = Wording("Read this.\n\n", "What is it?", "It is")


def _text(tokens):
    return byte_tokenizer().decode(tokens)


@pytest.fixture(scope="module")
def materials():
    return Materials.of(PromptWriter(byte_tokenizer()), "pydoc:test", 20000)


def test_a_prompt_without_a_chat_template():
    prompt = PromptWriter(byte_tokenizer()).write(
        100, WORDING, lambda room: torch.zeros(room).long(), ["42"], "42"
    )
    assert (prompt.tokens, prompt.answers) == (100, ("42",))
    assert _text(prompt.context).startswith("Read this.\n\n")
    # The space before the answer is no part of it.
    assert _text(prompt.question) == "\n\nWhat is it?\nIt is "
    assert _text(prompt.answer) == "42"


def test_a_prompt_in_a_chat_template():
    writer = PromptWriter(byte_tokenizer(CHAT))
    prompt = writer.write(120, WORDING, lambda room: torch.zeros(room).long(), ["42"])
    assert prompt.tokens == 120
    assert prompt.answer is None
    assert _text(prompt.context).startswith("<|user|>Read this.\n\n")
    assert _text(prompt.question) == "\n\nWhat is it?<eos><|assistant|>It is"
    assert prompt.question.tolist().count(EOS) == 1
    for template in ("{{ raise_exception('no') }}", "nothing"):
        with pytest.raises(DataError, match="chat template"):
            PromptWriter(byte_tokenizer(template))


def test_prompts_begin_with_the_tokenizers_own_beginning():
    from tokenizers import processors

    tokenizer = byte_tokenizer(bos_token="<bos>")
    assert PromptWriter(tokenizer).write(90, WORDING, torch.arange, ["1"]).context[0] != EOS + 1
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", EOS + 1)]
    )
    prompt = PromptWriter(tokenizer).write(90, WORDING, lambda room: torch.zeros(room).long(), ["1"])
    assert (int(prompt.context[0]), prompt.tokens) == (EOS + 1, 90)
    assert prompt.context.tolist().count(EOS + 1) == 1


def test_a_length_without_room():
    with pytest.raises(ConfigError, match=r"length 20 is too short: instruction and question alone take 31"):
        PromptWriter(byte_tokenizer()).write(20, WORDING, torch.arange, [])
    needles = [torch.zeros(30, dtype=torch.long)] * 2
    with pytest.raises(ConfigError, match=r"2 needles take 60 tokens where there is room for 50; .* by 10"):
        Haystack(torch.arange(9), True).hide(50, needles, [0, 1], Random(0))


@pytest.mark.parametrize("shifts", [False, True])
def test_needles_are_at_their_depths(shifts):
    stream = torch.arange(100, 137)
    needles = [torch.full((2 + i,), i) for i in range(3)]
    found = Haystack(stream, shifts).hide(209, needles, [1, 0.25, 0], Random(5)).tolist()
    assert len(found) == 209
    assert found[:4] == [2] * 4
    assert found[-2:] == [0] * 2
    assert found[4 + 50 : 4 + 53] == [1] * 3
    text = [token for token in found if token >= 100]
    assert len(text) == 200
    assert all((b - a) % 37 == 1 for a, b in pairwise(text)), "read in a circle"
    assert shifts or text[0] == 100


def test_documents_inside_a_prompt_do_not_end_it(materials):
    assert EOS not in materials.text.stream.tolist()
    assert len(materials.text.stream) == 20000


# --- needle -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["pydoc:test", "noise"])
def test_needle_prompts(data):
    task = Needle(data=data, lengths=[400, 700], depths=[0, 30, 100], samples=2)
    cells = task.prompts(loaded(), Setting())
    assert list(cells) == [(length, depth) for length in (400, 700) for depth in (0, 30, 100)]
    keys = set()
    for (length, depth), prompts in cells.items():
        assert len(prompts) == 2
        for prompt in prompts:
            key = prompt.answers[0]
            keys.add(key)
            assert re.fullmatch(r"[1-9]\d{4}", key)
            assert prompt.tokens == length
            text = _text(prompt.context)
            assert text.count(key) == 2
            assert key not in _text(prompt.question)
            assert _text(prompt.answer) == key
            before, _, after = re.split(r"(\n\nThe pass key is .* is the pass key\.\n\n)", text)
            before = before.split("remember it.\n\n", 1)[1]
            assert len(before.encode()) == pytest.approx(depth / 100 * len((before + after).encode()), abs=2)
    # Numbers are those of a length and sample, at all depths.
    assert len(keys) == 4
    assert [p.answers for p in cells[400, 0]] == [p.answers for p in cells[400, 100]]


def _tokens(cells):
    return [torch.cat([p.context, p.question]).tolist() for cell in cells.values() for p in cell]


def test_the_same_seed_gives_the_same_prompts():
    tasks = [
        Needle(lengths=[400], samples=3, seed=1),
        Needle(lengths=[400], samples=3, seed=1),
        Needle(lengths=[400], samples=3, seed=2),
    ]
    first, again, other = (_tokens(task.prompts(loaded(), Setting())) for task in tasks)
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_retrieval_is_of_the_whole_number():
    assert retrieved(" 12345. Remember it", "12345")
    assert retrieved("the key is 12345", "12345")
    for reply in ("", "none", "123456", "1234", "54321 or 12345"):
        assert not retrieved(reply, "12345")


def test_lengths_follow_the_model():
    task = Needle(depths=[50], samples=1)
    assert [length for length, _ in task.prompts(loaded(), Setting())] == [1024, 2048]
    with pytest.raises(
        ConfigError, match=r"8192 tokens.* tiny's maximum of 512; give lengths of 496 or less"
    ):
        task.prompts(loaded(512), Setting())
    with pytest.raises(ConfigError, match=r"prompts of 4081 tokens.* lengths of 4080 or less"):
        Needle(lengths=[100, 4081]).prompts(loaded(), Setting())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lengths": [0]}, "lengths: expected whole numbers from 1, got 0"),
        ({"lengths": []}, r"lengths: expected whole numbers from 1, got \[\]"),
        ({"lengths": "1024"}, "lengths: expected whole"),
        ({"depths": [50, 101]}, "depths: expected numbers from 0 up to 100, got 101"),
        ({"depths": [float("nan")]}, "depths: expected .* got nan"),
        ({"samples": 0}, "samples: expected"),
        ({"samples": True}, "samples: expected"),
        ({"digits": 1.5}, "digits: expected"),
    ],
)
def test_impossible_needles(settings, says):
    with pytest.raises(ConfigError, match=f"task needle: {says}"):
        Needle(**settings)


# --- RULER ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("length", [2000, 3333])
def test_rulers_prompts_have_their_length(materials, name, length):
    prompt = KINDS[name].make(materials, length, Random(3))
    lists = {"niah_multikey_2": 90, "niah_multikey_3": 120, "cwe": 60, "fwe": 20}
    assert length - lists.get(name, 0) <= prompt.tokens <= length
    again, other = (KINDS[name].make(materials, length, Random(seed)) for seed in (3, 4))
    assert torch.equal(prompt.context, again.context)
    assert prompt.answers == again.answers != other.answers


@pytest.mark.parametrize(
    ("name", "needles", "asked", "answers"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_2", 1, 1, 1),
        ("niah_single_3", 1, 1, 1),
        ("niah_multikey_1", 4, 1, 1),
        ("niah_multikey_2", None, 1, 1),
        ("niah_multikey_3", None, 1, 1),
        ("niah_multivalue", 4, 1, 4),
        ("niah_multiquery", 4, 4, 4),
    ],
)
def test_rulers_needles(materials, name, needles, asked, answers):
    prompt = KINDS[name].make(materials, 2000, Random(1))
    text, question = _text(prompt.context), _text(prompt.question)
    found = re.findall(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.\n?", text)
    assert len(found) == needles or (needles is None and len(found) > 10)
    assert len(prompt.answers) == answers == len(set(prompt.answers))
    keys = {key for key, value in found if value in prompt.answers}
    assert len(keys) == asked
    for value in prompt.answers:
        assert text.count(value) == 1
        assert value not in question
    assert all((question.count(key) == 2) == (key in keys) for key, _ in found)
    if name in ("niah_multikey_2", "niah_multikey_3"):
        assert len({key for key, _ in found}) == len(found)
    of = "uuid" if name in ("niah_single_3", "niah_multikey_3") else "number"
    assert f"special magic {of}" in question


def test_variable_tracking(materials):
    prompt = KINDS["vt"].make(materials, 1500, Random(2))
    text = _text(prompt.context)
    assignments = re.findall(r"\nVAR ([A-Z]{5}) = (?:VAR )?(\w+)\n", text)
    assert [name for name, _ in assignments] == list(prompt.answers)
    value, *sources = [source for _, source in assignments]
    assert sources == list(prompt.answers[:-1])
    assert text.count(value) == 1
    assert f"the value {value}" in _text(prompt.question)
    counts = [text.count(name) for name in prompt.answers]
    assert counts == [2, 2, 2, 2, 1]


@pytest.mark.parametrize(("length", "repeats"), [(2500, 1), (5500, 2), (9000, 3)])
def test_common_words(materials, length, repeats):
    prompt = KINDS["cwe"].make(materials, length, Random(2))
    entries = re.findall(r"^(\d+)\. (\w+)$", _text(prompt.context), flags=re.MULTILINE)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    counts = Counter(word for _, word in entries)
    common = {word for word, count in counts.items() if count == 10 * repeats}
    assert common == set(prompt.answers)
    assert len(common) == 10
    assert set(counts.values()) == {repeats, 10 * repeats}


def test_common_words_once_all_words_are_in_the_list(materials, monkeypatch):
    from aquakv.evaluation.ruler import words

    monkeypatch.setattr(words, "vocabulary", lambda: tuple(f"word{a}" for a in string.ascii_lowercase))
    prompt = KINDS["cwe"].make(materials, 9000, Random(2))
    assert prompt.tokens > 4000
    counts = Counter(re.findall(r"word\w", _text(prompt.context)))
    assert {word for word, _ in counts.most_common(10)} == set(prompt.answers)


def test_frequent_words(materials):
    prompt = KINDS["fwe"].make(materials, 3000, Random(2))
    words = _text(prompt.context).split("mean nothing.\n\n")[1].split(" ")
    counts = Counter(words)
    ranked = counts.most_common(5)
    assert [word for word, _ in ranked[:4]] == ["...", *prompt.answers]
    assert ranked[3][1] > ranked[4][1]
    assert sorted(counts.values(), reverse=True) == zeta_counts(len(words)) or len(words) > 300
    ratios = [ranked[0][1] / count for _, count in ranked]
    assert ratios == pytest.approx([1, 4, 9, 16, 25], rel=0.1)


def test_a_score_is_the_fraction_of_strings_found():
    answers = ("ABCDE", "12")
    assert found_strings("abcde and 12", answers) == 1
    assert found_strings("it is 12.", answers) == 0.5
    assert found_strings("", answers) == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tasks": ["niah"]}, "expected tasks of niah_single_1, .*, got 'niah'"),
        ({"tasks": "vt"}, "tasks: expected a list"),
        ({"tasks": []}, "tasks: expected a list"),
        ({"max_new_tokens": {"qa": 3}}, "expected .* got 'qa'"),
        ({"max_new_tokens": {"vt": 0}}, "max_new_tokens: expected .* got 0 for vt"),
        ({"lengths": [-1]}, "lengths: expected"),
    ],
)
def test_impossible_rulers(settings, says):
    with pytest.raises(ConfigError, match=f"task ruler: {says}"):
        Ruler(**settings)


@pytest.mark.parametrize("name", ["niah_multikey_2", "cwe", "fwe", "vt"])
def test_rulers_lengths_without_room(name):
    with pytest.raises(ConfigError, match=rf"task ruler: {name}: .* too short"):
        Ruler(tasks=[name], lengths=[300]).prompts(loaded(), Setting())
