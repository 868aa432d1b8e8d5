"""Each competitor has the property that defines it."""

import itertools
import zlib

import pytest
import torch
from transformers import DynamicCache

from aquakv.baselines import BASELINES, baseline
from aquakv.baselines.encoded import join
from aquakv.baselines.fp8 import Float8Cast
from aquakv.baselines.higgs import Higgs
from aquakv.baselines.kivi import Kivi
from aquakv.baselines.kvquant import ChannelLevels, TokenLevels
from aquakv.baselines.kvquant_fit import CELLS, _fisher, fit_tables, outliers_per_end, weighted_levels
from aquakv.baselines.kvtc import Components
from aquakv.baselines.kvtc_plan import SCALE_BITS, group_errors, plan, plan_groups
from aquakv.baselines.lloyd_max import sphere_levels
from aquakv.baselines.quarot import HeadRotation
from aquakv.baselines.turboquant import RotatedLloydMax, random_rotation, sketch_matrix
from aquakv.baselines.uniform import ChannelRounding, TokenRounding, dequantize, quantize
from aquakv.errors import ConfigError, DataError
from aquakv.models.adapter import adapt
from aquakv.models.rotary import rotate
from aquakv.numerics.orthogonal import orthogonal_matrix
from aquakv.numerics.packing import unpack
from tiny_models import build, random_tokens, shared


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(encoded, values):
    """Bits per value from the storages' bytes."""
    return 8 * (encoded.code_bytes + encoded.scale_bytes + encoded.outlier_bytes) / values


# --- round-to-nearest --------------------------------------------------------------------------------------


def test_rounding_errs_by_half_a_step_at_most_and_holds_what_it_should():
    x = gaussian(50, 2, 2, 16)
    coder = TokenRounding(2, 16, 3, 8)
    encoded = coder.encode(x)
    groups = x.reshape(50, 2, 4, 8)
    step = (groups.amax(-1) - groups.amin(-1)) / 7
    error = (coder.decode(encoded) - x).abs().reshape(50, 2, 4, 8).amax(-1)
    assert bool((error <= step / 2 * 1.01 + 2e-3).all())  # steps and zeros are rounded to float16
    assert float(error.mean()) > 0.1 * float(step.mean())  # or nothing was quantised
    assert bits(encoded, x.numel()) == 3 + 32 / 8


def test_rounding_takes_constant_groups_and_saturates():
    constant = torch.full((1, 4), 3.25)
    assert torch.equal(dequantize(*quantize(constant, 2)), constant)
    huge = torch.tensor([[-1e6, 0.0, 1e6, 2.0]])
    assert bool(dequantize(*quantize(huge, 8)).isfinite().all())


# --- KIVI --------------------------------------------------------------------------------------------------


def test_kivi_rounds_keys_by_channel_in_groups_of_tokens():
    x = gaussian(64, 1, 2, 16)
    coder = ChannelRounding(2, 16, 2, 32)
    plain = coder.decode(coder.encode(x))
    loud = x.clone()
    loud[:, :, 0, 3] *= 1000
    other = torch.ones(2, 16, dtype=torch.bool)
    other[0, 3] = False
    assert torch.equal(coder.decode(coder.encode(loud))[:, 0, other], plain[:, 0, other])
    late = x.clone()
    late[40] += 50
    assert torch.equal(coder.decode(coder.encode(late))[:32], plain[:32])
    assert not torch.equal(coder.decode(coder.encode(late))[32:40], plain[32:40])
    assert bits(coder.encode(x), x.numel()) == 2 + 32 / 32
    # A channel of 32 tokens takes four values at 2 bits, its extremes among them.
    channel = plain[:32, 0, 1, 5]
    assert len(channel.unique()) <= 4
    assert torch.allclose(channel.aminmax().max, x[:32, 0, 1, 5].max(), atol=5e-3)


def test_kivi_window_holds_the_newest_tokens_exactly():
    method, model = Kivi(2, residual=32), shared()
    tokens, cache = random_tokens(1, 101), method.cache(model)
    with torch.no_grad():
        model(tokens[:, :100], past_key_values=cache)
        keys, values = cache.layers[0].sides
        assert (keys.coded, values.coded) == (96, 68)
        before = [side.everything(cache.layers[0].decoded(i)) for i, side in enumerate((keys, values))]
        exact = build()(tokens[:, :100], use_cache=True).past_key_values.layers[0]
        assert torch.equal(before[0][:, :, 96:], exact.keys[:, :, 96:])
        assert torch.equal(before[1][:, :, 68:], exact.values[:, :, 68:])
        assert not torch.allclose(before[1][:, :, :68], exact.values[:, :, :68], atol=1e-3)
        model(tokens[:, 100:], past_key_values=cache)
    assert (keys.coded, values.coded) == (96, 69)  # values leave their window one by one


