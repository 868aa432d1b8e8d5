"""The page format that decode kernels read: codes of 64 tokens, 16 coefficients to a field.

What memory holds of a page is a *record*, one of the keys and one of the values::

    uint8 [record_bytes], record_bytes = planes * 1024 + 80
    0 ... planes * 1024 - 1   the page's byte planes
    the next 64               the tokens' scale codes (uint8; 255: not finite)
    the next 8                bit t, little-endian, is 1 if token t is attended to as a code
    the next 8                zero

Tokens that attention sees otherwise (outliers kept exactly) have bit 0, and so have those past the end. In
records of values the bits are written alike but not read.

A page holds the codes of `PAGE_TOKENS` = 64 neighbouring tokens as byte planes::

    uint8 [planes, 64 tokens, 16 columns], row-major: 1024 bytes a plane

The coefficients of a group (a KV head for keys; all of them for values) are sorted by falling width (equal
widths: by rising index) and cut into runs of 16. Each run is a *field*: column j of the field is the run's
j-th coefficient. A field is as wide as its widest coefficient, W bits, and lies in bits ``shift`` (the
lowest) to ``shift + W - 1`` of every byte of one plane::

    byte[plane, token, column] = sum over the plane's fields of stored[field, token, column] << shift[field]

No field straddles two bytes; fields of several groups may share a plane. `aquakv.numerics.place_fields` says
which plane each field takes: it needs as few planes as possible and keeps a group's fields together where
that costs none. Bits that no field takes are zero. Codecs of the preset ``decode`` give all coefficients of a
field one width, and fill their planes.

A coefficient of width w < W is stored as ``code + (2**W - 2**w) / 2``, which leaves
``x = stored - (2**W - 1) / 2 = code - (2**w - 1) / 2`` as it was. Columns without a coefficient (the end of a
group's last field) store 0, and so do all columns of tokens past the end. Coefficients of width 0 do not
exist.

Why 64 tokens: the smallest tile that fills Hopper's matrix instructions, a plane is one 8-byte load for each
of 128 threads, and the end of a sequence wastes 32 tokens on average. Why bytes: any width up to 8 fits,
little is left unused, and four columns unpack in one 32-bit register.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from aquakv.errors import ConfigError, ShapeError
from aquakv.numerics.cubic_levels import cubic_levels
from aquakv.numerics.planes import place_fields

PAGE_TOKENS = 64
FIELD_COLUMNS = 16
PLANE_BYTES = PAGE_TOKENS * FIELD_COLUMNS
#: Bytes of a record behind the planes: scale codes, attended bits, zeros.
TAIL_BYTES = PAGE_TOKENS + 16
_ATTENDED = slice(-16, -8)
MAX_WIDTH = 8


@dataclass(frozen=True)
class Field:
    """Up to 16 coefficients of one group that lie in the same bits of a plane.

    Attributes
    ----------
    group
        KV head (keys) or 0 (values).
    width, plane, shift
        Bits of each stored code, and where they are.
    coefficients
        Index of the coefficient in every column; shorter than 16 at the end of a group.
    """

    group: int
    width: int
    plane: int
    shift: int
    coefficients: tuple[int, ...]

    @property
    def mask(self) -> int:
        """The field's bits of a byte."""
        return ((1 << self.width) - 1) << self.shift

    @property
    def centre(self) -> float:
        """The stored code that would be level 0."""
        return ((1 << self.width) - 1) / 2


