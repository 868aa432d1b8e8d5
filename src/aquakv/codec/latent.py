"""Carry the key predictors' latents from layer to layer without reconstructing keys.

With a low-rank predictor that reads the layer before's keys only, ``k̂_i = c_{i-1} B_i + b_i + z_i S_i`` where
``c_{i-1} = k̂_{i-1} U_i`` is the predictor's latent, ``z_i`` the decoded coefficients and ``S_i`` the
transform's synthesis. So ``c_i = k̂_i U_{i+1}`` is itself affine in ``c_{i-1}`` and ``z_i``: a few numbers per
token, one layer alive at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from aquakv.codec.layer import LayerCodec
from aquakv.codec.transform import LinearTransform
from aquakv.errors import ConfigError


@dataclass(frozen=True)
class LatentStep:
    """From the latent that predicts one layer's keys to the one that predicts the next layer's.

    Attributes
    ----------
    transition
        ``[rank, next_rank]`` float64; None at the first compressed layer, whose keys are not predicted.
    innovation
        ``[coefficients, next_rank]`` float64.
    offset
        ``[next_rank]`` float64.
    """

    transition: Tensor | None
    innovation: Tensor
    offset: Tensor

    def advance(self, latent: Tensor | None, coefficients: Tensor) -> Tensor:
        """Return the next latent, ``[tokens, next_rank]``.

        Parameters
        ----------
        latent
            ``[tokens, rank]``; None at the first compressed layer.
        coefficients
            ``[tokens, coefficients]``: the layer's decoded key coefficients, in the dtype to compute in.
        """
        dtype = coefficients.dtype
        following = coefficients @ self.innovation.to(dtype) + self.offset.to(dtype)
        if self.transition is None:
            return following
        if latent is None:
            raise ConfigError("latent: expected the latent of the layer before, got none")
        return following + latent @ self.transition.to(dtype)


def latent_steps(layers: Sequence[LayerCodec]) -> tuple[LatentStep, ...]:
    """Return the step at every layer but the last.

    Raises
    ------
    ConfigError
        Keys are not predicted through a latent of the layer before's keys alone, or not by a fitted
        transform.
    """
    require_latents(layers)
    steps = []
    for layer, following in pairwise(layers):
        reader, transform, own = following.keys.predictor, layer.keys.transform, layer.keys.predictor
        assert reader is not None  # see `require_latents`
        assert isinstance(transform, LinearTransform)
        down = reader.factors[0].double()
        offset = down.new_zeros(down.shape[1])
        transition = None
        if own is not None:
            transition = own.factors[-1].double() @ down
            offset = own.bias.double() @ down
        steps.append(LatentStep(transition, transform.synthesis.double() @ down, offset))
    return tuple(steps)


def require_latents(layers: Sequence[LayerCodec]) -> None:
    """Raise what `latent_steps` raises, without its products."""
    for layer, following in pairwise(layers):
        reader, inputs = following.keys.predictor, following.inputs
        if reader is None or reader.rank is None or inputs.key_inputs != ("previous_keys",):
            raise ConfigError(
                "latent: expected key predictors of limited rank that read previous_keys only, as in the "
                f"preset decode; got rank {None if reader is None else reader.rank} of "
                f"{', '.join(inputs.key_inputs)}"
            )
        if inputs.history != 1 or not isinstance(layer.keys.transform, LinearTransform):
            raise ConfigError("latent: expected a history of one layer and a klt transform")
