"""Markers of points, and the swatches that a legend shows."""

from __future__ import annotations

import math
from collections.abc import Iterable

from aquakv.evaluation.report.markup import Markup, tag
from aquakv.evaluation.report.names import Style


def _polygon(corners: int, turn: float) -> str:
    angles = (turn + 2 * math.pi * index / corners for index in range(corners))
    return _closed((1.15 * math.sin(a), -1.15 * math.cos(a)) for a in angles)


def _star() -> str:
    points = ((1.35 if index % 2 == 0 else 0.55, math.pi * index / 5) for index in range(10))
    return _closed((r * math.sin(a), -r * math.cos(a)) for r, a in points)


def _closed(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.3f} {y:.3f}" for x, y in points) + "Z"


#: Shapes around the origin, of radius about one.
SHAPES = {
    "circle": "M-1 0A1 1 0 1 0 1 0A1 1 0 1 0 -1 0Z",
    "square": _closed(((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9))),
    "up": _polygon(3, 0),
    "down": _polygon(3, math.pi),
    "left": _polygon(3, -math.pi / 2),
    "right": _polygon(3, math.pi / 2),
    "diamond": _polygon(4, 0),
    "hexagon": _polygon(6, 0),
    "pentagon": _polygon(5, 0),
    "star": _star(),
    "cross": "M-0.9 -0.9L0.9 0.9M-0.9 0.9L0.9 -0.9",
    "plus": "M-1.1 0L1.1 0M0 -1.1L0 1.1",
    "bar": "M-1.1 0L1.1 0",
}


def marker(style: Style, x: float, y: float, radius: float, *, filled: bool | None = None) -> Markup:
    """Return a family's marker; filled where the family is emphasised, unless said otherwise."""
    filled = style.strong if filled is None else filled
    place = f"translate({x:.1f} {y:.1f}) scale({radius:.1f})"
    kind = f"mark c-{style.colour}" + ("" if filled else " hollow")
    return tag("path", d=SHAPES[style.marker], transform=place, class_=kind)


def swatch(style: Style, *, line: bool = True) -> Markup:
    """Return what stands for a family in a legend."""
    stroke = tag(
        "path",
        d="M1 8H31",
        class_=f"line c-{style.colour}" + (" strong" if style.strong else ""),
        stroke_dasharray=style.dash,
    )
    return tag(
        "svg",
        stroke if line else None,
        marker(style, 16, 8, 4.5),
        viewBox="0 0 32 16",
        width=32,
        height=16,
        class_="swatch",
        aria_hidden="true",
    )
