"""Coefficients as columns, and how they become codes in pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from aquakv.errors import ConfigError
from aquakv.kernels.pages import FIELD_COLUMNS, Field, PageLayout
from aquakv.numerics import cubic_levels

Moved = TypeVar("Moved")

#: What a row of `CodeColumns.table` holds of 16 coefficients each.
TABLE_ROWS = ("most", "rise", "cubic", "bend", "top", "slope", "gain", "weight", "middle")

#: A float32 of this size has halves as its last bit: added to x, it leaves twice the stored code there.
MAGIC = 2.0**22

#: Fields that the kernel works on at a time.
FIELDS_AT_ONCE = 4

#: Furthest that a codec's float32 matrices are from what they should be, relative to 1.
_ORTHONORMAL = 1e-2


@dataclass(frozen=True, eq=False)
class CodeColumns:
    """How columns of coefficients become codes in pages.

    A group's columns are its fields, 16 columns each, in the order of the layout; then, with a guard, what a
    residual has beside the coded coefficients, so that its squared weighted error is a weighted sum of
    squares. Columns of a field without a coefficient hold such numbers too.

    Attributes
    ----------
    layout
        The page layout.
    fields
        ``[fields, 2]`` int32, in the order of planes and shifts; fields without bits and coefficients make
        them a multiple of `FIELDS_AT_ONCE`. First ``plane | width << 16 | shift << 20 | first of its plane <<
        24 | last << 25 | some levels are cubic << 26``; then the field's first column.
    table
        ``[fields, 9, 16]`` float32 by `TABLE_ROWS`: of width w, the largest x, 0 without a coefficient;
        bounds between levels are ``m * (rise + cubic * m**2)``, rise infinite where there are none (one bit,
        no coefficient), whose inverse is near ``u / (rise + bend * u)`` up to ``top``; levels are ``slope * x
        * (1 + gain * x**2)``, gain rounded to the operands' dtype; weight of the error in the guard, over the
        root of its limit; middle is `MAGIC` and the stored code that would be x = 0, or `MAGIC` alone
        without a coefficient.
    slots
        ``[fields * 16]`` int64: the coefficient in every slot, -1 if none.
    coded, rest
        ``[columns]`` float32: 1 where a column is coded; weight of what is not, over the limit's root.
    first_columns
        ``[groups + 1]`` int32: where each group's columns begin.
    coefficients
        How many are coded.
    """

    layout: PageLayout
    fields: Tensor
    table: Tensor
    slots: Tensor
    coded: Tensor
    rest: Tensor
    first_columns: Tensor
    coefficients: int

    @property
    def columns(self) -> int:
        """Columns of all groups."""
        return len(self.coded)

    def to(self, device: torch.device | str) -> CodeColumns:
        """Return the tables on another device."""
        return move(self, device)


def code_columns(
    name: str,
    layout: PageLayout,
    size: int,
    analysis: Tensor,
    synthesis: Tensor,
    roots: Tensor | None,
    limit: float,
    dtype: torch.dtype,
) -> tuple[CodeColumns, Tensor]:
    """Describe one tensor's columns; also return ``[size, columns]``, from a group's residual to them.

    Parameters
    ----------
    name
        What the tensor is called in errors.
    layout
        Its page layout.
    size
        Coordinates of a group.
    analysis, synthesis
        ``[size, coefficients]`` float64, from the residual of a coefficient's own group, and the inverse.
    roots, limit
        ``[groups, size, size]`` float64: root of each group's weight in the guard, and the guard's limit;
        None without a guard.
    dtype
        Of the operands.

    Raises
    ------
    ConfigError
        The guard's norm is not the one in which the transform is orthogonal.
    """
    order = _Order([0], [], {}, {}, [0.0] * layout.coefficients)
    extended = [analysis]
    for group in range(layout.num_groups):
        own = layout.group_fields(group)
        members = [i for f in own for i in f.coefficients]
        extra, unit = 0, 1.0
        if roots is not None:
            weights, beside = _beside(name, roots[group], analysis[:, members], synthesis[members])
            for i, weight in zip(members, weights.tolist(), strict=True):
                order.weights[i] = weight
            # In units of some coefficient's deviation, so that their size is moderate.
            unit = float(weights.median()) if members else 1.0
            extended.append(beside / unit)
            extra = beside.shape[1]
        order.add(own, sum(part.shape[1] for part in extended) - extra, extra, unit)
    root_limit = math.sqrt(limit)
    words, table, slots = _tables(layout, order, root_limit)
    gain = TABLE_ROWS.index("gain")
    table[:, gain] = table[:, gain].to(dtype).double()
    coded = [0 <= c < layout.coefficients for c in order.columns]
    rest = [order.rest.get(c, 0.0) / root_limit for c in order.columns]
    described = CodeColumns(
        layout,
        _on_cpu(words, torch.int32).view(-1, 2),
        table.float(),
        _on_cpu(slots, torch.int64),
        _on_cpu(coded, torch.float32),
        _on_cpu(rest, torch.float32),
        _on_cpu(order.first, torch.int32),
        sum(coded),
    )
    return described, gather_rows(torch.cat(extended, 1).T, _on_cpu(order.columns, torch.int64)).T


class _Order(NamedTuple):
    """Columns in order, as they come.

    Attributes
    ----------
    first
        Where groups begin, and the end.
    columns
        Of each column, its coefficient; beyond those, the number of something beside; -1 for nothing.
    starts, rest
        Each field's first column; weights of what is beside, by number.
    weights
        Of the coefficients' errors.
    """

    first: list[int]
    columns: list[int]
    starts: dict[Field, int]
    rest: dict[int, float]
    weights: list[float]

    def add(self, own: Sequence[Field], number: int, extra: int, unit: float) -> None:
        """Add a group's fields and what is beside, numbered from ``number`` on, of weight ``unit``."""
        columns: list[int] = []
        for f in own:
            self.starts[f] = self.first[-1] + len(columns)
            columns += [*f.coefficients, *[-1] * (FIELD_COLUMNS - len(f.coefficients))]
        beside = list(range(number, number + extra))
        self.rest.update(dict.fromkeys(beside, unit))
        columns = [beside.pop(0) if c < 0 and beside else c for c in columns] + beside
        columns += [-1] * (-len(columns) % FIELD_COLUMNS)
        self.columns.extend(columns)
        self.first.append(len(self.columns))


