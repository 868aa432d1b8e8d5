"""What is said of a calibration before it begins."""

import dataclasses
import gc
import importlib
import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from aquakv import calibrate, preset
from aquakv.calibration.forecast import OFFLOADS, choose_waiting, fits, forecast, ways_to_wait
from aquakv.calibration.observe import Waiting
from aquakv.calibration.workload import workload_of
from aquakv.cli.main import main
from aquakv.cli.progress_log import progress_log
from aquakv.errors import ConfigError, ResourceError
from aquakv.evaluation.bench import allocated
from aquakv.evaluation.bench_calibrate import CalibrationBench, project, synthetic, write_synthetic
from aquakv.evaluation.shapes import SHAPES, random_tokens
from aquakv.models.adapter import adapt
from aquakv.models.streaming import stream_directory
from tiny_models import WINDOW, build, shared

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_shape(monkeypatch):
    """Add a shape that is quick, yet has more activations than its tokens are worth in bookkeeping."""
    shape = {
        **SHAPES["llama-3.2-1b"],
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    monkeypatch.setitem(SHAPES, "small", shape)
    monkeypatch.setattr("aquakv.evaluation.bench_calibrate._VOCABULARY", 512)
    return "small"


def work_of(adapter, samples, seq_len, name="decode", batch_size=4, **more):
    return workload_of(adapter, samples, seq_len, {"": preset(name)}, batch_size, **more)


def test_operations_are_those_of_the_matrices():
    adapter = adapt(shared("llama"))
    work = work_of(adapter, 8, 64)
    # Per layer and token: q, k, v, o of 32 x (64 + 32 + 32 + 64), and three matrices of 32 x 48.
    assert work.layer_flop == 3 * 2 * (32 * 192 + 3 * 32 * 48)
    experts = work_of(adapt(shared("qwen3-moe")), 8, 64)
    # The router sees all three experts, of which all three are used: 32 x 24, three matrices each.
    assert experts.layer_flop == 3 * 2 * (32 * 192 + 32 * 3 + 3 * 3 * 32 * 24)
    found = forecast(work, Waiting(CPU, CPU))
    assert found.flop["plan: observe"] == (work.layer_flop + 2 * 64 * 64 * 3) * 8 * 64
    assert "observe" not in found.flop  # all text was observed to plan with
    assert "plan: observe" not in forecast(work_of(adapter, 8, 64, "paper"), Waiting(CPU, CPU)).flop


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", ["paper", "decode"])
def test_peak_memory_is_what_was_predicted(name, overlap, small_shape, monkeypatch):
    monkeypatch.setattr("aquakv.calibration.workload.MOST_OBSERVED_BYTES", 1)
    monkeypatch.setattr("aquakv.calibration.workload.MOST_NEEDED_BYTES", 1)
    adapter = synthetic(small_shape, None, torch.float32, CPU)
    tokens = random_tokens(adapter.model, 64, 128)
    work = work_of(adapter, 64, 128, name)
    calibrate(shared(), random_tokens(shared(), 8, 48), preset(name))  # tables are made on first use
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        calibrate(adapter, tokens, preset(name), overlap=overlap)
    peak = max(level for _, level in allocated(profiler))
    found = forecast(work, Waiting(CPU, CPU, overlap=overlap))
    # Two streams of a GPU cannot share what a batch takes in each; on a CPU only one of them has a batch.
    batches = [item.size for item in found.items if item.what.startswith("a batch")]
    apart = min(batches) if overlap else 0
    assert found.total("device") - apart == pytest.approx(peak, rel=0.25)


def test_what_does_not_fit_waits_on_the_host_or_is_refused(small_shape, monkeypatch):
    adapter = synthetic(small_shape, None, torch.float32, CPU)
    work = dataclasses.replace(work_of(adapter, 512, 256), device=torch.device("cuda"))
    needs = {name: forecast(work, Waiting(CPU, CPU, name)).total("device") for name in OFFLOADS}
    assert needs["none"] > needs["hidden"] > needs["all"]
    for name, size in needs.items():
        monkeypatch.setattr(
            "aquakv.calibration.forecast.free_bytes", lambda _, size=size: (size * 1.1, 1 << 40)
        )
        assert choose_waiting(work, "auto").name == name
    for free, says in (((needs["all"] * 0.9, 1 << 40), "of device memory"), ((1 << 40, 1 << 20), "of host")):
        monkeypatch.setattr("aquakv.calibration.forecast.free_bytes", lambda _, free=free: free)
        with pytest.raises(ResourceError, match=f"{says}.*--samples"):
            choose_waiting(work, "auto")
    monkeypatch.setattr("aquakv.calibration.forecast.free_bytes", lambda _: (needs["all"] * 1.1, 1 << 40))
    with pytest.raises(ResourceError, match="--offload all"):
        choose_waiting(work, "none")


def test_overlap_is_given_up_before_more_is_offloaded(small_shape, monkeypatch):
    adapter = synthetic(small_shape, None, torch.float32, CPU)
    work = work_of(adapter, 512, 256, "paper")
    assert [way.overlap for way in ways_to_wait(work, "auto")] == [False]  # nothing to win on a CPU
    work = dataclasses.replace(work, device=torch.device("cuda"))
    ways = [(way.name, way.overlap) for way in ways_to_wait(work, "auto")]
    assert ways == [(name, overlap) for name in OFFLOADS for overlap in (True, False)]
    needs = [forecast(work, way).total("device") for way in ways_to_wait(work, "auto")]
    assert needs[0] - needs[1] > work.vector_bytes  # half of two, and what both are doing at the moment
    for (name, overlap), size in zip(ways, needs, strict=True):
        monkeypatch.setattr("aquakv.calibration.forecast.free_bytes", lambda _, n=size: (n / 0.93, 1 << 40))
        chosen = choose_waiting(work, "auto")
        # The first that fits: less may do for one that comes later.
        assert needs[ways.index((chosen.name, chosen.overlap))] <= size
        assert ways.index((chosen.name, chosen.overlap)) <= ways.index((name, overlap))
        assert choose_waiting(work, name, overlap)[2:] == (name, overlap)
    monkeypatch.setattr("aquakv.calibration.forecast.free_bytes", lambda _: (needs[1] / 0.93, 1 << 40))
    with pytest.raises(ResourceError, match="--no-overlap"):
        choose_waiting(work, "none", True)
    spread = dataclasses.replace(work, spread=True)
    assert not any(way.overlap for way in ways_to_wait(spread, "auto"))
    with pytest.raises(ConfigError, match="several"):
        choose_waiting(spread, "auto", True)
    planned = dataclasses.replace(work, observed_tokens=work.tokens)
    assert not any(way.overlap for asked in (None, True) for way in ways_to_wait(planned, "auto", asked))


def test_host_memory_counts_on_a_cpu():
    work = work_of(adapt(shared("llama")), 8, 64)
    found = forecast(work, Waiting(CPU, CPU))
    assert not fits(found, None, found.total("host"))
    assert fits(found, None, 2 * found.total("host"))


def test_a_part_of_the_model_tells_the_time_of_the_whole():
    layers = {(0, "observe"): 5.0, (1, "observe"): 2.0, (2, "observe"): 4.0, (0, "plan: harm"): 6.0}
    found = project({"phases": {"observe": 11.0, "plan: harm": 6.0}, "layers": layers}, 18.0, 3, 12)
    assert found == {"observe": 5 + 4 + 10 * 2.0, "plan: harm": 6 * 12 * 13 / (3 * 4), "rest": 1.0}
    found = project({"phases": {"observe": 7.0}, "layers": {**layers, (1, "observe"): 3.0}}, 7.5, 2, 12)
    assert found == {"observe": 5 + 11 * 3.0, "rest": 0.5}  # the second stands for all others


def test_side_by_side_the_last_fit_counts_once():
    """Every layer's fit but the last one's goes on beside observing; what is observed alone is the rest."""
    layers = {(n, "observe"): 7.0 if n == 0 else 5.0 for n in range(4)}
    layers.update({(n, "fit, beside observing"): 3.0 for n in range(3)})
    layers[3, "fit"] = 1.5
    phases = {"observe": 22.0, "fit, beside observing": 9.0, "fit": 1.5}
    found = project({"phases": phases, "layers": layers}, sum(phases.values()), 4, 80)
    assert found == {
        "observe": 7 + 79 * 5.0,
        "fit, beside observing": 79 * 3.0,
        "fit": 1.5,
        "rest": 0.0,
    }


def test_benchmark_from_disk_and_on_the_fly(small_shape, tmp_path):
    write_synthetic(small_shape, 3, torch.bfloat16, CPU, tmp_path / "model")
    stamp = (tmp_path / "model" / "model.safetensors.index.json").stat().st_mtime_ns
    write_synthetic(small_shape, 3, torch.bfloat16, CPU, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors.index.json").stat().st_mtime_ns == stamp
    from transformers import AutoConfig

    read = stream_directory(tmp_path / "model", AutoConfig.from_pretrained(tmp_path / "model"), "auto", CPU)
    made = synthetic(small_shape, 3, torch.bfloat16, CPU)
    tokens = random_tokens(read.model, 6, 128)
    config = preset("decode")
    rows = [
        CalibrationBench("it", small_shape, adapter, tokens, config, 2, "auto", 5).run()
        for adapter in (read, made)
    ]
    assert read.fingerprint() == made.fingerprint()
    for found in rows:
        total = found[-1]
        phases = {row["phase"]: row["seconds"] for row in found if not row["phase"].startswith("layer ")}
        assert sum(phases.values()) - phases["total"] == pytest.approx(phases["total"], rel=1e-6)
        assert total["projected_total_seconds"] > total["seconds"]
        assert total["peak_host_bytes"] > 0


def test_tables_of_calibrations_side_by_side_and_not(small_shape, tmp_path, monkeypatch):
    monkeypatch.setattr("aquakv.calibration.workload.MOST_OBSERVED_BYTES", 1)
    monkeypatch.setattr("aquakv.calibration.workload.MOST_NEEDED_BYTES", 1)
    adapter = synthetic(small_shape, 3, torch.bfloat16, CPU)
    tokens, rows = random_tokens(adapter.model, 6, 128), []
    for overlap in (False, True):
        bench = CalibrationBench(
            f"overlap {overlap}", small_shape, adapter, tokens, preset("decode"), 2, "auto", 9, overlap
        )
        found = bench.run()
        phases = {row["phase"]: row for row in found}
        assert ("fit, beside observing" in phases) == overlap == phases["total"]["overlap"]
        assert ("of_matmul_rate" in phases["observe"]) != overlap
        assert phases["total"]["sweep_of_matmul_rate"] > 0
        assert phases["total"]["projected_total_seconds"] > phases["total"]["seconds"]
        rows += found
    for row in rows:
        row["peak_device_bytes"] = 1 << 30  # as a GPU says
    result = {"versions": {"torch": "2"}, "device": "it", "rows": rows}
    for name in ("calibrate-h200", "calibrate-cpu"):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    monkeypatch.syspath_prepend(ROOT / "scripts")
    tables = importlib.import_module("tables.calibration")
    monkeypatch.setattr("tables.committed.RESULTS", tmp_path)
    for table in (tables.calibration(), tables.calibration_cpu()):
        lines = table.split("\n\n")[0].splitlines()
        assert len({line.count("|") for line in lines}) == 1
        for title in (tables.PHASES["fit, beside observing"], "in all"):
            assert any(line.startswith(f"| {title} |") for line in lines)
    assert "text and fits" in tables.calibration()


def test_command_line_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    build().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as done:
        main(["calibrate", str(tmp_path / "model"), "--dry-run", "--seq-len", "64", "--device", "cpu"])
    said = capsys.readouterr().out
    assert done.value.code == 0
    for text in ("weights", "hidden states", "fit", "in all", "loaded as a whole"):
        assert text in said
    assert "next one" not in said
    options = ["--dry-run", "--overlap", "--preset", "paper", "--seq-len", "64"]
    with pytest.raises(SystemExit):
        main(["calibrate", str(tmp_path / "model"), *options])
    said = capsys.readouterr().out
    for text in ("a layer and of what is ahead", "in all, at most", "while the next one is observed"):
        assert text in said
    with pytest.raises(SystemExit) as done:
        main(["calibrate", str(tmp_path / "model"), "--dry-run", "--samples", "100000000", "--seq-len", "64"])
    assert done.value.code == 2
    said = capsys.readouterr()
    assert "hidden states" in said.out
    assert "--samples" in said.err
    with pytest.raises(SystemExit) as done:
        main(["calibrate", str(tmp_path / "model"), "--seq-len", "64"])
    assert done.value.code == 2
    assert "--out" in capsys.readouterr().err


def test_log_tells_apart_what_goes_on_side_by_side(tmp_path):
    config = dataclasses.replace(preset("paper"), window=WINDOW)
    with progress_log(tmp_path / "log") as report:
        tokens = random_tokens(shared(), 8, 48)
        calibrate(shared(), tokens, config, batch_size=2, overlap=True, progress=report)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    found = [(line["layer"], line["phase"], line["batches"]) for line in lines]
    assert sorted(found) == sorted((n, *of) for n in range(3) for of in (("observe", 4), ("fit", 8)))
    assert lines[-1]["done"] == lines[-1]["total"]


def test_log_has_a_line_for_every_layer_and_phase(tmp_path):
    config = dataclasses.replace(preset("decode"), window=WINDOW)
    with progress_log(tmp_path / "log") as report:
        calibrate(shared(), random_tokens(shared(), 8, 48), config, batch_size=2, progress=report)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert {(line["phase"], line["layer"]) for line in lines} == {
        (phase, layer) for phase in ("plan: observe", "plan: fit", "fit") for layer in range(3)
    }
    assert sum(line["batches"] for line in lines) == lines[-1]["done"] == lines[-1]["total"]
    assert lines[-1]["seconds_left"] == 0
    assert all(line["tokens_per_second"] > 0 for line in lines)
