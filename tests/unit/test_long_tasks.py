"""Replies through fresh caches, and what tasks make of them."""

import dataclasses

import pytest
import torch

from aquakv import WindowConfig, calibrate, preset
from aquakv.baselines import baseline
from aquakv.errors import ConfigError
from aquakv.evaluation import drift as drift_module
from aquakv.evaluation.drift import Drift, continued, measure_drift
from aquakv.evaluation.generation import feed, reply_to
from aquakv.evaluation.methods import fresh_cache
from aquakv.evaluation.prompts import Prompt
from aquakv.evaluation.quality import Quality
from aquakv.evaluation.tasks import LongDrift, Needle, Ruler, Setting, task_of
from aquakv.models.loading import LoadedModel
from byte_tokenizer import EOS, VOCAB, byte_tokenizer, loaded
from tiny_models import build

WINDOW = WindowConfig(sink_tokens=2, recent_window=0, block_tokens=16)


def _tokens(*shape, seed=0):
    return torch.randint(0, VOCAB - 2, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def codec():
    config = dataclasses.replace(preset("paper", 8), window=WINDOW)
    return calibrate(loaded().model, _tokens(8, 64, seed=1), config)


def _prompts(count=3, context=70, question=9, answer=4):
    rows = _tokens(count, context + question + answer, seed=2)
    return [
        Prompt(row[:context], row[context : context + question], ("1",), row[-answer:] if answer else None)
        for row in rows
    ]


def _texts(replies):
    return [reply.text for reply in replies.replies]


def _losses(replies):
    return [reply.answer_nll for reply in replies.replies]


def test_replies_with_the_exact_cache_are_those_of_plain_generation():
    prompts = _prompts()
    exact, found = reply_to(loaded(), {"none": None}, prompts, [12] * 3)
    assert found["none"] is exact
    assert exact.size_fields() == {"bits_per_value": None, "bits_per_value_total": None}
    for prompt, reply in zip(prompts, exact.replies, strict=True):
        whole = torch.cat([prompt.context, prompt.question])[None]
        plain = loaded().model.generate(whole, max_new_tokens=12, do_sample=False, eos_token_id=EOS)
        assert reply.text == byte_tokenizer().decode(plain[0, whole.shape[1] :], skip_special_tokens=True)
        everything = torch.cat([whole, prompt.answer[None]], 1)
        with torch.no_grad():
            logs = loaded().model(everything).logits.log_softmax(-1)[0, whole.shape[1] - 1 : -1]
        expected = -logs.gather(-1, prompt.answer[:, None]).mean()
        assert reply.answer_nll == pytest.approx(float(expected), abs=1e-5)


def test_methods_reply_as_finely_as_they_code(codec):
    prompts = _prompts()
    methods = {"ours": codec, "fp8": baseline("fp8"), "rtn:8": baseline("rtn:8"), "rtn:1": baseline("rtn:1")}
    exact, found = reply_to(loaded(), methods, prompts, [6] * 3)
    errors = {
        name: max(abs(a - b) for a, b in zip(_losses(replies), _losses(exact), strict=True))
        for name, replies in found.items()
    }
    assert 0 < errors["ours"] < 0.05
    assert 0 < errors["rtn:8"] < 0.05
    assert errors["rtn:8"] < errors["fp8"] < 0.5
    assert errors["rtn:1"] > 4 * errors["ours"]
    bits = {name: replies.size_fields()["bits_per_value"] for name, replies in found.items()}
    assert bits["rtn:1"] < bits["fp8"] < bits["ours"] < 10
    # Of 70 tokens of context 64 are coded; the question is not counted.
    assert found["ours"].held.coded_values == 3 * 64 * 3 * 64


def test_the_question_sees_codes_and_the_context_does_not(codec):
    prompt = _prompts(1)[0]
    cache, one_pass = (fresh_cache(loaded().model, codec) for _ in range(2))
    exact = feed(loaded().model, fresh_cache(loaded().model, None), prompt.context[None])
    assert torch.equal(feed(loaded().model, cache, prompt.context[None]), exact)
    assert cache.footprint().coded_values
    whole = torch.cat([prompt.context, prompt.question])[None]
    behind = feed(loaded().model, cache, prompt.question[None])
    at_once = feed(loaded().model, one_pass, whole)
    assert not torch.allclose(behind, at_once, atol=1e-6)


def test_batches_reply_alike_in_order(codec):
    # Equally long in all parts are the first two and the last.
    prompts = [*_prompts(3), *_prompts(1, context=90), *_prompts(1, answer=0), *_prompts(1, context=70)]
    new_tokens = [3, 3, 5, 3, 3, 3]
    methods = {"ours": codec, "kivi": baseline("kivi:2")}
    prompts = [dataclasses.replace(p, context=torch.cat([p.context] * 2)) for p in prompts]
    alone = [reply_to(loaded(), methods, [p], [n]) for p, n in zip(prompts, new_tokens, strict=True)]
    ticks = []
    exact, found = reply_to(
        loaded(), methods, prompts, new_tokens, batch_size=2, progress=lambda p: ticks.append(p.done)
    )
    assert _texts(exact) == [_texts(one)[0] for one, _ in alone]
    for name in methods:
        assert _texts(found[name]) == [_texts(their[name])[0] for _, their in alone]
        for loss, (_, their) in zip(_losses(found[name]), alone, strict=True):
            expected = _losses(their[name])[0]
            assert loss == (None if expected is None else pytest.approx(expected, abs=1e-4))
    assert ticks[-1] == 3 * len(prompts)


def test_replies_end_where_the_model_ends_them():
    model = build(vocab_size=VOCAB, max_position_embeddings=512)
    prompt = _prompts(1)[0]
    whole = torch.cat([prompt.context, prompt.question])[None]
    new = model.generate(whole, max_new_tokens=8, do_sample=False)[0, whole.shape[1] :].tolist()
    model.generation_config.eos_token_id = [new[3], 5]
    found, _ = reply_to(LoadedModel(model, byte_tokenizer(), "tiny", "tiny"), {}, [prompt], [8])
    kept = new[: new.index(new[3])]
    assert _texts(found) == [byte_tokenizer().decode(kept, skip_special_tokens=True)]


def test_what_cannot_be_replied_to(codec):
    with pytest.raises(ConfigError, match=r"17 tokens is too short: nothing .* \(ours keeps sinks"):
        reply_to(loaded(), {"ours": codec}, _prompts(context=17), [4] * 3)
    with pytest.raises(ConfigError, match=r"79 tokens and 450 new .* maximum of 512; give a length of 62"):
        reply_to(loaded(512), {}, _prompts(), [450] * 3)


# --- needle and RULER -------------------------------------------------------------------------------------


def test_needle(codec):
    task = Needle(lengths=[300, 420], depths=[0, 50], samples=2, max_new_tokens=6)
    methods = {"exact": None, "ours": codec, "rtn:1": baseline("rtn:1")}
    found = task.evaluate(loaded(), methods, Setting(batch_size=2))
    assert list(found) == list(methods)
    for name, fields in found.items():
        assert [(cell["length"], cell["depth"]) for cell in fields["cells"]] == [
            (300, 0), (300, 50), (420, 0), (420, 50),
        ]  # fmt: skip
        assert fields["baseline_accuracy"] == found["exact"]["accuracy"]
        assert fields["exact_answer_nll"] == found["exact"]["answer_nll"]
        assert fields["answer_nll"] == pytest.approx(
            sum(cell["answer_nll"] for cell in fields["cells"]) / 4, abs=1e-12
        )
        assert (fields["bits_per_value"] is None) == (name == "exact")
    exact, ours, coarse = found.values()
    for cell, other in zip(exact["cells"], coarse["cells"], strict=True):
        assert cell["answer_nll"] == cell["exact_answer_nll"] == other["exact_answer_nll"]
        assert abs(other["answer_nll"] - cell["answer_nll"]) > 1e-3
    assert ours["answer_nll"] == pytest.approx(exact["answer_nll"], abs=0.05)


def test_accuracy_counts_replies_that_name_the_number(monkeypatch):
    from aquakv.evaluation.tasks import needle as module

    original = module.reply_to

    def knowing(loaded, methods, prompts, *more, **rest):
        exact, found = original(loaded, methods, prompts, *more, **rest)
        for i, prompt in enumerate(prompts):
            said = prompt.answers[0] if i != 2 else "0"
            exact.replies[i] = dataclasses.replace(exact.replies[i], text=f" {said}.")
        return exact, found

    monkeypatch.setattr(module, "reply_to", knowing)
    task = Needle(lengths=[300], depths=[0, 100], samples=2, max_new_tokens=1)
    fields = task.evaluate(loaded(), {"rtn": baseline("rtn:2")}, Setting())["rtn"]
    assert (fields["accuracy"], fields["baseline_accuracy"]) == (0, 0.75)
    assert [cell["baseline_accuracy"] for cell in fields["cells"]] == [1, 0.5]


def test_ruler(codec):
    task = task_of(
        {
            "task": "ruler",
            "tasks": ["niah_multikey_2", "vt"],
            "lengths": [600, 700],
            "samples": 2,
            "max_new_tokens": {"niah_multikey_2": 8, "vt": 5},
        }
    )
    assert isinstance(task, Ruler)
    found = task.evaluate(loaded(), {"exact": None, "ours": codec}, Setting())
    for fields in found.values():
        cells = [("niah_multikey_2", 600), ("niah_multikey_2", 700), ("vt", 600), ("vt", 700)]
        assert [(row["task"], row["length"]) for row in fields["rows"]] == cells
        assert all(0 <= row["score"] <= 1 for row in fields["rows"])
        assert fields["rows"][2]["tokens"] == [600, 600]
        assert fields["score"] == sum(row["score"] for row in fields["rows"]) / 4
    exact, ours = found.values()
    assert exact["score"] == exact["baseline_score"] == ours["baseline_score"]
    assert exact["bits_per_value"] is None
    assert ours["bits_per_value_total"] > ours["bits_per_value"] > 8


# --- drift ------------------------------------------------------------------------------------------------


def test_continuations():
    prompts = _tokens(2, 20)
    greedy = continued(loaded(), prompts, 30, temperature=0)
    plain = loaded().model.generate(
        prompts, max_new_tokens=30, min_new_tokens=30, do_sample=False, eos_token_id=EOS
    )
    assert torch.equal(greedy, plain)
    state = torch.get_rng_state()
    first, again, other = (continued(loaded(), prompts, 30, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (2, 50)
    assert torch.equal(first[:, :20], prompts)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not (first == EOS).any()


@pytest.mark.parametrize(
    ("name", "pass_tokens"),
    [("ours", 7), ("ours", 256), ("rtn:3", 7), ("windowed", 256)],
)
def test_drift_is_what_feeding_token_by_token_gives(codec, monkeypatch, name, pass_tokens):
    monkeypatch.setattr(drift_module, "_PASS_TOKENS", pass_tokens)
    windowed = dataclasses.replace(baseline("rtn:2"), window=WINDOW)
    method = {"ours": codec, "windowed": windowed}.get(name) or baseline(name)
    model, prompt, new = loaded().model, 30, 70
    texts = continued(loaded(), _tokens(2, prompt), new)
    found = Drift.empty(new, 30)
    measure_drift(loaded(), method, texts, prompt, found)
    assert [quality.tokens for quality in found.bins] == [60, 60, 20]
    cache, logits = fresh_cache(model, method), []
    for token in texts[:, :-1].split(1, 1):
        logits += [feed(model, cache, token)]
    with torch.no_grad():
        exact = model(texts).logits
    for quality, start in zip(found.bins, (0, 30, 60), strict=True):
        part = slice(prompt - 1 + start, min(prompt - 1 + start + 30, prompt + new - 1))
        expected = Quality()
        expected.compare(
            exact[:, part], torch.cat(logits, 1)[:, part], texts[:, part.start + 1 : part.stop + 1]
        )
        assert quality.mean_kl == pytest.approx(expected.mean_kl, rel=0.02, abs=1e-7)
        assert quality.exact_nll == pytest.approx(expected.exact_nll, rel=1e-4)
        assert quality.agreements == pytest.approx(expected.agreements, abs=2)
    assert found.held.bits_per_value > 1


def test_drift_fields():
    drift = Drift.empty(10, 4)
    assert drift.edges == [0, 4, 8, 10]
    for quality, kl, tokens in zip(drift.bins, (0.4, 0.8, 0.8), (4, 4, 2), strict=True):
        quality.kl, quality.tokens, quality.agreements = kl, tokens, tokens // 2
    fields = drift.fields()
    assert fields["bins"] == [
        {"start": 0, "end": 4, "mean_kl": 0.1, "top1_agreement": 0.5},
        {"start": 4, "end": 8, "mean_kl": 0.2, "top1_agreement": 0.5},
        {"start": 8, "end": 10, "mean_kl": 0.4, "top1_agreement": 0.5},
    ]
    assert (fields["tokens"], fields["mean_kl"]) == (10, pytest.approx(0.2))
    assert fields["late_to_early"] == pytest.approx(4)
    # Middles are 2, 6 and 9: the line through (2, 0.1), (6, 0.2), (9, 0.4) rises by 0.0419 a token.
    assert fields["kl_slope"] == pytest.approx(41.89, abs=0.01)
    assert Drift.empty(3, 4).edges == [0, 3]


def test_drift_task(codec):
    task = LongDrift(prompt_tokens=20, new_tokens=100, samples=3, bin_tokens=40)
    methods = {"exact": None, "ours": codec, "rtn:1": baseline("rtn:1")}
    found = task.evaluate(loaded(), methods, Setting(batch_size=2))
    exact, ours, coarse = found.values()
    assert (exact["mean_kl"], exact["top1_agreement"], exact["late_to_early"]) == (0, 1, None)
    assert exact["bits_per_value"] is None
    assert 0 < ours["mean_kl"] < coarse["mean_kl"] / 10
    assert [one["end"] for one in ours["bins"]] == [40, 80, 100]
    assert ours["tokens"] == 300
    assert task.evaluate(loaded(), methods, Setting(batch_size=2))["ours"]["bins"] == ours["bins"]


def test_impossible_drifts(codec):
    with pytest.raises(ConfigError, match=r"400 tokens and 120 new .* maximum of 512"):
        LongDrift(prompt_tokens=400, new_tokens=120).evaluate(loaded(512), {}, Setting())
    with pytest.raises(ConfigError, match="too short"):
        LongDrift(prompt_tokens=8, new_tokens=10).evaluate(loaded(), {"ours": codec}, Setting())
    for setting in ("bin_tokens", "new_tokens", "samples"):
        with pytest.raises(ConfigError, match=f"task drift: {setting}: expected"):
            LongDrift(**{setting: 0})
    with pytest.raises(ConfigError, match="temperature: expected numbers from 0, got -1"):
        LongDrift(temperature=-1)
