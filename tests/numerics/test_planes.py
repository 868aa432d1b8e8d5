import functools
import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aquakv.errors import ConfigError, InputError, ShapeError
from aquakv.numerics import allocate_fields, place_fields, plane_gains, planes_hold, unit_distortions

ALL = tuple(range(9))
CUBIC = unit_distortions(ALL, arithmetic=True)

energy_lists = st.lists(
    st.floats(-4, 4).map(lambda x: 10.0**x) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=7
)
width_sets = st.sets(st.integers(1, 8), min_size=1).map(lambda chosen: (0, *sorted(chosen)))


def tensor(values) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def counts_of(widths) -> list[int]:
    return [list(widths).count(width) for width in range(9)]


def partitions(total, most=8):
    """Return everything that one plane can hold: widths, falling."""
    yield ()
    for width in range(min(total, most), 0, -1):
        for rest in partitions(total - width, width):
            yield (width, *rest)


@functools.cache
def arrangements(planes) -> frozenset:
    """Return the sorted widths of everything that planes can hold."""
    if planes == 0:
        return frozenset([()])
    return frozenset(
        tuple(sorted((*before, *more))) for before in arrangements(planes - 1) for more in partitions(8)
    )


@pytest.mark.parametrize("planes", [0, 1, 2, 3])
def test_what_planes_hold_is_what_some_arrangement_holds(planes):
    held = arrangements(planes)
    candidates = [
        widths for n in range(8 * planes + 1) for widths in _multisets(n, 8 * planes)
    ]  # all whose widths sum to what the planes have, or less
    assert held <= set(candidates)
    counts = torch.tensor([counts_of(widths) for widths in candidates])
    assert [widths in held for widths in candidates] == planes_hold(counts, planes).tolist()


def _multisets(size, most, least=1):
    """Return all rising tuples of ``size`` widths that sum to at most ``most``."""
    if size == 0:
        yield ()
        return
    for width in range(least, min(8, most // size) + 1):
        for rest in _multisets(size - 1, most - width, width):
            yield (width, *rest)


def test_fields_of_width_0_need_no_room_and_negative_counts_do_not_fit():
    assert planes_hold(torch.tensor([[7] + [0] * 8, [0, -1] + [0] * 7, [-1] + [0] * 8]), 0).tolist() == [
        True,
        False,
        False,
    ]


@settings(max_examples=300, deadline=None)
@given(fields=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 2)), max_size=40))
def test_placed_fields_overlap_nowhere_and_need_no_more_planes_than_hold_them(fields):
    widths, groups = [width for width, _ in fields], [group for _, group in fields]
    places = place_fields(widths, groups)
    taken = [0] * (1 + max((plane for plane, _ in places), default=-1))
    for width, (plane, shift) in zip(widths, places, strict=True):
        mask = ((1 << width) - 1) << shift
        assert mask < 256
        assert not taken[plane] & mask
        taken[plane] |= mask
    assert all(taken)
    counts = torch.tensor(counts_of(widths))
    assert bool(planes_hold(counts, len(taken)))
    assert not taken or not bool(planes_hold(counts, len(taken) - 1))


def test_a_groups_fields_stay_together():
    # Three heads that fill a plane each.
    widths, groups = [4, 2, 1, 1] * 3, [0] * 4 + [1] * 4 + [2] * 4
    planes = [plane for plane, _ in place_fields(widths, groups)]
    assert planes == [0] * 4 + [1] * 4 + [2] * 4
    assert len({plane for plane, _ in place_fields([5, 3, 5, 3], [0, 0, 1, 1])}) == 2
    widths, groups = [4, 4, 4, 4, 3, 1], [0, 0, 1, 1, 2, 2]
    places = place_fields(widths, groups)
    assert places == [(0, 0), (0, 4), (1, 0), (1, 4), (2, 0), (2, 3)]


def test_threes_leave_room_for_twos():
    # First fit, by falling width, puts a 3 beside the 4 and needs three planes.
    places = place_fields([4, 3, 3, 2, 2, 2], [0] * 6)
    assert {plane for plane, _ in places} == {0, 1}


@settings(max_examples=80, deadline=None)
@given(energies=energy_lists, options=width_sets, planes=st.integers(0, 4))
@example(energies=[1.0, 1.0, 1.0, 100.0, 10.0**1.75], options=(0, 1, 2, 3, 4, 6, 7), planes=3)
def test_allocation_is_optimal(energies, options, planes):
    chosen = allocate_fields(tensor(energies), options, CUBIC, planes).tolist()
    assert set(chosen) <= set(options)
    assert bool(planes_hold(torch.tensor(counts_of(chosen)), planes))
    for (more, wide), (less, narrow) in itertools.permutations(zip(energies, chosen, strict=True), 2):
        assert wide >= narrow or more <= less
    falling = sorted(energies, reverse=True)
    candidates = [
        tuple(reversed(widths)) for widths in itertools.combinations_with_replacement(options, len(energies))
    ]
    held = planes_hold(torch.tensor([counts_of(widths) for widths in candidates]), planes).tolist()
    best = min(distortion(falling, widths) for widths, fits in zip(candidates, held, strict=True) if fits)
    assert distortion(energies, chosen) == pytest.approx(best, rel=1e-9)


def distortion(energies, widths) -> float:
    return math.fsum(energy * CUBIC[width] for energy, width in zip(energies, widths, strict=True))


@pytest.mark.parametrize("fields", [12, 64])
@pytest.mark.parametrize("spread", [1.0, 2.0, 3.0])
def test_planes_are_full_and_little_is_lost_by_whole_bytes(fields, spread):
    random = torch.randn(fields, generator=torch.Generator().manual_seed(fields), dtype=torch.float64)
    energies = (spread * random).exp()
    gains = plane_gains(energies, ALL, CUBIC)
    assert len(gains) == fields
    assert bool((gains.diff() <= 1e-12 * gains[0]).all())
    for planes in range(1, fields // 2):
        chosen = allocate_fields(energies, ALL, CUBIC, planes)
        assert int(chosen.sum()) == 8 * planes
        bound = float(energies.sum() - gains[:planes].sum())
        assert bound * (1 - 1e-9) <= distortion(energies.tolist(), chosen.tolist()) < 1.05 * bound


def test_more_planes_than_fields_can_use():
    assert allocate_fields(tensor([1.0, 2.0]), ALL, CUBIC, 9).tolist() == [8, 8]
    assert allocate_fields(tensor([1.0, 0.0]), (0, 2), CUBIC, 0).tolist() == [0, 0]
    gains = plane_gains(tensor([1.0, 3.0]), (0, 1, 3), CUBIC)
    assert gains.tolist() == pytest.approx([4 * (1 - CUBIC[3])])


def test_bad_input_is_refused():
    ones = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ConfigError, match="planes >= 0"):
        allocate_fields(ones, ALL, CUBIC, -1)
    # A second bit that is worth more than the first.
    with pytest.raises(ConfigError, match="less for each bit"):
        plane_gains(ones, (0, 1, 2), {0: 1.0, 1: 0.9, 2: 0.1})
    for operation in (plane_gains, functools.partial(allocate_fields, planes=1)):
        with pytest.raises(ConfigError, match="start with 0"):
            operation(ones, (1, 2), CUBIC)
        with pytest.raises(ShapeError, match="float64"):
            operation(ones.float(), ALL, CUBIC)
        with pytest.raises(InputError, match="finite"):
            operation(-ones, ALL, CUBIC)
