"""Random layers of random shapes, and what attention over their reconstructed keys and values is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aquakv.kernels import PAGE_TOKENS, DecodeOperands, PagedCodes, PageLayout, PageRotary, pack_records
from aquakv.numerics import cubic_level_table

#: Entries of a table that no kernel may follow.
WILD = 1 << 30
MIXED = (5, 4, 4, 3, 2, 2, 1, 1, 1, 0)


@dataclass(frozen=True)
class Shape:
    """What a random layer is like; ``widths`` are repeated over each head's coefficients."""

    head_dim: int = 64
    kv_heads: int = 2
    group: int = 2
    rank: int = 16
    next_rank: int = 16
    lengths: tuple[int, ...] = (150, 65)
    pages: int = 3
    key_coefficients: tuple[int, ...] = (40, 40)
    value_coefficients: int = 70
    widths: tuple[int, ...] = MIXED
    rotary_dim: int | None = None
    softcap: float | None = None
    masked: bool = False
    value_map: bool = True


SHAPES = {
    "plain": Shape(),
    "wide heads, group of 4": Shape(head_dim=128, group=4, rank=32, next_rank=40, key_coefficients=(128, 97)),
    "group of 3, unequal heads": Shape(group=3, kv_heads=3, key_coefficients=(64, 0, 17), masked=True),
    "first layer": Shape(rank=0, group=1, value_map=False),
    "last layer": Shape(next_rank=0, rank=64, softcap=20.0),
    "partial rotary": Shape(rotary_dim=32, lengths=(1, 0), pages=2),
    "no key codes": Shape(key_coefficients=(0, 0), group=1),
    "no value codes": Shape(value_coefficients=0, rank=20),
    "heads of 256": Shape(head_dim=256, kv_heads=1, key_coefficients=(90,), lengths=(70,), pages=2),
    "one head, 40 queries": Shape(kv_heads=1, group=40, key_coefficients=(50,), masked=True),
}


