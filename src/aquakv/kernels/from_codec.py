"""A layer's operands from its codec, folded once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aquakv.codec import LayerCodec, LinearTransform, OutlierGuard, ScalarQuantizer, TensorCodec
from aquakv.codec.latent import latent_steps
from aquakv.codec.pages import coefficient_heads
from aquakv.errors import ConfigError
from aquakv.kernels.encode.operands import EncodeOperands, Guard
from aquakv.kernels.operands import DecodeOperands
from aquakv.kernels.pages import PageLayout
from aquakv.kernels.reconstruct.operands import ReconstructOperands


class PlainLayer(NamedTuple):
    """A layer's matrices before any folding, float64 except where they are stored narrower.

    Attributes
    ----------
    key_layout, value_layout
        How codes lie in pages: a group for every KV head, and one for all values.
    key_synthesis
        ``[key coefficients, head_dim]``: of each coefficient's own head, deviations folded in.
    value_synthesis
        ``[value coefficients, features]``, deviations folded in.
    key_bias, value_bias
        ``[features]``: of the predictors; zeros without one.
    latent_map
        ``[rank, features]``: from the latent to centred keys; None at the first compressed layer.
    value_map
        ``[features, features]``: from centred keys to values; None if values are not predicted.
    innovation, next_offset, transition
        The next layer's latent (`aquakv.codec.latent.LatentStep`), deviations folded in; None at the last.
    key_analysis
        ``[head_dim, key coefficients]``: from the residual of a coefficient's own head, over deviations.
    value_analysis
        ``[features, value coefficients]``, over deviations.
    """

    key_layout: PageLayout
    value_layout: PageLayout
    key_synthesis: Tensor
    value_synthesis: Tensor
    key_bias: Tensor
    value_bias: Tensor
    latent_map: Tensor | None
    value_map: Tensor | None
    innovation: Tensor | None
    next_offset: Tensor | None
    transition: Tensor | None
    key_analysis: Tensor
    value_analysis: Tensor


def decode_operands(
    codec: LayerCodec,
    next_codec: LayerCodec | None,
    *,
    num_kv_heads: int | None = None,
    rotary_dim: int | None = None,
    dtype: torch.dtype = torch.float16,
) -> DecodeOperands:
    """Fold what the decode kernels multiply with.

    Parameters
    ----------
    codec
        The layer's codec, of the preset ``decode``.
    next_codec
        That of the compressed layer after; None at the last, which has no next latent.
    num_kv_heads
        KV heads; by default as many as the outlier guard has.
    rotary_dim, dtype
        As for `DecodeOperands.build`.

    Raises
    ------
    ConfigError
        The codec is not made for decoding from codes.
    """
    plain = plain_layer(codec, next_codec, num_kv_heads)
    return DecodeOperands.build(
        plain.key_layout,
        plain.value_layout,
        key_synthesis=plain.key_synthesis,
        key_bias=plain.key_bias,
        key_mean=codec.keys.mean,
        value_synthesis=plain.value_synthesis,
        value_offset=plain.value_bias + codec.values.mean.double(),
        value_map=plain.value_map,
        latent_map=plain.latent_map,
        innovation=plain.innovation,
        next_offset=plain.next_offset,
        transition=plain.transition,
        rotary_dim=rotary_dim,
        dtype=dtype,
    )


def encode_operands(
    codec: LayerCodec,
    next_codec: LayerCodec | None,
    *,
    num_kv_heads: int | None = None,
    dtype: torch.dtype = torch.float16,
) -> EncodeOperands:
    """Fold what the encode kernels multiply with; parameters and errors as for `decode_operands`.

    Also a `ConfigError` if the codec's guard measures errors in another norm than its transform.
    """
    plain = plain_layer(codec, next_codec, num_kv_heads)
    guards = None
    if codec.keys.guard is not None and codec.values.guard is not None:
        guards = _guard(codec.keys.guard), _guard(codec.values.guard)
    return EncodeOperands.build(
        plain.key_layout,
        plain.value_layout,
        key_analysis=plain.key_analysis,
        key_synthesis=plain.key_synthesis,
        key_offset=plain.key_bias + codec.keys.mean.double(),
        key_bias=plain.key_bias,
        value_analysis=plain.value_analysis,
        value_synthesis=plain.value_synthesis,
        value_offset=plain.value_bias + codec.values.mean.double(),
        value_map=plain.value_map,
        latent_map=plain.latent_map,
        innovation=plain.innovation,
        next_offset=plain.next_offset,
        transition=plain.transition,
        guards=guards,
        dtype=dtype,
    )


def reconstruct_operands(
    codec: LayerCodec, *, num_kv_heads: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> ReconstructOperands:
    """Fold what reconstruction multiplies with; parameters and errors as for `decode_operands`."""
    plain = plain_layer(codec, None, num_kv_heads)
    return ReconstructOperands.build(
        plain.key_layout,
        plain.value_layout,
        key_synthesis=plain.key_synthesis,
        key_bias=plain.key_bias,
        key_mean=codec.keys.mean,
        value_synthesis=plain.value_synthesis,
        value_bias=plain.value_bias,
        value_mean=codec.values.mean,
        value_map=plain.value_map,
        latent_map=plain.latent_map,
        dtype=dtype,
    )


def plain_layer(
    codec: LayerCodec, next_codec: LayerCodec | None, num_kv_heads: int | None = None
) -> PlainLayer:
    """Return a layer's matrices, checked to be what the kernels can do; raises as `decode_operands`."""
    heads = _kv_heads(codec, num_kv_heads)
    _check_predictors(codec)
    key_transform, key_quantizer = _scalar_parts("keys", codec.keys)
    value_transform, value_quantizer = _scalar_parts("values", codec.values)
    groups = coefficient_heads(key_transform, heads)
    own_head = key_transform.synthesis.double().unflatten(1, (heads, -1))
    index = torch.arange(len(groups), device=own_head.device)
    deviations = key_quantizer.deviations.double()[:, None]
    key_synthesis = own_head[index, groups] * deviations
    key_analysis = key_transform.analysis.T.double().unflatten(1, (heads, -1))[index, groups] / deviations
    innovation, next_offset, transition = None, None, None
    if next_codec is not None:
        (step,) = latent_steps((codec, next_codec))
        innovation, next_offset = step.innovation * deviations, step.offset
        transition = step.transition
    value_predictor, key_predictor = codec.values.predictor, codec.keys.predictor
    value_map = None
    if value_predictor is not None:
        value_map = value_predictor.factors[0].double()
        for factor in value_predictor.factors[1:]:
            value_map = value_map @ factor.double()
    return PlainLayer(
        PageLayout(tuple(key_quantizer.widths.tolist()), tuple(groups.tolist()), heads),
        PageLayout(tuple(value_quantizer.widths.tolist()), (0,) * value_quantizer.features, 1),
        key_synthesis,
        value_transform.synthesis.double() * value_quantizer.deviations.double()[:, None],
        _bias(codec.keys),
        _bias(codec.values),
        None if key_predictor is None else key_predictor.factors[-1].double(),
        value_map,
        innovation,
        next_offset,
        transition,
        key_analysis.T,
        value_transform.analysis.double() / value_quantizer.deviations.double(),
    )


