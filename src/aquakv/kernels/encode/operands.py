"""What the encode kernels multiply with and quantise by, folded once from a layer's plain matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from aquakv.errors import ConfigError
from aquakv.kernels.encode.columns import TABLE_ROWS, CodeColumns, code_columns, gather_rows, move
from aquakv.kernels.operands import HEAD_DIMS, check_shapes, latent_width
from aquakv.kernels.pages import PageLayout

#: Columns that the kernel of the key coefficients computes at a time.
BLOCK_COLUMNS = 64


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
        check_shapes(
            "encode operands",
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
        )
        if innovation is not None and (latent_map is None) != (transition is None):
            raise ConfigError("encode operands: expected latent_map and transition together, got one of them")
        key_guard, value_guard = guards or (None, None)
        key_columns, by_column = code_columns(
            "keys",
            key_layout,
            head_dim,
            key_analysis.double(),
            key_synthesis.double(),
            None if key_guard is None else key_guard.roots.double(),
            1.0 if key_guard is None else key_guard.limit,
            dtype,
        )
        value_columns, value_by_column = code_columns(
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
        levels = gather_rows(dense.flatten(1), key_columns.slots) * slope[:, None]
        offset = value_offset.double()
        from_keys = by_column.new_zeros(0, value_columns.columns)
        if value_map is not None:
            offset = offset + key_bias.double() @ value_map.double()
            from_keys = -torch.cat([levels, latent_rows]) @ (value_map.double() @ value_by_column)
        following = latent_width(next_rank)
        innovations, transitions = None, None
        if innovation is not None:
            innovations = gather_rows(innovation.double(), key_columns.slots) * slope[:, None]
        if transition is not None:
            transitions = torch.nn.functional.pad(transition.double(), (0, 0, 0, latent_width(rank) - rank))
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
            None if innovations is None else _wide(innovations, following).to(dtype),
            None if transitions is None else _wide(transitions, following).to(dtype),
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
        return move(self, device)


def _unit(synthesis: Tensor, width: int) -> float:
    """Return the power of two that brings a residual's coordinates near 1."""
    mean_square = float(synthesis.double().square().sum()) / width
    return 1.0 if mean_square == 0 else 2.0 ** -round(math.log2(mean_square) / 2)


def _wide(matrix: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[1])).contiguous()