@dataclass
class Case:
    """A layer's plain float64 matrices, codes and one step's query."""

    shape: Shape
    key_layout: PageLayout
    value_layout: PageLayout
    matrices: dict[str, Tensor]
    key_codes: list[Tensor]
    value_codes: list[Tensor]
    scales: Tensor
    latents: Tensor | None
    query: Tensor
    frequencies: Tensor
    starts: Tensor
    lengths: Tensor
    attended: Tensor | None

    @property
    def scaling(self) -> float:
        return 1 / math.sqrt(self.shape.head_dim)

    def operands(self, dtype: torch.dtype) -> DecodeOperands:
        matrices = {name: m for name, m in self.matrices.items() if m is not None}
        return DecodeOperands.build(
            self.key_layout, self.value_layout, **matrices, rotary_dim=self.shape.rotary_dim, dtype=dtype
        )

    def rotary(self, dtype: torch.dtype) -> PageRotary:
        positions = self.starts[:, None] + 64 * torch.arange(self.shape.pages)
        return PageRotary.build(self.frequencies, positions, dtype=dtype)

    def codes(self) -> PagedCodes:
        """Scatter pages between records of garbage; nobody may follow the ends of the table."""
        layouts = self.key_layout, self.value_layout
        counts = [-(-length // PAGE_TOKENS) for length in self.shape.lengths]
        total = sum(counts) + 2
        order = torch.randperm(total, generator=torch.Generator().manual_seed(1))[: sum(counts)]
        pages = [torch.full((total, layout.record_bytes), 0xA5, dtype=torch.uint8) for layout in layouts]
        table = torch.full((len(counts), self.shape.pages), WILD, dtype=torch.int32)
        first = 0
        for row, (length, count) in enumerate(zip(self.shape.lengths, counts, strict=True)):
            own = order[first : first + count]
            first += count
            table[row, :count] = own
            attended = None if self.attended is None else self.attended[row, :length]
            for kind, codes in enumerate((self.key_codes[row], self.value_codes[row])):
                scales = self.scales[kind, row, :length]
                pages[kind][own] = pack_records(codes, scales, layouts[kind], attended)
        return PagedCodes(*pages, table, self.lengths)

    def stored_latents(self, width: int, dtype: torch.dtype) -> Tensor | None:
        if self.latents is None:
            return None
        return torch.nn.functional.pad(self.latents, (0, width - self.shape.rank)).to(dtype)


def make_case(shape: Shape, seed: int = 0) -> Case:
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int, spread: float = 1.0) -> Tensor:
        return spread * torch.randn(*size, generator=random, dtype=torch.float64)

    heads, dim = shape.kv_heads, shape.head_dim
    width = heads * dim

    def widths(count: int) -> tuple[int, ...]:
        return tuple(shape.widths[i % len(shape.widths)] for i in range(count))

    key_widths = tuple(w for count in shape.key_coefficients for w in widths(count))
    key_groups = tuple(h for h, count in enumerate(shape.key_coefficients) for _ in range(count))
    key_layout = PageLayout(key_widths, key_groups, heads)
    value_layout = PageLayout(widths(shape.value_coefficients), (0,) * shape.value_coefficients, 1)

    def codes(layout: PageLayout) -> list[Tensor]:
        limits = 2.0 ** torch.tensor(layout.widths, dtype=torch.float64)
        return [
            (torch.rand(n, len(limits), generator=random, dtype=torch.float64) * limits).to(torch.uint8)
            for n in shape.lengths
        ]

    rank, following, coefficients = shape.rank, shape.next_rank, key_layout.coefficients
    matrices = {
        "key_synthesis": normal(coefficients, dim, spread=0.3),
        "key_bias": normal(width),
        "key_mean": normal(width, spread=2.0),
        "value_synthesis": normal(shape.value_coefficients, width, spread=0.3),
        "value_offset": normal(width),
        "value_map": normal(width, width, spread=width**-0.5) if shape.value_map else None,
        "latent_map": normal(rank, width, spread=0.3) if rank else None,
        "innovation": normal(coefficients, following, spread=0.1) if following else None,
        "next_offset": normal(following) if following else None,
        "transition": normal(rank, following, spread=0.3) if rank and following else None,
    }
    rows, capacity = len(shape.lengths), shape.pages * 64
    scales = torch.randint(100, 150, (2, rows, capacity), generator=random).to(torch.uint8)
    latents = normal(rows, capacity, rank) if rank else None
    attended = None
    if shape.masked:
        attended = torch.rand(rows, capacity, generator=random) < 0.8
        scales[:, ~attended] = 255
    for row, length in enumerate(shape.lengths):
        scales[:, row, length:] = 255
        if latents is not None:
            latents[row, length:] = float("nan")
    turning = dim if shape.rotary_dim is None else shape.rotary_dim
    frequencies = 500000.0 ** (-torch.arange(turning // 2, dtype=torch.float64) * 2 / turning)
    return Case(
        shape,
        key_layout,
        value_layout,
        {name: m for name, m in matrices.items() if m is not None},
        codes(key_layout),
        codes(value_layout),
        scales,
        latents,
        normal(rows, heads * shape.group, dim),
        frequencies,
        torch.tensor([3, 1000])[:rows],
        torch.tensor(shape.lengths, dtype=torch.int32),
        attended,
    )


def levels(codes: Tensor, layout: PageLayout) -> Tensor:
    columns = [
        cubic_level_table(w).double()[codes[:, i].long()] if w else torch.zeros(len(codes)).double()
        for i, w in enumerate(layout.widths)
    ]
    return torch.stack(columns, 1) if columns else torch.zeros(len(codes), 0, dtype=torch.float64)


@dataclass
class Dense:
    """Float64 results by reconstruction; ``next_latents`` and ``scores`` of each row's tokens."""

    scores: list[Tensor]
    out: Tensor
    lse: Tensor
    next_latents: list[Tensor]


def dense(case: Case) -> Dense:
    shape, m = case.shape, case.matrices
    heads, dim = shape.kv_heads, shape.head_dim
    all_scores, outs, lses, following = [], [], [], []
    for row, length in enumerate(shape.lengths):
        scale = 2.0 ** ((case.scales[:, row, :length].double() - 128) / 16)
        u = levels(case.key_codes[row], case.key_layout) * scale[0][:, None]
        y = levels(case.value_codes[row], case.value_layout) * scale[1][:, None]
        centred = m["key_bias"].expand(length, -1).clone().view(length, heads, dim)
        for i, head in enumerate(case.key_layout.groups):
            centred[:, head] += u[:, i, None] * m["key_synthesis"][i]
        centred = centred.flatten(1)
        latent = None
        if case.latents is not None:
            latent = case.latents[row, :length]
            centred = centred + latent @ m["latent_map"]
        values = y @ m["value_synthesis"] + m["value_offset"]
        if "value_map" in m:
            values = values + centred @ m["value_map"]
        keys = (centred + m["key_mean"]).view(length, heads, dim)
        turning = 2 * len(case.frequencies)
        angle = (case.starts[row] + torch.arange(length))[:, None, None] * case.frequencies
        first, second = keys[..., : turning // 2], keys[..., turning // 2 : turning]
        rotated = torch.cat(
            [
                first * angle.cos() - second * angle.sin(),
                second * angle.cos() + first * angle.sin(),
                keys[..., turning:],
            ],
            -1,
        )
        rotated = rotated.repeat_interleave(shape.group, 1)
        score = torch.einsum("hd,thd->ht", case.query[row], rotated) * case.scaling
        if shape.softcap is not None:
            score = shape.softcap * (score / shape.softcap).tanh()
        keep = torch.ones(length, dtype=torch.bool)
        if case.attended is not None:
            keep = case.attended[row, :length]
        score = score.masked_fill(~keep, float("-inf"))
        all_scores.append(score)
        by_head = values.view(length, heads, dim).repeat_interleave(shape.group, 1)
        weights = torch.where(keep, score.softmax(-1), 0.0)
        outs.append(torch.einsum("ht,thd->hd", weights, by_head.where(keep[:, None, None], 0.0)))
        lses.append(score.logsumexp(-1) if length else torch.full((len(score),), -math.inf).double())
        if shape.next_rank:
            step = u @ m["innovation"] + m["next_offset"]
            following.append(step if latent is None else step + latent @ m["transition"])
    return Dense(all_scores, torch.stack(outs), torch.stack(lses), following)


def codes_to(codes: PagedCodes, device: str) -> PagedCodes:
    return replace(codes, **{k: v.to(device) for k, v in vars(codes).items()})