def _tables(
    layout: PageLayout, order: _Order, root_limit: float
) -> tuple[list[list[int]], Tensor, list[int]]:
    """Return the words of the fields, the table in float64 and the slots; see `CodeColumns`."""
    by_plane = sorted(layout.fields, key=lambda f: (f.plane, f.shift))
    words, slots = [], []
    padding = -len(by_plane) % FIELDS_AT_ONCE
    shape = len(by_plane) + padding, len(TABLE_ROWS), FIELD_COLUMNS
    table = torch.zeros(shape, dtype=torch.float64, device="cpu")
    table[:, TABLE_ROWS.index("rise")] = math.inf
    table[:, TABLE_ROWS.index("middle")] = MAGIC
    for index, f in enumerate(by_plane):
        before = by_plane[index - 1].plane if index else -1
        after = by_plane[index + 1].plane if index + 1 < len(by_plane) else -1
        cubic = any(layout.widths[i] > 2 for i in f.coefficients)
        flags = (before != f.plane) << 24 | (after != f.plane) << 25 | cubic << 26
        words.append([f.plane | f.width << 16 | f.shift << 20 | flags, order.starts[f]])
        for column, i in enumerate(f.coefficients):
            # A field is as wide as its widest coefficient; the levels of the others lie in the middle.
            row = (*_level_row(layout.widths[i]), order.weights[i] / root_limit, MAGIC + f.centre)
            table[index, :, column] = _on_cpu(row, torch.float64)
        slots += [*f.coefficients, *[-1] * (FIELD_COLUMNS - len(f.coefficients))]
    return words + [[0, 0]] * padding, table, slots + [-1] * (padding * FIELD_COLUMNS)


def _on_cpu(numbers: Sequence[Any], dtype: torch.dtype) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device="cpu")


def _level_row(width: int) -> tuple[float, ...]:
    """Return the largest x of a width, and what its bounds and levels follow from."""
    linear, cubic, _ = cubic_levels(width)
    half = 1 << (width - 1)
    # The bound between levels m - 1/2 and m + 1/2 is their mean.
    rise = linear + 0.75 * cubic
    top = half * (rise + cubic * half * half)
    bend = (top / half - rise) / top
    return half - 0.5, rise if half > 1 else math.inf, cubic, bend, top, linear, cubic / linear


def _beside(name: str, root: Tensor, analysis: Tensor, synthesis: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of coefficients' errors, and ``[size, rest]``, what else adds to the error.

    With the weight's root R and analysis F, the columns of ``R⁻¹ F`` are orthogonal. With Q orthonormal and
    orthogonal to them, an error e weighs ``|e R|² = Σ (weight_j (e F)_j)² + |e R Q|²``.
    """
    count = analysis.shape[1]
    directions = torch.linalg.solve(root, analysis)
    weights = 1 / directions.norm(dim=0)
    basis = directions * weights
    beside = root @ torch.linalg.qr(basis, mode="complete").Q[:, count:]
    exact = torch.eye(count, dtype=root.dtype, device=root.device)
    if count:
        off = max(
            float((basis.T @ basis - exact).abs().max()), float((synthesis @ analysis - exact).abs().max())
        )
        if beside.shape[1]:
            off = max(off, float(((synthesis / weights[:, None]) @ beside).abs().max()))
        if not off < _ORTHONORMAL:
            raise ConfigError(
                f"encode operands: expected {name} whose guard has the norm of their transform, got "
                f"coefficients that are {off:.1g} from orthogonal in it"
            )
    return weights, beside


def gather_rows(matrix: Tensor, index: Tensor) -> Tensor:
    """Gather rows; zeros where the index is negative."""
    padded = torch.cat([matrix, matrix.new_zeros(1, matrix.shape[1])])
    index = index.to(matrix.device)
    return padded[index.where(index >= 0, len(matrix))]


def move(value: Moved, device: torch.device | str) -> Moved:
    """Return a dataclass of tensors and `CodeColumns` on another device."""
    parts = {f.name: getattr(value, f.name) for f in fields(value)}  # pyright: ignore[reportArgumentType]
    moved = {k: v.to(device) for k, v in parts.items() if isinstance(v, (Tensor, CodeColumns))}
    return replace(value, **moved)  # pyright: ignore[reportArgumentType]
