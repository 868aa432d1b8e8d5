"""What the encode kernels multiply with and quantise by, folded once from a layer's plain matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from aquakv.errors import ConfigError, ShapeError
from aquakv.kernels.operands import HEAD_DIMS, latent_width
from aquakv.kernels.pages import FIELD_COLUMNS, PageLayout
from aquakv.numerics import cubic_levels

Moved = TypeVar("Moved", "CodeColumns", "EncodeOperands")

#: Columns that the kernel of the key coefficients computes at a time.
BLOCK_COLUMNS = 64

#: What a row of `CodeColumns.table` holds of 16 coefficients each.
TABLE_ROWS = ("half", "rise", "cubic", "bend", "top", "slope", "gain", "weight")

#: Furthest that a codec's float32 matrices are from what they should be, relative to 1.
_ORTHONORMAL = 1e-2


class Guard(NamedTuple):
    """The outlier guard of keys or values, see `aquakv.codec.guard.OutlierGuard`.

    Attributes
    ----------
    roots
        ``[kv_heads, head_dim, head_dim]``: symmetric root of each head's weight.
    limit
        Squared weighted error of an outlier.
    """

    roots: Tensor
    limit: float


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
        ``[fields, 2]`` int32, in the order of planes and shifts. First ``plane | width << 16 | shift << 20 |
        first of its plane << 24 | last << 25 | some levels are cubic << 26``; then the field's first column.
    table
        ``[fields, 8, 16]`` float32 by `TABLE_ROWS`: of width w, half its levels (0 without a coefficient,
        whose other numbers are of no matter); bounds between levels are ``m * (rise + cubic * m**2)``, whose
        inverse is near ``u / (rise + bend * u)`` up to ``top``; levels are ``slope * x * (1 + gain *
        x**2)``, gain rounded to the operands' dtype; weight of the error in the guard, over the root of its
        limit.
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
        return _to(self, device)


@dataclass(frozen=True, eq=False)
class EncodeOperands:
    """One layer's operands; `build` folds them.

    All matrices are of one dtype, float16 for speed; coefficients are in units of their deviations.

    Attributes
    ----------
    keys, values
        What becomes of coefficients.
    num_kv_heads, head_dim
        Shapes.
    key_offset, value_offset
        ``[kv_heads * head_dim]`` float32: what keys and values are without latent and codes.
    latent_map
        ``[latent_width, kv_heads * head_dim]``: from the latent to keys; None without a latent.
    key_unit, value_unit
        Powers of two that bring residuals near 1, so that float16 holds them.
    key_analysis
        ``[kv_heads, head_dim, blocks * 64]``: from a head's residual, in units, to its columns.
    value_analysis
        ``[key slots + latent_width + kv_heads * head_dim, columns]``: from key levels times scales, latent
        and centred values in units, side by side, to the columns of the values. Where values are not
        predicted, from centred values alone.
    innovation, transition, next_offset
        ``[key slots, next_width]``, ``[latent_width, next_width]`` and ``[next_width]`` float32: the next
        latent, as in `DecodeOperands`, in the order of the slots here.
    guarded
        Whether squared errors over the guard's limits are computed.
    """

    keys: CodeColumns
    values: CodeColumns
    num_kv_heads: int
    head_dim: int
    key_offset: Tensor
    value_offset: Tensor
    latent_map: Tensor | None
    key_unit: float
    value_unit: float
    key_analysis: Tensor
    value_analysis: Tensor
    innovation: Tensor | None
    transition: Tensor | None
    next_offset: Tensor | None
    guarded: bool

    @classmethod
    def build(
        cls,
        key_layout: PageLayout,
        value_layout: PageLayout,
        *,
        key_analysis: Tensor,
        key_synthesis: Tensor,
        key_offset: Tensor,
        key_bias: Tensor,
        value_analysis: Tensor,
        value_synthesis: Tensor,
        value_offset: Tensor,
        value_map: Tensor | None = None,
        latent_map: Tensor | None = None,
        innovation: Tensor | None = None,
        next_offset: Tensor | None = None,
        transition: Tensor | None = None,
        guards: tuple[Guard, Guard] | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> EncodeOperands:
        """Fold plain matrices, in float64, and round them to ``dtype``.

        Parameters
        ----------
        key_layout, value_layout
            Page layouts; the groups of the keys are the KV heads, the values are one group.
        key_analysis, value_analysis
            ``[head_dim, key coefficients]``, of a coefficient's own head, and ``[kv_heads * head_dim, value
            coefficients]``: from residuals to coefficients over their deviations.
        key_synthesis, value_synthesis
            Their inverses, as for `DecodeOperands.build`.
        key_offset, value_offset
            ``[kv_heads * head_dim]``: bias of the predictor plus mean.
        key_bias
            ``[kv_heads * head_dim]``: bias of the keys' predictor.
        value_map, latent_map, innovation, next_offset, transition
            As for `DecodeOperands.build`.
        guards
            Of keys and values; None measures no errors.
        dtype
            float16; float32 keeps the codes of the float32 definition.

        Raises
        ------
        ShapeError, ConfigError
            Shapes do not fit each other, the kernels do not support them, or a guard's norm is not the one in
            which the transform is orthogonal.
        """
        heads, head_dim = key_layout.num_groups, key_analysis.shape[0]
        width = heads * head_dim
        if head_dim not in HEAD_DIMS:
            raise ConfigError(f"encode operands: expected head_dim {HEAD_DIMS}, got {head_dim}")
        if value_layout.num_groups != 1:
            raise ConfigError(
                f"encode operands: expected values in one group, got {value_layout.num_groups} groups"
            )
        rank = 0 if latent_map is None else latent_map.shape[0]
        next_rank = 0 if innovation is None else innovation.shape[1]
        counts = key_layout.coefficients, value_layout.coefficients
        root_shape = (heads, head_dim, head_dim)
        for name, tensor, shape in (
            ("key_analysis", key_analysis, (head_dim, counts[0])),
            ("key_synthesis", key_synthesis, (counts[0], head_dim)),
            ("key_offset", key_offset, (width,)),
            ("key_bias", key_bias, (width,)),
            ("value_analysis", value_analysis, (width, counts[1])),
            ("value_synthesis", value_synthesis, (counts[1], width)),
            ("value_offset", value_offset, (width,)),
            ("value_map", value_map, (width, width)),
            ("latent_map", latent_map, (rank, width)),
            ("innovation", innovation, (counts[0], next_rank)),
            ("next_offset", next_offset, (next_rank,)),
            ("transition", transition, (rank, next_rank)),
            ("key roots", guards[0].roots if guards else None, root_shape),
            ("value roots", guards[1].roots if guards else None, root_shape),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ShapeError(f"encode operands: expected {name} {list(shape)}, got {list(tensor.shape)}")
        if innovation is not None and (latent_map is None) != (transition is None):
            raise ConfigError("encode operands: expected latent_map and transition together, got one of them")
        key_guard, value_guard = guards or (None, None)
        key_columns, by_column = _columns(
            "keys",
            key_layout,
            head_dim,
            key_analysis.double(),
            key_synthesis.double(),
            None if key_guard is None else key_guard.roots.double(),
            1.0 if key_guard is None else key_guard.limit,
            dtype,
        )
        value_columns, value_by_column = _columns(
            "values",
            value_layout,
            width,
            value_analysis.double(),
            value_synthesis.double(),
            None if value_guard is None else torch.block_diag(*value_guard.roots.double())[None],
            1.0 if value_guard is None else value_guard.limit,
            dtype,
        )
        key_unit, value_unit = _unit(key_synthesis, width), _unit(value_synthesis, width)
        first = key_columns.first_columns.tolist()
        most = max(end - start for start, end in pairwise(first))
        blocks = -(-most // BLOCK_COLUMNS)
        per_head = by_column.new_zeros(heads, head_dim, blocks * BLOCK_COLUMNS)
        for head, (start, end) in enumerate(pairwise(first)):
            per_head[head, :, : end - start] = by_column[:, start:end] / key_unit

        latents, latent_rows = None, by_column.new_zeros(latent_width(rank), width)
        if latent_map is not None:
            latents = torch.nn.functional.pad(latent_map.double(), (0, 0, 0, latent_width(rank) - rank))
            latent_rows = latents
        dense = by_column.new_zeros(counts[0], heads, head_dim)
        index = torch.arange(counts[0], device=dense.device)
        dense[index, list(key_layout.groups)] = key_synthesis.double()
        slope = key_columns.table[:, TABLE_ROWS.index("slope")].flatten().double().to(dense.device)
        levels = _rows(dense.flatten(1), key_columns.slots) * slope[:, None]
        offset = value_offset.double()
        from_keys = by_column.new_zeros(0, value_columns.columns)
        if value_map is not None:
            offset = offset + key_bias.double() @ value_map.double()
            from_keys = -torch.cat([levels, latent_rows]) @ (value_map.double() @ value_by_column)
        following = latent_width(next_rank)
        device = key_analysis.device
        return cls(
            key_columns.to(device),
            value_columns.to(device),
            heads,
            head_dim,
            key_offset.float().contiguous(),
            offset.float().contiguous(),
            None if latents is None else latents.to(dtype).contiguous(),
            key_unit,
            value_unit,
            per_head.to(dtype),
            torch.cat([from_keys, value_by_column / value_unit]).to(dtype).contiguous(),
            None
            if innovation is None
            else _wide(_rows(innovation.double(), key_columns.slots) * slope[:, None], following).to(dtype),
            None
            if transition is None or innovation is None
            else _wide(
                torch.nn.functional.pad(transition.double(), (0, 0, 0, latent_width(rank) - rank)), following
            ).to(dtype),
            None if next_offset is None else _wide(next_offset.double()[None], following)[0].float(),
            guards is not None,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices."""
        return self.key_analysis.dtype

    @property
    def features(self) -> int:
        """``kv_heads * head_dim``."""
        return self.num_kv_heads * self.head_dim

    @property
    def predicts_values(self) -> bool:
        """Whether values are predicted from keys."""
        return len(self.value_analysis) > self.features

    @property
    def latent_width(self) -> int:
        """Numbers of a latent: its rank rounded up to 16, 32 or 64; 0 without one."""
        return 0 if self.latent_map is None else self.latent_map.shape[0]

    @property
    def next_width(self) -> int:
        """Numbers of the next layer's latent; 0 if it is not wanted."""
        return 0 if self.innovation is None else self.innovation.shape[1]

    def to(self, device: torch.device | str) -> EncodeOperands:
        """Return the operands on another device."""
        return _to(self, device)


