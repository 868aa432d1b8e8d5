"""Codecs, layer by layer: what prediction explains, and where the bits go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from aquakv.evaluation.report import formats
from aquakv.evaluation.report.chart import HALF, Axis, Figure, Point, Series, figure
from aquakv.evaluation.report.load import CodecFigures
from aquakv.evaluation.report.markup import Markup, join, tag
from aquakv.evaluation.report.names import Style
from aquakv.evaluation.report.scales import linear_ends, linear_ticks
from aquakv.evaluation.report.section import Section
from aquakv.evaluation.report.tables import Column, table

_LOOK = {"keys": Style("decode", "square", strong=True), "values": Style("storage", "circle", strong=True)}

Layer = Mapping[str, Any]


def section(codecs: Sequence[CodecFigures]) -> Section | None:
    """Return the section of codecs, if there are any."""
    if not codecs:
        return None
    return Section(
        "codecs",
        "Codecs, layer by layer",
        "What the predictor explains of each layer's variance, on text that calibration held out, and how "
        "many bits of a value the allocation gives to keys and to values.",
        join([_codec(codec) for codec in codecs]),
    )


def _codec(codec: CodecFigures) -> Markup:
    record, layers = codec.calibration, codec.layers
    data = [str(one.get("name")) if isinstance(one, dict) else str(one) for one in record.get("data") or []]
    facts = [
        f"preset {codec.preset}",
        f"{formats.fixed(codec.bits_per_value, 3)} bits per value",
        codec.architecture,
        f"{len(layers)} layers with figures",
        f"calibrated on {formats.number(record.get('tokens'), 9)} tokens of "
        f"{', '.join(data) or 'unnamed data'}",
    ]
    versions = record.get("versions")
    if isinstance(versions, dict):
        facts.append(", ".join(f"{name} {version}" for name, version in versions.items() if name != "python"))
    return tag(
        "section",
        tag("h3", codec.name),
        tag("p", "; ".join(facts) + ".", class_="facts"),
        tag(
            "div",
            _chart(
                layers,
                "Explained variance",
                _explained,
                "Part of the variance that prediction explains, by layer.",
            ),
            _chart(layers, "Bits per value", _bits, "Bits per value, by layer."),
            class_="charts",
        )
        if layers
        else tag("p", "This file keeps no figures by layer.", class_="note"),
        _table(layers) if layers else None,
    )


def _explained(layer: Layer, kind: str) -> float:
    return 100 * layer[kind]["explained_variance"]


def _bits(layer: Layer, kind: str) -> float:
    return layer["key_bits" if kind == "keys" else "value_bits"]


def _chart(layers: Sequence[Layer], title: str, figure_of: Any, caption: str) -> Markup:
    percent = figure_of is _explained
    unit = " %" if percent else ""
    values = [figure_of(layer, kind) for layer in layers for kind in _LOOK]
    low, high = linear_ends(values, floor=0)
    if percent:
        low, high = max(low, -20.0), 100.0
    numbers = [layer["layer"] for layer in layers]
    first, last = min(numbers) - 0.5, max(numbers) + 0.5
    whole = [tick for tick in linear_ticks(first, last, 7) if tick.is_integer()]
    series = [
        Series(
            kind,
            [
                Point(
                    layer["layer"],
                    figure_of(layer, kind),
                    f"layer {layer['layer']}, {formats.fixed(figure_of(layer, kind), 2)}{unit}",
                )
                for layer in layers
            ],
            look,
        )
        for kind, look in _LOOK.items()
    ]
    return figure(
        Figure(
            caption,
            series,
            Axis("layer", first, last, whole or [numbers[0]], formats.tick),
            Axis(
                f"{title}, %" if percent else title,
                low,
                high,
                linear_ticks(low, high),
                formats.tick,
            ),
        ),
        caption,
        size=HALF,
    )


def _table(layers: Sequence[Layer]) -> Markup:
    columns: list[Column[Layer]] = [Column("layer", lambda layer: str(layer["layer"]), numeric=False)]
    for kind, name in (("keys", "key"), ("values", "value")):
        columns += [
            Column(f"{name} bits", partial(_bits, kind=kind), partial(formats.fixed, places=2)),
            Column(f"{name}s predicted", partial(_predicted, kind=kind), formats.percent, "high"),
            Column(f"{name}s, error", partial(_error, kind=kind), partial(formats.percent, places=3), "low"),
            Column(f"{name}s, weight", partial(_weight, kind=kind), partial(formats.fixed, places=2)),
        ]
    caption = "Figures by layer: errors relative to the variance, weights as allocated. ★ best of its column."
    return table(caption, columns, [(None, list(layers))])


def _predicted(layer: Layer, kind: str) -> float:
    return layer[kind]["explained_variance"]


def _error(layer: Layer, kind: str) -> float:
    return layer[kind]["reconstruction_error"]


def _weight(layer: Layer, kind: str) -> float:
    return layer["importance"][kind]
