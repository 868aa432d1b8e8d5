"""Write names beside their lines, where there is room for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A rectangle in a figure's coordinates."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box, gap: float = 0.0) -> bool:
        """Say whether two boxes come closer than a gap."""
        return (
            self.left < other.right + gap
            and other.left < self.right + gap
            and self.top < other.bottom + gap
            and other.top < self.bottom + gap
        )

    def within(self, other: Box) -> bool:
        """Say whether this box is inside another."""
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.top <= self.top
            and self.bottom <= other.bottom
        )

    def holds(self, point: tuple[float, float], margin: float) -> bool:
        """Say whether a point is inside, or nearly."""
        x, y = point
        return self.left - margin < x < self.right + margin and self.top - margin < y < self.bottom + margin


@dataclass(frozen=True)
class Placed:
    """A label's place: the middle or an end of its base line."""

    x: float
    y: float
    anchor: str
    box: Box


#: What a label may cost; see `place`.
_WORST = 9.0

_Point = tuple[float, float]


def width_of(text: str, font: float, *, bold: bool = False) -> float:
    """Return about how wide a text is, rather too much."""
    return font * len(text) * (0.68 if bold else 0.63)


def place(
    text: str,
    font: float,
    bold: bool,
    anchors: Sequence[_Point],
    room: Box,
    taken: Sequence[Box],
    lines: Sequence[_Point],
    marks: Sequence[_Point],
) -> Placed | None:
    """Find a place for a label next to one of its points.

    Parameters
    ----------
    text, font, bold
        What is written, and how.
    anchors
        The points that the label may stand next to.
    room
        Where it has to be.
    taken
        What it must not touch.
    lines, marks
        Points on lines, and of markers, that it should not cover.

    Returns
    -------
    Placed or None
        None where the best place would still cover too much.
    """
    width = width_of(text, font, bold=bold)
    best: tuple[float, Placed] | None = None
    for cost, found in _candidates(anchors, width, font):
        if not found.box.within(room) or any(found.box.overlaps(box, 2) for box in taken):
            continue
        cost += sum(found.box.holds(point, 1) for point in lines)
        cost += 4 * sum(found.box.holds(point, 4) for point in marks)
        if best is None or cost < best[0]:
            best = cost, found
    return best[1] if best is not None and best[0] <= _WORST else None


def _candidates(anchors: Sequence[_Point], width: float, font: float) -> Iterator[tuple[float, Placed]]:
    for order, (x, y) in enumerate(anchors):
        for distance in (10.0, 16.0, 24.0):
            for side, (dx, dy, anchor) in enumerate(
                (
                    (distance, 0, "start"),
                    (-distance, 0, "end"),
                    (0, -distance - 2, "middle"),
                    (0, distance + 4, "middle"),
                    (distance - 3, -distance + 2, "start"),
                    (distance - 3, distance, "start"),
                    (3 - distance, -distance + 2, "end"),
                    (3 - distance, distance, "end"),
                )
            ):
                left = x + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
                middle = y + dy
                box = Box(left, middle - 0.55 * font, left + width, middle + 0.55 * font)
                yield (
                    0.3 * order + 0.12 * (distance - 10) + 0.1 * side,
                    Placed(x + dx, middle + 0.35 * font, anchor, box),
                )
