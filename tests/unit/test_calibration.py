import dataclasses

import pytest
import torch

from aquakv import calibrate, calibrate_many, preset
from aquakv.calibration.sweep import Split
from aquakv.errors import ConfigError, DataError, InputError, UnsupportedModelError
from tiny_models import DECODE_BITS, WINDOW, build, codec_for, random_tokens, same_bits, shared

PAPER = dataclasses.replace(preset("paper"), window=WINDOW)
TOKENS = random_tokens(8, 48, seed=1)


def _keys_and_values(model, tokens, layer):
    """Project by hand: a layer's keys before rotary embedding and its values, ``[sequences, tokens, d]``."""
    attention, found = model.model.layers[layer].self_attn, {}
    handles = [
        getattr(attention, name).register_forward_hook(lambda m, a, out, name=name: found.update({name: out}))
        for name in ("k_proj", "v_proj")
    ]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found["k_proj"].double(), found["v_proj"].double()


def _naive_ridge(x, y, relative):
    """Solve for weights and bias in float64, straight from the definition."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    a, b = x - x_mean, y - y_mean
    gram = a.T @ a
    penalty = relative * gram.diagonal().mean() * torch.eye(len(gram), dtype=x.dtype)
    weight = torch.linalg.solve(gram + penalty, a.T @ b)
    return weight, y_mean - x_mean @ weight


@pytest.mark.parametrize("kind", ["llama", "llama-odd"])
@pytest.mark.parametrize("held_out", [1, 3])
def test_predictors_are_those_of_the_definition(kind, held_out):
    model = shared(kind)
    codec = calibrate(model, TOKENS, PAPER, batch_size=3, held_out=held_out)
    sinks, fitted, history = WINDOW.sink_tokens, 8 - held_out, ()
    for index, layer in enumerate(codec.layers):
        keys, values = (t[:, sinks:] for t in _keys_and_values(model, TOKENS, index))
        rows = [t.flatten(0, 1) for t in (keys, values)]
        for part, own in ((layer.keys, keys), (layer.values, values)):
            # The model computes in float32.
            torch.testing.assert_close(part.mean.double(), own[:fitted].mean((0, 1)), atol=1e-5, rtol=0)
            assert (part.predictor is None) == (index == 0)
        # The loop is closed: the next layer's inputs are what this codec reconstructs, of all sequences.
        _, hat = layer.encode(*(t.float() for t in rows), history)
        if index:
            wide = [
                t.double().view(8, -1, t.shape[1])[:fitted].flatten(0, 1) for t in (*history[0], hat.keys)
            ]
            for part, own, inputs in (
                (layer.keys, keys, wide[0]),
                (
                    layer.values,
                    values,
                    torch.cat([wide[2], wide[1]], 1),
                ),  # [k_hat of this layer; v_hat before]
            ):
                weight, bias = _naive_ridge(inputs, own[:fitted].flatten(0, 1) - part.mean.double(), 1e-3)
                # Weights are stored in bfloat16 (2^-8 relative); the rest is float32 moments.
                torch.testing.assert_close(
                    part.predictor.factors[0].double(),
                    weight,
                    rtol=2**-7,
                    atol=1e-3 * float(weight.abs().max()),
                )
                torch.testing.assert_close(
                    part.predictor.bias.double(), bias, rtol=0, atol=1e-3 * float(own.abs().max())
                )
        history = layer.extend(history, hat)


def test_higgs_has_the_mean_and_nothing_else():
    codec = codec_for("llama", "higgs")
    assert all(part.predictor is None for layer in codec.layers for part in (layer.keys, layer.values))
    assert all(part.mean.abs().max() > 0 for layer in codec.layers for part in (layer.keys, layer.values))
    none = calibrate(
        shared(),
        TOKENS,
        dataclasses.replace(PAPER, predictor=dataclasses.replace(PAPER.predictor, kind="none")),
    )
    assert all(part.mean.abs().max() == 0 for layer in none.layers for part in (layer.keys, layer.values))


def test_record_has_every_layers_figures_and_they_are_those_of_held_out_sequences():
    model = shared()
    codec = calibrate(model, TOKENS, PAPER, held_out=2, record={"data": "random", "seed": 1})
    record = codec.calibration
    assert (record["data"], record["seed"]) == ("random", 1)
    assert (record["sequences"], record["held_out_sequences"], record["seq_len"], record["tokens"]) == (
        8,
        2,
        48,
        384,
    )
    assert (record["device"], record["model_dtype"]) == ("cpu", "float32")
    assert set(record["versions"]) == {"aquakv", "torch", "transformers", "python"}
    assert [layer["layer"] for layer in record["layers"]] == [0, 1, 2]
    history = ()
    for index, (layer, figures) in enumerate(zip(codec.layers, record["layers"], strict=True)):
        assert figures["bits_per_value"] == (4 if index == 0 else 2) + 16 / 32
        keys, values = (t[:, 2:].flatten(0, 1).float() for t in _keys_and_values(model, TOKENS, index))
        _, hat = layer.encode(keys, values, history)
        held = slice(6 * 46, None)
        for name, own, got in (("keys", keys, hat.keys), ("values", values, hat.values)):
            centred = own[held] - own[: 6 * 46].mean(0)
            error = (centred - got[held]).square().sum() / centred.square().sum()
            # float32 sums; a code in thousands may turn.
            assert figures[name]["reconstruction_error"] == pytest.approx(float(error), rel=1e-2)
            assert 0 < figures[name]["reconstruction_error"] < 0.2
            explained = figures[name]["explained_variance"]
            assert explained == 0 if index == 0 else -0.2 < explained < 1
        history = layer.extend(history, hat)


def test_held_out_split():
    assert Split.of([3, 3, 2], 1).fitted == (3, 3, 1)
    assert Split.of([3, 3, 2], 2).fitted == (3, 3, 0)
    assert Split.of([3, 3, 2], 4).fitted == (3, 1, 0)
    assert Split.of([4], 3).fitted == (1,)
    default = calibrate(shared(), TOKENS, PAPER).calibration["held_out_sequences"]
    assert default == 1


def test_held_out_sequences_do_not_enter_the_fit():
    other = TOKENS.clone()
    other[6:] = random_tokens(2, 48, seed=99)
    a, b = (calibrate(shared(), tokens, PAPER, held_out=2) for tokens in (TOKENS, other))
    for mine, theirs in zip(a.layers, b.layers, strict=True):
        # Other rows of the same batch: float32 products may differ in their last bit.
        torch.testing.assert_close(mine.keys.mean, theirs.keys.mean, atol=1e-6, rtol=0)
        if mine.keys.predictor is not None:
            torch.testing.assert_close(
                mine.keys.predictor.factors[0].float(),
                theirs.keys.predictor.factors[0].float(),
                rtol=2**-6,
                atol=1e-3,
            )
    assert a.calibration["layers"] != b.calibration["layers"]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_batch_size_does_not_change_the_result(kind):
    config = dataclasses.replace(preset("paper", 8), window=WINDOW)
    codecs = [calibrate(shared(kind), TOKENS, config, batch_size=size) for size in (1, 3, 8, 100)]
    first = codecs[0]
    for other in codecs[1:]:
        for a, b in zip(first.layers, other.layers, strict=True):
            torch.testing.assert_close(a.keys.mean, b.keys.mean, atol=1e-5, rtol=0)
            torch.testing.assert_close(a.values.mean, b.values.mean, atol=1e-5, rtol=0)
        # The first predictor reads the same codes. Moments are merged in another order, so that a bfloat16
        # weight (below 1 here) may turn by its last bit.
        mine, theirs = (codec.layers[1].keys.predictor.factors[0].float() for codec in (first, other))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2**-8)
        # A turned bit turns codes after it; and keys and values are both linear in a hidden state no wider
        # than they are, so that quantisation noise alone decides many later weights. Their worth stays.
        for a, b in zip(first.calibration["layers"], other.calibration["layers"], strict=True):
            for tensor in ("keys", "values"):
                assert a[tensor] == pytest.approx(b[tensor], rel=0.02, abs=3e-6)


def test_keys_and_values_that_are_wider_than_hidden_states():
    """Little is left of them behind predictors: less than float32's rounding of what they were."""
    model = build("llama", hidden_size=256, num_attention_heads=8, num_key_value_heads=8, head_dim=64)
    codec = calibrate(model, random_tokens(16, 96, seed=1), preset("decode", 4))
    for figures in codec.calibration["layers"]:
        assert 0 < figures["values"]["reconstruction_error"] < 1e-2
    assert codec.bits_per_value == pytest.approx(4, rel=0.03)


