"""What a layer's decode kernels multiply with, folded once from the plain matrices of its codec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from aquakv.errors import ConfigError, ShapeError
from aquakv.kernels.pages import FIELD_COLUMNS, Field, PageLayout, level_slopes

#: Fields that kernels unpack together: 64 coefficients, a full tile of a matrix instruction.
CHUNK_FIELDS = 4
CHUNK_SLOTS = CHUNK_FIELDS * FIELD_COLUMNS

Moved = TypeVar("Moved", "CodeTables", "DecodeOperands")

#: Head dimensions that the Triton kernels take; the definitions in PyTorch take all even ones.
HEAD_DIMS = (64, 128, 256)
#: Highest rank of a latent.
MAX_RANK = 64


@dataclass(frozen=True, eq=False)
class CodeTables:
    """A page layout as the kernels read it.

    *Slots* are where the kernels have coefficients: fields in the order of the layout, 16 slots each, filled
    up to chunks of four fields.

    Attributes
    ----------
    layout
        The page layout.
    fields
        ``[fields + padding, 2]`` int32. First ``plane | mask << 20 | whether levels are cubic << 28``;
        then the float16 bits of ``2**-shift`` in the lower half, of minus the centre in the upper.
    gains
        ``[fields + padding, 16]`` float16: the levels' cubic over their linear coefficient.
    first_fields
        ``[groups + 1]`` int32: where each group's fields begin.
    slots
        ``[chunks * 64]`` int64: the coefficient in every slot, -1 if none.
    """

    layout: PageLayout
    fields: Tensor
    gains: Tensor
    first_fields: Tensor
    slots: Tensor

    @classmethod
    def build(cls, layout: PageLayout) -> CodeTables:
        """Describe a layout, on the CPU."""
        level_gains = level_slopes(layout)[1]
        # Kernels read ahead of the last field, at most a slab of eight chunks.
        rows = len(layout.fields) + 8 * CHUNK_FIELDS
        words = torch.zeros(rows, 2, dtype=torch.int32, device="cpu")
        gains = torch.zeros(rows, FIELD_COLUMNS, dtype=torch.float16, device="cpu")
        for index, f in enumerate(layout.fields):
            cubic = bool(level_gains[list(f.coefficients)].any())
            words[index, 0] = f.plane | f.mask << 20 | cubic << 28
            halves = torch.tensor([2.0**-f.shift, -f.centre], dtype=torch.float16, device="cpu")
            words[index, 1] = halves.view(torch.int32)[0]
            gains[index, : len(f.coefficients)] = level_gains[list(f.coefficients)].half()
        counts = [len(layout.group_fields(group)) for group in range(layout.num_groups)]
        first = torch.tensor([0, *counts], dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
        slots = slot_coefficients(layout.fields, chunk_sizes(-(-len(layout.fields) // 4) * 4))
        return cls(layout, words, gains, first, torch.tensor(slots, dtype=torch.int64, device="cpu"))

    @property
    def chunks(self) -> int:
        """Chunks of four fields, the last filled up."""
        return len(self.slots) // CHUNK_SLOTS

    def to(self, device: torch.device | str) -> CodeTables:
        """Return the tables on another device."""
        return _to(self, device)


@dataclass(frozen=True, eq=False)
class DecodeOperands:
    """One layer's operands; `build` folds them.

    Attributes
    ----------
    keys, values
        How codes lie in pages.
    num_kv_heads, head_dim, rotary_dim
        Shapes; the first ``rotary_dim`` coordinates of a head are rotated.
    score_synthesis
        ``[kv_heads, rows, head_dim]``: a head's synthesis in the order of its chunks (`chunk_sizes`),
        deviations and linear level coefficients folded in. Coordinates in the order of `rotary_order`.
    latent_synthesis
        ``[kv_heads, latent_width, head_dim]``, likewise; None without a latent.
    key_offset
        ``[kv_heads, head_dim]`` float32, likewise: bias and mean.
    epilogue
        ``[kv_heads, head_dim, slots]``: from sums of key codes, value codes and latents to values.
    epilogue_offset
        ``[kv_heads, head_dim]`` float32.
    innovation
        ``[key slots, next_width]``; None if no next latent is wanted.
    transition
        ``[latent_width, next_width]``; None without a latent.
    next_offset
        ``[next_width]`` float32.
    """

    keys: CodeTables
    values: CodeTables
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    score_synthesis: Tensor
    latent_synthesis: Tensor | None
    key_offset: Tensor
    epilogue: Tensor
    epilogue_offset: Tensor
    innovation: Tensor | None
    transition: Tensor | None
    next_offset: Tensor | None

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
        value_offset: Tensor,
        value_map: Tensor | None = None,
        latent_map: Tensor | None = None,
        innovation: Tensor | None = None,
        next_offset: Tensor | None = None,
        transition: Tensor | None = None,
        rotary_dim: int | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> DecodeOperands:
        """Fold plain matrices, in float64, and round them to ``dtype``.

        Parameters
        ----------
        key_layout, value_layout
            Page layouts; the groups of the keys are the KV heads, the values are one group.
        key_synthesis
            ``[key coefficients, head_dim]``: from a coefficient's level to its own head's keys, deviations
            folded in.
        key_bias, key_mean
            ``[kv_heads * head_dim]``: bias of the centred keys' predictor, mean of the keys.
        value_synthesis
            ``[value coefficients, kv_heads * head_dim]``, deviations folded in.
        value_offset
            ``[kv_heads * head_dim]``: bias of the values' predictor plus mean of the values.
        value_map
            ``[kv_heads * head_dim, kv_heads * head_dim]``: from centred keys to values; None predicts none.
        latent_map
            ``[rank, kv_heads * head_dim]``: from the latent to centred keys; None at the first layer.
        innovation, next_offset, transition
            ``[key coefficients, next_rank]`` (deviations folded in), ``[next_rank]`` and
            ``[rank, next_rank]``: the next layer's latent; None at the last layer.
        rotary_dim
            Coordinates that are rotated; by default all.
        dtype
            float16 for the Triton kernels; float32 keeps the torch definitions exact.

        Raises
        ------
        ShapeError, ConfigError
            Shapes do not fit each other, or the kernels do not support them.
        """
        heads = key_layout.num_groups
        head_dim = key_synthesis.shape[1]
        width = heads * head_dim
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if head_dim % 2:
            raise ConfigError(f"decode operands: expected an even head_dim, got {head_dim}")
        if not 0 <= rotary_dim <= head_dim or rotary_dim % 2:
            raise ConfigError(
                f"decode operands: expected an even rotary_dim up to {head_dim}, got {rotary_dim}"
            )
        if (latent_map is None) != (transition is None) and innovation is not None:
            raise ConfigError("decode operands: expected latent_map and transition together, got one of them")
        rank = 0 if latent_map is None else latent_map.shape[0]
        next_rank = 0 if innovation is None else innovation.shape[1]
        check_shapes(
            "decode operands",
            ("key_synthesis", key_synthesis, (key_layout.coefficients, head_dim)),
            ("key_bias", key_bias, (width,)),
            ("key_mean", key_mean, (width,)),
            ("value_synthesis", value_synthesis, (value_layout.coefficients, width)),
            ("value_offset", value_offset, (width,)),
            ("value_map", value_map, (width, width)),
            ("latent_map", latent_map, (rank, width)),
            ("innovation", innovation, (key_layout.coefficients, next_rank)),
            ("next_offset", next_offset, (next_rank,)),
            ("transition", transition, (rank, next_rank)),
        )
        keys, values = CodeTables.build(key_layout), CodeTables.build(value_layout)
        key_slope, value_slope = (
            level_slopes(layout)[0][:, None].to(key_synthesis.device) for layout in (key_layout, value_layout)
        )
        order = rotary_order(head_dim, rotary_dim)
        per_head = key_synthesis.double() * key_slope
        sizes = chunk_sizes(key_layout.max_group_fields)
        score_synthesis = torch.stack(
            [
                _rows(per_head, slot_coefficients(key_layout.group_fields(head), sizes))[:, order]
                for head in range(heads)
            ]
        )
        latent = None if latent_map is None else _pad_rows(latent_map.double(), latent_width(rank))
        parts = []
        offset = value_offset.double()
        if value_map is None:
            parts.append(per_head.new_zeros(len(keys.slots), width))
        else:
            dense = per_head.new_zeros(key_layout.coefficients, heads, head_dim)
            index = torch.arange(key_layout.coefficients, device=dense.device)
            dense[index, list(key_layout.groups)] = per_head
            parts.append(_rows(dense.flatten(1) @ value_map.double(), keys.slots.tolist()))
            offset = offset + key_bias.double() @ value_map.double()
        parts.append(_rows(value_synthesis.double() * value_slope, values.slots.tolist()))
        if latent is not None:
            parts.append(torch.zeros_like(latent) if value_map is None else latent @ value_map.double())
        folded = torch.cat(parts).view(-1, heads, head_dim).permute(1, 2, 0)
        columns = latent_width(next_rank)
        return cls(
            keys.to(key_synthesis.device),
            values.to(key_synthesis.device),
            heads,
            head_dim,
            rotary_dim,
            score_synthesis.to(dtype).contiguous(),
            None if latent is None else _by_head(latent, heads)[..., order].to(dtype).contiguous(),
            (key_bias.double() + key_mean.double()).view(heads, head_dim)[:, order].float().contiguous(),
            folded.to(dtype).contiguous(),
            offset.view(heads, head_dim).float(),
            None
            if innovation is None
            else _pad_columns(_rows(innovation.double() * key_slope, keys.slots.tolist()), columns).to(dtype),
            None
            if transition is None
            else _pad_columns(_pad_rows(transition.double(), latent_width(rank)), columns).to(dtype),
            None if next_offset is None else _pad_columns(next_offset.float()[None], columns)[0],
        )

    @property
    def latent_width(self) -> int:
        """Numbers stored for a latent: its rank rounded up to 16, 32 or 64; 0 without one."""
        return 0 if self.latent_synthesis is None else self.latent_synthesis.shape[1]

    @property
    def next_width(self) -> int:
        """Numbers stored for the next layer's latent; 0 if it is not wanted."""
        return 0 if self.innovation is None else self.innovation.shape[1]

    def require_triton(self) -> None:
        """Raise `ConfigError` if the Triton kernels do not take such operands."""
        if self.head_dim not in HEAD_DIMS or self.score_synthesis.dtype != torch.float16:
            raise ConfigError(
                f"backend triton: expected head_dim {HEAD_DIMS} and operands of float16, got {self.head_dim} "
                f"and {str(self.score_synthesis.dtype).removeprefix('torch.')}; choose torch"
            )

    def to(self, device: torch.device | str) -> DecodeOperands:
        """Return the operands on another device."""
        return _to(self, device)


