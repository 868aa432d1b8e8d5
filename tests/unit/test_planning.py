import dataclasses
import importlib
from itertools import pairwise, product

import pytest
import torch
from safetensors.torch import load_file
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from aquakv import calibrate, calibrate_many, preset
from aquakv.calibration.history import InputMoments
from aquakv.calibration.metrics import DISTANCES, Metric, QueryMoments, key_weight, value_weight
from aquakv.calibration.observe import Observer
from aquakv.calibration.plan import (
    Spectrum,
    entropy_plan,
    expected_bits,
    first_model,
    fixed_rate_plan,
    level_options,
)
from aquakv.calibration.planner import Planner
from aquakv.calibration.sensitivity import ProbeErrors, _divergence, measure_harm
from aquakv.calibration.walk import LayerWalk
from aquakv.config import AllocationConfig, QuantizerConfig
from aquakv.errors import UnsupportedModelError
from aquakv.models.adapter import adapt
from aquakv.models.attention import observed_queries
from aquakv.models.rotary import rotate
from aquakv.numerics import StreamingMoments, allocate_fields, widths_at
from aquakv.numerics.pages import PageLayout
from tiny_models import WINDOW, build, random_tokens, same_bits, shared

workload_module = importlib.import_module("aquakv.calibration.workload")
TOKENS = random_tokens(16, 64, seed=1)


def config(name, bits=None):
    return dataclasses.replace(preset(name, bits), window=WINDOW)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_same_tensors(a, b, tmp_path):
    """Compare codecs by all that is stored of them."""
    found = []
    for number, codec in enumerate((a, b)):
        codec.save(tmp_path / str(number))
        found.append([t for _, t in sorted(load_file(tmp_path / str(number)).items())])
    assert same_bits(*found)


# --- moments of what predictors read ----------------------------------------------------------------------


def _sources():
    """Return three batches of three sources with large means, and how many sequences of each are fitted."""
    sizes, tokens, fitted = (3, 3, 2), 900, (3, 2, 0)
    base = [normal(size, tokens, 6, seed=10 + size + n) for n, size in enumerate(sizes)]
    sources = {
        name: [(batch @ normal(6, width, seed=width) + 50 * normal(width, seed=1)) for batch in base]
        for name, width in (("a", 6), ("b", 4), ("c", 5))
    }
    return sources, fitted


@pytest.mark.parametrize("names", [("a",), ("b", "a"), ()])
def test_regression_moments_are_those_of_the_inputs_side_by_side(names):
    sources, fitted = _sources()
    inputs = InputMoments(fitted, torch.device("cpu"))
    for name in ("a", "b"):
        inputs.add(name, sources[name])
    got = inputs.regression(names, sources["c"])

    def rows(name):
        return torch.cat([b[:n].flatten(0, 1) for b, n in zip(sources[name], fitted, strict=True)])

    y = rows("c")
    x = torch.cat([y[:, :0], *(rows(name) for name in names)], 1)
    expected = StreamingMoments(x.shape[1], 5, full_y=True)
    expected.update(x, y)
    assert got.count == expected.count == 5 * 900
    for part in ("mean_x", "mean_y", "scatter_xx", "scatter_xy", "scatter_yy"):
        mine, theirs = getattr(got, part), getattr(expected, part)
        assert mine.dtype == torch.float64
        # Thousands of products summed in float32.
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(y.var() * 4500))