def _kv_heads(codec: LayerCodec, num_kv_heads: int | None) -> int:
    if num_kv_heads is None:
        if codec.keys.guard is None:
            raise ConfigError("kernels: a codec without a guard does not tell its heads; give num_kv_heads")
        num_kv_heads = codec.keys.guard.roots.shape[0]
    if num_kv_heads < 1 or codec.features % num_kv_heads:
        raise ConfigError(
            f"kernels: expected a num_kv_heads that divides {codec.features} features, got {num_kv_heads}"
        )
    return num_kv_heads


def _check_predictors(codec: LayerCodec) -> None:
    keys, inputs = codec.keys.predictor, codec.inputs
    if keys is not None and (
        keys.rank is None or inputs.key_inputs != ("previous_keys",) or inputs.history != 1
    ):
        raise ConfigError(
            "kernels: expected key predictors of limited rank that read the previous_keys of one layer; got "
            f"rank {keys.rank} of {', '.join(inputs.key_inputs)} of {inputs.history} layers"
        )
    if codec.values.predictor is not None and inputs.value_inputs != ("keys",):
        raise ConfigError(
            f"kernels: expected values predicted from keys only, got {', '.join(inputs.value_inputs)}"
        )


def _scalar_parts(name: str, codec: TensorCodec) -> tuple[LinearTransform, ScalarQuantizer]:
    transform, quantizer = codec.transform, codec.quantizer
    if not isinstance(transform, LinearTransform) or not isinstance(quantizer, ScalarQuantizer):
        raise ConfigError(
            f"kernels: expected {name} with a klt transform and a scalar quantiser, got "
            f"{type(transform).__name__} and {type(quantizer).__name__}"
        )
    if not quantizer.arithmetic:
        raise ConfigError(
            f"kernels: expected {name} with levels by a cubic (quantizer.arithmetic), got tables"
        )
    return transform, quantizer


def _guard(guard: OutlierGuard) -> Guard:
    return Guard(guard.roots.double(), float(guard.limit))


def _bias(codec: TensorCodec) -> Tensor:
    return torch.zeros_like(codec.mean).double() if codec.predictor is None else codec.predictor.bias.double()
