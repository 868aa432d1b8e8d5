"""Reports: what is read, how it is drawn, and that every row is somewhere on the page."""

import contextlib
import copy
import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import report_samples
from aquakv.errors import CodecFileError, DataError
from aquakv.evaluation.report import formats, load, page, scales
from aquakv.evaluation.report.chart import Axis, Figure, Point, Series, figure
from aquakv.evaluation.report.load import Record, Source
from aquakv.evaluation.report.markup import Markup, join, tag
from aquakv.evaluation.report.names import method_of, styles
from aquakv.evaluation.report.section import grouped
from aquakv.evaluation.report.sections import calibration as sections_calibration
from aquakv.evaluation.report.sections.comparison import band_of, comparisons, least_bits
from aquakv.evaluation.report.tables import Column, best_cells, table
from tiny_models import codec_for

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
COMMITTED = sorted(RESULTS.glob("*.json"))
HOSTILE = "</title><script>alert(1)</script><img src=x onerror='alert(2)'>\""


class Checked(HTMLParser):
    """Reads a page: elements are closed in order, ids are there once, nothing is loaded."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.levels, self.texts, self.links = [], [], [], [], []
        self.figures = 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, name, attributes):
        found = dict(attributes)
        assert name not in ("script", "img", "link", "iframe", "object"), name
        assert not [key for key in found if key.startswith("on") or key == "src"]
        if "href" in found:
            self.links.append(found["href"])
        if "id" in found:
            self.ids.append(found["id"])
        if re.fullmatch("h[1-6]", name):
            self.levels.append(int(name[1]))
        if name == "svg" and found.get("role") == "img":
            assert found["aria-label"]
            self.figures += 1
        if name == "table":
            self.captioned = False
        if name == "th":
            assert found["scope"] in ("col", "row", "rowgroup")
        if name not in ("meta", "br"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def checked(text):
    found = Checked(text)
    assert text.startswith('<!doctype html>\n<html lang="en">')
    assert len(found.ids) == len(set(found.ids))
    assert set(found.links) <= {f"#{name}" for name in found.ids}
    assert found.levels[0] == 1
    assert found.levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(found.levels, found.levels[1:], strict=False))
    assert "nan" not in re.findall(r"[\w.]+", text.lower())
    return found


def written(tmp_path, **rows):
    return checked(page(load(report_samples.write(tmp_path, rows))))


def record(**fields):
    return Record(fields, Source("some.json", "a device"))


# Reading


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_every_committed_result_makes_a_page(path):
    inputs = load([path])
    assert len(inputs.records) == len(json.loads(path.read_text())["rows"])
    found = checked(page(inputs))
    assert path.name in found.text


def test_all_committed_results_together_make_a_page_of_moderate_size():
    inputs = load(COMMITTED)
    text = page(inputs)
    assert checked(text).figures > 20
    # It grows with the results: a kilobyte for each that was measured, in figures and tables together.
    assert len(text.encode()) < 1_000 * len(inputs.records)


def test_a_single_result_and_lines_of_a_grid(tmp_path):
    single = {"schema_version": 1, "command": "eval perplexity", **report_samples.QUALITY[0]}
    (tmp_path / "one.json").write_text(json.dumps(single))
    lines = "\n".join(json.dumps(row) for row in report_samples.GRID)
    (tmp_path / "grid.jsonl").write_text("\ufeff" + lines + "\n\n")
    (tmp_path / "lines.txt").write_text(lines)
    inputs = load(
        [tmp_path / "one.json", tmp_path / "grid.jsonl", tmp_path / "one.json", tmp_path / "lines.txt"]
    )
    assert [one.source.name for one in inputs.records] == [
        "one.json",
        *["grid.jsonl"] * 2,
        *["lines.txt"] * 2,
    ]
    row = inputs.records[1]
    assert (row["task"], row["data"], row["seq_len"]) == ("perplexity", "pydoc:test", 512)
    assert row.source is inputs.records[2].source
    assert row.source.device == "AMD EPYC, 2 threads"


def test_a_codec_is_read_whatever_it_is_called(tmp_path):
    codec = codec_for("llama", "decode")
    codec.save(tmp_path / "codec")
    (found,) = load([tmp_path / "codec"]).codecs
    assert (found.preset, found.bits_per_value) == ("decode", codec.bits_per_value)
    text = checked(page(load([tmp_path / "codec"]))).text
    assert "Codecs, layer by layer" in text
    for layer in codec.calibration["layers"]:
        assert formats.percent(layer["keys"]["explained_variance"]) in text
        assert f"{layer['value_bits']:.2f}" in text


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b"", "is empty"),
        ("a.json", b"{", "expected JSON"),
        ("a.json", b"\xff\xfe\x00", "other bytes"),
        ("a.json", b"[1, 2]", "expected a JSON object"),
        ("a.json", b'{"a": 1}', "got other JSON"),
        ("a.json", b'{"rows": [1]}', "rows as JSON objects"),
        ("a.json", b'{"rows": {}}', "rows as JSON objects"),
        ("a.json", b'{"schema_version": 9, "rows": []}', "schema version 9"),
        ("a.json", b'{"rows": [{"contestant": "x", "score": NaN}]}', "the number NaN"),
        ("a.json", b'{"rows": [{"contestant": "x", "score": 1e999}]}', "the number 1e999"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.jsonl", b'{"model": "a", "status": "ok"}\n{"model"', "line 2 of"),
        ("a.jsonl", b'{"model": "a", "status": "ok"}\n7\n', "line 2 of"),
        ("a.html", b"<p>no result</p>", "expected JSON"),
    ],
)
def test_files_that_are_no_results(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(says)) as error:
        load([path])
    assert str(path) in str(error.value)


def test_missing_files_folders_damaged_codecs_and_nothing_to_show(tmp_path):
    with pytest.raises(DataError, match="could not be read"):
        load([tmp_path / "none.json"])
    with pytest.raises(DataError, match="could not be read"):
        load([tmp_path])
    (tmp_path / "bad.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(CodecFileError):
        load([tmp_path / "bad.safetensors"])
    (tmp_path / "no.json").write_text('{"schema_version": 1, "rows": []}')
    with pytest.raises(DataError, match="got none"):
        page(load([tmp_path / "no.json"]))


VALUES = [
    None,
    True,
    -1,
    0,
    3,
    10**400,
    1e-300,
    1e300,
    "",
    "x",
    [],
    [1],
    ["a", {}],
    {},
    {"policy": [], "keep": 2},
]


@pytest.mark.parametrize("kind", list(report_samples.ALL))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_that_hold_anything_make_a_page_or_one_clear_error(tmp_path, kind, data):
    rows = json.loads(json.dumps(report_samples.ALL[kind]))
    for _ in range(data.draw(st.integers(1, 3))):
        row = data.draw(st.sampled_from(rows))
        inner = [one for name in ("cells", "bins") for one in (row.get(name) or []) if isinstance(one, dict)]
        row = data.draw(st.sampled_from([row, *inner]))
        name = data.draw(
            st.sampled_from([*row, "pruning", "model", "data", "codec", "baseline", "kept", "unseen"])
        )
        row[name] = copy.deepcopy(data.draw(st.sampled_from(VALUES)))  # the next draw may change it
    report_samples.write(tmp_path, {"any": rows})
    with contextlib.suppress(DataError):
        checked(page(load([tmp_path / "any.json"])))


def test_a_codec_without_its_record_says_so(tmp_path):
    codec = codec_for("llama", "decode")
    dataclasses.replace(codec, calibration={}).save(tmp_path / "bare")
    assert "no figures by layer" in checked(page(load([tmp_path / "bare"]))).text
    dataclasses.replace(codec, calibration={"layers": [{"layer": 0}] * 3}).save(tmp_path / "bare")
    with pytest.raises(DataError, match="bare: a field is missing"):
        page(load([tmp_path / "bare"]))


# Sections


def test_every_kind_of_row_has_its_section(tmp_path):
    found = checked(page(load(report_samples.write(tmp_path)), "All of it"))
    for title in (
        "Rate and quality",
        "Needle in a haystack",
        "Tasks with scores",
        "Drift",
        "Memory against context",
        "Speed",
        "Calibration",
        "Runs that failed",
    ):
        assert title in found.texts
    assert "Other measurements" not in found.texts
    assert found.texts.count("All of it") == 2
    assert "AMD EPYC, 2 threads; aquakv 0.1.0, torch 2.13.0; commit 0123456789, changed." in found.text


def test_quality(tmp_path):
    text = written(tmp_path, quality=report_samples.QUALITY).text
    assert "+30.30 ± 0.20 %" in text  # on pointing at it
    assert "exact cache, 16 bits" in text
    assert "1 figure below 0.02 %, or negative" in text
    assert "2.5 to 3 bits" in text
    assert "At a glance" in text


def test_quality_of_one_method_alone_has_no_figure(tmp_path):
    found = written(tmp_path, quality=report_samples.QUALITY[:1])
    assert found.figures == 0
    assert "+0.70 %" in found.text


def test_what_was_measured_otherwise_is_not_compared():
    rows = [record(**row) for row in report_samples.QUALITY]
    assert len(comparisons(rows)) == 1
    for name, value in (
        ("dtype", "float32"),
        ("model", "other"),
        ("device", "GPU"),
        ("calibration_tokens", 5),
    ):
        assert len(comparisons([*rows, record(**{**report_samples.QUALITY[0], name: value})])) == 2


def test_fewest_bits_within_a_loss():
    rows = [record(**row) for row in report_samples.QUALITY]
    (found,) = least_bits(rows, 0.01)
    assert (found.label, found.bits) == ("storage 1.25\u00a0bit", 1.3)
    assert least_bits(rows, 0.002)[0].bits == 2.05
    assert least_bits(rows[:1], 0.01) == []
    assert least_bits(rows[3:4] * 2, 0.01) == []


def test_needles(tmp_path):
    text = written(tmp_path, needle=report_samples.NEEDLE).text
    for part in ("1k", "8k", "75", "96.2 %", "0.13", "nats lost on the answer"):
        assert part in text
    lone = [{**report_samples.NEEDLE[0], "cells": [{"length": 500, "depth": 50, "accuracy": None}]}]
    assert "50\u00a0%" in written(tmp_path, needle=lone).text


def test_scores_have_the_exact_caches_beside_them(tmp_path):
    text = written(tmp_path, scores=report_samples.SCORES).text
    for part in ("ruler vt", "98.0 %", "mean of 3 tasks", "63.7 %"):
        assert part in text
    some = written(tmp_path, scores=report_samples.SCORES[:6]).text
    assert "–" in some  # no mean over tasks that were not all run


def test_drift_memory_speed_calibration(tmp_path):
    assert "tokens 7,168 to 8,192" in written(tmp_path, drift=report_samples.DRIFT).text
    memory = written(tmp_path, memory=report_samples.MEMORY).text
    for part in ("128k tokens", "432 MiB", "not enough", "3.38 MiB", "15.0 %"):
        assert part in memory
    speed = written(tmp_path, speed=report_samples.SPEED).text
    for part in ("92 ms (89.7 ms to 101 ms)", "2.30 ×", "behind 2,000 tokens"):
        assert part in speed
    calibration = written(tmp_path, calibration=report_samples.CALIBRATION).text
    for part in ("13.8 min", "4 of 80 layers", "text through the layers 79 %", "60 GiB"):
        assert part in calibration


def test_failures_and_rows_of_unknown_shape(tmp_path):
    text = checked(page(load(report_samples.write(tmp_path)))).text
    assert "kvtc needs <text> to be fitted to" in text
    other = [{"contestant": "something", "entropy": 1.5, "remark": "new"}, {"flips": 3}]
    text = written(tmp_path, other=other).text
    for part in ("Other measurements", "something", "entropy", "1.5", "new", "flips"):
        assert part in text


# Names, escaping, tables, scales, figures


@pytest.mark.parametrize(
    ("fields", "label", "family", "ours"),
    [
        ({"contestant": "storage 1.25"}, "storage 1.25\u00a0bit", "storage", True),
        ({"contestant": "paper 2 bit"}, "paper 2\u00a0bit", "paper", True),
        ({"contestant": "higgs 2 bit"}, "higgs (aquakv) 2\u00a0bit", "higgs (aquakv)", False),
        ({"method": "kivi:2+window"}, "KIVI 2\u00a0bit, our window", "KIVI, our window", False),
        ({"method": "x/y.safetensors", "codec": {"preset": "decode"}}, "y.safetensors", "decode", True),
        ({"method": "exact"}, "exact cache", "exact", False),
        ({"codec": {"file": "a", "preset": "paper"}}, "a", "paper", True),
        ({"codec": None, "baseline": {"name": "fp8", "bits": 8}}, "FP8 8\u00a0bit", "FP8", False),
        ({"codec": None, "baseline": None}, "exact cache", "exact", False),
        ({"contestant": "decode, fused path"}, "decode, fused path", "decode, fused path", False),
        (
            {"contestant": "exact", "pruning": {"policy": "h2o", "keep": 0.5}},
            "exact cache, 50 % kept by H2O",
            "exact, 50 % kept by H2O",
            False,
        ),
    ],
)
def test_names(fields, label, family, ours):
    found = method_of(record(**fields))
    assert (found.label, found.family, found.ours) == (label, family, ours)


def test_families_differ_by_more_than_colour():
    families = ["storage", "decode", "paper", "KIVI", "KIVI, our window", "FP8", *map(str, range(14))]
    found = styles(families)
    looks = {(one.colour, one.marker, one.dash) for one in found.values()}
    assert len(looks) == len(families)
    assert found["storage"].strong
    assert not found["KIVI"].strong
    assert styles(["KIVI"])["KIVI"] == found["KIVI"]  # the same in every figure


def test_text_from_files_is_never_markup(tmp_path):
    rows = [
        {**row, "contestant": f"{HOSTILE}{number}", "model": HOSTILE, "data": HOSTILE}
        for number, row in enumerate(report_samples.QUALITY)
    ]
    other = [{"contestant": HOSTILE, HOSTILE: HOSTILE, "status": "failed", "error": HOSTILE, "task": HOSTILE}]
    needles = [{**report_samples.NEEDLE[0], "contestant": HOSTILE, "task": HOSTILE}]
    report_samples.write(tmp_path, {"rows": rows, "other": other, "needles": needles})
    path = tmp_path / 'a<b>"&.json'
    path.write_text(json.dumps({"rows": [{"contestant": "\x00\ud800"}], "device": HOSTILE, "note": HOSTILE}))
    found = checked(page(load([*tmp_path.glob("*.json")]), HOSTILE))
    assert found.text.count(HOSTILE) > 10
    assert 'a<b>"&.json' in found.text


def test_tags():
    assert tag("p", "a<b", None, ["&", Markup("<i>")], class_="x", hidden=True, id=None) == (
        '<p class="x" hidden>a&lt;b&amp;<i></p>'
    )
    assert tag("meta", name="n", content='"') == '<meta name="n" content="&quot;">'
    assert tag("path", x=1 / 3, text_anchor="end") == '<path x="0.33" text-anchor="end"></path>'
    assert join("a", 1, ("<",)) == "a1&lt;"


def test_best_of_a_column():
    low = Column("c", lambda row: row, lambda value: f"{value:.1f}", "low")
    high = Column("c", lambda row: row, lambda value: f"{value:.1f}", "high")
    assert best_cells(low, [3.0, 1.0, None, 2.0]) == {1}
    assert best_cells(high, [3.0, 1.0, None, 2.0]) == {0}
    assert best_cells(low, [1.01, 1.02, 3.0]) == {0, 1}  # written alike
    assert best_cells(low, [1.0, 1.0]) == set()  # all level: none is best
    assert best_cells(low, [1.0]) == set()
    assert best_cells(low, ["x", 1.0]) == set()
    assert best_cells(Column("c", lambda row: row), [1.0, 2.0]) == set()
    assert best_cells(low, [-1.0, 0.0, 1.0]) == {0}


def test_tables_mark_the_best_by_more_than_colour_and_not_the_exact_cache():
    columns = [Column("name", lambda row: row[0], numeric=False), Column("n", lambda row: row[1], str, "low")]
    text = table(
        "what",
        columns,
        [(None, [("a", 2.0), ("b", 3.0), ("exact", 1.0)])],
        judged=lambda row: row[0] != "exact",
    )
    assert re.findall(r"<b>(.*?)</b><span class=\"star\" aria-label=\"best\" role=\"img\">★", text) == ["2.0"]
    assert '<th scope="row">exact</th><td class="n">1.0</td>' in text
    assert "<caption><span>what</span></caption>" in text


def test_scales():
    log = scales.Scale(1, 100, 0, 200, log=True)
    assert [log(value) for value in (1, 10, 100, 1000, 0, -1)] == pytest.approx([0, 100, 200, 200, 0, 0])
    assert scales.Scale(0, 10, 100, 0)(2.5) == 75
    assert scales.Scale(1e-300, 1e300, 0, 100, log=True)(1) == pytest.approx(50)
    with pytest.raises(ValueError, match="NaN"):
        log(math.nan)
    for ends in ((1, 1), (2, 1), (math.nan, 1), (0, math.inf)):
        with pytest.raises(ValueError, match="finite ends"):
            scales.Scale(*ends, 0, 1)
    with pytest.raises(ValueError, match="positive"):
        scales.Scale(0, 1, 0, 1, log=True)


@pytest.mark.parametrize(
    "values", [[], [1.0], [0.0], [-3.0], [2.0, 2.0], [0.0, -1.0, 5.0], [1e-9, 1e9], [math.inf]]
)
def test_ends_and_ticks_of_any_values(values):
    low, high = scales.log_ends(values)
    assert 0 < low < high < math.inf
    assert all(low <= value <= high for value in values if 0 < value < math.inf)
    ticks = scales.log_ticks(low, high)
    assert 1 <= len(ticks) <= 7
    assert all(low <= tick <= high for tick in ticks)
    assert len(scales.power_ticks(low, high)) <= 9
    low, high = scales.linear_ends(values)
    assert -math.inf < low < high < math.inf
    ticks = scales.linear_ticks(low, high)
    assert 1 <= len(ticks) <= 7
    assert all(low <= tick <= high for tick in ticks)


def test_ticks_are_round():
    assert scales.log_ticks(0.05, 5) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2, 5])
    assert scales.log_ticks(1e-4, 30) == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1, 10])
    assert scales.linear_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert scales.power_ticks(1000, 70000) == [1024, 2048, 4096, 8192, 16384, 32768, 65536]
    assert scales.bit_ticks(0.9, 16.5) == [1, 1.25, 1.5, 2, 3, 4, 8, 16]
    assert scales.linear_ends([0.5, 1], floor=0)[0] == 0


def test_rates_are_compared_with_their_like():
    found = [band_of(bits) for bits in (0.5, 1.0, 1.01, 2.15, 8.0, 16.0)]
    assert found == [
        "up to 1 bit",
        "up to 1 bit",
        "1 to 1.5 bits",
        "2 to 2.5 bits",
        "6 to 8 bits",
        "above 8 bits",
    ]


def _axis(low, high, log):
    return Axis("an axis", low, high, [low], formats.tick, log)


@pytest.mark.parametrize("points", [[], [(1, 1)], [(1, 0), (2, -5), (9, 3)], [(1, 1)] * 40])
def test_figures_of_any_points(points):
    look = styles(["a", "decode"])
    series = [
        Series(name, [Point(*at, hover="h", low=0, high=9) for at in points], look[name]) for name in look
    ]
    text = figure(Figure("what it shows", series, _axis(1, 10, True), _axis(0.1, 10, True), zero="none"))
    assert text.count("<svg") == 4  # wide and narrow, and the legend's two
    places = [float(number) for number in re.findall(r'(?:cx|cy|x|y)="([-\d.]+)"', text)]
    assert all(0 <= place <= 520 for place in places)


def test_numbers_that_are_none_are_refused():
    look = styles(["a"])["a"]
    broken = Figure("x", [Series("a", [Point(1, math.nan)], look)], _axis(1, 2, False), _axis(1, 2, False))
    with pytest.raises(ValueError, match="NaN"):
        figure(broken)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formats.number(0.000123), "0.000123"),
        (formats.number(1234567.8), "1,234,568"),
        (formats.number(-2.5), "\u22122.50"),
        (formats.number(0), "0"),
        (formats.number(None), "–"),
        (formats.increase(-0.0005), "\u22120.05 %"),
        (formats.increase(36.2), "+3,620 %"),
        (formats.size(3 << 20), "3 MiB"),
        (formats.size(1500), "1.46 KiB"),
        (formats.tokens(131072), "128k"),
        (formats.tokens(1000), "1,000"),
        (formats.seconds(830), "13.8 min"),
        (formats.percent_tick(0.0002), "0.02 %"),
        (formats.tick(0.00001), "0.00001"),
        (formats.tick(1000), "1,000"),
    ],
)
def test_numbers_as_people_read_them(text, expected):
    assert text == expected


def test_the_phases_of_a_calibration_add_up():
    """Whatever a calibration spends its time on is in its bar, also where fits go on beside observing."""
    found = load([RESULTS / "calibrate-h200.json", RESULTS / "calibrate-cpu.json"]).records
    runs = [
        sections_calibration._Run(rows)
        for rows in grouped(found, lambda row: row.text("contestant")).values()
    ]
    assert len(runs) == 5
    for run in runs:
        assert sum(run.phases.values()) == pytest.approx(run.total["seconds"], rel=1e-3)