@pytest.mark.parametrize("left", [1e-2, 1e-5])
def test_the_covariance_of_what_is_left_is_as_exact_as_it_is_small(left):
    """Even where it is below the rounding of float32 moments of targets, whose mean is far from zero too."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 5, generator=generator).bfloat16()
    inputs = torch.randn(4, 300, 6, generator=generator) + 30
    noise = left * torch.randn(4, 300, 5, generator=generator, dtype=torch.float64)
    exact = inputs.double() @ weight.double()
    targets = (exact + noise).float()
    moments = InputMoments((2, 1), torch.device("cpu"))
    moments.add("a", list(inputs.split(2)))
    batches = list(targets.split(2))
    mean, count = moments.mean(batches)
    got = moments.residual_covariance(["a"], batches, (weight,), mean, count)
    own = (targets.double() - exact)[:3].flatten(0, 1)
    expected = (own - own.mean(0)).T @ (own - own.mean(0)) / len(own)
    assert got.dtype == torch.float64
    # Targets of some 100 are rounded to 4e-6, by the codec's prediction in float32 as well.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3 * left**2 + 1e-10)
    two = torch.eye(6)[:, :4], torch.ones(4, 5)
    assert float(moments.residual_covariance(["a"], batches, two, mean, count).diagonal().min()) > 1


def test_forgotten_inputs_are_gone():
    sources, fitted = _sources()
    inputs = InputMoments(fitted, torch.device("cpu"))
    for name in ("a", "b"):
        inputs.add(name, sources[name])
    before = inputs.regression(["b"], sources["c"])
    inputs.keep(["b", "z"])
    assert set(inputs.sources) == {"b"}
    assert set(inputs.scatter) == {("b", "b")}
    with pytest.raises(KeyError):
        inputs.regression(["a", "b"], sources["c"])
    assert torch.equal(inputs.regression(["b"], sources["c"]).scatter_xx, before.scatter_xx)
    inputs.add("c", sources["c"])
    assert inputs.regression(["c", "b"], sources["a"]).scatter_xx.shape == (9, 9)


# --- what attention feels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llama-odd", "llama-yarn"])
@pytest.mark.parametrize("seq_len", [3, 60])
def test_key_weight_is_the_mean_squared_error_of_scores(kind, seq_len):
    adapter = adapt(shared(kind))
    heads, dim = adapter.num_kv_heads, adapter.head_dim
    attention_heads = adapter.config.num_attention_heads
    rotation = lambda positions: adapter.rotary_tables(  # noqa: E731
        torch.tensor(positions), 0, torch.float32, torch.device("cpu")
    )
    queries = normal(40, attention_heads, dim) * torch.arange(1, dim + 1) + 1  # before rotary embedding
    moments = QueryMoments.empty(adapter, torch.device("cpu"))
    for rows in (queries[:30].unflatten(0, (2, 15)), queries[30:][None]):
        tables = rotation(list(range(rows.shape[1])))
        moments.add(torch.stack([rotate(row, tables) for row in rows]).transpose(1, 2), tables)
    weight = key_weight(adapter, 0, moments, seq_len)
    assert weight.dtype == torch.float64
    errors = normal(10, heads, dim, seed=1)
    got = torch.einsum("ehi,hij,ehj->eh", errors.double(), weight, errors.double())
    at_key = rotate(errors, rotation([5] * 10)).double()
    squares = []
    for distance in DISTANCES:
        if distance < seq_len:
            at_query = rotate(queries, rotation([5 + distance] * 40)).double().unflatten(1, (heads, -1))
            squares.append(torch.einsum("thqi,ehi->ehtq", at_query, at_key).square().mean((2, 3)))
    expected = torch.stack(squares).mean(0)
    if kind == "llama-yarn":  # attention scaling changes all scores by one factor
        got, expected = got / got.mean(), expected / expected.mean()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.mean()))


def test_value_weight_is_the_squared_output():
    for kind in ("llama", "llama-odd"):
        adapter = adapt(shared(kind))
        heads, dim = adapter.num_kv_heads, adapter.head_dim
        group = adapter.config.num_attention_heads // heads
        weight = value_weight(adapter, 1)
        projection = adapter.layers[1].self_attn.o_proj
        for head in range(heads):
            error = normal(dim, seed=head)
            expected = 0.0
            for member in range(group):
                inputs = torch.zeros(heads * group, dim)
                inputs[head * group + member] = error
                expected += float(projection(inputs.flatten()).square().sum())
            got = float(error.double() @ weight[head] @ error.double())
            assert got == pytest.approx(expected, rel=1e-5)


def test_value_weight_without_an_output_projection():
    model = build()
    del model.model.layers[1].self_attn.o_proj
    assert torch.equal(value_weight(adapt(model), 1), torch.eye(16).double().expand(2, 16, 16))


def test_metric_is_normalised_and_positive():
    root = normal(3, 4, 4, dtype=torch.float64)
    blocks = root @ root.mT
    metric = Metric.of(7 * blocks, 1e-3)
    ratio = (metric.blocks - 1e-3 * torch.eye(4)) / blocks
    torch.testing.assert_close(ratio, ratio.mean().expand(3, 4, 4), rtol=1e-9, atol=0)
    assert float(metric.matrix.diagonal().mean()) == pytest.approx(1.001)
    assert metric.matrix[:4, 4:].abs().max() == 0
    torch.testing.assert_close(metric.roots() @ metric.roots(), metric.blocks)
    flat = Metric.of(torch.zeros(3, 4, 4, dtype=torch.float64), 1e-3)
    torch.testing.assert_close(flat.matrix, 1.001 * torch.eye(12, dtype=torch.float64))


# --- seeing queries ---------------------------------------------------------------------------------------


def _advance(adapter, layers, observer=None):
    walk = LayerWalk(adapter, TOKENS[:4], 2, torch.device("cpu"))
    for layer in range(layers):
        for _ in walk.advance(layer, lambda: None, observer if layer == layers - 1 else None):
            pass
    return walk.hidden


@pytest.mark.parametrize("kind", ["llama", "llama-yarn", "gemma3"])
def test_queries_are_seen_and_nothing_else_is_changed(kind):
    model = shared(kind)
    adapter, layer, seen, projected = adapt(model), 1, [], []
    attention = adapter.layers[layer].self_attn
    module = getattr(attention, "q_norm", attention.q_proj)
    handle = module.register_forward_hook(lambda m, a, out: projected.append(out))
    with torch.no_grad():
        model(TOKENS[:4])
    handle.remove()
    before = (model.config._attn_implementation, set(ALL_ATTENTION_FUNCTIONS.valid_keys()))
    with torch.no_grad():
        hidden = _advance(adapter, layer + 1, seen.append)
        assert all(torch.equal(a, b) for a, b in zip(hidden, _advance(adapter, layer + 1), strict=True))
    assert (model.config._attn_implementation, set(ALL_ATTENTION_FUNCTIONS.valid_keys())) == before
    tables = adapter.rotary_tables(torch.arange(64), layer, torch.float32, torch.device("cpu"))
    queries = projected[0].reshape(4, 64, -1, adapter.head_dim)
    if kind == "gemma3":
        queries = projected[0] if projected[0].shape[1] == 64 else projected[0].transpose(1, 2)
    expected = torch.stack([rotate(row, tables) for row in queries]).transpose(1, 2)
    assert [tuple(q.shape) for q in seen] == [(2, *expected.shape[1:])] * 2
    torch.testing.assert_close(torch.cat(seen), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_is_restored_whatever_happens(implementation):
    model = build(attn_implementation=implementation)
    adapter = adapt(model)
    assert model.config._attn_implementation == implementation

    def fail(query):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _advance(adapter, 1, fail)
    with pytest.raises(ZeroDivisionError), observed_queries(adapter, 0, fail):
        raise ZeroDivisionError
    with (
        pytest.raises(UnsupportedModelError, match=r"layer 2 .* queries cannot be seen"),
        observed_queries(adapter, 2, fail),
    ):
        pass
    with observed_queries(adapter, 2, None):
        assert model.config._attn_implementation == implementation
    assert model.config._attn_implementation == implementation
    assert "aquakv_observed" not in ALL_ATTENTION_FUNCTIONS.valid_keys()
    model(TOKENS[:1])


# --- harm -------------------------------------------------------------------------------------------------


def _probe(adapter, sequences=2, tokens=62):
    return [
        ProbeErrors(
            {
                kind: 0.2 * normal(sequences, tokens, adapter.features, seed=2 * i + k)
                for k, kind in enumerate(("keys", "values"))
            },
            {"keys": 0.5 + i, "values": 2.0},
        )
        for i in range(len(adapter.compressed_layers))
    ]


def test_harm_is_divergence_per_relative_power():
    """Disturb the whole model's projections in the first half; look at the second."""
    model = shared()
    adapter = adapt(model)
    tokens, errors = TOKENS[:2], _probe(adapter)
    with torch.no_grad():
        harm = measure_harm(adapter, tokens, errors)
        exact = model(tokens).logits[:, 32:].double().log_softmax(-1)
        expected = []
        for layer, probed in enumerate(errors):
            for kind, projection in (("keys", "k_proj"), ("values", "v_proj")):
                added = torch.zeros(2, 64, adapter.features)
                added[:, 2:32] = probed.errors[kind][:, :30]
                module = getattr(adapter.layers[layer].self_attn, projection)
                handle = module.register_forward_hook(lambda m, a, out, added=added: out + added)
                disturbed = model(tokens).logits[:, 32:].double().log_softmax(-1)
                handle.remove()
                divergence = (exact.exp() * (exact - disturbed)).sum(-1).mean()
                expected.append(float(divergence) / probed.relative_power[kind])
    expected = torch.tensor(expected)
    assert (expected > 1e-3 * expected.max()).sum() == 5
    expected = expected.clamp(min=1e-3 * float(expected.max()))
    got = torch.tensor([layer[kind] for layer in harm for kind in ("keys", "values")])
    torch.testing.assert_close(got, expected / expected.log().mean().exp(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5])