def test_kivi_refuses_windows_of_broken_groups():
    with pytest.raises(ConfigError, match="whole groups"):
        Kivi(2, group=32, residual=100)


# --- QuaRot ------------------------------------------------------------------------------------------------


def test_hadamard_spreads_an_outlier():
    rotation = orthogonal_matrix(64)
    spike = torch.zeros(64)
    spike[17] = 100.0
    assert torch.allclose((spike @ rotation).abs(), torch.full((64,), 12.5), atol=1e-4)
    x = gaussian(200, 1, 1, 64)
    x[..., 17] += 100
    plain = TokenRounding(1, 64, 4, 64)
    rotated = HeadRotation(plain)
    quiet = [i for i in range(64) if i != 17]
    errors = [
        float((coder.decode(coder.encode(x)) - x)[..., quiet].square().mean()) for coder in (plain, rotated)
    ]
    assert errors[1] < errors[0] / 2
    assert bits(rotated.encode(x), x.numel()) == 4 + 32 / 64


# --- TurboQuant --------------------------------------------------------------------------------------------


def test_lloyd_max_levels_are_the_known_optimum():
    assert torch.allclose(sphere_levels(1 << 20, 1), torch.tensor([-0.7979, 0.7979]), atol=2e-4)
    known = torch.tensor([-1.5104, -0.4528, 0.4528, 1.5104])
    assert torch.allclose(sphere_levels(1 << 20, 2), known, atol=3e-4)
    known = torch.tensor([0.2451, 0.7560, 1.3439, 2.1520])
    assert torch.allclose(sphere_levels(1 << 20, 3)[4:], known, atol=5e-4)
    # Three dimensions: a coordinate is uniform in ±sqrt(3), whose best levels are equally spaced.
    assert torch.allclose(sphere_levels(3, 2), torch.tensor([-0.75, -0.25, 0.25, 0.75]) * 3**0.5, atol=2e-4)


@pytest.mark.parametrize(("width", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03455), (4, 0.0095)])
def test_turboquant_errs_alike_whatever_the_direction(width, distortion):
    coder = RotatedLloydMax(1, 128, width)
    spikes = torch.eye(128)[:, None, None] * 37.0
    dense = gaussian(400, 1, 1, 128)
    for x in (spikes, dense):
        left = (coder.decode(coder.encode(x)) - x).square().sum(-1) / x.square().sum(-1)
        assert float(left.mean()) == pytest.approx(distortion, rel=0.08)
    assert bits(coder.encode(dense), dense.numel()) == width + 16 / 128


def test_turboquants_rotation_is_one():
    rotation = random_rotation(48).double()
    assert torch.allclose(rotation @ rotation.T, torch.eye(48, dtype=torch.float64), atol=1e-5)
    assert not torch.equal(sketch_matrix(48), random_rotation(48))


def test_the_sketch_makes_inner_products_right_in_the_mean():
    x, queries = gaussian(3000, 1, 1, 64), gaussian(3000, 64, seed=1)
    exact = (x[:, 0, 0] * queries).sum(-1)

    def slope(coder):
        estimate = (coder.decode(coder.encode(x))[:, 0, 0] * queries).sum(-1)
        return float((estimate * exact).sum() / exact.square().sum())

    assert slope(RotatedLloydMax(1, 64, 1)) == pytest.approx(2 / torch.pi, abs=0.03)
    assert slope(RotatedLloydMax(1, 64, 1, sketch=True)) == pytest.approx(1, abs=0.03)
    assert slope(RotatedLloydMax(1, 64, 0, sketch=True)) == pytest.approx(1, abs=0.05)
    encoded = RotatedLloydMax(1, 64, 1, sketch=True).encode(x)
    assert bits(encoded, x.numel()) == 2 + 32 / 64


# --- HIGGS -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "distortion"), [(2, 0.108), (3, 0.0296), (4, 0.0077)])
def test_higgs_reaches_its_grids_distortion(width, distortion):
    model = shared()
    coder, _ = Higgs(width).coders(adapt(model), 0)
    x = gaussian(2000, 1, 2, 16) * 7
    left = (coder.decode(coder.encode(x)) - x).square().mean() / x.square().mean()
    assert float(left) == pytest.approx(distortion, rel=0.06)
    assert bits(coder.encode(x), x.numel()) == width + 16 / 32


