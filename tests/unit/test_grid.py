import json
import multiprocessing
import os
import re
import signal
import time
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from aquakv import evaluate_quality
from aquakv.errors import ConfigError, DataError, OutputError
from aquakv.evaluation import methods
from aquakv.evaluation.grid import (
    Ledger,
    cells_of,
    latest_rows,
    pending,
    read_grid,
    read_rows,
    run_grid,
)
from aquakv.evaluation.grid.config import grid_of
from aquakv.evaluation.grid.isolate import together
from aquakv.evaluation.grid.run import families
from aquakv.evaluation.methods import prepare
from aquakv.evaluation.quality import EvaluationProgress
from aquakv.evaluation.tasks import TASKS, Task, task_of
from aquakv.models.loading import LoadedModel
from tiny_models import random_tokens, shared

METHODS = ["exact", "rtn:4", "kivi:2", "fp8:8", "quanto:2"]
CODEC_TOO = ["exact", "rtn:4", "kivi:2", "decode 3", "quanto:2"]


def _grid(**changes):
    content = {
        "models": ["tiny"],
        "methods": METHODS,
        "calibration": {"data": ["train"], "samples": 8, "seq_len": 160},
        "tasks": [{"task": "stub"}, {"task": "stub", "weight": 2}],
    }
    return grid_of({name: value for name, value in (content | changes).items() if value is not None})


@dataclass(frozen=True)
class Stub(Task):
    """Counts what it is asked for, and fails where it is told to."""

    name = "stub"
    weight: int = 1

    asked: ClassVar[list] = []
    fails: ClassVar[dict] = {}

    def evaluate(self, loaded, methods, setting):
        Stub.asked.append((self.weight, list(methods)))
        for name in methods:
            if (error := Stub.fails.get(name)) is not None:
                raise error
        setting.progress(EvaluationProgress(1, 2))
        return {name: {"score": float(len(name)), "bits_per_value": 2.0} for name in methods}


@pytest.fixture(autouse=True)
def _stub(monkeypatch):
    monkeypatch.setitem(TASKS, "stub", Stub)
    monkeypatch.setattr(Stub, "asked", [])
    monkeypatch.setattr(Stub, "fails", {})
    texts = {"train": random_tokens(8, 160), "test": random_tokens(3, 250, seed=3)}
    for place in ("grid.run", "tasks.perplexity"):
        monkeypatch.setattr(
            f"aquakv.evaluation.{place}.token_sequences", lambda data, *_: texts[next(iter(data))]
        )


def _load(model):
    return LoadedModel(shared("llama"), None, model.name, model.name)


def _run(config, out, retry_failed=False, load=_load, progress=None, only=None):
    with Ledger.open(out) as ledger:
        todo = pending(cells_of(config, only), ledger.latest, retry_failed)
        run_grid(config, todo, ledger, load, progress=progress)
        return ledger.latest


def _states(rows):
    return {(row["method"], row["weight"]): row["status"] for row in rows.values()}


# --- rows ---------------------------------------------------------------------------------------------------


def test_a_row_for_every_cell(tmp_path):
    config, states = _grid(group=2, methods=CODEC_TOO), []
    rows = _run(config, tmp_path / "out.jsonl", progress=states.append)
    assert list(rows) == [cell.key for cell in cells_of(config)] or len(rows) == 10
    assert set(_states(rows).values()) == {"ok"}
    row = next(row for row in rows.values() if row["method"] == "decode 3")
    assert row["codec"]["preset"] == "decode"
    assert row["codec"]["bits"] == 3
    assert len(row["codec"]["config_sha256"]) == 64
    assert row["calibration"] == {"data": ["train"], "samples": 8, "seq_len": 160}
    assert {"schema_version", "command", "model", "task", "elapsed_s", "versions", "device"} <= set(row)
    assert {"git_sha", "score", "weight", "batch_size", "model_dtype"} <= set(row)
    kivi = next(row for row in rows.values() if row["method"] == "kivi:2")
    assert (kivi["baseline"]["name"], kivi["baseline"]["bits"]) == ("kivi", 2)
    assert (kivi["codec"], kivi["calibration"]) == (None, None)
    # Two at a time; what has no single pass comes last.
    assert [names for weight, names in Stub.asked if weight == 1] == [
        CODEC_TOO[:2],
        CODEC_TOO[2:4],
        CODEC_TOO[4:],
    ]
    assert states[-1].done == states[-1].total == 10
    assert 0.5 * 2 in [state.done for state in states]


