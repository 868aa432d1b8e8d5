"""Which columns that a model counts are no longer held, and which are where.

Once tokens are evicted, the columns that a model counts and the *slots* in which a cache holds tokens are two
things. The slots are what the rest of the package calls columns: sinks, compressed blocks and the exact tail
follow each other in them, and each row ends at the last one. So all that works on a cache that never evicted
anything works on the slots as well; only what a model sees and says (attention masks, keys and values in
columns, lengths) is translated, here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aquakv.cache.records import storage_bytes
from aquakv.errors import CacheStateError


@dataclass
class Holes:
    """Where the tokens in slots come from.

    Attributes
    ----------
    seen
        Columns that the model counted when ``origins`` was made; each column since then has a slot.
    origins
        ``[rows, slots]`` int32 on the CPU: the model's column of what was in each slot then; -1 for slots
        that hold no token: before a row's first one, sinks that were evicted, and fillers of blocks.
    """

    seen: int
    origins: Tensor
    _origins_on: dict[torch.device, Tensor] = field(default_factory=dict)
    _held_on: dict[torch.device, Tensor] = field(default_factory=dict)

    @property
    def slots(self) -> int:
        """Slots that ``origins`` tells of."""
        return self.origins.shape[1]

    @property
    def shift(self) -> int:
        """By how much the model's column exceeds the slot, for all slots behind those."""
        return self.seen - self.slots

    def hides_some(self, starts: list[int]) -> bool:
        """Tell whether slots behind the first token of a row hold none."""
        return any(bool((row[start:] < 0).any()) for row, start in zip(self.origins, starts, strict=True))

    def select(self, rows: list[int]) -> Holes:
        """Return the holes of copies of rows."""
        return Holes(self.seen, self.origins[rows])

    def columns_of_slots(self, slots: int) -> Tensor:
        """Return the model's column of so many slots, ``[rows, slots]`` int64 on the CPU; -1 for none."""
        later = torch.arange(self.slots, slots) + self.shift
        return torch.cat([self.origins.long(), later.expand(len(self.origins), -1)], 1)

    def held(self, device: torch.device) -> Tensor:
        """Return which of the model's first `seen` columns are held, ``[rows, seen]`` bool."""
        if device not in self._held_on:
            held = torch.zeros(len(self.origins), self.seen + 1, dtype=torch.bool)
            held.scatter_(1, torch.where(self.origins < 0, self.seen, self.origins).long(), True)
            self._held_on[device] = held[:, : self.seen].to(device)
        return self._held_on[device]

    def in_slots(self, mask: Tensor | None, slots: int, starts: list[int]) -> Tensor | None:
        """Return what an attention mask by the model's columns says of slots.

        Parameters
        ----------
        mask
            ``[rows or 1, columns]``, nonzero where a token is real and may be seen, or None.
        slots
            How many there are, those of the pass included.
        starts
            Slot of each row's first token.

        Returns
        -------
        Tensor or None
            ``[rows, slots]`` bool (fewer slots of a mask that is too short); None if all may be seen.
        """
        origins = self._on(torch.device("cpu") if mask is None else mask.device)
        there = origins >= 0
        if mask is None:
            if not self.hides_some(starts):
                return None
            return torch.cat([there, there.new_ones(len(there), slots - self.slots)], 1)
        real = mask.ne(0).expand(len(origins), -1)
        if real.shape[1] < self.seen:
            real = torch.nn.functional.pad(real, (0, self.seen - real.shape[1]))
        older = real.gather(1, origins.clamp(min=0)) & there if self.seen else there
        return torch.cat([older, real[:, self.seen :]], 1)

    def in_columns(self, mask: Any, new_columns: int, columns: int, device: torch.device) -> Any:
        """Return an attention mask for the model, from which evicted columns are taken out.

        Parameters
        ----------
        mask
            What the caller gave: None, ``[rows or 1, columns]``, or ``[rows or 1, heads or 1, queries,
            columns]``, bool (True is seen) or to be added to scores.
        new_columns
            Of the pass.
        columns
            Of the model, before the pass.
        device
            Where a mask is made if there was none.

        Raises
        ------
        CacheStateError
            The mask has another form.
        """
        rows = len(self.origins)
        if mask is None:
            mask = torch.ones(rows, columns + new_columns, dtype=torch.long, device=device)
        if not isinstance(mask, Tensor) or mask.ndim not in (2, 4) or mask.shape[-1] < self.seen:
            found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise CacheStateError(
                f"tokens were evicted, so expected an attention mask [{rows}, {columns + new_columns}] or "
                f"[{rows}, 1, {new_columns}, {columns + new_columns}], or none, got {found}"
            )
        held = self.held(mask.device)
        held = torch.nn.functional.pad(held, (0, mask.shape[-1] - self.seen), value=True)
        if mask.ndim == 4:
            hidden = ~held[:, None, None]
            lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            return mask.expand(rows, -1, -1, -1).masked_fill(hidden, lowest)
        return mask * held.to(mask.dtype)

    def spread(self, vectors: Tensor, columns: int) -> Tensor:
        """Return vectors in slots, ``[rows, heads, slots, dim]``, in the model's columns; zeros in holes."""
        rows, heads, _, dim = vectors.shape
        origins = self._on(vectors.device)
        out = vectors.new_zeros(rows, heads, columns + 1, dim)  # the last takes what is in no column
        place = torch.where(origins < 0, columns, origins)[:, None, :, None].expand(-1, heads, -1, dim)
        out.scatter_(2, place, vectors[:, :, : self.slots])
        out[:, :, self.seen : columns] = vectors[:, :, self.slots :]
        return out[:, :, :columns]

    def footprint(self) -> int:
        """Return the bytes of all this."""
        return storage_bytes(self.origins, *self._origins_on.values(), *self._held_on.values())

    def _on(self, device: torch.device) -> Tensor:
        """Return ``origins`` as int64 on a device."""
        if device not in self._origins_on:
            self._origins_on[device] = self.origins.long().to(device)
        return self._origins_on[device]