def test_higgs_divides_many_features_into_groups():
    model = build(hidden_size=40, num_key_value_heads=20, num_attention_heads=20, head_dim=64)
    coder, _ = Higgs(2).coders(adapt(model), 0)
    x = gaussian(300, 2, 20, 64)
    x[:, :, :10] *= 50  # the first of two groups of 640
    left = (coder.decode(coder.encode(x)) - x).square().mean((0, 1, 3)) / x.square().mean((0, 1, 3))
    assert torch.allclose(left, torch.full((20,), 0.108), rtol=0.1)
    assert bits(coder.encode(x), x.numel()) == 2 + 16 / 640


# --- KVQuant -----------------------------------------------------------------------------------------------


def histogram(values, weights):
    cell = ((values.double() + 1) / 2 * CELLS).long().clamp(max=CELLS - 1)
    empty = torch.zeros(CELLS, dtype=torch.float64)
    return empty.index_add(0, cell, weights.double()), empty.index_add(0, cell, weights.double() * values)


def test_levels_go_where_the_weights_are():
    clusters = torch.tensor([-0.9, -0.2, 0.1, 0.8], dtype=torch.float64)
    values = (clusters[:, None] + 0.01 * gaussian(4, 500).clamp(-2, 2)).flatten().double()
    found = weighted_levels(*histogram(values, torch.ones_like(values)), 4)
    assert torch.allclose(found.double(), clusters, atol=5e-3)
    even = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    heavy = torch.where(even > 0.5, 1000.0, 1.0)
    assert int((weighted_levels(*histogram(even, heavy), 8) > 0.5).sum()) >= 6
    assert int((weighted_levels(*histogram(even, torch.ones_like(even)), 8) > 0.5).sum()) == 2
    nothing = torch.zeros(CELLS, dtype=torch.float64)
    assert torch.equal(weighted_levels(nothing, nothing, 2), torch.tensor([-0.5, 0.5]))


def test_weighted_levels_beat_unweighted_ones_in_the_weighted_error():
    values = gaussian(4000).clamp(-3, 3).double() / 3
    weights = (values + 1.2) ** 6

    def error(levels):
        nearest = (values[:, None] - levels.double()).abs().amin(1)
        return float((weights * nearest.square()).sum())

    plain = weighted_levels(*histogram(values, torch.ones_like(values)), 8)
    assert error(weighted_levels(*histogram(values, weights), 8)) < 0.8 * error(plain)


def test_kvquant_keeps_outliers_apart():
    levels = torch.linspace(-1, 1, 4)
    centers, halves = gaussian(32), gaussian(32, seed=1).abs() + 0.5
    coder = ChannelLevels(2, 16, 2, levels, centers, halves)
    inside = centers + halves * (gaussian(40, 3, 32, seed=2) / 4).clamp(-0.99, 0.99)
    x = inside.clone()
    x[7, 1, 5] += 300
    x[20, 0, 31] -= 50
    shaped = x.view(40, 3, 2, 16)
    encoded = coder.encode(shaped)
    decoded = coder.decode(encoded).view(40, 3, 32)
    assert encoded.outliers.counts.sum() == 2
    assert decoded[7, 1, 5] == x[7, 1, 5].half().float()
    assert decoded[20, 0, 31] == x[20, 0, 31].half().float()
    rest = torch.ones_like(x, dtype=torch.bool)
    rest[7, 1, 5] = rest[20, 0, 31] = False
    plain = coder.decode(coder.encode(inside.view(40, 3, 2, 16))).view(40, 3, 32)
    assert torch.equal(decoded[rest], plain[rest])
    assert bits(encoded, x.numel()) == 2 + (2 * 32 + 120 * 16) / x.numel()
    rows = torch.tensor([1, 1, 0])
    again = coder.decode(encoded.select(rows)).view(40, 3, 32)
    assert torch.equal(again, decoded[:, rows])
    halves_joined = join([coder.encode(shaped[:13]), coder.encode(shaped[13:])])
    assert torch.equal(coder.decode(halves_joined), coder.decode(encoded))