def test_figures_are_those_of_evaluate_quality(tmp_path):
    task = {"task": "perplexity", "data": "test", "samples": 3, "seq_len": 250, "protocol": "auto"}
    rows = _run(_grid(methods=CODEC_TOO, tasks=[task | {"batch_size": 2}]), tmp_path / "out.jsonl")
    model, tokens = shared("llama"), random_tokens(3, 250, seed=3)
    found = prepare(CODEC_TOO, model, random_tokens(8, 160))
    for row in rows.values():
        name = row["method"]
        assert row["status"] == "ok"
        assert row["protocol"] == ("streaming" if name == "quanto:2" else "single-pass")
        expected = evaluate_quality(
            model, tokens, {name: found[name]}, protocol=row["protocol"], batch_size=2
        )[name]
        assert row["perplexity"] == expected.perplexity
        assert row["mean_kl"] == expected.mean_kl
        assert row["bits_per_value"] == expected.bits_per_value
        assert row["bits_per_value_total"] == expected.bits_per_value_total
        assert (row["bits_per_value_total"] is None) == (name == "exact")


def test_auto_protocol_of_the_task():
    assert task_of({"task": "perplexity", "protocol": "auto"}).protocol == "auto"
    with pytest.raises(ConfigError, match="streaming, single-pass, auto, got 'any'"):
        task_of({"task": "perplexity", "protocol": "any"})


# --- going on -----------------------------------------------------------------------------------------------


def test_what_has_a_row_is_not_measured_again(tmp_path, monkeypatch):
    out, loads = tmp_path / "out.jsonl", []
    config = _grid()
    _run(config, out)
    before = out.read_bytes()
    Stub.asked.clear()
    _run(config, out, load=lambda model: loads.append(model) or _load(model))
    assert (out.read_bytes(), Stub.asked, loads) == (before, [], [])
    _run(_grid(methods=[*METHODS, "rtn:3"]), out)
    assert Stub.asked == [(1, ["rtn:3"]), (2, ["rtn:3"])]


def test_goes_on_from_any_row_and_any_torn_one(tmp_path):
    config = _grid(methods=["exact", "rtn:4", "kivi:2"])
    whole = tmp_path / "whole.jsonl"
    _run(config, whole)
    content = whole.read_bytes()
    lines = content.splitlines(keepends=True)
    assert len(lines) == 6
    ends = [sum(map(len, lines[:count])) for count in range(7)]
    cuts = [*ends, *(end - 1 for end in ends[1:]), *(end + 5 for end in ends[:-1]), ends[3] + 100]
    for cut in cuts:
        out = tmp_path / f"cut{cut}.jsonl"
        out.write_bytes(content[:cut])
        kept = sum(end - 1 <= cut for end in ends[1:])
        assert len(read_rows(out)) == kept
        Stub.asked.clear()
        rows = _run(config, out)
        assert set(rows) == {json.loads(line)["key"] for line in lines}
        assert sum(len(names) for _, names in Stub.asked) == 6 - kept
        assert out.read_bytes().startswith(b"".join(lines[:kept]))
        assert [json.loads(line)["status"] for line in out.read_text().splitlines()] == ["ok"] * 6


def test_every_torn_byte_of_a_row_is_recognised(tmp_path):
    out = tmp_path / "out.jsonl"
    with Ledger.open(out) as ledger:
        ledger.append({"key": "a", "status": "ok", "text": "ä\r\n"})
        ledger.append({"key": "b", "status": "ok"})
    content = out.read_bytes()
    first = content.index(b"\n") + 1
    for cut in range(len(content) + 1):
        for end in (
            (b"", b"\0\0") if cut not in (0, first, len(content), first - 1, len(content) - 1) else (b"",)
        ):
            out.write_bytes(content[:cut] + end)
            with Ledger.open(out) as ledger:
                kept = len(ledger.rows)
                ledger.append({"key": "c", "status": "ok"})
            assert [row["key"] for row in read_rows(out)] == [*["a", "b"][:kept], "c"]
            assert kept == (cut >= first - 1) + (cut >= len(content) - 1)


