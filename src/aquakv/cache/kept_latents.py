"""Latents of all layers, kept from step to step instead of being made anew in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.cache.layout import TokenLayout
from aquakv.cache.records import storage_bytes
from aquakv.kernels import DecodeOperands, PagedCodes, PageRotary, carry_latents
from aquakv.kernels.backend import Backend


@dataclass(frozen=True)
class CodedLayer:
    """What the latents of the layer after follow from."""

    codes: PagedCodes
    operands: DecodeOperands
    rotary: PageRotary


class KeptLatents:
    """Latents of compressed tokens at all layers.

    They follow from codes alone. A step that finds none of the present pages makes its own, and these are
    kept; where a step has changed pages, they are made behind it. They stay where they are while tables have
    room for more pages.
    """

    def __init__(self) -> None:
        self._held: list[Tensor] = []  # at the layers behind the first
        self._made_of: tuple[int, int, torch.Size] | None = None
        self._query: Tensor | None = None

    def are_current(self, layout: TokenLayout, table: Tensor) -> bool:
        """Tell whether they are those of a layout's pages, in the places of a table of these."""
        return self._made_of == (*_pages_of(layout), table.shape)

    def forget(self) -> None:
        """Free them."""
        self._held.clear()
        self._made_of = None

    def forget_stale(self, layout: TokenLayout) -> None:
        """Free them if they are those of other pages: another way of attending may go on from here."""
        if self._made_of is None or self._made_of[:2] != _pages_of(layout):
            self.forget()

    def at(self, order: int) -> Tensor | None:
        """Return the latents at a compressed layer, ``[rows, tokens, width]``; None at the first."""
        return self._held[order - 1] if order else None

    def expect(self, query: Tensor) -> None:
        """Learn what queries of steps are like, by one of ``[rows, query_heads, head_dim]``."""
        self._query = torch.empty_like(query, device="meta")

    def take(self, order: int, made: Tensor) -> None:
        """Keep those that a step has made for a layer, and attends with there; `complete` ends it."""
        self._made_of = None
        self._keep(order - 1, made, made.device)

    def complete(self, layout: TokenLayout, table: Tensor) -> None:
        """Note whose latents have been kept, once those of all layers are there."""
        self._made_of = *_pages_of(layout), table.shape

    def renew(self, layout: TokenLayout, layers: Sequence[CodedLayer], backend: Backend) -> None:
        """Make them of all layers' pages, whose tables are up to date; in place if they fit."""
        latents: Tensor | None = None
        self._made_of = None  # until all are there
        for order, layer in enumerate(layers[:-1]):
            if latents is not None:
                latents = latents.to(layer.codes.table.device)
            made = carry_latents(
                layer.codes, latents, layer.operands, layer.rotary, query=self._query, backend=backend
            )
            latents = self._keep(order, made, layers[order + 1].codes.table.device)
        self.complete(layout, layers[0].codes.table)

    def _keep(self, place: int, made: Tensor, device: torch.device) -> Tensor:
        """Put a layer's latents where its last ones were, unless these were of other sizes."""
        if place == len(self._held):
            self._held.append(made.to(device))
        elif self._held[place].shape == made.shape and self._held[place].device == device:
            self._held[place].copy_(made.to(device))
        else:
            self._held[place] = made.to(device)
        return self._held[place]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return tuple(self._held)

    def footprint(self) -> int:
        """Return their bytes."""
        return storage_bytes(*self._held)


def _pages_of(layout: TokenLayout) -> tuple[int, int]:
    """Return what tells a layout's pages from others that the same state of a cache has had."""
    return len(layout.pages), layout.selections
