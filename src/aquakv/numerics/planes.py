"""Fields of 1 to 8 bits in byte planes: what fits, where it goes, and which widths are worth most.

A field takes the same bits of every byte of a plane and straddles none, so a plane holds fields of 8 bits
together. What fits is decided by wide fields and by those of 3 bits; narrower ones fill up what is left.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from aquakv.errors import ConfigError
from aquakv.numerics.water_filling import check_options, check_variances

#: Bits of a plane, and so of the widest field.
PLANE_BITS = 8

# Fields that change their width in one step of the search for the best widths. With few fields, one more:
# where some widths are not allowed, the best of few is not always reached by changing two.
_CHANGES, _FEW_FIELDS = 2, 8


def planes_hold(counts: Tensor, planes: int) -> Tensor:
    """Tell whether fields fit planes.

    Fields of 5 to 8 bits need a plane each, those of 4 half a one. Those of 3 go to planes with one of 5, two
    by two into free planes, and a last one beside a single one of 4. Each plane that is left with an odd
    number of bits has one bit that fields of 2 cannot use. All else fits wherever bits are left. (That no
    other arrangement holds more is tested against all arrangements.)

    Parameters
    ----------
    counts
        ``[..., 9]`` int64: how many fields there are of each width from 0 to 8; negative ones do not fit.
    planes
        How many planes there are.

    Returns
    -------
    Tensor
        ``[...]`` bool.
    """
    ones, twos, threes, fours, fives, sixes, sevens, eights = counts.unbind(-1)[1:]
    free = planes - fives - sixes - sevens - eights - (fours + 1) // 2
    beside_five = torch.minimum(threes, fives)
    others = threes - beside_five
    wide = 3 * threes + 4 * fours + 5 * fives + 6 * sixes + 7 * sevens + 8 * eights
    left = PLANE_BITS * planes - wide
    odd = sevens + fives - beside_five + others % 2
    fits = (free >= 0) & (others <= 2 * free + fours % 2) & (2 * twos <= left - odd)
    return fits & (ones <= left - 2 * twos) & (counts >= 0).all(-1)


def place_fields(widths: Sequence[int], groups: Sequence[int]) -> list[tuple[int, int]]:
    """Place fields in as few planes as can hold them.

    First, group by group, planes that fields of one group fill (of all combinations that do, the one with the
    widest fields), as long as what is left then needs no more planes. The other fields follow by falling
    width, those of one width by rising group, each directly above what its plane holds. Of the planes with
    room for it, a field takes one that holds a field of its group, else the one with least room, else the
    first; without any it opens a new plane. Fields of 3 bits are choosier: they take planes with exactly 3
    bits left, then planes with nothing but one field of 3 bits; the others open a plane, except the last one,
    if there is a plane with 4 bits left.

    Parameters
    ----------
    widths
        Of every field, 1 to 8.
    groups
        Group of every field.

    Returns
    -------
    list of (int, int)
        Plane and lowest bit of every field.
    """
    order = sorted(range(len(widths)), key=lambda i: (-widths[i], groups[i], i))
    needed = -(-sum(widths) // PLANE_BITS)
    while not _held(widths, needed):
        needed += 1
    planes: list[list[int]] = []
    for group in sorted(set(groups)):
        while filling := _filling(widths, [i for i in order if groups[i] == group], PLANE_BITS):
            rest = [i for i in order if i not in filling]
            if not _held([widths[i] for i in rest], needed - len(planes) - 1):
                break
            planes.append(filling)
            order = rest
    _place_rest(widths, groups, order, planes)
    places = [(0, 0)] * len(widths)
    for plane, inside in enumerate(planes):
        shifts = itertools.accumulate((widths[i] for i in inside), initial=0)
        for i, shift in zip(inside, shifts, strict=False):
            places[i] = (plane, shift)
    return places


def _held(widths: Sequence[int], planes: int) -> bool:
    counts = torch.bincount(torch.tensor(widths, dtype=torch.int64), minlength=PLANE_BITS + 1)
    return bool(planes_hold(counts, planes))


def _filling(widths: Sequence[int], order: list[int], bits: int) -> list[int]:
    """Return fields, from the first of ``order`` that do, that fill so many bits; none if none do."""
    for place, i in enumerate(order):
        if place and widths[i] == widths[order[place - 1]]:
            continue  # no better than the one before
        if widths[i] == bits:
            return [i]
        if widths[i] < bits and (more := _filling(widths, order[place + 1 :], bits - widths[i])):
            return [i, *more]
    return []


def _place_rest(
    widths: Sequence[int], groups: Sequence[int], order: Sequence[int], planes: list[list[int]]
) -> None:
    """Add fields to planes as `place_fields` describes."""
    threes = sum(widths[i] == 3 for i in order)
    for i in order:
        room = [PLANE_BITS - sum(widths[j] for j in inside) for inside in planes]
        fitting = [plane for plane, bits in enumerate(room) if bits >= widths[i]]
        if widths[i] == 3:
            threes -= 1
            exact, single, half = ([plane for plane in fitting if room[plane] == bits] for bits in (3, 5, 4))
            fitting = exact or single or ([] if threes else half)
        if not fitting:
            planes.append([i])
            continue
        foreign = [all(groups[j] != groups[i] for j in inside) for inside in planes]
        planes[min(fitting, key=lambda plane: (foreign[plane], room[plane], plane))].append(i)


def plane_gains(energies: Tensor, widths: Sequence[int], distortions: Mapping[int, float]) -> Tensor:
    """Return how much less distortion each further plane allows, if fields could straddle bytes.

    Parameters
    ----------
    energies
        ``[fields]`` float64, finite, not negative: summed variances of each field's coefficients, already
        multiplied by their importance.
    widths
        The allowed widths, ascending, the first of them 0.
    distortions
        Unit-variance squared error of each width, 1 at width 0 and falling, by less for each bit.

    Returns
    -------
    Tensor
        ``[planes]`` float64, not rising; zero from where every field is as wide as it can be.

    Raises
    ------
    ConfigError
        If widths or distortions are not as above.
    ShapeError
        If ``energies`` is not ``[fields]`` float64.
    InputError
        If an energy is negative or not finite.
    """
    options, errors = _check(energies, widths, distortions)
    rates, bits, _ = _promotions(energies, options, errors)
    each = rates.repeat_interleave(bits)
    padded = torch.cat([each, each.new_zeros(-len(each) % PLANE_BITS)])
    return padded.view(-1, PLANE_BITS).sum(1)


def allocate_fields(
    energies: Tensor, widths: Sequence[int], distortions: Mapping[int, float], planes: int
) -> Tensor:
    """Give each field a width so that the summed distortion is least and all fit the planes.

    Starts from the most promotions, those that gain most per bit first, that still fit, and then changes the
    widths of two fields at a time (three, if there are few) as long as that helps.

    Parameters
    ----------
    energies, widths, distortions
        As for `plane_gains`.
    planes
        How many planes there are, not negative.

    Returns
    -------
    Tensor
        ``[fields]`` uint8, on the device of the energies. Larger energies get no fewer bits.

    Raises
    ------
    ConfigError, ShapeError, InputError
        As `plane_gains`; ConfigError also if ``planes`` is negative.
    """
    options, errors = _check(energies, widths, distortions)
    if planes < 0:
        raise ConfigError(f"planes: expected planes >= 0, got {planes}")
    ordered, order = energies.cpu().sort(descending=True, stable=True)
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    error_of = torch.zeros(PLANE_BITS + 1, dtype=torch.float64)
    error_of[list(options)] = torch.tensor(errors, dtype=torch.float64)

    def distortion(counts: Tensor) -> Tensor:
        ends = sums[counts.flip(-1).cumsum(-1)]
        return (torch.diff(ends, prepend=ends.new_zeros(len(ends), 1)) * error_of.flip(0)).sum(1)

    counts = _most_promotions(ordered, options, errors, planes)
    least = float(distortion(counts[None]))
    changes = _changes(options, _CHANGES + (len(ordered) <= _FEW_FIELDS))
    while True:
        candidates = counts + changes
        candidates = candidates[planes_hold(candidates, planes)]
        reached = distortion(candidates)
        best = int(reached.argmin())
        # Rounding must not send the search in circles.
        if not float(reached[best]) < least * (1 - 1e-12):
            break
        counts, least = candidates[best], float(reached[best])
    chosen = torch.zeros(len(ordered), dtype=torch.uint8)
    chosen[order] = torch.arange(PLANE_BITS, -1, -1, dtype=torch.uint8).repeat_interleave(counts.flip(0))
    return chosen.to(energies.device)


def _most_promotions(ordered: Tensor, options: Sequence[int], errors: Sequence[float], planes: int) -> Tensor:
    """Return the counts, ``[9]``, after as many promotions as fit, in order of what they gain per bit."""
    _, _, steps = _promotions(ordered, options, errors)
    now = torch.tensor(options)
    counts = torch.zeros(len(steps) + 1, PLANE_BITS + 1, dtype=torch.int64)
    rows = torch.arange(1, len(steps) + 1)
    counts[rows, now[steps]] -= 1
    counts[rows, now[steps + 1]] += 1
    counts[0, 0] = len(ordered)
    counts = counts.cumsum(0)
    # None fit no planes but no promotion always does.
    return counts[int(planes_hold(counts, planes).nonzero().max())]


def _promotions(
    energies: Tensor, options: Sequence[int], errors: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return every step from a width to the next one of every field, those that gain most per bit first.

    For each step: what a bit gains, how many bits it takes, and the index of the narrower width.
    """
    bits = torch.tensor(options).diff()
    rates = -torch.tensor(errors, dtype=torch.float64).diff() / bits
    # Width by width: of equal gains, and of fields without energy, the lower step comes first.
    each = (rates[:, None] * energies.cpu()).flatten()
    order = each.argsort(descending=True, stable=True)
    step = torch.arange(len(bits)).repeat_interleave(len(energies))[order]
    return each[order], bits[step], step


@lru_cache(maxsize=8)
def _changes(options: tuple[int, ...], fields: int) -> Tensor:
    """Return all changes of counts, ``[changes, 9]``, in which up to so many fields take another width."""
    moves = []
    for narrow, wide in itertools.permutations(options, 2):
        move = [0] * (PLANE_BITS + 1)
        move[narrow], move[wide] = -1, 1
        moves.append(move)
    single = torch.tensor([[0] * (PLANE_BITS + 1), *moves])
    total = single
    for _ in range(fields - 1):
        total = (total[:, None] + single).flatten(0, 1).unique(dim=0)
    return total


def _check(
    energies: Tensor, widths: Sequence[int], distortions: Mapping[int, float]
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the widths and their distortions."""
    options, errors = check_options(widths, distortions)
    check_variances(energies)
    pairs = list(itertools.pairwise(zip(options, errors, strict=True)))
    rates = [(before - after) / (wide - narrow) for (narrow, before), (wide, after) in pairs]
    if not all(first >= second for first, second in itertools.pairwise(rates)):
        raise ConfigError(
            f"planes: expected distortions that fall by less for each bit, got {list(errors)} for widths "
            f"{list(options)}"
        )
    return options, errors