def test_kvquant_finds_values_outliers_token_by_token():
    coder = TokenLevels(2, 16, 3, torch.linspace(-1, 1, 8), 1)
    x = gaussian(30, 2, 2, 16)
    encoded = coder.encode(x)
    decoded, flat = coder.decode(encoded).flatten(2), x.flatten(2)
    for pick in (flat.argmax(-1, keepdim=True), flat.argmin(-1, keepdim=True)):
        assert torch.equal(decoded.gather(-1, pick), flat.gather(-1, pick).half().float())
    assert bits(encoded, x.numel()) == 3 + (16 + 2 * 32 + 32) / 32
    louder = flat.clone()
    louder.scatter_(-1, flat.argmax(-1, keepdim=True), 1e4)
    others = coder.decode(coder.encode(louder.view_as(x))).flatten(2)
    middle = flat.argsort(-1)[..., 1:-1]
    assert torch.equal(others.gather(-1, middle), decoded.gather(-1, middle))


def test_outliers_at_either_end():
    assert [outliers_per_end(d, 0.01) for d in (32, 192, 1024, 4096)] == [1, 1, 5, 20]


def test_fisher_information_is_that_of_finite_differences():
    model = build(dtype=torch.float64)
    adapter, tokens = adapt(model), random_tokens(1, 12)
    found = {}

    def add(order, keys, values, key_weight, value_weight):
        found[order] = key_weight, value_weight

    _fisher(adapter, tokens, add)
    layer = 1

    def loss(kind, token, change):
        class Shifted(DynamicCache):
            def update(self, keys, values, layer_idx, *args, **kwargs):
                if layer_idx == layer:
                    both = [keys.clone(), values.clone()]
                    both[kind][0, :, token] += change
                    keys, values = both
                return super().update(keys, values, layer_idx, *args, **kwargs)

        with torch.no_grad():
            logits = model(tokens, past_key_values=Shifted(config=model.config)).logits[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))

    for kind in (0, 1):
        weights = found[layer][kind]
        # Norms are computed in float32, so only the steepest slope stands clear of rounding.
        row, feature = divmod(int(weights.argmax()), weights.shape[1])
        token = row + 1  # the first token is never encoded
        change = torch.zeros(1, 2, 16)
        change.view(-1)[feature] = 0.02
        if kind == 0:
            tables = adapter.rotary_tables(torch.tensor([token]), layer, torch.float64, torch.device("cpu"))
            change = rotate(change, tables)
        slope = (loss(kind, token, change[0]) - loss(kind, token, -change[0])) / 0.04
        assert float(weights[row, feature]) == pytest.approx(slope**2, rel=1e-2)


def test_kvquant_leaves_the_model_alone_and_wants_text():
    model = build()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    tables = fit_tables(model, random_tokens(2, 60), 0.01)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(len(layer.keys.levels(3).unique()) == 8 and bool((layer.halves > 0).all()) for layer in tables)
    with pytest.raises(DataError, match="more calibration text"):
        fit_tables(model, random_tokens(1, 20), 0.01)


# --- KVTC --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_dynamic_programming_finds_what_brute_force_finds(seed):
    random = torch.Generator().manual_seed(seed)
    units, sizes, budget = 5, (1, 2, 3), 9
    errors, costs = {}, {}
    for first in range(units):
        for size in sizes:
            errors[first, size] = [*sorted(torch.rand(3, generator=random).tolist(), reverse=True)]
            errors[first, size] = [size * error for error in errors[first, size]]
            costs[first, size] = [0, size + 1, 2 * size + 1]

    def divisions(first):
        if first == units:
            yield []
        for size in sizes:
            if first + size <= units:
                for rest in divisions(first + size):
                    yield [(first, size), *rest]

    best = min(
        sum(errors[group][choice] for group, choice in zip(groups, choices, strict=True))
        for groups in divisions(0)
        for choices in itertools.product(range(3), repeat=len(groups))
        if sum(costs[group][choice] for group, choice in zip(groups, choices, strict=True)) <= budget
    )
    found = plan_groups(units, sizes, lambda *g: errors[g], lambda *g: costs[g], budget)
    assert [first for first, _, _ in found] == [sum(s for _, s, _ in found[:i]) for i in range(len(found))]
    assert sum(size for _, size, _ in found) == units
    assert sum(costs[first, size][choice] for first, size, choice in found) <= budget
    assert sum(errors[first, size][choice] for first, size, choice in found) == pytest.approx(best)