def test_the_divergence_of_small_errors_is_theirs(size):
    """It is half the variance of the errors; sums of float32 probabilities are 1 up to 1e-7 only."""
    logits = torch.randn(1, 130, 40, generator=torch.Generator().manual_seed(0))
    error = size * torch.randn(1, 130, 40, generator=torch.Generator().manual_seed(1))
    shifted = logits.double() + error  # exact in float64, whatever the size
    p = logits.double().softmax(-1)
    variance = (p * error**2).sum(-1) - (p * error).sum(-1) ** 2
    assert _divergence(logits, shifted) == pytest.approx(float(variance.mean() / 2), rel=0.2)
    assert abs(_divergence(logits, logits + 3.0)) < 1e-12  # up to the rounding of the sum


def test_values_that_nobody_reads_do_least_harm():
    model = build()
    model.model.layers[1].self_attn.o_proj.weight.zero_()
    adapter = adapt(model)
    with torch.no_grad():
        harm = measure_harm(adapter, TOKENS[:2], _probe(adapter))
    others = [layer[kind] for layer in (harm[0], harm[2]) for kind in layer]
    most = max(others)
    for kind in ("keys", "values"):
        assert harm[1][kind] == pytest.approx(1e-3 * most)
        assert harm[1][kind] < min(others)
    logs = torch.tensor([layer[kind] for layer in harm for kind in layer]).log()
    assert float(logs.mean()) == pytest.approx(0, abs=1e-5)


