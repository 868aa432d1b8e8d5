"""The latent recursion gives what reconstruction gives."""

import pytest
import torch

from aquakv.codec.latent import latent_steps
from aquakv.errors import ConfigError
from tiny_models import codec_for, variant


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("name", ["decode", "two-stage"])
def test_recursion_equals_the_latent_of_reconstructed_keys(kind, name):
    layers = variant(name, kind).layers
    generator = torch.Generator().manual_seed(0)
    history, latent = (), None
    steps = latent_steps(layers)
    assert len(steps) == len(layers) - 1 > 0
    for index, (layer, step) in enumerate(zip(layers, steps, strict=False)):
        keys, values = (torch.randn(9, layer.features, generator=generator) for _ in range(2))
        codes, hat = layer.encode(keys, values, history)
        coefficients = layer.keys.quantizer.dequantize(codes.keys)
        assert float(coefficients.abs().max()) > 0
        latent = step.advance(latent, coefficients)
        expected = layers[index + 1].keys.predictor.latent((hat.keys,))
        assert torch.allclose(latent, expected, atol=1e-4 * float(expected.abs().max()))
        history = layer.extend(history, hat)


def test_other_predictors_are_refused():
    with pytest.raises(ConfigError, match="rank None of previous_keys"):
        latent_steps(codec_for("llama", "paper", 2).layers)
    with pytest.raises(ConfigError, match="previous_keys, previous_values"):
        latent_steps(codec_for("llama", "storage", 2).layers)
