"""What reconstructing multiplies with, folded once from a layer's plain matrices."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from aquakv.errors import ConfigError
from aquakv.kernels.operands import HEAD_DIMS, check_shapes, latent_width
from aquakv.kernels.pages import FIELD_COLUMNS, PageLayout, level_slopes

Moved = TypeVar("Moved", "FieldTables", "ReconstructOperands")

#: dtypes that keys and values can be reconstructed in.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class FieldTables:
    """How fields become columns of scaled levels, 16 each, in the order of the layout.

    Attributes
    ----------
    layout
        The page layout.
    fields
        ``[fields]`` int32: ``plane | width << 16 | shift << 20``.
    gains
        ``[fields, 16]`` float32: levels are ``x * (1 + gain * x**2)``; -1 where there is no coefficient.
    first_fields
        ``[groups + 1]`` int32: where each group's fields begin.
    slots
        ``[fields * 16]`` int64: the coefficient in every column, -1 if none.
    """

    layout: PageLayout
    fields: Tensor
    gains: Tensor
    first_fields: Tensor
    slots: Tensor

    @classmethod
    def build(cls, layout: PageLayout) -> FieldTables:
        """Describe a layout, on the CPU."""
        words = [f.plane | f.width << 16 | f.shift << 20 for f in layout.fields]
        slots = [
            c for f in layout.fields for c in (*f.coefficients, *[-1] * (FIELD_COLUMNS - len(f.coefficients)))
        ]
        index = torch.tensor(slots, dtype=torch.int64, device="cpu")
        gains = torch.cat([level_slopes(layout)[1], torch.tensor([-1.0], dtype=torch.float64, device="cpu")])
        counts = [len(layout.group_fields(group)) for group in range(layout.num_groups)]
        first = torch.tensor([0, *counts], dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
        return cls(
            layout,
            torch.tensor(words, dtype=torch.int32, device="cpu"),
            gains[index].float().view(-1, FIELD_COLUMNS),
            first,
            index,
        )

    def to(self, device: torch.device | str) -> FieldTables:
        """Return the tables on another device."""
        return _to(self, device)


@dataclass(frozen=True, eq=False)
class ReconstructOperands:
    """One layer's operands; `build` folds them.

    Attributes
    ----------
    keys, values
        How columns follow from pages.
    num_kv_heads, head_dim
        Shapes.
    key_synthesis
        ``[key columns, head_dim]``: from scaled levels to their own head's keys.
    latent_map
        ``[latent_width, kv_heads * head_dim]``: from the latent to keys; None without a latent.
    value_synthesis
        ``[key columns + latent_width + value columns, kv_heads * head_dim]``: from all scaled levels and the
        latent, side by side, to values; from value levels alone where values are not predicted.
    key_bias, key_offset
        ``[kv_heads * head_dim]`` float32: what is added for centred keys and for keys as they are.
    value_bias, value_offset
        ``[kv_heads * head_dim]`` in the matrices' dtype, likewise.
    """

    keys: FieldTables
    values: FieldTables
    num_kv_heads: int
    head_dim: int
    key_synthesis: Tensor
    latent_map: Tensor | None
    value_synthesis: Tensor
    key_bias: Tensor
    key_offset: Tensor
    value_bias: Tensor
    value_offset: Tensor

    @classmethod
    def build(
        cls,
        key_layout: PageLayout,
        value_layout: PageLayout,
        *,
        key_synthesis: Tensor,
        key_bias: Tensor,
        key_mean: Tensor,
        value_synthesis: Tensor,
        value_bias: Tensor,
        value_mean: Tensor,
        value_map: Tensor | None = None,
        latent_map: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> ReconstructOperands:
        """Fold plain matrices, in float64, and round them to ``dtype``.

        Parameters
        ----------
        key_layout, value_layout, key_synthesis, key_bias, key_mean, value_synthesis, value_map, latent_map
            As for `DecodeOperands.build`.
        value_bias, value_mean
            ``[kv_heads * head_dim]``: bias of the values' predictor, mean of the values.
        dtype
            In which keys and values are wanted: float16, bfloat16 or float32.

        Raises
        ------
        ShapeError, ConfigError
            Shapes do not fit each other, or the kernels do not support them.
        """
        heads, head_dim = key_layout.num_groups, key_synthesis.shape[1]
        width = heads * head_dim
        if dtype not in DTYPES:
            raise ConfigError(f"reconstruct operands: expected float16, bfloat16 or float32, got {dtype}")
        rank = 0 if latent_map is None else latent_map.shape[0]
        check_shapes(
            "reconstruct operands",
            ("key_synthesis", key_synthesis, (key_layout.coefficients, head_dim)),
            ("key_bias", key_bias, (width,)),
            ("key_mean", key_mean, (width,)),
            ("value_synthesis", value_synthesis, (value_layout.coefficients, width)),
            ("value_bias", value_bias, (width,)),
            ("value_mean", value_mean, (width,)),
            ("value_map", value_map, (width, width)),
            ("latent_map", latent_map, (rank, width)),
        )
        keys, values = (
            FieldTables.build(layout).to(key_synthesis.device) for layout in (key_layout, value_layout)
        )
        per_head = _levels(key_synthesis, keys)
        latent = None
        if latent_map is not None:
            latent = torch.nn.functional.pad(latent_map.double(), (0, 0, 0, latent_width(rank) - rank))
        parts, value_base = [], value_bias.double()
        if value_map is not None:
            dense = per_head.new_zeros(len(per_head), heads, head_dim)
            owner = torch.tensor(
                [f.group for f in key_layout.fields for _ in range(FIELD_COLUMNS)],
                dtype=torch.int64,
                device=dense.device,
            )
            dense[torch.arange(len(owner), device=dense.device), owner] = per_head
            parts = [dense.flatten(1) @ value_map.double()]
            parts += [] if latent is None else [latent @ value_map.double()]
            value_base = value_base + key_bias.double() @ value_map.double()
        parts.append(_levels(value_synthesis, values))
        return cls(
            keys,
            values,
            heads,
            head_dim,
            per_head.to(dtype),
            None if latent is None else latent.to(dtype).contiguous(),
            torch.cat(parts).to(dtype),
            key_bias.float(),
            (key_bias.double() + key_mean.double()).float(),
            value_base.to(dtype),
            (value_base + value_mean.double()).to(dtype),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.key_synthesis.dtype

    @property
    def features(self) -> int:
        """``kv_heads * head_dim``."""
        return self.num_kv_heads * self.head_dim

    @property
    def latent_width(self) -> int:
        """Numbers of a latent; 0 without one."""
        return 0 if self.latent_map is None else self.latent_map.shape[0]

    @property
    def predicts_values(self) -> bool:
        """Whether values are predicted from keys."""
        return len(self.value_synthesis) > len(self.values.slots)

    def require_triton(self) -> None:
        """Raise `ConfigError` if the Triton kernels do not take such operands."""
        if self.head_dim not in HEAD_DIMS:
            raise ConfigError(
                f"backend triton: expected head_dim {HEAD_DIMS}, got {self.head_dim}; choose torch or auto"
            )

    def to(self, device: torch.device | str) -> ReconstructOperands:
        """Return the operands on another device."""
        return _to(self, device)


def _levels(synthesis: Tensor, tables: FieldTables) -> Tensor:
    """Return ``[columns, …]`` float64: rows by column, the levels' linear coefficient folded in."""
    slopes = level_slopes(tables.layout)[0].to(synthesis.device)
    rows = torch.cat(
        [synthesis.double() * slopes[:, None], synthesis.new_zeros(1, synthesis.shape[1]).double()]
    )
    return rows[tables.slots.where(tables.slots >= 0, len(synthesis))]


def _to(value: Moved, device: torch.device | str) -> Moved:
    parts = {f.name: getattr(value, f.name) for f in fields(value)}
    return replace(
        value, **{k: v.to(device) for k, v in parts.items() if isinstance(v, (Tensor, FieldTables))}
    )