# --- plans ------------------------------------------------------------------------------------------------


def _spectra(weights=(1.0, 16.0, 0.1), n=200):
    return [
        Spectrum(torch.logspace(1, -3, n, dtype=torch.float64) * (1 + i), weight, n)
        for i, weight in enumerate(weights)
    ]


@pytest.mark.parametrize("bits", [0.3, 1.25, 4.0])
def test_entropy_plan_meets_the_mean_bits(bits):
    model, spectra = first_model(QuantizerConfig(kind="entropy")), _spectra()
    plan = entropy_plan(spectra, model, bits)
    assert plan.theta is None
    assert plan.model is model

    def each(step):
        rates = model.mean_lengths()
        return [expected_bits(s.variances.sqrt() * s.weight**0.5 / step, rates) / 200 for s in spectra]

    assert 0.98 * bits < sum(each(plan.step)) / 3 <= bits * (1 + 1e-9)
    assert sum(each(plan.step / 1.05)) / 3 > bits
    alike = [Spectrum(spectra[0].variances, weight, spectra[0].features) for weight in (0.1, 1.0, 16.0)]
    step = entropy_plan(alike, model, bits).step
    shares = [expected_bits(s.variances.sqrt() * s.weight**0.5 / step, model.mean_lengths()) for s in alike]
    assert all(a < b for a, b in pairwise(shares))