def test_many_at_once_are_each_alone():
    configs = {
        "two": PAPER,
        "three": dataclasses.replace(preset("paper", 3), window=WINDOW),
        "other sinks": dataclasses.replace(PAPER, window=dataclasses.replace(WINDOW, sink_tokens=5)),
        "higgs": dataclasses.replace(preset("higgs"), window=WINDOW),
    }
    together = calibrate_many(shared(), TOKENS, configs)
    assert list(together) == list(configs)
    for name, config in configs.items():
        alone = calibrate(shared(), TOKENS, config)
        for a, b in zip(together[name].layers, alone.layers, strict=True):
            for mine, theirs in ((a.keys, b.keys), (a.values, b.values)):
                assert same_bits([mine.mean], [theirs.mean])
                if theirs.predictor is not None:
                    assert same_bits(
                        [mine.predictor.factors[0], mine.predictor.bias],
                        [theirs.predictor.factors[0], theirs.predictor.bias],
                    )


def test_progress_counts_to_the_end_and_the_model_is_left_alone():
    model = build("gemma3")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    seen = []
    calibrate(model, TOKENS, PAPER, batch_size=3, progress=seen.append)
    assert [p.done for p in seen] == list(range(1, seen[-1].total + 1))
    assert {p.layer for p in seen} <= {0, 1, 2, 3}
    assert seen[-1].layer == 3
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_progress_names_the_layer_at_hand():
    seen = []
    calibrate(shared(), TOKENS, PAPER, batch_size=8, progress=seen.append)
    # One batch: a walk's step, then the two sweeps of that layer.
    assert [p.layer for p in seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("name", ["storage", "decode"])
def test_fitted_codecs_are_those_of_their_residuals(name):
    """On fitted tokens coefficients have the stored deviations and are uncorrelated where they may mix."""
    bits = DECODE_BITS if name == "decode" else None
    model, config = shared(), dataclasses.replace(preset(name, bits), window=WINDOW)
    codec = calibrate(model, TOKENS, config, held_out=1)
    fitted, history = slice(7 * 46), ()
    for index, layer in enumerate(codec.layers):
        rows = [t[:, 2:].flatten(0, 1).float() for t in _keys_and_values(model, TOKENS, index)]
        _, hat = layer.encode(*rows, history)
        sources = (layer.key_sources(history), layer.value_sources(hat.keys, history))
        for part, own, got, inputs in zip((layer.keys, layer.values), rows, hat, sources, strict=True):
            centred = own - part.mean
            z = part.transform.forward(centred - part.predict(centred, inputs))[fitted].double()
            deviations = part.quantizer.deviations.double()
            head = part.transform.analysis.abs().argmax(0) // 16
            mixing = [head == h for h in range(2)] if name == "decode" and part is layer.keys else [head >= 0]
            for own_deviations in (deviations[members] for members in mixing):
                assert bool((own_deviations.diff() <= 0).all())
            # Inputs are reconstructions, whose codes may turn here and there: much for what hardly varies.
            exact = part is codec.layers[0].keys or (name == "storage" and index == 0)
            vary = deviations > (0 if exact else 0.03) * deviations[0]
            z, deviations, head = z[:, vary], deviations[vary], head[vary]
            covariance = z.T @ z / len(z) / (deviations[:, None] * deviations)
            tolerance = 1e-3 if exact else 0.1
            mixed = head[:, None] == head if name == "decode" and part is layer.keys else covariance > -2
            error = (covariance - torch.eye(len(covariance)))[mixed]
            assert error.abs().max() < tolerance
            mean = part.guard.weighted_error((centred - got)[fitted]).mean()
            threshold = {"decode": 8, "storage": 16}[name]
            assert float(part.guard.limit) == pytest.approx(threshold * float(mean), rel=0.02)
        history = layer.extend(history, hat)


def test_gradients_and_half_precision_are_no_obstacle():
    codec = calibrate(build("llama", dtype=torch.bfloat16).requires_grad_(True), TOKENS, PAPER)
    exact = codec_for("llama")
    for a, b in zip(codec.layers, exact.layers, strict=True):
        assert not a.keys.mean.requires_grad
        # Keys in bfloat16 are off by 0.4 % each, their means by less.
        torch.testing.assert_close(a.keys.mean, b.keys.mean, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        (random_tokens(1, 48), {}, "at least 2 sequences"),
        (random_tokens(48), {}, "at least 2 sequences"),
        (random_tokens(2, 257), {}, "maximum of 256"),
        (random_tokens(2, 40), {}, "at least 64 calibration tokens"),
        (random_tokens(8, 48), {"held_out": 0}, "held-out"),
        (random_tokens(8, 48), {"held_out": 8}, "held-out"),
        (random_tokens(8, 48), {"held_out": -1}, "held-out"),
        (random_tokens(8, 48), {"offload": "disk"}, "hidden, all"),
    ],
)
def test_bad_input(tokens, settings, message):
    with pytest.raises((DataError, ConfigError), match=message) as error:
        calibrate(shared(), tokens, PAPER, **settings)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(("name", "tokens"), [("higgs", (4, 2)), ("higgs", (4, 1)), ("paper", (33, 3))])
def test_sink_tokens_do_not_count_as_calibration_tokens(name, tokens):
    """With 2 sinks nothing (higgs) or too little (paper: 32 tokens for 64 inputs) is left to fit."""
    config = dataclasses.replace(preset(name), window=WINDOW)
    with pytest.raises(DataError, match="calibration tokens"):
        calibrate(shared(), random_tokens(*tokens), config)


def test_a_model_that_gives_no_numbers_is_refused():
    model = build()
    model.model.layers[1].self_attn.v_proj.weight[0] = torch.nan
    with pytest.raises((InputError, UnsupportedModelError), match=r"finite|not a number|NaN"):
        calibrate(model, TOKENS, PAPER)
