"""Figures of lines and points on two axes, as SVG, once for wide and once for narrow screens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aquakv.evaluation.report.labels import Box, place, width_of
from aquakv.evaluation.report.marks import marker, swatch
from aquakv.evaluation.report.markup import Markup, join, tag
from aquakv.evaluation.report.names import Style
from aquakv.evaluation.report.scales import Scale


@dataclass(frozen=True)
class Point:
    """A figure; ``low`` and ``high`` are the ends of its error bar, ``hover`` is shown on pointing at it."""

    x: float
    y: float
    hover: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points that belong together, joined by a line unless they are single ones."""

    name: str
    points: Sequence[Point]
    style: Style
    joined: bool = True


@dataclass(frozen=True)
class Axis:
    """An axis: its title, ends, what is written on it, and how."""

    title: str
    low: float
    high: float
    ticks: Sequence[float]
    text: Callable[[float], str]
    log: bool = False


@dataclass(frozen=True)
class Figure:
    """What is drawn.

    Attributes
    ----------
    label
        What those hear who cannot see it.
    series
        In the order of the legend; emphasised ones are drawn last, on top.
    x, y
        The axes.
    zero
        Text for a line below a logarithmic y axis that stands for zero, with what that text says of it (such
        as the exact cache). Values below the axis lie on it.
    zero_tick
        What is written at that line.
    reference
        A level and a text for a line across.
    """

    label: str
    series: Sequence[Series]
    x: Axis
    y: Axis
    zero: str | None = None
    zero_tick: str = "0"
    reference: tuple[float, str] | None = None


@dataclass(frozen=True)
class Size:
    """How large a figure is drawn; ``names`` says whether lines are labelled: all, strong ones, or none."""

    name: str
    width: float
    height: float
    font: float
    names: str = "all"


FULL = Size("full", 1040, 520, 14)
HALF = Size("half", 520, 340, 13)
NARROW = Size("narrow", 340, 320, 12.5, "strong")

#: Height of the strip that holds the line of zero.
_STRIP = 40


def figure(content: Figure, caption: object = None, *, size: Size = HALF, legend: bool = True) -> Markup:
    """Return a figure with its legend and caption, drawn for wide and for narrow screens."""
    items = [
        tag("li", swatch(one.style, line=one.joined and len(one.points) > 1), one.name)
        for one in content.series
    ]
    return tag(
        "figure",
        tag("p", content.y.title, class_="chart-title"),
        _Drawing(content, size).svg(),
        _Drawing(content, NARROW).svg(),
        tag("ul", items, class_="legend") if legend and len(items) > 1 else None,
        tag("figcaption", caption) if caption else None,
        class_=f"chart {size.name}",
    )