@pytest.mark.parametrize("bits", [0.3, 2.0, 4.5])
def test_fixed_rate_plan_meets_the_mean_bits(bits):
    allocation = AllocationConfig(kind="water-filling", bits=bits, widths=(1, 2, 4, 8))
    quantizer = QuantizerConfig(kind="scalar", arithmetic=False)
    options = level_options(allocation, quantizer)
    assert options[0] == [0, 1, 2, 4, 8]
    spectra = _spectra()
    plan = fixed_rate_plan(spectra, allocation, quantizer)
    assert (plan.step, plan.model, plan.planes) == (None, None, None)

    def mean(theta):
        widths = [widths_at(s.variances * s.weight, *options, theta).double().mean() for s in spectra]
        return float(torch.stack(widths).mean())

    assert bits - 0.02 < mean(plan.theta) <= bits  # one coefficient's step is at most 4 / 600
    assert mean(plan.theta * (1 - 1e-9)) > bits
    assert mean(plan.theta / 2) > bits


def _record_bits(planes, tensors, features):
    """Return what records of pages hold, by value."""
    return 8 * (1024 * sum(planes) + 80 * tensors) / (64 * features * tensors)


@pytest.mark.parametrize("bits", [1.67, 2.16, 2.25, 4.0])
def test_planes_meet_the_mean_bits_as_records_count_them(bits):
    spectra = _head_spectra(layers=10)
    allocation = AllocationConfig(kind="water-filling", bits=bits)
    plan = fixed_rate_plan(spectra, allocation, QuantizerConfig(kind="scalar"))
    assert (plan.theta, plan.step, plan.model) == (None, None, None)
    assert len(plan.planes) == len(spectra) == 20
    held = _record_bits(plan.planes, 20, 192)
    assert bits - 128 / (192 * 20) < held <= bits
    options = level_options(allocation, QuantizerConfig(kind="scalar"))
    for spectrum, planes in zip(spectra, plan.planes, strict=True):
        widths = torch.zeros(192, dtype=torch.uint8)
        chosen = allocate_fields(spectrum.energies, *options, planes)
        for members, width in zip(spectrum.fields, chosen, strict=True):
            assert len(members) == 16
            assert len(set(spectrum.groups[members].tolist())) == 1
            widths[members] = width
        layout = PageLayout(tuple(widths.tolist()), tuple(spectrum.groups.tolist()), 3)
        assert layout.planes == planes
        assert all(layout.widths[i] == f.width for f in layout.fields for i in f.coefficients)
        assert sum(f.width for f in layout.fields) == 8 * planes  # no bit is unused
        assert {frozenset(f.coefficients) for f in layout.fields} == {
            frozenset(members.tolist()) for members in spectrum.fields if widths[members[0]]
        }


def _head_spectra(layers):
    """Return spectra of keys in three heads of 64, and of values that are one group."""
    random = torch.Generator().manual_seed(0)
    spectra = []
    for number in range(2 * layers):
        decay = torch.rand(3, 1, generator=random, dtype=torch.float64) * 2 + 1
        heads = 10.0 ** (-decay * torch.linspace(0, 1, 64, dtype=torch.float64)).flatten()
        order = heads.argsort(descending=True)
        groups = order // 64 if number % 2 == 0 else torch.zeros(192, dtype=torch.int64)
        weight = float(10 ** torch.randn(1, generator=random))
        spectra.append(Spectrum(heads[order], weight, 192, groups))
    return spectra