@dataclass(frozen=True)
class PageLayout:
    """How a layer's key codes or value codes lie in pages; see the module for the format.

    Attributes
    ----------
    widths
        Bits of every coefficient, 0 to 8.
    groups
        Group of every coefficient, 0 to ``num_groups - 1``: its KV head for keys, 0 for values.
    num_groups
        KV heads for keys, 1 for values.
    fields
        In the order of the groups.
    planes
        Byte planes of a page.
    """

    widths: tuple[int, ...]
    groups: tuple[int, ...]
    num_groups: int
    fields: tuple[Field, ...] = field(init=False, repr=False)
    planes: int = field(init=False)

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.groups):
            raise ShapeError(
                f"pages: expected one group for each width, got {len(self.widths)} widths and "
                f"{len(self.groups)} groups"
            )
        if not all(0 <= width <= MAX_WIDTH for width in self.widths):
            raise ConfigError(
                f"pages: expected widths of 0 to {MAX_WIDTH} bits, got {sorted(set(self.widths))}"
            )
        if not all(0 <= group < self.num_groups for group in self.groups):
            raise ConfigError(
                f"pages: expected groups 0 to {self.num_groups - 1}, got {sorted(set(self.groups))}"
            )
        fields = tuple(_fields(self.widths, self.groups, self.num_groups))
        object.__setattr__(self, "fields", fields)
        object.__setattr__(self, "planes", 1 + max((f.plane for f in fields), default=-1))

    @property
    def coefficients(self) -> int:
        """Codes of a token, those of width 0 included."""
        return len(self.widths)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of codes that pages hold for each token."""
        return self.planes * FIELD_COLUMNS

    @property
    def page_bytes(self) -> int:
        """Bytes of one page's planes."""
        return self.planes * PLANE_BYTES

    @property
    def record_bytes(self) -> int:
        """Bytes of one page's record: planes, scale codes and attended bits."""
        return self.page_bytes + TAIL_BYTES

    def group_fields(self, group: int) -> tuple[Field, ...]:
        """Return a group's fields, widest first."""
        return tuple(f for f in self.fields if f.group == group)

    @property
    def max_group_fields(self) -> int:
        """Most fields that a group has."""
        return max((len(self.group_fields(group)) for group in range(self.num_groups)), default=0)

    @cached_property
    def fields_by_plane(self) -> tuple[tuple[Field, ...], ...]:
        """The fields of every plane, from the lowest bit up."""
        by_plane: list[list[Field]] = [[] for _ in range(self.planes)]
        for f in sorted(self.fields, key=lambda f: f.shift):
            by_plane[f.plane].append(f)
        return tuple(map(tuple, by_plane))

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all coefficients of a field are as wide as the field, and none has width 0."""
        uniform = all(self.widths[i] == f.width for f in self.fields for i in f.coefficients)
        return uniform and all(self.widths)


def _fields(widths: tuple[int, ...], groups: tuple[int, ...], num_groups: int) -> Iterator[Field]:
    """Cut every group into runs of 16, in the order of the groups, and place them in planes."""
    runs: list[tuple[int, tuple[int, ...]]] = []
    for group in range(num_groups):
        members = [i for i, g in enumerate(groups) if g == group and widths[i]]
        members.sort(key=lambda i: (-widths[i], i))
        starts = range(0, len(members), FIELD_COLUMNS)
        runs += [(group, tuple(members[start : start + FIELD_COLUMNS])) for start in starts]
    places = place_fields([widths[run[0]] for _, run in runs], [group for group, _ in runs])
    for (group, run), (plane, shift) in zip(runs, places, strict=True):
        yield Field(group, widths[run[0]], plane, shift, run)


def level_slopes(layout: PageLayout) -> tuple[Tensor, Tensor]:
    """Return what turns stored codes into levels, ``slope * x * (1 + gain * x**2)``.

    Returns
    -------
    slopes, gains
        ``[coefficients]`` float64 each; 0 where the width is 0.
    """
    levels = [cubic_levels(width)[:2] if width else (1.0, 0.0) for width in layout.widths]
    slopes = [linear if width else 0.0 for (linear, _), width in zip(levels, layout.widths, strict=True)]
    gains = [cubic / linear for linear, cubic in levels]
    made = torch.tensor([slopes, gains], dtype=torch.float64, device="cpu")
    return made[0], made[1]


def pack_pages(codes: Tensor, layout: PageLayout) -> Tensor:
    """Pack codes into pages.

    Parameters
    ----------
    codes
        ``[tokens, coefficients]`` uint8, each below 2 to the power of its width; those of width 0 are
        ignored.
    layout
        Where they go.

    Returns
    -------
    Tensor
        ``[pages, planes, 64, 16]`` uint8 on the device of the codes; the last page is filled up with zeros.

    Raises
    ------
    ShapeError
        If the codes are of another shape or dtype.
    """
    if codes.ndim != 2 or codes.shape[1] != layout.coefficients or codes.dtype != torch.uint8:
        raise ShapeError(
            f"pages: expected uint8 codes [tokens, {layout.coefficients}], got {codes.dtype} "
            f"{list(codes.shape)}"
        )
    tokens = len(codes)
    pages = -(-tokens // PAGE_TOKENS)
    packed = codes.new_zeros(layout.planes, pages * PAGE_TOKENS, FIELD_COLUMNS)
    for f in layout.fields:
        columns = torch.tensor(f.coefficients, device=codes.device)
        raised = [((1 << f.width) - (1 << layout.widths[i])) >> 1 for i in f.coefficients]
        stored = codes.index_select(1, columns) + codes.new_tensor(raised)
        packed[f.plane, :tokens, : len(f.coefficients)] |= stored << f.shift
    return packed.view(layout.planes, pages, PAGE_TOKENS, FIELD_COLUMNS).transpose(0, 1).contiguous()


def unpack_pages(pages: Tensor, layout: PageLayout, tokens: int | None = None) -> Tensor:
    """Return the codes of pages; the inverse of `pack_pages`.

    Parameters
    ----------
    pages
        ``[pages, planes, 64, 16]`` uint8.
    layout
        Their layout.
    tokens
        How many tokens to return; by default all that the pages hold.

    Returns
    -------
    Tensor
        ``[tokens, coefficients]`` uint8; 0 where the width is 0. Tokens past the end of what was packed come
        back with arbitrary codes.

    Raises
    ------
    ShapeError
        If the pages are of another shape or dtype.
    """
    expected = [len(pages), layout.planes, PAGE_TOKENS, FIELD_COLUMNS]
    if list(pages.shape) != expected or pages.dtype != torch.uint8:
        raise ShapeError(
            f"pages: expected uint8 [pages, {layout.planes}, {PAGE_TOKENS}, {FIELD_COLUMNS}], got "
            f"{pages.dtype} {list(pages.shape)}"
        )
    capacity = len(pages) * PAGE_TOKENS
    planes = pages.transpose(0, 1).reshape(layout.planes, capacity, FIELD_COLUMNS)
    codes = pages.new_zeros(capacity, layout.coefficients)
    for f in layout.fields:
        raised = [((1 << f.width) - (1 << layout.widths[i])) >> 1 for i in f.coefficients]
        stored = (planes[f.plane, :, : len(f.coefficients)] >> f.shift) & ((1 << f.width) - 1)
        columns = torch.tensor(f.coefficients, device=pages.device)
        codes.index_copy_(1, columns, stored - pages.new_tensor(raised))
    return codes[:tokens]


def pack_records(codes: Tensor, scales: Tensor, layout: PageLayout, attended: Tensor | None = None) -> Tensor:
    """Pack codes and scales into records.

    Parameters
    ----------
    codes
        As for `pack_pages`.
    scales
        ``[tokens]`` uint8: scale codes.
    layout
        Where the codes go.
    attended
        ``[tokens]`` bool: whether tokens are attended to as codes; None: all of them.

    Returns
    -------
    Tensor
        ``[pages, record_bytes]`` uint8 on the device of the codes; the last page is filled up with zeros.

    Raises
    ------
    ShapeError
        If a tensor is of another shape or dtype.
    """
    pages = pack_pages(codes, layout)
    tokens = len(codes)
    if attended is None:
        attended = torch.ones(tokens, dtype=torch.bool, device=codes.device)
    for name, tensor, dtype in (("scales", scales, torch.uint8), ("attended", attended, torch.bool)):
        if tuple(tensor.shape) != (tokens,) or tensor.dtype != dtype:
            raise ShapeError(
                f"records: expected {name} {str(dtype).removeprefix('torch.')} [{tokens}], got "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
    records = codes.new_zeros(len(pages), layout.record_bytes)
    records[:, : layout.page_bytes] = pages.flatten(1)
    missing = len(pages) * PAGE_TOKENS - tokens
    filled = torch.nn.functional.pad(scales, (0, missing))
    records[:, layout.page_bytes : layout.page_bytes + PAGE_TOKENS] = filled.view(-1, PAGE_TOKENS)
    records[:, _ATTENDED] = attended_bytes(torch.nn.functional.pad(attended, (0, missing)))
    return records


def record_planes(records: Tensor, layout: PageLayout) -> Tensor:
    """Return a view of the byte planes of records ``[..., record_bytes]``: ``[..., planes, 64, 16]``.

    Raises
    ------
    ShapeError
        If the records are not of this layout.
    """
    if records.shape[-1] != layout.record_bytes or records.dtype != torch.uint8:
        raise ShapeError(
            f"records: expected uint8 [..., {layout.record_bytes}], got {records.dtype} {list(records.shape)}"
        )
    return records[..., : layout.page_bytes].unflatten(-1, (layout.planes, PAGE_TOKENS, FIELD_COLUMNS))


def record_scales(records: Tensor) -> Tensor:
    """Return a view of the scale codes of records ``[..., record_bytes]``: ``[..., 64]`` uint8."""
    return records[..., -TAIL_BYTES : PAGE_TOKENS - TAIL_BYTES]


def record_attended(records: Tensor) -> Tensor:
    """Return which tokens of records ``[..., record_bytes]`` are attended to as codes, ``[..., 64]`` bool."""
    shifts = torch.arange(8, dtype=torch.uint8, device=records.device)
    return ((records[..., _ATTENDED, None] >> shifts) & 1).ne(0).flatten(-2)


def clear_attended(records: Tensor, tokens: Tensor) -> None:
    """Let attention pass over tokens, in place.

    Parameters
    ----------
    records
        ``[pages, record_bytes]`` uint8.
    tokens
        Distinct tokens, ``page * 64 + number in the page``, any integer dtype, on the same device.
    """
    attended = record_attended(records).flatten()
    attended[tokens.long()] = False
    records[:, _ATTENDED] = attended_bytes(attended)


def attended_bytes(attended: Tensor) -> Tensor:
    """Return how records keep which tokens ``[..., tokens]`` bool, whole pages, are attended to as codes.

    Returns
    -------
    Tensor
        ``[..., pages, 8]`` uint8, for `write_attended`.
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=attended.device)
    bits = attended.unflatten(-1, (-1, PAGE_TOKENS // 8, 8))
    return (bits.view(torch.uint8) << shifts).sum(-1, dtype=torch.uint8)


def write_attended(records: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    """Write which tokens are attended to as codes into several tensors of records, in place.

    Parameters
    ----------
    records
        ``[pages, record_bytes]`` uint8 each.
    kept
        For each ``[pages, 8]``, from `attended_bytes`.
    """
    into = [one[:, _ATTENDED] for one in records]
    torch._foreach_copy_(into, list(kept))  # pyright: ignore[reportPrivateImportUsage]
