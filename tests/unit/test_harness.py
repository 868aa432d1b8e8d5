"""lm-eval's tasks through our caches. See also test_harness_model.py."""

import copy
import json
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aquakv.cli.main import main
from aquakv.errors import ConfigError, DataError
from aquakv.evaluation.harness import GSM8K_VARIANTS, LONGBENCH_TASKS
from aquakv.evaluation.tasks import GSM8K, LmEval, LongBench, Setting, task_of
from aquakv.models.loading import LoadedModel
from tiny_models import VOCAB, build, codec_for

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'aquakv[lm-eval]'")
rouge = pytest.importorskip("rouge")

WORDS = ["<unk>", "<eos>", *(f"w{i}" for i in range(VOCAB - 2))]


def words(seed, count):
    ids = torch.randint(2, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(WORDS[i] for i in ids)


@pytest.fixture(scope="module")
def loaded():
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    return LoadedModel(build("llama", dtype=torch.float64), tokenizer, "tiny", "tiny")


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def document(seed, **changes):
    """A LongBench document whose answer overlaps with nearly any."""
    return {
        "input": words(seed, 5),
        "context": words(seed + 1, 60 + seed),
        "answers": [words(seed + 7, 60)],
        "length": 60,
        "dataset": "any",
        "language": "en",
        "all_classes": ["w1", "w2"],
        **changes,
    }


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in LONGBENCH_TASKS:
        answers = {"answers": ["Paragraph 7"]} if name == "passage_retrieval_en" else {}
        write(tmp_path / "longbench" / f"{name}.jsonl", [document(i, **answers) for i in range(3)])
    questions = [{"question": words(i, 9), "answer": f"{words(i, 4)} #### {i}"} for i in range(3)]
    write(tmp_path / "gsm8k" / "test.jsonl", questions)
    write(tmp_path / "gsm8k" / "train.jsonl", questions * 3)
    return tmp_path


def test_multi_news_with_the_exact_cache_is_what_transformers_and_the_scorer_give(loaded, data_dir):
    task = LongBench(max_new_tokens=12)
    found = task.evaluate(loaded, {"exact": None}, Setting(data_dir))["exact"]
    scores = []
    for record in (document(i) for i in range(3)):
        prompt = (
            "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n"
            f"{record['context']}\n\nNow, write a one-page summary of all the news.\n\nSummary:"
        )
        inputs = loaded.tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            out = loaded.model.generate(
                **inputs, max_new_tokens=12, do_sample=False, eos_token_id=loaded.tokenizer.eos_token_id
            )
        new = out[0, inputs["input_ids"].shape[1] :]
        answer = loaded.tokenizer.decode(new, skip_special_tokens=True).strip()
        scores.append(rouge.Rouge().get_scores([answer], record["answers"], avg=True)["rouge-l"]["f"])
    assert max(scores) > 0
    assert found["score"] == found["baseline_score"] == pytest.approx(sum(scores) / 3, abs=1e-15)
    assert (found["metric"], found["samples"], found["bits_per_value"]) == ("rouge_score", 3, None)


def test_methods_are_measured_beside_one_exact_cache(loaded, data_dir):
    seen = []
    setting = Setting(data_dir, 2, progress=lambda state: seen.append((state.done, state.total)))
    codec = codec_for("llama", bits=1)
    found = LongBench(tasks=("multi_news", "trec"), limit=2, max_new_tokens=12).evaluate(
        loaded, {"exact": None, "coded": codec, "again": codec}, setting
    )
    exact, coded = found["exact"], found["coded"]
    assert coded == found["again"]
    assert exact["score"] == exact["baseline_score"] == coded["baseline_score"]
    assert list(coded["tasks"]) == ["multi_news", "trec"]
    assert coded["score"] == pytest.approx(sum(t["score"] for t in coded["tasks"].values()) / 2)
    news = coded["tasks"]["multi_news"]
    assert news["same_answers"] < 1
    assert news["score_difference"] == news["score"] - news["baseline_score"] != 0
    assert news["score_difference_stderr"] > 0
    assert exact["tasks"]["multi_news"]["same_answers"] == 1
    assert coded["metric"] == "rouge_score, classification_score"
    assert coded["tokens"] == exact["tokens"] > 4 * 60
    assert 1 < coded["bits_per_value"] < coded["bits_per_value_total"] < 64
    assert 0.5 < coded["coded_fraction"] < 1
    assert (exact["bits_per_value"], exact["coded_fraction"]) == (None, None)
    assert seen[-1] == (12, 12)
    json.dumps(found, allow_nan=False)


def test_prompts_that_are_too_long_lose_their_middle(loaded, data_dir):
    task = LongBench(max_length=50, max_new_tokens=6, limit=2)
    found = task.evaluate(loaded, {"exact": None}, Setting(data_dir))["exact"]
    assert (found["tokens"], found["truncated_prompts"], found["truncation"]) == (88, 2, "middle")


@pytest.mark.parametrize("name", LONGBENCH_TASKS)
def test_every_task_of_longbench_runs_on_local_files(loaded, data_dir, name):
    task = LongBench(tasks=name, max_length=250, max_new_tokens=3, limit=1)
    found = task.evaluate(loaded, {"exact": None}, Setting(data_dir))["exact"]
    assert found["samples"] == 1
    assert 0 <= found["score"] <= 1
    assert found["metric"].endswith("_score")


@pytest.mark.parametrize("variant", GSM8K_VARIANTS)
def test_gsm8k_runs_on_local_files(loaded, data_dir, variant):
    task = GSM8K(variant=variant, max_length=250, max_new_tokens=3, limit=2)
    found = task.evaluate(loaded, {"coded": codec_for("llama")}, Setting(data_dir))["coded"]
    assert found["metric"] == "exact_match,strict-match"
    part = found["tasks"][variant]
    assert set(part["metrics"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert part["samples"] == 2
    assert found["truncation"] == "left"


def test_gsm8k_with_examples_of_its_own_needs_no_training_set(loaded, data_dir):
    (data_dir / "gsm8k" / "train.jsonl").unlink()
    GSM8K(max_length=250, max_new_tokens=3, limit=1).load(Setting(data_dir))
    with pytest.raises(DataError, match=r"expected gsm8k:train at .*train\.jsonl"):
        GSM8K(variant="gsm8k").load(Setting(data_dir))


CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_target: 0
doc_to_choice: ["w3 w4", "w5 w6", "w7"]
metric_list:
  - metric: acc
"""


def test_likelihood_tasks_from_a_directory_of_ones_own(loaded, data_dir, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(data_dir / "cache"))
    file = write(data_dir / "choice.jsonl", [{"context": words(i, 70)} for i in range(6)])
    (data_dir / "own").mkdir()
    (data_dir / "own" / "choice.yaml").write_text(CHOICE.format(file=file), encoding="utf-8")
    task = LmEval(tasks=("tiny_choice",), include_path=str(data_dir / "own"))
    found = task.evaluate(loaded, {"coded": codec_for("llama", bits=1)}, Setting(data_dir, 3))["coded"]
    assert (found["metric"], found["samples"]) == ("acc", 6)
    assert found["bits_per_value"] > 1
    assert found["coded_fraction"] > 0.5
    assert found["tasks"]["tiny_choice"]["same_answers"] is None


def test_what_cannot_be_had_is_said_in_one_line(loaded, data_dir, tmp_path):
    def refused(kind, match, task, run=False):
        with pytest.raises(kind, match=match) as error:
            task().evaluate(loaded, {"exact": None}, Setting(data_dir)) if run else task().load(
                Setting(data_dir)
            )
        assert "\n" not in str(error.value)

    refused(
        ConfigError,
        r"expected a LongBench task of narrativeqa, .* got 'news'",
        lambda: LongBench(tasks="news"),
    )
    refused(ConfigError, "task once", lambda: LongBench(tasks=("trec", "trec")))
    refused(ConfigError, "one file goes with one task", lambda: LongBench(tasks="all", file="any"))
    refused(ConfigError, "variant of GSM8K of gsm8k_cot", lambda: GSM8K(variant="hard"))
    refused(ConfigError, "at least one task", LmEval)
    refused(ConfigError, "directory of tasks", lambda: LmEval(tasks=["a"], include_path="nowhere"))
    refused(ConfigError, "protocol of streaming, single-pass", lambda: LongBench(protocol="guess"))
    refused(ConfigError, "limit: expected a whole number from 1, got 0", lambda: LongBench(limit=0))
    refused(ConfigError, "512 tokens leave no room", lambda: LongBench(), run=True)
    refused(ConfigError, "more than tiny's maximum of 256", lambda: LongBench(max_length=300), run=True)
    refused(ConfigError, "no chat template", lambda: LongBench(chat=True), run=True)
    (data_dir / "longbench" / "qasper.jsonl").unlink()
    refused(DataError, r"expected longbench/qasper at .*qasper\.jsonl", lambda: LongBench(tasks="qasper"))
    for changes, match in (
        ({"context": 3}, 'text in field "context" of line 2 of .*, found int'),
        ({"answers": "w1"}, 'list of texts in field "answers" .* found str'),
        ({"all_classes": []}, 'list of texts in field "all_classes" .* found an empty list'),
        ({"input": None}, 'text in field "input" .* found nothing'),
    ):
        file = write(tmp_path / "bad.jsonl", [document(0), document(1, **changes)])
        refused(DataError, match, lambda file=file: LongBench(tasks="trec", file=str(file)))
    write(tmp_path / "bad.jsonl", [document(0)])
    file = str(tmp_path / "bad.jsonl")
    refused(DataError, "like 'Paragraph 3'", lambda: LongBench(tasks="passage_retrieval_en", file=file))
    (tmp_path / "bad.jsonl").write_text("\n")
    refused(DataError, "expected documents", lambda: LongBench(file=file))


def test_without_a_data_dir_documents_come_from_the_hub(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, name, **_):
        asked.append((path, name))
        raise ConnectionError("no route to the Hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.delenv("AQUAKV_DATA_DIR", raising=False)
    for task in (LongBench(), GSM8K()):
        with pytest.raises(DataError, match=r"from the Hub \(no route to the Hub\); give --data-dir"):
            task.load(Setting())
    assert asked == [("Xnhyacinth/LongBench", "multi_news"), ("openai/gsm8k", "main")]


def test_a_chat_template_is_wrapped_around_prompts_where_asked_for(loaded, data_dir):
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = "w1 w2 {% for turn in messages %}{{ turn['content'] }}{% endfor %}"
    chatting = LoadedModel(loaded.model, tokenizer, "tiny", "tiny")
    plain, chat = (
        LongBench(chat=chat, max_new_tokens=3, limit=2).evaluate(chatting, {"it": None}, Setting(data_dir))[
            "it"
        ]
        for chat in (False, True)
    )
    assert (plain["chat"], chat["chat"]) == (False, True)
    assert chat["tokens"] == plain["tokens"] + 2 * 2


def test_without_lm_eval_one_line_says_how_to_get_it(monkeypatch, data_dir):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'aquakv\[lm-eval\]'"):
        LongBench().load(Setting(data_dir))


def test_tasks_by_configuration():
    task = task_of({"task": "longbench", "tasks": ["all"], "limit": 3})
    assert task == LongBench(tasks=["all"], limit=3)
    assert task.names == LONGBENCH_TASKS
    assert task_of({"task": "gsm8k"}) == GSM8K()
    assert task_of({"task": "lm-eval", "tasks": ["piqa"]}) == LmEval(tasks=["piqa"])


@pytest.fixture
def place(loaded, data_dir, tmp_path):
    loaded.model.save_pretrained(tmp_path / "tiny")
    loaded.tokenizer.save_pretrained(tmp_path / "tiny")
    codec_for("llama", bits=1).save(tmp_path / "codec")
    return tmp_path


def run(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_command_longbench(place, capsys):
    command = ["eval", "longbench", place / "tiny", "--codec", place / "codec", "--data-dir", place]
    command += ["--max-new-tokens", 12, "--limit", 2, "--device", "cpu"]
    code, out, err = run(capsys, *command, "--task", "multi_news,trec", "--json", place / "out.json")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("multi_news: rouge_score 0.")
    assert "exact cache 0." in lines[0]
    assert lines[0].endswith("2 samples")
    assert lines[2].startswith("mean of tasks: score 0.")
    assert "bits per value" in lines[3]
    result = json.loads((place / "out.json").read_text())
    assert result["command"] == "eval longbench"
    assert result["codec"]["preset"] == "paper"
    assert result["data"] == ["longbench/multi_news", "longbench/trec"]
    assert (result["prefill_chunk"], result["chat"], result["batch_size"]) == (None, False, 1)
    assert {"schema_version", "model", "tokens", "seq_len", "elapsed_s", "versions", "device"} < set(result)
    file = place / "longbench" / "qasper.jsonl"
    code, out, err = run(capsys, *command, "--task", "qasper", "--file", file, "--prefill-chunk", 8)
    assert (code, err) == (0, "")
    assert out.startswith("qasper: qa_f1_score 0.")


def test_commands_gsm8k_and_lm_eval(place, capsys, monkeypatch):
    short = ["--max-length", 250, "--max-new-tokens", 3, "--limit", 1, "--device", "cpu"]
    code, out, err = run(capsys, "eval", "gsm8k", place / "tiny", "--data-dir", place, *short)
    assert (code, err) == (0, "")
    assert out == "gsm8k_cot: exact_match,strict-match 0.0000 with the exact cache, 1 samples\n"
    own = ["eval", "lm-eval", place / "tiny", "--include-path", place / "own", *short]
    code, out, err = run(capsys, *own, "--tasks", "any")
    assert (code, out) == (2, "")
    assert err.startswith("aquakv: expected a directory of tasks, found none")


def test_a_prompt_so_short_that_nothing_is_compressed_is_not_passed_over(place, capsys):
    write(place / "short.jsonl", [document(0, context="w1")])
    code, out, err = run(
        capsys,
        *("eval", "longbench", place / "tiny", "--file", place / "short.jsonl", "--baseline", "kivi:2"),
        *("--max-new-tokens", 2, "--device", "cpu"),
    )
    assert (code, err) == (0, "")
    assert "nothing was compressed" in out