def _append_for_ever(path):
    with Ledger.open(path) as ledger:
        for number in range(10**9):
            ledger.append({"key": str(number), "status": "ok", "more": "x" * 3000})


def test_killed_while_it_writes(tmp_path):
    context = multiprocessing.get_context("fork")
    out, known = tmp_path / "out.jsonl", []
    for _ in range(3):
        child = context.Process(target=_append_for_ever, args=(out,))
        child.start()
        size = out.stat().st_size if out.exists() else 0
        deadline = time.monotonic() + 60
        while (out.stat().st_size if out.exists() else 0) < size + 20_000 and time.monotonic() < deadline:
            time.sleep(0.002)
        with pytest.raises(OutputError, match="another process is writing"), Ledger.open(out):
            pass
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        with Ledger.open(out) as ledger:
            assert [row["key"] for row in ledger.rows][: len(known)] == known
            known = [row["key"] for row in ledger.rows]
    assert len(known) >= 15


def test_other_files_are_left_alone(tmp_path):
    for content in (b"hello", b'{"rows": []}\n', b'{"schema_version": 1}\n', b"\n", b'{"a": 1'):
        out = tmp_path / "notes.txt"
        out.write_bytes(content)
        with pytest.raises(DataError, match="line 1: expected a row of a grid"), Ledger.open(out):
            pass
        assert out.read_bytes() == content
    with Ledger.open(tmp_path / "rows.jsonl") as ledger:
        ledger.append({"key": "a", "status": "ok"})
    whole = (tmp_path / "rows.jsonl").read_bytes()
    damaged = whole.replace(b'"ok"', b'"ok') + whole
    (tmp_path / "rows.jsonl").write_bytes(damaged)
    with pytest.raises(DataError, match="line 1"):
        read_rows(tmp_path / "rows.jsonl")
    with pytest.raises(OutputError, match="cannot write results"), Ledger.open(tmp_path / "none" / "x"):
        pass


def test_a_row_that_cannot_be_written_leaves_no_trace(tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    real, written = os.write, []

    def full(descriptor, content):
        written.append(content)
        if len(written) > 1:
            raise OSError(28, "No space left on device")
        return real(descriptor, content[:9])

    with Ledger.open(out) as ledger:
        ledger.append({"key": "a", "status": "ok"})
        before = out.read_bytes()
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OutputError, match="No space left"):
            ledger.append({"key": "b", "status": "ok"})
        monkeypatch.undo()
        assert out.read_bytes() == before
        with pytest.raises(ValueError, match="JSON"):
            ledger.append({"key": "c", "status": "ok", "value": float("nan")})
        assert out.read_bytes() == before


# --- failures -----------------------------------------------------------------------------------------------


def test_only_the_culprit_fails(tmp_path):
    out = tmp_path / "out.jsonl"
    config = _grid()
    Stub.fails["kivi:2"] = torch.OutOfMemoryError("CUDA out of memory.\n Tried to allocate")
    rows = _run(config, out)
    assert {key for key, state in _states(rows).items() if state == "failed"} == {
        ("kivi:2", 1),
        ("kivi:2", 2),
    }
    assert len(rows) == 10
    failed = next(row for row in rows.values() if row["status"] == "failed")
    assert failed["error"] == "CUDA out of memory. Tried to allocate"
    assert failed["error_type"] == "OutOfMemoryError"
    assert {"model", "method", "task", "weight", "versions", "git_sha", "elapsed_s"} <= set(failed)
    # A group of four fails, then each is by itself.
    assert [len(names) for weight, names in Stub.asked if weight == 1] == [4, 1, 1, 1, 1, 1]
    Stub.fails.clear()
    Stub.asked.clear()
    assert set(_states(_run(config, out)).values()) == {"ok", "failed"}
    assert not Stub.asked
    rows = _run(config, out, retry_failed=True)
    assert set(_states(rows).values()) == {"ok"}
    assert Stub.asked == [(1, ["kivi:2"]), (2, ["kivi:2"])]
    assert len(read_rows(out)) == 12
    assert latest_rows(read_rows(out)) == rows


