import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquakv import WindowConfig
from aquakv.cache import TokenLayout
from aquakv.errors import CacheStateError


class NaiveLayout:
    """The same bookkeeping with one plain list per row: what every column is."""

    def __init__(self, window):
        self.window, self.rows = window, None

    def append(self, real):
        """``real`` says for every row and new column whether it is a token (True) or padding."""
        if self.rows is None:
            self.rows = [[] for _ in real]
        for row, new in zip(self.rows, real, strict=True):
            for is_real in new:
                started = any(kind != "pad" for kind in row)
                row.append("exact" if is_real or started else "pad")

    def due(self):
        blocks = []
        for index, row in enumerate(self.rows):
            tokens = [c for c, kind in enumerate(row) if kind != "pad"]
            eligible = tokens[self.window.sink_tokens :]
            if self.window.recent_window:
                eligible = eligible[: -self.window.recent_window]
            waiting = [c for c in eligible if row[c] == "exact"]
            size = self.window.block_tokens
            blocks += [
                (index, waiting[i : i + size]) for i in range(0, len(waiting) - len(waiting) % size, size)
            ]
        return blocks

    def commit(self, blocks):
        for index, columns in blocks:
            for column in columns:
                self.rows[index][column] = "coded"

    def exact_tail(self, index):
        row = self.rows[index]
        tokens = [c for c, kind in enumerate(row) if kind != "pad"]
        return [c for c in tokens[self.window.sink_tokens :] if row[c] == "exact"]


windows = st.builds(WindowConfig, st.integers(0, 3), st.integers(0, 4), st.integers(1, 5))


def _check(layout, naive):
    columns = len(naive.rows[0])
    assert layout.columns == columns
    assert layout.rows == len(naive.rows)
    for i, row in enumerate(naive.rows):
        assert layout.starts[i] == row.count("pad")
        assert layout.lengths()[i] == columns - row.count("pad")
        assert layout.coded[i] == row.count("coded")
        tail = naive.exact_tail(i)
        first = layout.first_exact_columns()[i]
        assert list(range(first, columns)) == tail
        pages = [c for r, c in layout.pages if r == i]
        coded = [c for c, kind in enumerate(row) if kind == "coded"]
        assert pages == coded[:: layout.window.block_tokens]
    assert tuple(layout.positions.shape) == (len(naive.rows), columns)
    assert layout.positions.dtype == torch.int32


@settings(max_examples=150, deadline=None)
@given(data=st.data(), window=windows, rows=st.integers(1, 4))
def test_layout_is_the_naive_one(data, window, rows):
    pads = [data.draw(st.integers(0, 12), label="padding") for _ in range(rows)]
    chunks = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=7), label="chunks")
    width = sum(chunks)
    real = torch.tensor([[int(c >= p) for c in range(width)] for p in pads])
    positions = (real.cumsum(1) - 1).clamp(min=0)
    layout, naive = TokenLayout(window), NaiveLayout(window)
    start = 0
    for size in chunks:
        end = start + size
        layout.append(size, positions[:, start:end], real[:, :end], rows)
        naive.append(real[:, start:end].bool().tolist())
        due = naive.due()
        assert layout.blocks_due() == [(row, columns[0]) for row, columns in due]
        # A block is a run of neighbouring columns: only so does its first one say which it is.
        assert all(columns == list(range(columns[0], columns[0] + len(columns))) for _, columns in due)
        layout.commit(layout.blocks_due())
        naive.commit(due)
        _check(layout, naive)
        assert layout.blocks_due() == []
        assert torch.equal(layout.positions, positions[:, :end].int())
        start = end
    index = layout.page_columns(layout.pages, torch.device("cpu"))
    flat = [r * width + c for r, first in layout.pages for c in range(first, first + window.block_tokens)]
    assert index.tolist() == flat
    if layout.pages:
        assert layout.is_contiguous(layout.pages) == (rows == 1)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), window=windows)
