"""In which order the Hopper kernels take the fields of a page: neighbours share planes where they can.

Fields are counted as `PageLayout.fields` counts them, those that fill up the last chunk of four behind; an
order is a permutation of them. Matrices and sums have their slots in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from aquakv.kernels.pages import Field

#: Widest codes whose levels are equally spaced.
LINEAR_WIDTH = 2

#: Warpgroups and warps of a warpgroup that sum codes.
SUM_TEAMS, WARPS = 3, 4


def score_order(kinds: Sequence[int], planes: Sequence[int]) -> list[int]:
    """Return the order of a head's fields for its scores: by kind, and from the last to the first by planes.

    Parameters
    ----------
    kinds, planes
        Of every field.
    """
    taken: list[int] = []
    for kind in sorted(set(kinds), reverse=True):
        later = {plane for plane, own in zip(planes, kinds, strict=True) if own < kind}
        present = planes[taken[-1]] if taken else -1
        # Goes on with the plane that is at hand, and ends with one that the kinds to come need.
        ranks = [(plane != present, plane in later, plane) for plane in planes]
        taken += sorted((i for i, own in enumerate(kinds) if own == kind), key=ranks.__getitem__)
    return taken[::-1]


def latent_order(fields: Sequence[Field]) -> tuple[list[int], int]:
    """Return the order in which the next latent is computed, and the number of general chunks.

    In the other chunks, which follow, the first two fields share a plane and so do the last two, and levels
    are equally spaced.
    """
    general, pairs, waiting = [], [], dict[int, int]()
    for index in sorted(range(len(fields)), key=lambda i: (fields[i].plane, fields[i].shift)):
        field = fields[index]
        if field.width > LINEAR_WIDTH:
            general.append(index)
        elif field.plane in waiting:
            pairs += [waiting.pop(field.plane), index]
        else:
            waiting[field.plane] = index
    general += waiting.values()
    if len(pairs) % 4:
        general += pairs[-2:]
        del pairs[-2:]
    padding = list(range(len(fields), len(fields) + -len(fields) % 4))
    return general + padding + pairs, (len(general) + len(padding)) // 4


def sum_order(fields: Sequence[Field]) -> list[int]:
    """Return the field of each tile's each warp, where tile ``t`` is the ``t // 3``-th of team ``t % 3``.

    A warp takes its wide codes first, then the fields of a plane one after the other; wide codes, which take
    longest, are spread over teams and warps alike.
    """
    tiles = -(-len(fields) // WARPS)
    planes: dict[int, list[int]] = {}
    for index in sorted(range(len(fields)), key=lambda i: (-fields[i].width, fields[i].shift)):
        planes.setdefault(fields[index].plane, []).append(index)

    def cost(indices: Sequence[int]) -> int:
        """Instructions, about, in tens."""
        return sum(13 if fields[i].width > LINEAR_WIDTH else 4 for i in indices)

    runs = [_Run(run % SUM_TEAMS, run % WARPS, tiles) for run in range(SUM_TEAMS * WARPS)]
    for plane in sorted(planes.values(), key=cost, reverse=True):
        rest = plane
        while rest:
            run = min((run for run in runs if run.room), key=lambda run: (cost(run.fields), -run.room))
            # Another wide field of the plane goes to another warp.
            wide = sum(fields[i].width > LINEAR_WIDTH for i in rest)
            count = min(run.room, 1 if wide > 1 else len(rest))
            run.fields += rest[:count]
            rest = rest[count:]
    padding = iter(range(len(fields), tiles * WARPS))
    order = [0] * (tiles * WARPS)
    for run in runs:
        wide = [i for i in run.fields if fields[i].width > LINEAR_WIDTH]
        last = fields[wide[-1]].plane if wide else -1
        narrow = [i for i in run.fields if i not in wide]
        narrow.sort(key=lambda i: fields[i].plane != last)
        for place, field in zip(run.places, [*wide, *narrow, *islice(padding, run.room)], strict=True):
            order[place] = field
    return order


def cubic_tiles(fields: Sequence[Field], order: Sequence[int]) -> int:
    """Return how many of a team's first tiles have fields with unequally spaced levels, in `sum_order`."""
    places = [p for p, i in enumerate(order) if i < len(fields) and fields[i].width > LINEAR_WIDTH]
    return max((p // (WARPS * SUM_TEAMS) + 1 for p in places), default=0)


class _Run:
    """What one warp sums, one field after the other."""

    def __init__(self, team: int, warp: int, tiles: int) -> None:
        self.places = [tile * WARPS + warp for tile in range(team, tiles, SUM_TEAMS)]
        self.fields: list[int] = []

    @property
    def room(self) -> int:
        return len(self.places) - len(self.fields)
