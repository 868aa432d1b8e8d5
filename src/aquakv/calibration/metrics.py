"""How much attention feels of an error in keys and in values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aquakv.calibration.group import Group
from aquakv.models.adapter import ModelAdapter
from aquakv.models.placement import weight_of
from aquakv.models.rotary import RotaryTables, rotate, unrotate
from aquakv.numerics import symmetric_root

#: Distances between query and key over which the weight of keys is averaged.
DISTANCES = (1, 2, 4, 8, 16, 32, 64, 128, 200, 300, 450, 700, 1000, 1500)


@dataclass(frozen=True)
class Metric:
    """Weight of errors in one layer's keys or values, normalised to a mean diagonal of about 1.

    Attributes
    ----------
    blocks
        ``[num_kv_heads, head_dim, head_dim]`` float64, positive definite: an error e of a head weighs
        ``eᵀ M e``.
    """

    blocks: Tensor

    @classmethod
    def of(cls, blocks: Tensor, floor: float) -> Metric:
        """Normalise weights by their mean diagonal over all heads, and add ``floor`` times the identity."""
        scale = blocks.diagonal(dim1=1, dim2=2).mean()
        identity = torch.eye(blocks.shape[1], dtype=blocks.dtype, device=blocks.device)
        blocks = blocks / scale if float(scale) > 0 else identity.expand_as(blocks)
        return cls(blocks + floor * identity)

    @property
    def matrix(self) -> Tensor:
        """The whole weight, ``[features, features]`` float64, block-diagonal."""
        return torch.block_diag(*self.blocks)

    def roots(self, inverse: bool = False) -> Tensor:
        """Return the symmetric roots of the blocks, or the roots' inverses."""
        return torch.stack([symmetric_root(block, inverse) for block in self.blocks])


@dataclass
class QueryMoments:
    """Second moments of the queries of each key head, taken back to position 0.

    Attributes
    ----------
    sums
        ``[num_kv_heads, head_dim, head_dim]`` float64.
    count
        Queries summed for each key head.
    """

    sums: Tensor
    count: int = 0

    @classmethod
    def empty(cls, adapter: ModelAdapter, device: torch.device) -> QueryMoments:
        """Return moments of no queries, for those of a layer on a device."""
        shape = (adapter.num_kv_heads, adapter.head_dim, adapter.head_dim)
        return cls(torch.zeros(shape, dtype=torch.float64, device=device))

    def add(self, queries: Tensor, tables: RotaryTables) -> None:
        """Add queries ``[rows, num_attention_heads, tokens, head_dim]``, given the tables of the tokens."""
        heads = self.sums.shape[0]
        for row in queries:
            vectors = unrotate(row.transpose(0, 1), tables)  # [tokens, num_attention_heads, head_dim]
            grouped = vectors.unflatten(1, (heads, -1)).permute(1, 0, 2, 3).flatten(1, 2)
            self.sums += torch.bmm(grouped.transpose(1, 2), grouped).double()
            self.count += grouped.shape[1]

    def share(self, group: Group) -> None:
        """Add what the other processes of a group have summed."""
        self.sums = group.add(self.sums)
        self.count = int(group.add_numbers(self.count)[0])


def key_weight(adapter: ModelAdapter, layer_idx: int, moments: QueryMoments, seq_len: int) -> Tensor:
    """Return the weight of errors in keys before rotary embedding.

    A score is the product of the query, rotated by its distance from the key, with the key. So the weight is
    the queries' second moment, averaged over rotations by `DISTANCES` below ``seq_len``.

    Returns
    -------
    Tensor
        ``[num_kv_heads, head_dim, head_dim]`` float64, not normalised.
    """
    device = moments.sums.device
    distances = torch.tensor([d for d in DISTANCES if d < seq_len] or [1])
    tables = adapter.rotary_tables(distances, layer_idx, torch.float32, device)
    identity = torch.eye(adapter.head_dim, device=device)[None]
    weight = torch.zeros_like(moments.sums)
    for index in range(len(distances)):
        one = tables._replace(cos=tables.cos[index : index + 1], sin=tables.sin[index : index + 1])
        rotation = rotate(identity, one)[0].double()  # row i is the rotated unit vector i
        weight += rotation.T @ moments.sums @ rotation
    return weight / (len(distances) * max(moments.count, 1))


def value_weight(adapter: ModelAdapter, layer_idx: int) -> Tensor:
    """Return the weight of errors in values: the squared size that the output projection gives them.

    Returns
    -------
    Tensor
        ``[num_kv_heads, head_dim, head_dim]`` float64, not normalised; identities where the projection is not
        found.
    """
    heads, dim, device = adapter.num_kv_heads, adapter.head_dim, adapter.layer_device(layer_idx)
    projection = getattr(adapter.layers[layer_idx].self_attn, "o_proj", None)
    if isinstance(projection, nn.Module):
        with weight_of(adapter.model, f"{adapter.layer_name(layer_idx)}.self_attn.o_proj.weight") as weight:
            if weight is not None and weight.ndim == 2 and not weight.shape[1] % (heads * dim):
                by_head = weight.to(device).double().unflatten(1, (heads, -1, dim))
                # [hidden, kv head, query head, dim]
                return torch.einsum("ogqi,ogqj->gij", by_head, by_head)
    return torch.eye(dim, dtype=torch.float64, device=device).repeat(heads, 1, 1)