def test_crop_is_never_having_had_the_columns(data, window):
    pads = data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=3))
    width = data.draw(st.integers(1, 30))
    removed = data.draw(st.integers(0, width))
    real = torch.tensor([[int(c >= p) for c in range(width)] for p in pads])
    positions = torch.arange(width).expand(len(pads), -1)

    def run(columns):
        layout = TokenLayout(window)
        if columns:
            layout.append(columns, positions[:, :columns], real[:, :columns], len(pads))
            layout.commit(layout.blocks_due())
        return layout

    layout = run(width)
    last_coded = max((c + window.block_tokens for _, c in layout.pages), default=0)
    if width - removed < last_coded:
        before = copy.deepcopy(layout)
        with pytest.raises(CacheStateError, match=f"cannot remove {removed} tokens"):
            layout.crop(removed)
        after, expected = vars(layout), vars(before)
        assert torch.equal(layout.positions, before.positions)
        assert torch.equal(after.pop("_positions"), expected.pop("_positions"))
        assert after == expected
        return
    layout.crop(removed)
    expected = run(width - removed)
    assert layout.columns == expected.columns
    if expected.rows:
        assert layout.starts == expected.starts
        assert torch.equal(layout.positions, expected.positions)
    # What was compressed stays so, whether or not the recent window would still ask for it.
    more = torch.tensor([[1] * 40] * len(pads))
    for one in (layout, expected):
        mask = torch.cat([real[:, : one.columns], more], 1)
        one.append(40, torch.arange(40)[None], mask, len(pads))
        one.commit(one.blocks_due())
    assert (layout.starts, layout.coded) == (expected.starts, expected.coded)
    assert sorted(layout.pages) == sorted(expected.pages)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), window=windows, pads=st.lists(st.integers(0, 8), min_size=1, max_size=4))
def test_select_is_a_layout_of_the_chosen_rows(data, window, pads):
    chosen = data.draw(st.lists(st.integers(0, len(pads) - 1), min_size=1, max_size=5))
    real = torch.tensor([[int(c >= p) for c in range(30)] for p in pads])

    def run(mask):
        layout = TokenLayout(window)
        for start in (0, 15):
            positions = torch.arange(start, start + 15)[None] + mask.sum(1, keepdim=True)
            layout.append(15, positions, mask[:, : start + 15], len(mask))
            layout.commit(layout.blocks_due())
        return layout

    layout, expected = run(real), run(real[chosen])
    old_pages = list(layout.pages)
    source = layout.select(chosen)
    assert (layout.starts, layout.coded) == (expected.starts, expected.coded)
    assert torch.equal(layout.positions, expected.positions)
    assert sorted(layout.pages) == sorted(expected.pages)
    assert len(source) == len(layout.pages)
    for index, (row, column) in zip(source, layout.pages, strict=True):
        assert old_pages[index] == (chosen[row], column)


def test_without_a_mask_every_column_is_real():
    layout = TokenLayout(WindowConfig(1, 0, 2))
    layout.append(4, torch.arange(4)[None], None, 3)
    assert layout.starts == [0, 0, 0]
    assert layout.blocks_due() == [(0, 1), (1, 1), (2, 1)]


def test_a_row_that_was_all_padding_starts_where_its_mask_says():
    layout = TokenLayout(WindowConfig(1, 0, 2))
    mask = torch.tensor([[1] * 9, [0] * 6 + [1] * 3])
    layout.append(4, torch.arange(4)[None], mask[:, :4], 2)
    assert layout.starts == [0, 4]
    assert layout.lengths() == [4, 0]
    layout.append(1, torch.arange(1)[None], mask[:, :5], 2)
    assert layout.starts == [0, 5]
    layout.append(4, torch.arange(4)[None], mask[:, :9], 2)
    assert layout.starts == [0, 6]
    # A hole in a row that has begun does not move its start.
    layout.append(1, torch.arange(1)[None], torch.tensor([[1] * 10, [0] * 10]), 2)
    assert layout.starts == [0, 6]


def test_a_mask_wider_than_the_columns_is_cut():
    layout = TokenLayout(WindowConfig())
    layout.append(3, torch.arange(3)[None], torch.tensor([[0, 1, 1, 0, 0, 0]]), 1)
    assert layout.starts == [1]


@pytest.mark.parametrize(
    ("positions", "mask", "rows", "message"),
    [
        ((1, 4), (2, 9), 3, "holds 2 sequences"),
        ((1, 3), (2, 9), 2, "position ids"),
        ((3, 4), (2, 9), 2, "position ids"),
        ((3, 1, 4), (2, 9), 2, "position ids"),
        ((1, 4), (2, 8), 2, "attention mask"),
        ((1, 4), (3, 9), 2, "attention mask"),
    ],
)
def test_wrong_shapes_are_refused_and_change_nothing(positions, mask, rows, message):
    layout = TokenLayout(WindowConfig())
    layout.append(5, torch.arange(5)[None], torch.tensor([[1] * 5, [0] * 5]), 2)
    with pytest.raises(CacheStateError, match=message):
        layout.append(4, torch.zeros(positions), torch.ones(mask), rows)
    assert (layout.columns, layout.starts, layout.positions.shape[1]) == (5, [0, 5], 5)


def test_a_refused_first_append_leaves_the_layout_empty():
    layout = TokenLayout(WindowConfig())
    with pytest.raises(CacheStateError):
        layout.append(4, torch.zeros(1, 5), None, 2)
    with pytest.raises(CacheStateError):
        layout.append(4, torch.zeros(1, 4), torch.ones(2, 3), 2)
    layout.append(4, torch.zeros(1, 4), None, 3)
    assert layout.rows == 3
