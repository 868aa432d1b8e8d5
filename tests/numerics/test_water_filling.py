import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquakv.errors import ConfigError, InputError, ShapeError
from aquakv.numerics import (
    allocate_widths,
    cubic_levels,
    fill_bytes,
    load_grid,
    theta_for,
    unit_distortions,
    widths_at,
)

ALL = tuple(range(9))
LLOYD_MAX = unit_distortions(ALL)
# Not convex in the width: 2 and 3 bits are above the line from 1 to 4.
LUMPY = {0: 1.0, 1: 0.4, 2: 0.39, 3: 0.38, 4: 0.05, 8: 0.01}

variance_lists = st.lists(
    st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-6, 1e6)), min_size=1, max_size=40
)
width_sets = st.sets(st.integers(1, 8), min_size=1).map(lambda chosen: (0, *sorted(chosen)))


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def distortion(variances, widths, distortions) -> float:
    return math.fsum(float(v) * distortions[int(w)] for v, w in zip(variances, widths, strict=True))


def spectrum(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(3 * torch.randn(n, generator=generator, dtype=torch.float64))


def test_unit_distortions():
    assert unit_distortions((0, 1, 8)) == {0: 1.0, 1: load_grid(1, 2).mse, 8: load_grid(1, 256).mse}
    assert unit_distortions((0, 3), arithmetic=True) == {0: 1.0, 3: cubic_levels(3).mse}
    for bad in (9, -1):
        with pytest.raises(ConfigError, match="0 to 8"):
            unit_distortions((0, bad))
        with pytest.raises(ConfigError, match="1 to 8"):
            cubic_levels(bad)


@settings(max_examples=60, deadline=None)
@given(
    variances=st.lists(st.floats(0, 10), min_size=1, max_size=4),
    distortions=st.sampled_from([LLOYD_MAX, LUMPY]),
    theta=st.floats(0, 3),
)
def test_a_price_gives_the_best_allocation_of_its_total(variances, distortions, theta):
    widths = tuple(w for w in (0, 1, 2, 3, 4) if w in distortions)
    chosen = widths_at(tensor(variances), widths, distortions, theta)
    assert chosen.dtype == torch.uint8
    total = int(chosen.sum())
    options = itertools.product(widths, repeat=len(variances))
    best = min(distortion(variances, o, distortions) for o in options if sum(o) <= total)
    assert distortion(variances, chosen, distortions) <= best * (1 + 1e-12) + 1e-12


def test_widths_above_the_convex_hull_are_not_bought():
    for theta in torch.logspace(-4, 1, 40).tolist():
        assert not {2, 3} & set(widths_at(spectrum(200), (0, 1, 2, 3, 4, 8), LUMPY, theta).tolist())


@settings(max_examples=60, deadline=None)
@given(
    variances=st.lists(st.floats(0, 10), min_size=1, max_size=4),
    mean_bits=st.floats(0, 5),
    arithmetic=st.booleans(),
)
def test_allocation_over_every_width_is_optimal(variances, mean_bits, arithmetic):
    widths = (0, 1, 2, 3, 4)
    distortions = unit_distortions(widths, arithmetic)
    chosen = allocate_widths(tensor(variances), widths, distortions, mean_bits)
    budget = mean_bits * len(variances) + 1e-9
    assert int(chosen.sum()) <= budget
    options = itertools.product(widths, repeat=len(variances))
    best = min(distortion(variances, o, distortions) for o in options if sum(o) <= budget)
    assert distortion(variances, chosen, distortions) <= best * (1 + 1e-12) + 1e-12


@settings(max_examples=80, deadline=None)
@given(variances=variance_lists, widths=width_sets, mean_bits=st.floats(0, 9))
def test_allocation_spends_all_that_it_can_and_no_more(variances, widths, mean_bits):
    chosen = allocate_widths(tensor(variances), widths, LLOYD_MAX, mean_bits).tolist()
    assert set(chosen) <= set(widths)
    left = mean_bits * len(variances) + 1e-9 - sum(chosen)
    assert left >= 0
    for variance, width in zip(variances, chosen, strict=True):
        wider = [w for w in widths if w > width]
        assert variance == 0 or not wider or min(wider) - width > left
    priced = widths_at(
        tensor(variances), widths, LLOYD_MAX, theta_for([tensor(variances)], widths, LLOYD_MAX, mean_bits)
    )
    assert int(priced.sum()) <= sum(chosen)
    assert distortion(variances, chosen, LLOYD_MAX) <= distortion(variances, priced, LLOYD_MAX) * (1 + 1e-12)


def test_decimal_budgets_and_equal_variances():
    chosen = allocate_widths(torch.ones(15).double(), ALL, LLOYD_MAX, 2.2)
    assert sorted(chosen.tolist()) == [2] * 12 + [3] * 3
    assert allocate_widths(torch.zeros(3).double(), ALL, LLOYD_MAX, 2.0).tolist() == [0, 0, 0]
    assert allocate_widths(tensor([]), ALL, LLOYD_MAX, 2.0).shape == (0,)
    assert allocate_widths(spectrum(9), ALL, LLOYD_MAX, 100.0).tolist() == [8] * 9


def test_one_price_for_many_tensors():
    parts = [spectrum(100, 1), 100 * spectrum(37, 2), spectrum(250, 3) / 100, tensor([])]
    theta = theta_for(parts, ALL, LLOYD_MAX, 1.7)
    total = sum(int(widths_at(part, ALL, LLOYD_MAX, theta).sum()) for part in parts)
    assert 1.7 * 387 - 8 < total <= 1.7 * 387
    assert sum(int(widths_at(part, ALL, LLOYD_MAX, theta * 0.9).sum()) for part in parts) > total
    assert theta_for(parts, ALL, LLOYD_MAX, 8.0) == 0.0
    assert theta_for([], ALL, LLOYD_MAX, 1.0) == 0.0
    nothing = theta_for(parts, ALL, LLOYD_MAX, 0.0)
    assert all(not widths_at(part, ALL, LLOYD_MAX, nothing).any() for part in parts)


def counts_fill_bytes(widths) -> bool:
    return all(widths.count(w) * w % 8 == 0 for w in set(widths))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), variances=variance_lists, widths=width_sets)