def _columns(
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

    ``analysis`` ``[size, coefficients]`` and ``synthesis`` are within a group of ``size`` coordinates; roots
    are ``[groups, size, size]``.
    """
    weights = analysis.new_zeros(layout.coefficients)
    first, order, starts, rests = [0], [], {}, {}
    extended = [analysis]
    next_extra = layout.coefficients
    for group in range(layout.num_groups):
        own = layout.group_fields(group)
        members = [i for f in own for i in f.coefficients]
        columns: list[int] = []
        for f in own:
            starts[f] = first[-1] + len(columns)
            columns += [*f.coefficients, *[-1] * (FIELD_COLUMNS - len(f.coefficients))]
        if roots is not None:
            found, extra = _beside(name, roots[group], analysis[:, members], synthesis[members])
            weights[members] = found
            # In units of some coefficient's deviation, so that their size is moderate.
            unit = float(found.median()) if members else 1.0
            extended.append(extra / unit)
            numbers = list(range(next_extra, next_extra + extra.shape[1]))
            rests.update(dict.fromkeys(numbers, unit))
            next_extra += extra.shape[1]
            columns = [numbers.pop(0) if c < 0 and numbers else c for c in columns] + numbers
        columns += [-1] * (-len(columns) % FIELD_COLUMNS)
        order += columns
        first.append(first[-1] + len(columns))
    root_limit, error_weights = math.sqrt(limit), weights.tolist()
    by_plane = sorted(layout.fields, key=lambda f: (f.plane, f.shift))
    words, table, slots = (
        [],
        torch.zeros(len(by_plane), len(TABLE_ROWS), FIELD_COLUMNS, dtype=torch.float64),
        [],
    )
    table[:, TABLE_ROWS.index("rise")] = 1.0  # what is divided by
    for index, f in enumerate(by_plane):
        before = by_plane[index - 1].plane if index else -1
        after = by_plane[index + 1].plane if index + 1 < len(by_plane) else -1
        cubic = any(layout.widths[i] > 2 for i in f.coefficients)
        flags = (before != f.plane) << 24 | (after != f.plane) << 25 | cubic << 26
        words.append([f.plane | f.width << 16 | f.shift << 20 | flags, starts[f]])
        for column, i in enumerate(f.coefficients):
            table[index, :-1, column] = torch.tensor(_level_row(layout.widths[i]), dtype=torch.float64)
            table[index, -1, column] = error_weights[i] / root_limit
        slots += [*f.coefficients, *[-1] * (FIELD_COLUMNS - len(f.coefficients))]
    gain = TABLE_ROWS.index("gain")
    table[:, gain] = table[:, gain].to(dtype).double()
    coded = torch.tensor([0 <= c < layout.coefficients for c in order], dtype=torch.float32)
    rest = torch.tensor([rests.get(c, 0.0) / root_limit for c in order], dtype=torch.float32)
    described = CodeColumns(
        layout,
        torch.tensor(words, dtype=torch.int32).view(-1, 2),
        table.float(),
        torch.tensor(slots, dtype=torch.int64),
        coded,
        rest,
        torch.tensor(first, dtype=torch.int32),
        int(coded.sum()),
    )
    columns_of = torch.tensor(order, dtype=torch.int64)
    return described, _rows(torch.cat(extended, 1).T, columns_of).T


def _level_row(width: int) -> tuple[float, ...]:
    """Return half the levels of a width, and what their bounds and levels follow from."""
    linear, cubic, _ = cubic_levels(width)
    half = 1 << (width - 1)
    # The bound between levels m - 1/2 and m + 1/2 is their mean.
    rise = linear + 0.75 * cubic
    top = half * (rise + cubic * half * half)
    return half, rise, cubic, (top / half - rise) / top, top, linear, cubic / linear


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


def _unit(synthesis: Tensor, width: int) -> float:
    """Return the power of two that brings a residual's coordinates near 1."""
    mean_square = float(synthesis.double().square().sum()) / width
    return 1.0 if mean_square == 0 else 2.0 ** -round(math.log2(mean_square) / 2)


def _rows(matrix: Tensor, index: Tensor) -> Tensor:
    """Gather rows; zeros where the index is negative."""
    padded = torch.cat([matrix, matrix.new_zeros(1, matrix.shape[1])])
    index = index.to(matrix.device)
    return padded[index.where(index >= 0, len(matrix))]


def _wide(matrix: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[1])).contiguous()


def _to(value: Moved, device: torch.device | str) -> Moved:
    parts = {f.name: getattr(value, f.name) for f in fields(value)}
    return replace(
        value, **{k: v.to(device) for k, v in parts.items() if isinstance(v, (Tensor, CodeColumns))}
    )
