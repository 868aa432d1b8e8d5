"""Which codecs keep their codes in pages, and where codes lie in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aquakv.codec.latent import require_latents
from aquakv.codec.layer import LayerCodec
from aquakv.codec.scalar import ScalarQuantizer
from aquakv.codec.transform import LinearTransform
from aquakv.errors import ConfigError
from aquakv.numerics.pages import PageLayout


def with_page_layouts(layers: Sequence[LayerCodec], num_kv_heads: int) -> tuple[LayerCodec, ...]:
    """Return layers that keep their codes in pages, or rows where kernels cannot attend to pages.

    Kernels can if keys follow from a latent and from coefficients of their own head, values from their
    layer's keys and coefficients, and levels from arithmetic, at all layers: preset ``decode``.
    """
    layouts = _page_layouts(layers, num_kv_heads)
    return tuple(
        replace(
            layer, keys=replace(layer.keys, pages=own_keys), values=replace(layer.values, pages=own_values)
        )
        for layer, (own_keys, own_values) in zip(layers, layouts, strict=True)
    )


def _page_layouts(
    layers: Sequence[LayerCodec], heads: int
) -> list[tuple[PageLayout, PageLayout] | tuple[None, None]]:
    rows: list[tuple[PageLayout, PageLayout] | tuple[None, None]] = [(None, None)] * len(layers)
    pages: list[tuple[PageLayout, PageLayout] | tuple[None, None]] = []
    try:
        require_latents(layers)
        for layer in layers:
            keys, values = layer.keys, layer.values
            if values.predictor is not None and layer.inputs.value_inputs != ("keys",):
                return rows
            for part in (keys, values):
                quantizer = part.quantizer
                if not isinstance(quantizer, ScalarQuantizer) or not quantizer.arithmetic:
                    return rows
            if not isinstance(keys.transform, LinearTransform) or layer.features % heads:
                return rows
            groups = coefficient_heads(keys.transform, heads).tolist()
            assert isinstance(keys.quantizer, ScalarQuantizer)
            assert isinstance(values.quantizer, ScalarQuantizer)
            key_widths, value_widths = (q.widths.tolist() for q in (keys.quantizer, values.quantizer))
            pages.append(
                (
                    PageLayout(tuple(key_widths), tuple(groups), heads),
                    PageLayout(tuple(value_widths), (0,) * len(value_widths), 1),
                )
            )
    except ConfigError:
        return rows
    return pages


def coefficient_heads(transform: LinearTransform, heads: int) -> Tensor:
    """Return the KV head, ``[coefficients]`` int64, that each coefficient of a transform belongs to.

    Raises
    ------
    ConfigError
        A coefficient mixes heads.
    """
    parts = transform.synthesis.unflatten(1, (heads, -1)).abs().sum(-1)
    parts = parts + transform.analysis.T.unflatten(1, (heads, -1)).abs().sum(-1)
    if bool(((parts > 0).sum(1) > 1).any()):
        raise ConfigError(
            "kernels: expected key coefficients that stay within a head (transform.key_scope head), got some "
            "that mix heads"
        )
    return parts.argmax(1) if len(parts) else torch.zeros(0, dtype=torch.int64, device=parts.device)