def test_planes_go_where_they_gain_most():
    parts = (([4.0, 1.0], 1.0), ([1.0], 3.0), ([0.5], 1.0))
    spectra = [Spectrum(torch.tensor(v, dtype=torch.float64), weight, 40) for v, weight in parts]
    for planes in range(1, 5):
        allocation = AllocationConfig(kind="water-filling", bits=(1024 * planes + 3 * 80) * 8 / (64 * 120))
        got = fixed_rate_plan(spectra, allocation, QuantizerConfig(kind="scalar")).planes
        options = level_options(allocation, QuantizerConfig(kind="scalar"))

        def harm(each, options=options):
            chosen = [allocate_fields(s.energies, *options, p) for s, p in zip(spectra, each, strict=True)]
            errors = [options[1][int(widths)] for widths in chosen]
            return sum(float(s.energies) * e for s, e in zip(spectra, errors, strict=True))

        # Each has one field, which one plane fills: a second plane is worth nothing.
        assert sum(got) == min(3, planes)
        shares = [each for each in product(range(2), repeat=3) if sum(each) == sum(got)]
        assert harm(got) == min(map(harm, shares))


def test_fields_are_runs_of_falling_variance_within_a_group():
    variances = torch.tensor([5.0, 9, 1, 7, 3, 8], dtype=torch.float64).repeat(6)
    groups = torch.tensor([0, 1, 0, 1, 1, 0]).repeat(6)
    spectrum = Spectrum(variances, 2.0, 36, groups)
    fields = spectrum.fields
    assert sorted(torch.cat(fields).tolist()) == list(range(36))
    assert [len(members) for members in fields] == [16, 2, 16, 2]
    for first, second in (fields[:2], fields[2:]):
        assert bool((variances[torch.cat([first, second])].diff() <= 0).all())
    assert [groups[members].unique().tolist() for members in fields] == [[0], [0], [1], [1]]
    assert spectrum.energies.tolist() == [2 * float(variances[members].sum()) for members in fields]


def test_important_layers_get_more_bits():
    for name, kind in (("storage", "entropy"), ("decode", "scalar")):
        model = build()
        model.model.layers[1].self_attn.o_proj.weight.zero_()  # its keys and values have no effect
        codec = calibrate(model, TOKENS, config(name))
        bits = [layer["bits_per_value"] for layer in codec.calibration["layers"]]
        weights = [layer["importance"] for layer in codec.calibration["layers"]]
        assert codec.config.quantizer.kind == kind
        for part in ("keys", "values"):
            assert weights[1][part] < min(weights[0][part], weights[2][part])
        assert bits[1] < min(bits[0], bits[2])


# --- whole calibrations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0.75, 1.25, 3.0])
def test_storage_codecs_land_near_the_asked_bits(bits):
    codec = calibrate(shared(), random_tokens(48, 64, seed=3), config("storage", bits))
    parts = [part for layer in codec.layers for part in (layer.keys, layer.values)]
    # A byte of scale for every token comes on top, by definition.
    mean = sum(float(part.quantizer.rate_bits) - 8 for part in parts) / (32 * len(parts))
    assert mean == pytest.approx(bits, rel=0.1)
    assert codec.bits_per_value == pytest.approx(mean + 8 / 32)


@pytest.mark.parametrize("kind", ["llama", "llama-odd"])
@pytest.mark.parametrize("bits", [0.75, 3.0, 5.0, 8.0])
def test_decode_codecs_hold_the_asked_bits_in_pages(kind, bits):
    window = dataclasses.replace(WINDOW, block_tokens=64)
    codec = calibrate(shared(kind), TOKENS, dataclasses.replace(preset("decode", bits), window=window))
    parts = [part for layer in codec.layers for part in (layer.keys, layer.values)]
    features = codec.layers[0].features
    planes = [part.pages.planes for part in parts]
    assert codec.bits_per_value == pytest.approx(_record_bits(planes, len(parts), features))
    recorded = [layer["bits_per_value"] for layer in codec.calibration["layers"]]
    assert sum(recorded) / 3 == pytest.approx(codec.bits_per_value)
    assert all(part.pages.is_uniform for part in parts)
    if sum(planes) > 1:  # one at least
        assert bits - 128 / (features * len(parts)) < codec.bits_per_value <= bits