def check_shapes(what: str, *expected: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    """Raise `ShapeError` unless each named tensor, where there is one, has the shape given with it."""
    for name, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ShapeError(f"{what}: expected {name} {list(shape)}, got {list(tensor.shape)}")


def chunk_sizes(num_fields: int) -> tuple[int, ...]:
    """Return how many fields the score kernel unpacks at a time: fours, then what is left as 1, 2 or 4."""
    fours, rest = divmod(num_fields, CHUNK_FIELDS)
    return (CHUNK_FIELDS,) * fours + ((0, 1, 2, 4)[rest],) * (rest > 0)


def slot_coefficients(fields_: Sequence[Field], sizes: Sequence[int]) -> list[int]:
    """Return the coefficient (or -1) in every slot of chunks of the given sizes, field by field."""
    slots, first = [], 0
    for size in sizes:
        chunk = [f.coefficients for f in fields_[first : first + size]]
        chunk += [()] * (size - len(chunk))
        slots += [c[column] if column < len(c) else -1 for c in chunk for column in range(FIELD_COLUMNS)]
        first += size
    return slots


def latent_width(rank: int) -> int:
    """Return how many numbers latents of a rank are stored as."""
    if not 0 <= rank <= MAX_RANK:
        raise ConfigError(f"decode operands: expected a latent's rank up to {MAX_RANK}, got {rank}")
    return next(width for width in (0, 16, 32, MAX_RANK) if rank <= width)


def rotary_order(head_dim: int, rotary_dim: int) -> Tensor:
    """Return a head's coordinates in an order whose two halves pair up, ``[head_dim]`` int64.

    Coordinates i and i + rotary_dim / 2 rotate together. Those that do not rotate are split evenly.
    """
    index = torch.arange(head_dim, device="cpu")
    turning, still = index[:rotary_dim], index[rotary_dim:]
    (a, b), (c, d) = _halves(turning), _halves(still)
    return torch.cat([a, c, b, d])


def _halves(index: Tensor) -> tuple[Tensor, Tensor]:
    return index[: len(index) // 2], index[len(index) // 2 :]


def _rows(matrix: Tensor, slots: Sequence[int]) -> Tensor:
    """Gather rows; slots without a coefficient are zero."""
    index = torch.tensor(slots, dtype=torch.int64, device=matrix.device)
    padded = torch.cat([matrix, matrix.new_zeros(1, matrix.shape[1])])
    return padded[index.where(index >= 0, len(matrix))]


def _pad_rows(matrix: Tensor, rows: int) -> Tensor:
    return torch.cat([matrix, matrix.new_zeros(rows - len(matrix), matrix.shape[1])])


def _pad_columns(matrix: Tensor, columns: int) -> Tensor:
    return torch.cat([matrix, matrix.new_zeros(len(matrix), columns - matrix.shape[1])], 1).contiguous()


def _by_head(matrix: Tensor, heads: int) -> Tensor:
    return matrix.view(len(matrix), heads, -1).transpose(0, 1)


def _to(value: Moved, device: torch.device | str) -> Moved:
    parts = {f.name: getattr(value, f.name) for f in fields(value)}
    return replace(
        value, **{k: v.to(device) for k, v in parts.items() if isinstance(v, (Tensor, CodeTables))}
    )
