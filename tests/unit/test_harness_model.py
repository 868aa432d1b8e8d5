"""The subclass of lm-eval's model, below its tasks."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aquakv import AquaCache
from aquakv.baselines import baseline
from aquakv.evaluation.harness import HarnessSetting
from aquakv.evaluation.methods import fresh_cache
from aquakv.evaluation.quality import Quality, evaluate_quality
from tiny_models import VOCAB, build, codec_for, feed, random_tokens, variant

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'aquakv[lm-eval]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from aquakv.evaluation.harness.model import CachedLM

WORDS = ["<unk>", "<eos>", *(f"w{i}" for i in range(VOCAB - 2))]


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")


@pytest.fixture(scope="module")
def tiny():
    model = build("llama", dtype=torch.float64)
    model.generation_config.eos_token_id = 1
    return model


def text(tokens):
    return " ".join(WORDS[i] for i in tokens.tolist())


def prompts(*lengths):
    return [random_tokens(length, seed=length).clamp(min=2) for length in lengths]


def asked(kind, *arguments):
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


def answers(model, rows, new=10):
    return model.generate_until(
        asked("generate_until", *[(text(row), {"until": [], "max_gen_toks": new}) for row in rows])
    )


def pairs(rows, behind=20):
    return asked("loglikelihood", *[(text(row[:-behind]), " " + text(row[-behind:])) for row in rows])


def test_with_the_exact_cache_it_is_plain_lm_eval(tiny, tokenizer):
    plain = HFLM(pretrained=tiny, tokenizer=tokenizer, backend="causal", batch_size=2, max_length=100)
    ours = CachedLM(tiny, tokenizer, None, HarnessSetting(batch_size=2, max_length=100))
    rows = prompts(30, 50, 40, 120)
    assert answers(ours, rows) == answers(plain, rows)
    assert (ours.usage.prompt_tokens, ours.usage.truncated_prompts) == (30 + 50 + 40 + 90, 1)
    assert ours.loglikelihood(pairs(rows)) == plain.loglikelihood(pairs(rows))
    rolling = asked("loglikelihood_rolling", *[(text(row),) for row in rows])
    assert ours.loglikelihood_rolling(rolling) == plain.loglikelihood_rolling(rolling)
    assert ours.usage.bits_per_value is None


METHODS = ["paper", "decode", "guarded", "rtn:2+window"]


def method_and_lengths(name):
    """A method, and lengths at which it compresses something: competitors have windows of the usual size."""
    return (baseline(name), (200, 190, 195)) if ":" in name else (variant(name), (60, 45, 52))


@pytest.mark.parametrize("protocol", ["streaming", "single-pass"])
@pytest.mark.parametrize("name", METHODS)
def test_likelihoods_are_those_of_evaluate_quality(tiny, tokenizer, name, protocol):
    method, lengths = method_and_lengths(name)
    rows = prompts(*lengths)
    ours = CachedLM(tiny, tokenizer, method, HarnessSetting(batch_size=2, protocol=protocol))
    found = ours.loglikelihood(asked("loglikelihood", *[("", text(row)) for row in rows]))
    exact = CachedLM(tiny, tokenizer).loglikelihood(
        asked("loglikelihood", *[("", text(row)) for row in rows])
    )
    for row, (likelihood, _), (exact_likelihood, _) in zip(rows, found, exact, strict=True):
        # Without a context lm-eval has the end-of-sequence token stand before a text.
        tokens = torch.cat([torch.tensor([1]), row])[None]
        quality = evaluate_quality(tiny, tokens, {"it": method}, protocol=protocol)["it"]
        assert -likelihood == pytest.approx(quality.nll, rel=1e-5)
        assert -exact_likelihood == pytest.approx(quality.exact_nll, rel=1e-5)
        assert abs(likelihood - exact_likelihood) > 1e-3
    assert ours.usage.bits_per_value == pytest.approx(quality.bits_per_value, rel=0.2)
    assert ours.usage.prompt_tokens == sum(lengths)
    assert ours.batch_size == 2


def test_likelihoods_do_not_depend_on_what_else_is_asked(tiny, tokenizer):
    rows = prompts(70, 33, 50)
    one, all_ = (CachedLM(tiny, tokenizer, codec_for("llama"), HarnessSetting(batch_size=n)) for n in (1, 3))
    assert one.loglikelihood(pairs(rows)) == all_.loglikelihood(pairs(rows))
    assert one.usage == all_.usage


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("name", METHODS)
def test_answers_are_those_of_generate_with_that_cache(tiny, tokenizer, name, chunk):
    method, lengths = method_and_lengths(name)
    rows, held = prompts(*lengths), Quality()
    ours = CachedLM(tiny, tokenizer, method, HarnessSetting(batch_size=3, prefill_chunk=chunk))
    found, expected = answers(ours, rows), []
    for row in rows:
        cache = fresh_cache(tiny, method)
        with torch.no_grad():
            out = tiny.generate(
                row[None],
                past_key_values=cache,
                max_new_tokens=10,
                do_sample=False,
                prefill_chunk_size=chunk,
            )
        expected.append(tokenizer.decode(out[0, len(row) :], skip_special_tokens=True))
        held.count(cache.footprint())
    assert found == expected
    if ":" in name:  # competitors' rows have caches of their own; ours holds their padding too
        assert ours.usage.bits_per_value == held.bits_per_value
    assert ours.usage.bits_per_value == pytest.approx(held.bits_per_value, rel=0.1)


def test_a_prompt_in_one_pass_is_exact_among_its_tokens_and_one_in_parts_is_not(tiny, tokenizer):
    codec = codec_for("llama", bits=1)
    for row in prompts(*range(60, 90)):
        cache = AquaCache(tiny, codec)
        sizes = [16] * (len(row) // 16) + ([len(row) % 16] if len(row) % 16 else [])
        first = feed(tiny, cache, row[None], sizes)[0, -1].argmax()
        exact = tiny(row[None]).logits[0, -1].argmax()
        if first != exact:
            break
    assert first != exact
    whole, parts = (
        CachedLM(tiny, tokenizer, codec, HarnessSetting(prefill_chunk=chunk)) for chunk in (None, 16)
    )
    assert answers(whole, [row], new=1) == [WORDS[exact]]
    assert answers(parts, [row], new=1) == [WORDS[first]]


def test_long_prompts_lose_their_beginning_or_their_middle(tiny, tokenizer):
    row = prompts(21)[0]
    left, middle = (
        CachedLM(tiny, tokenizer, None, HarnessSetting(truncation=which)).tok_batch_encode(
            [text(row), "w1 w2"], left_truncate_len=11
        )
        for which in ("left", "middle")
    )
    assert left[0][0].tolist() == row[-11:].tolist()
    assert middle[0][0].tolist() == [*row[:5].tolist(), *row[-5:].tolist()]
    assert left[1].sum(1).tolist() == [11, 2]
    assert left[0][1, -2:].tolist() == [3, 4]
