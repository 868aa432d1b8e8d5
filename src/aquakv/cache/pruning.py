"""A cache's eviction policy at work: it watches queries meet keys, and says what stays after the pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aquakv.cache.records import storage_bytes
from aquakv.eviction import EvictionPolicy, PassScores
from aquakv.eviction.weights import attention_received


@dataclass
class _Pass:
    """A forward pass under way: its columns, what its mask says, and what columns received so far."""

    columns: int
    new_columns: int
    mask: Tensor | None
    received: Tensor | None = None


class Pruner:
    """What a policy has seen of a cache's sequences, by the model's columns.

    Parameters
    ----------
    policy
        Chooses.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self._scores: Tensor | None = None
        self._real: Tensor | None = None
        self._pass: _Pass | None = None

    def wants(self, new_columns: int) -> bool:
        """Tell whether keys are to be reconstructed in a pass of so many columns."""
        return self.policy.watched(new_columns) > 0

    def begins(self, columns: int, new_columns: int, mask: Any) -> None:
        """Learn of a pass behind so many columns, and of the mask that the model uses in it."""
        self._pass = _Pass(columns, new_columns, mask if isinstance(mask, Tensor) else None)

    def attended(
        self,
        module: nn.Module,
        query: Tensor,
        keys: Tensor,
        scaling: float,
        softcap: float | None,
        sink_logits: Tensor | None,
    ) -> None:
        """Add up what columns receive at a layer (called by the attention of compressed layers)."""
        now = self._pass
        count = 0 if now is None else min(self.policy.watched(now.new_columns), query.shape[2])
        if now is None or not count:
            return
        columns, mask = keys.shape[2], now.mask
        visible = torch.ones(1, 1, 1, columns, dtype=torch.bool, device=keys.device)
        if mask is not None and mask.ndim == 2:
            visible = mask.to(keys.device)[:, None, None, :columns].ne(0)
        elif mask is not None and mask.ndim == 4:
            own = mask.to(keys.device)[:, :, -count:, :columns]
            visible = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
        with torch.no_grad():
            found = attention_received(query[:, :, -count:], keys, visible, scaling, softcap, sink_logits)
        now.received = found if now.received is None else now.received + found.to(now.received.device)

    def ends(self, held: Tensor) -> Tensor | None:
        """Take in a pass that came to its end, and return what stays, if not all does.

        Parameters
        ----------
        held
            ``[rows, columns]`` bool on the CPU: which columns hold a token.

        Returns
        -------
        Tensor or None
            ``[rows, columns]`` bool on the CPU.
        """
        now, self._pass = self._pass, None
        if now is None:
            return None
        rows, columns = held.shape
        new = torch.ones(rows, now.new_columns, dtype=torch.bool)
        # Others are not looked at, which would take a wait for the device: padding is in prompts.
        if now.received is not None and now.mask is not None and now.mask.ndim == 2:
            new = now.mask[:, now.columns : columns].ne(0).cpu().expand(rows, -1)
        self._real = torch.cat([_widened(self._real, rows, now.columns, True), new], 1)
        received = torch.zeros(rows, columns) if now.received is None else now.received.cpu()
        if self.policy.accumulates:
            received = received + _widened(self._scores, rows, columns, 0.0)
            self._scores = received
        return self.policy.choose(PassScores(received, held, self._real.sum(1), now.new_columns))

    def footprint(self) -> int:
        """Return the bytes of what is kept from pass to pass."""
        return storage_bytes(self._scores, self._real)

    def select(self, rows: list[int]) -> None:
        """Follow a choice of rows."""
        self._real = None if self._real is None else self._real[rows]
        self._scores = None if self._scores is None else self._scores[rows]

    def crop(self, columns: int) -> None:
        """Forget all columns from ``columns`` on."""
        self._real = None if self._real is None else self._real[:, :columns]
        self._scores = None if self._scores is None else self._scores[:, :columns]


def _widened(held: Tensor | None, rows: int, columns: int, value: float | bool) -> Tensor:
    """Return what is known of columns with ``value`` for those that were fed unwatched."""
    if held is None:
        return torch.full((rows, columns), value)
    return torch.nn.functional.pad(held, (0, columns - held.shape[1]), value=value)