def test_what_cannot_be_prepared_fails_alone(tmp_path, monkeypatch):
    real = methods.preset

    def broken(name, bits=None):
        if bits == 5:
            raise RuntimeError("no such bits today")
        return real(name, bits)

    config = _grid(methods=["decode 3", "decode 5", "rtn:4", "none.safetensors"])
    monkeypatch.setattr(methods, "preset", broken)
    rows = _run(config, tmp_path / "out.jsonl")
    errors = {row["method"]: row["error_type"] for row in rows.values() if row["status"] == "failed"}
    assert errors == {"decode 5": "RuntimeError", "none.safetensors": "CodecFileError"}
    assert len(rows) == 8


def test_a_model_that_cannot_be_loaded(tmp_path):
    def load(model):
        if model.name == "other":
            raise MemoryError
        return _load(model)

    rows = _run(_grid(models=["other", "tiny"]), tmp_path / "out.jsonl", load=load)
    assert {(row["model"], row["status"]) for row in rows.values()} == {("other", "failed"), ("tiny", "ok")}
    assert {row.get("error_type") for row in rows.values()} == {None, "MemoryError"}


def test_figures_that_are_none_are_failures(tmp_path, monkeypatch):
    for fields, reason in (
        (
            {"bits_per_value": 2.0, "cells": [{"nll": float("inf")}]},
            r"finite figures, got cells\[0\].nll inf",
        ),
        ({"bits_per_value": None}, "nothing was compressed"),
    ):
        monkeypatch.setattr(
            Stub, "evaluate", lambda self, loaded, methods, setting, f=fields: dict.fromkeys(methods, f)
        )
        out = tmp_path / f"{reason[:3]}.jsonl"
        rows = _run(_grid(methods=["rtn:4"]), out)
        assert [row["status"] for row in rows.values()] == ["failed"] * 2
        assert all(re.search(reason, row["error"]) for row in rows.values())