def spectrum(tokens, features, seed=0):
    """Vectors whose principal components fall off steeply."""
    turn, _ = torch.linalg.qr(gaussian(features, features, seed=seed + 1))
    return gaussian(tokens, features, seed=seed) * torch.logspace(1, -2, features) @ turn + 3


def test_components_fall_and_bits_follow_them_within_the_budget():
    x = spectrum(800, 96)
    fitted = Components.fit(x.clone())
    assert torch.allclose(fitted.basis.T @ fitted.basis, torch.eye(96), atol=1e-4)
    variances = ((x - x.mean(0)) @ fitted.basis).var(0)
    assert bool((variances.diff() < 1e-3 * variances[0]).all())
    groups = plan(fitted.sample, 1.5, 96)
    assert groups
    widths = [group.width for group in groups]
    assert widths == sorted(widths, reverse=True)

    def spent(groups):
        return sum(group.width * (group.stop - group.start) + SCALE_BITS for group in groups)

    assert spent(groups) <= 1.5 * 96
    assert 3 * 96 < spent(plan(fitted.sample, 4, 96)) <= 4 * 96
    assert group_errors(fitted.sample, 0, 16)[0] > group_errors(fitted.sample, 0, 16)[-1]


def test_fewer_tokens_than_features_are_fitted_too():
    fitted = Components.fit(spectrum(40, 96))
    assert fitted.basis.shape == (96, 40)
    fitted.transform(2)


def test_deflate_round_trip_is_exact_and_what_is_stored_is_decoded():
    x = spectrum(900, 96)
    transform = Components.fit(x[:800].clone()).transform(2)
    block = transform.encode(x[800:])
    raw = torch.frombuffer(bytearray(zlib.decompress(block.payload.numpy().tobytes())), dtype=torch.int32)
    start = 0
    stop = transform.groups[-1].stop
    components = (x[800:] - transform.mean) @ transform.basis[:, :stop]
    for index, group in enumerate(transform.groups):
        codes, steps, zeros = quantize(components[:, group.start : group.stop], group.width)
        words = -(-codes.numel() * group.width // 32)
        stored = unpack(raw[start : start + words], group.width, codes.numel()).view(-1, 100).T
        assert torch.equal(stored, codes)
        assert torch.equal(block.scales[:, index], torch.cat([steps, zeros], 1))
        start += words
    assert start == len(raw)
    error = (transform.decode(block) - x[800:]).square().mean() / x[800:].var(0).mean()
    assert float(error) < 0.02
    block.payload[:] = transform.encode(x[800:]).payload
    assert torch.equal(transform.decode(block), transform.decode(transform.encode(x[800:])))


def test_layers_that_are_alike_share_their_bits():
    one = spectrum(700, 48)
    alike, apart = torch.cat([one, one], 1), torch.cat([one, spectrum(700, 48, seed=5)], 1)

    def error(x):
        transform = Components.fit(x[:600].clone()).transform(1)
        return float((transform.decode(transform.encode(x[600:])) - x[600:]).square().mean())

    assert error(alike) < error(apart) / 2


# --- FP8 ---------------------------------------------------------------------------------------------------


def test_float8_is_the_cast_and_saturates():
    x = torch.tensor([0.0, 1.0, 1.06, -300.0, 1e4, -1e4, 2**-9]).view(1, 1, 1, 7)
    decoded = Float8Cast().decode(Float8Cast().encode(x)).flatten()
    assert decoded.tolist() == [0.0, 1.0, 1.0, -288.0, 448.0, -448.0, 2**-9]
    assert bits(Float8Cast().encode(gaussian(5, 2, 2, 16)), 320) == 8


# --- names -------------------------------------------------------------------------------------------------


def test_names_and_bits():
    for name, kind in BASELINES.items():
        method = baseline(name)
        assert type(method) is kind
        assert baseline(method.label) == method
    assert baseline("kivi:4").bits == 4
    assert baseline("rtn:2+window").label == "rtn:2+window"
    assert not baseline("rtn+window").encodes_at_once


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("rtm:2", "expected NAME"),
        ("rtn:two", "as in rtn:2"),
        ("rtn:2.5", "expected bits of 1, 2"),
        ("fp8:4", "expected bits of 8, got 4"),
        ("kvtc:0", "above 0"),
        ("quanto:3", "expected bits of 2, 4"),
        ("quanto:2+window", "no other window"),
        ("kivi:", "as in kivi:2"),
    ],
)
def test_names_that_are_not_known(spec, says):
    with pytest.raises(ConfigError, match=says):
        baseline(spec)