def test_filled_allocations_fill_bytes_and_stay_near(data, variances, widths):
    before = data.draw(st.lists(st.sampled_from(widths), min_size=len(variances), max_size=len(variances)))
    values = tensor(variances)
    filled = fill_bytes(torch.tensor(before, dtype=torch.uint8), values, widths, LLOYD_MAX)
    assert filled.dtype == torch.uint8
    after = filled.tolist()
    assert set(after) <= set(widths)
    assert counts_fill_bytes(after)
    by_variance = [after[j] for j in values.argsort(descending=True, stable=True).tolist()]
    assert by_variance == sorted(after, reverse=True)
    if counts_fill_bytes(before):
        assert sum(after) == sum(before)
        assert distortion(variances, after, LLOYD_MAX) <= distortion(variances, before, LLOYD_MAX) * (
            1 + 1e-12
        )


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(), n=st.integers(1, 9), widths=st.sampled_from([(0, 4), (0, 2, 4), (0, 4, 6), (0, 2, 4, 8)])
)
def test_filling_is_optimal(data, n, widths):
    variances = data.draw(st.lists(st.floats(0, 10), min_size=n, max_size=n))
    before = data.draw(st.lists(st.sampled_from(widths), min_size=n, max_size=n))
    after = fill_bytes(torch.tensor(before, dtype=torch.uint8), tensor(variances), widths, LLOYD_MAX).tolist()
    ranked = sorted(variances, reverse=True)
    options = [
        sorted(option, reverse=True)
        for option in itertools.combinations_with_replacement(widths, n)
        if counts_fill_bytes(option)
    ]
    nearest = min(abs(sum(option) - sum(before)) for option in options)
    assert abs(sum(after) - sum(before)) == nearest
    best = min(distortion(ranked, option, LLOYD_MAX) for option in options if sum(option) == sum(after))
    assert distortion(variances, after, LLOYD_MAX) == pytest.approx(best, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("widths", [ALL, (0, 1, 2, 4, 8), (0, 1, 2, 4), (0, 2), (0, 1)])
@pytest.mark.parametrize("mean_bits", [0.4, 1.3, 2.15])
def test_filling_costs_next_to_nothing_at_real_sizes(widths, mean_bits):
    variances = spectrum(1024, 5)
    mean_bits = min(mean_bits, 0.9 * widths[-1])
    chosen = allocate_widths(variances, widths, LLOYD_MAX, mean_bits)
    filled = fill_bytes(chosen, variances, widths, LLOYD_MAX)
    assert counts_fill_bytes(filled.tolist())
    assert abs(int(filled.sum(dtype=torch.int64)) - int(chosen.sum(dtype=torch.int64))) <= 4
    lost = distortion(variances, filled, LLOYD_MAX) / distortion(variances, chosen, LLOYD_MAX)
    assert lost < 1.01


def test_tiny_allocations_that_cannot_fill_bytes():
    def fill(before, widths):
        values = tensor([3.0, 2.0, 1.0][: len(before)])
        return fill_bytes(torch.tensor(before, dtype=torch.uint8), values, widths, LLOYD_MAX).tolist()

    assert fill([1, 1, 1], (0, 1)) == [0, 0, 0]
    assert fill([2, 2, 2], (0, 1, 2, 4)) == [4, 4, 0]
    assert fill([7], (0, 7, 8)) == [8]
    assert fill([4], (0, 4, 8)) == [0]
    assert fill([], (0, 4)) == []


def test_bad_input_is_refused():
    ones = torch.ones(4).double()
    for widths in ((), (1, 2), (0, 2, 1), (0, 1, 1), (0, 9)):
        with pytest.raises(ConfigError, match="widths"):
            widths_at(ones, widths, {**LLOYD_MAX, 9: 1e-6}, 0.1)
    for distortions in ({0: 1.0}, {0: 2.0, 1: 1.0}, {0: 1.0, 1: 1.5}, {0: 1.0, 1: math.nan}):
        with pytest.raises(ConfigError, match="distortion"):
            allocate_widths(ones, (0, 1), distortions, 1.0)
    for mean_bits in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="mean bits"):
            theta_for([ones], ALL, LLOYD_MAX, mean_bits)
    with pytest.raises(ConfigError, match="price"):
        widths_at(ones, ALL, LLOYD_MAX, -1.0)
    for bad in (ones.float(), ones[None]):
        with pytest.raises(ShapeError):
            allocate_widths(bad, ALL, LLOYD_MAX, 1.0)
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError):
            allocate_widths(ones * value, ALL, LLOYD_MAX, 1.0)
    for allocation in (torch.zeros(3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(ShapeError, match="uint8"):
            fill_bytes(allocation, ones, ALL, LLOYD_MAX)