def test_interrupts_pass_and_lose_nothing_written(tmp_path):
    out = tmp_path / "out.jsonl"
    config = _grid(group=1)
    Stub.fails["kivi:2"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        _run(config, out)
    assert [row["method"] for row in read_rows(out)] == ["exact", "rtn:4"]
    Stub.fails.clear()
    assert len(_run(config, out)) == 10


def test_memory_of_a_failure_is_freed():
    class Held:
        alive = 0

        def __init__(self):
            Held.alive += 1

        def __del__(self):
            Held.alive -= 1

    seen = []

    def work(names):
        seen.append(Held.alive)
        held = Held()
        if "bad" in names:
            raise torch.OutOfMemoryError("no room")
        return dict.fromkeys(names, held is None)

    attempts = list(together(["a", "bad", "b"], work))
    assert [(attempt.names, attempt.failure is None) for attempt in attempts] == [
        (["a"], True),
        (["bad"], False),
        (["b"], True),
    ]
    assert seen == [0, 0, 0, 0]
    assert Held.alive == 0


# --- what a grid's file says ------------------------------------------------------------------------------


def test_preparation_is_shared():
    specs = ["exact", "decode 3", "kvquant:2", "storage 1", "kvquant:3+window", "kivi:2", "kvtc:2"]
    assert list(families(dict.fromkeys(specs))) == [
        ["exact"],
        ["decode 3", "storage 1"],
        ["kvquant:2", "kvquant:3+window"],
        ["kivi:2"],
        ["kvtc:2"],
    ]


def test_keys_are_stable(tmp_path):
    [cell] = cells_of(_grid(methods=["kivi:2"], tasks=[{"task": "stub"}]))
    assert cell.key == "7f6172b295f11cc4230c"

    def key(**changes):
        return cells_of(_grid(**({"methods": ["decode 3"], "tasks": [{"task": "stub"}]} | changes)))[0].key

    assert key() == key(group=7) == key(tasks=[{"task": "stub", "weight": 1, "batch_size": 4}])
    others = [
        key(models=["other"]),
        key(models=[{"name": "tiny", "dtype": "float32"}]),
        key(methods=["decode 2"]),
        key(tasks=[{"task": "stub", "weight": 3}]),
        key(calibration={"data": ["train"], "samples": 9, "seq_len": 160}),
    ]
    assert len({key(), *others}) == 6
    assert cells_of(_grid(), dtype="float32")[0].model.dtype == "float32"
    # What is fitted to nothing does not depend on the text; a codec file is known by what is in it.
    assert cell.key == cells_of(_grid(methods=["kivi:2"], tasks=[{"task": "stub"}], calibration=None))[0].key
    file = tmp_path / "it.safetensors"
    missing = key(methods=[str(file)])
    file.write_bytes(b"one")
    one = key(methods=[str(file)])
    file.write_bytes(b"two")
    assert len({missing, one, key(methods=[str(file)])}) == 3


def test_cells_by_name():
    config = _grid()
    labels = [cell.label for cell in cells_of(config, "kivi")]
    assert labels == ["tiny / kivi:2 / stub", "tiny / kivi:2 / stub weight=2"]
    assert [cell.label for cell in cells_of(config, "rtn*weight")] == ["tiny / rtn:4 / stub weight=2"]
    with pytest.raises(
        ConfigError, match="no cell is called 'kiwi'; the first of 10 is 'tiny / exact / stub'"
    ):
        cells_of(config, "kiwi")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": ["tiny"]}, "'model'; expected some of: models, methods, tasks, calibration, group"),
        ({"models": [{"name": "tiny", "type": 1}]}, "models: unknown key 'type'; .*: name, dtype"),
        ({"models": [{"name": "tiny", "dtype": "int"}]}, "expected a dtype of auto"),
        ({"models": [3]}, "expected a MODEL or a table with its name, got 3"),
        ({"models": []}, "models: expected at least one"),
        ({"models": ["tiny", "tiny"]}, "tiny is named twice"),
        ({"models": "tiny"}, "models: expected a list, got 'tiny'"),
        ({"methods": ["kiwi:2"]}, "competitor such as kivi:2"),
        ({"methods": ["kivi:9"]}, "expected bits of"),
        ({"methods": ["decode two"]}, "'decode 2'"),
        ({"methods": ["decode 99"]}, "99"),
        ({"methods": [2]}, "methods: expected text"),
        ({"calibration": {"data": "train"}}, "calibration.data: expected a list"),
        ({"calibration": {"data": ["train"], "sample": 3}}, "key 'sample'; expected some of: data, samples"),
        ({"calibration": {"data": ["train"], "samples": 0}}, "samples: expected a whole number >= 1, got 0"),
        ({"calibration": {"data": ["train"], "methods": []}}, r"write it above the first \[table\]"),
        ({"calibration": None, "methods": ["decode 3"]}, "expected texts to fit 'decode 3' to"),
        ({"tasks": [{"task": "beauty"}]}, "task 1: expected a task of .*got 'beauty'"),
        ({"tasks": [{"task": "stub", "wait": 1}]}, "unknown setting 'wait'; .*weight; .*batch_size"),
        ({"tasks": [{"task": "stub", "batch_size": 0}]}, "batch_size: expected a whole number >= 1, got 0"),
        ({"tasks": [{"task": "stub"}, {"task": "stub", "batch_size": 2}]}, "tasks: stub is named twice"),
        ({"group": True}, "group: expected a whole number, got True"),
        ({"group": 0}, "group: expected a whole number >= 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_name(changes, says):
    with pytest.raises(ConfigError, match=says):
        _grid(**changes)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the grid"):
        read_grid(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("models = [")
    with pytest.raises(ConfigError, match="expected TOML"):
        read_grid(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_text('models = ["a"]\nmethods = ["exact"]\nfoo = 1')
    with pytest.raises(ConfigError, match=r"grid .*bad\.toml: unknown key 'foo'"):
        read_grid(tmp_path / "bad.toml")