@pytest.mark.parametrize("name", ["paper", "storage", "decode"])
def test_calibration_is_deterministic_and_independent_of_company(name, tmp_path):
    alone = calibrate(build(), TOKENS, config(name))
    assert_same_tensors(alone, calibrate(build(), TOKENS, config(name)), tmp_path)
    # The first that weighs layers measures for all: it must be this one.
    order = [name, *(other for other in ("higgs", "decode", "storage", "paper") if other != name)]
    together = calibrate_many(build(), TOKENS, {other: config(other) for other in order})
    assert list(together) == order
    assert [codec.config.preset for codec in together.values()] == order
    assert_same_tensors(alone, together[name], tmp_path)


@pytest.mark.parametrize("name", ["storage", "decode"])
def test_trial_fits_see_a_part_of_much_text(name, monkeypatch):
    whole = calibrate(shared(), TOKENS, config(name))
    needed = 2 * 7 * 32 if name == "storage" else 12 * 32
    monkeypatch.setattr(workload_module, "PLAN_TOKENS", 1)
    monkeypatch.setattr(workload_module, "_PLAN_TOKENS_PER_INPUT", 2 if name == "storage" else 12)
    seen, sizes, fit = [], [], Planner._fit

    def watched(self, *args):
        sizes.append(sum(self.batch_sizes[: self.batches]))
        return fit(self, *args)

    monkeypatch.setattr(Planner, "_fit", watched)
    codec = calibrate(shared(), TOKENS, config(name), batch_size=2, progress=seen.append)
    # 64 tokens a sequence, in batches of two.
    assert sizes == [2 * -(-needed // 128)] * 2
    assert seen[-1].done == seen[-1].total == len(seen)
    # All the rest has seen all the text.
    for mine, theirs in zip(codec.layers, whole.layers, strict=True):
        torch.testing.assert_close(mine.keys.mean, theirs.keys.mean, atol=1e-6, rtol=0)
    assert codec.bits_per_value == pytest.approx(whole.bits_per_value, rel=0.15)


@pytest.mark.parametrize("name", ["storage", "decode"])
@pytest.mark.parametrize("observed", [2, 12])
def test_little_memory_means_two_walks(name, observed, monkeypatch):
    seen = []
    whole = calibrate(shared(), TOKENS, config(name), progress=seen.append)
    assert seen[-1].done == seen[-1].total == len(seen)
    walks, batches = [], Observer._batches
    # Keys and values of three layers, 32 floats each, for 64 tokens; but never fewer than two sequences.
    sequence = 2 * 3 * 32 * 4 * 64
    monkeypatch.setattr(workload_module, "MOST_OBSERVED_BYTES", observed * sequence if observed > 2 else 1)
    monkeypatch.setattr(workload_module, "MOST_NEEDED_BYTES", 1)
    monkeypatch.setattr(
        Observer, "_batches", lambda self, walk, *a: walks.append(walk.sequences) or batches(self, walk, *a)
    )
    few = []
    codec = calibrate(shared(), TOKENS, config(name), progress=few.append)
    assert walks == 3 * [observed] + 3 * [16]  # through three layers each
    assert few[-1].done == few[-1].total == len(few)
    assert codec.calibration["tokens"] == TOKENS.numel()
    # The fit itself saw all sequences, only the plan did not.
    for mine, theirs in zip(codec.layers, whole.layers, strict=True):
        torch.testing.assert_close(mine.keys.mean, theirs.keys.mean, atol=1e-6, rtol=0)
    if observed > 2:
        assert codec.bits_per_value == pytest.approx(whole.bits_per_value, rel=0.15)