class _Drawing:
    """One figure at one size."""

    def __init__(self, content: Figure, size: Size) -> None:
        self.content, self.size = content, size
        font = size.font
        texts = [content.y.text(tick) for tick in content.y.ticks]
        if content.zero is not None:
            texts.append(content.zero_tick)
        gutter = max((width_of(text, font) for text in texts), default=0.0) + 10
        self.plot = Box(gutter, 0.8 * font, size.width - 12, size.height - 3.5 * font)
        self.x = Scale(content.x.low, content.x.high, self.plot.left, self.plot.right, content.x.log)
        bottom = self.plot.bottom - (_STRIP if content.zero is not None else 0)
        self.y = Scale(content.y.low, content.y.high, bottom, self.plot.top, content.y.log)
        self.zero = self.plot.bottom - 12
        self.taken: list[Box] = []
        at = {id(one): [self._at(point) for point in one.points] for one in content.series}
        self.lines = [spot for one in content.series if one.joined for spot in _along(at[id(one)])]
        self.marks = [spot for spots in at.values() for spot in spots]

    def svg(self) -> Markup:
        content, size = self.content, self.size
        ordered = sorted(content.series, key=lambda one: one.style.strong)
        crowded = max((len(one.points) for one in content.series), default=0) > 30
        radius = (3.0 if crowded else 4.5) if size is not NARROW else (2.5 if crowded else 4.0)
        return tag(
            "svg",
            self._grid(),
            self._levels(),
            [self._line(one) for one in ordered],
            [self._points(one, radius) for one in ordered],
            self._names(),
            viewBox=f"0 0 {size.width:g} {size.height:g}",
            font_size=size.font,
            class_=f"plot {'narrow' if size is NARROW else 'wide'}",
            role="img",
            aria_label=content.label,
        )

    def _at(self, point: Point) -> tuple[float, float]:
        return self.x(point.x), self._height(point.y)

    def _height(self, value: float) -> float:
        if self.content.zero is not None and value < self.content.y.low:
            return self.zero
        return self.y(value)

    def _grid(self) -> Markup:
        content, plot, font = self.content, self.plot, self.size.font
        parts = []
        for tick in content.y.ticks:
            y = self.y(tick)
            parts.append(tag("path", d=f"M{plot.left:.1f} {y:.1f}H{plot.right:.1f}", class_="grid"))
            text = content.y.text(tick)
            parts.append(
                tag("text", text, x=plot.left - 8, y=y + 0.35 * font, text_anchor="end", class_="tick")
            )
        edge = 0.0
        for tick in content.x.ticks:
            x, text = self.x(tick), content.x.text(tick)
            parts.append(tag("path", d=f"M{x:.1f} {plot.top:.1f}V{plot.bottom:.1f}", class_="grid"))
            half = width_of(text, font) / 2
            middle = min(max(x, half), self.size.width - half)
            if middle - half < edge:
                continue  # no room for its text
            edge = middle + half + 5
            parts.append(
                tag("text", text, x=middle, y=plot.bottom + 1.35 * font, text_anchor="middle", class_="tick")
            )
        frame = f"M{plot.left:.1f} {plot.bottom:.1f}H{plot.right:.1f}"
        return join(
            parts,
            tag("path", d=frame, class_="axis"),
            tag(
                "text",
                content.x.title,
                x=plot.right,
                y=plot.bottom + 2.8 * font,
                text_anchor="end",
                class_="title",
            ),
        )

    def _levels(self) -> Markup | None:
        """Draw the line of zero below the axis, or the line of reference."""
        content, plot, font = self.content, self.plot, self.size.font
        if content.zero is not None:
            y, text = self.zero, content.zero
            top = plot.bottom - _STRIP + 8
            strip = tag(
                "rect",
                x=plot.left,
                y=top,
                width=plot.right - plot.left,
                height=plot.bottom - top,
                class_="strip",
            )
            tick = tag(
                "text",
                content.zero_tick,
                x=plot.left - 8,
                y=y + 0.35 * font,
                text_anchor="end",
                class_="tick",
            )
        elif content.reference is not None:
            y, text = self.y(content.reference[0]), content.reference[1]
            strip = tick = None
        else:
            return None
        width = width_of(text, font)
        above = y - 0.45 * font if y - 1.6 * font > plot.top else y + 1.15 * font
        boxes = [
            Box(right - width, above - font, right, above + 0.3 * font)
            for part in (1.0, 0.0, 0.5, 0.75, 0.25)
            for right in [plot.left + width + 4 + part * (plot.right - plot.left - width - 4)]
        ]
        box = min(boxes, key=self._covered)
        self.taken.append(box)
        return join(
            strip,
            tag("path", d=f"M{plot.left:.1f} {y:.1f}H{plot.right:.1f}", class_="line c-exact exact"),
            tick,
            tag("text", text, x=box.right, y=above, text_anchor="end", class_="name c-exact"),
        )

    def _covered(self, box: Box) -> int:
        """Return how much of lines and markers a box covers."""
        return sum(box.holds(spot, 1) for spot in self.lines) + 4 * sum(box.holds(s, 6) for s in self.marks)

    def _line(self, one: Series) -> Markup | None:
        if not one.joined or len(one.points) < 2:
            return None
        d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in map(self._at, one.points))
        strong = " strong" if one.style.strong else ""
        return tag("path", d=d, class_=f"line c-{one.style.colour}{strong}", stroke_dasharray=one.style.dash)

    def _points(self, one: Series, radius: float) -> Markup:
        parts = []
        for point in one.points:
            x, y = self._at(point)
            error = None
            if point.low is not None and point.high is not None:
                low, high = (self.zero if y == self.zero else self.y(point.low)), self.y(point.high)
                if abs(low - high) > 2 * radius:
                    error = tag(
                        "path", d=f"M{x:.1f} {low:.1f}V{high:.1f}", class_=f"error c-{one.style.colour}"
                    )
            hover = tag("title", f"{one.name}: {point.hover}") if point.hover else None
            target = tag("circle", cx=x, cy=y, r=radius + 5, class_="target") if hover else None
            below = self.content.zero is not None and point.y < self.content.y.low
            mark = marker(one.style, x, y, radius, filled=one.style.strong and not below)
            parts.append(tag("g", error, mark, target, hover))
        return join(parts)

    def _names(self) -> Markup:
        """Label lines where there is room; the legend names all of them."""
        named = [
            one
            for one in sorted(self.content.series, key=lambda one: not one.style.strong)
            if self.size.names == "all" or one.style.strong
        ]
        if len(self.content.series) < 2:
            return Markup()
        if len(self.marks) > 120:
            return Markup()
        parts = []
        room = Box(self.plot.left + 2, self.plot.top, self.plot.right, self.y.start - 2)
        for one in named:
            spots = [self._at(point) for point in one.points]
            ends = [spots[0], spots[-1], *spots[1:-1]] if spots else []
            found = place(
                one.name, self.size.font, one.style.strong, ends, room, self.taken, self.lines, self.marks
            )
            if found is None:
                continue
            self.taken.append(found.box)
            kind = f"name c-{one.style.colour}" + (" strong" if one.style.strong else "")
            parts.append(tag("text", one.name, x=found.x, y=found.y, text_anchor=found.anchor, class_=kind))
        return join(parts)


def _along(spots: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return points on the line through given ones, a few units from each other."""
    found = []
    for (x0, y0), (x1, y1) in itertools.pairwise(spots):
        steps = max(1, int(max(abs(x1 - x0), abs(y1 - y0)) / 7))
        found += [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)]
    return found
