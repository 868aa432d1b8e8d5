"""The definition of encoding against the codec's own."""

import dataclasses

import pytest
import torch
from codec_cases import LAYERS, history_of, plain_codes, random_layers, record_parts, tokens_of

from aquakv.codec.guard import choose_outliers
from aquakv.errors import ConfigError, ShapeError
from aquakv.kernels import PageLayout, clear_attended, record_attended
from aquakv.kernels.encode import EncodeOperands, Guard, encode
from aquakv.kernels.from_codec import encode_operands, plain_layer
from aquakv.numerics import cubic_level_table


def ties(relative, widths):
    """Return how far relative coefficients are from the nearest bound between levels, in parts of a step."""
    distance = torch.full_like(relative, torch.inf)
    for i, width in enumerate(widths):
        levels = cubic_level_table(width).double()
        bounds, steps = (levels[1:] + levels[:-1]) / 2, levels.diff()
        distance[:, i] = ((relative[:, i, None] - bounds).abs() / steps).amin(1)
    return distance


def latents_for(latent, operands):
    if latent is None:
        return None
    return torch.nn.functional.pad(latent, (0, operands.latent_width - latent.shape[1]))


def coefficients(codec, centred, inputs):
    """Return a tensor codec's coefficients over deviations, in float64."""
    residual = centred.double() - codec.predict(centred, inputs).double()
    return residual @ codec.transform.analysis.double() / codec.quantizer.deviations.double()


@pytest.mark.parametrize("name", LAYERS)
def test_encoding_gives_the_codes_that_the_codec_gives(name):
    shape = LAYERS[name]
    layer, following = random_layers(shape)
    random = torch.Generator().manual_seed(2)
    history, latent = history_of(layer, 256, random, shape.spread)
    keys, values = tokens_of(layer, 256, random, shape.spread)
    operands = encode_operands(layer, following, num_kv_heads=shape.heads, dtype=torch.float32)
    got = encode(keys, values, latents_for(latent, operands), operands)
    codes, hat = layer.encode(keys, values, history)
    inputs = {"keys": layer.key_sources(history), "values": layer.value_sources(hat.keys, history)}
    for kind, records, described, plain in (
        ("keys", got.key_pages, operands.keys, keys),
        ("values", got.value_pages, operands.values, values),
    ):
        codec, encoded = getattr(layer, kind), getattr(codes, kind)
        ours, scales, attended = record_parts(records, described.layout)
        assert attended.all()
        if not codec.quantizer.features:
            assert (scales == 128).all()
            continue
        exact = coefficients(codec, plain - codec.mean, inputs[kind])
        scale = 2.0 ** ((encoded.scales.double() - 128) / 16)
        octaves = 8 * exact.square().mean(1).log2()
        tied = (octaves - octaves.round()).abs() > 0.5 - 1e-4
        assert (scales == encoded.scales[:, 0])[~tied].all()
        same = scales == encoded.scales[:, 0]
        theirs = plain_codes(codec.quantizer, encoded.words)
        differ = (ours != theirs) & same[:, None]
        # Where codes differ the coefficient lies half-way between two levels, to float32's precision.
        assert (ties(exact / scale, codec.quantizer.widths.tolist())[differ] < 2e-4).all()
        assert differ.double().mean() < 1e-4
        assert len(set(theirs.flatten().tolist())) > 2
    if following is None:
        assert got.next_latents is None
    else:
        expected = following.keys.predictor.latent((hat.keys,))
        own = got.next_latents[:, : shape.next_rank]
        typical = float(expected.abs().mean())
        assert float((own - expected).abs().median()) < 1e-5 * typical
        assert not got.next_latents[:, shape.next_rank :].any()
    excess = layer.excess(keys, values, hat)
    assert (got.excess is None) == (excess is None)
    if excess is not None:
        off = (got.excess - excess).abs() / excess
        assert float(off.median()) < 1e-5
        assert float(off.quantile(0.97)) < 1e-3  # the rest may have a code on the other side of a tie


@pytest.mark.parametrize("name", LAYERS)
def test_float16_moves_few_codes(name):
    shape = LAYERS[name]
    layer, following = random_layers(shape)
    random = torch.Generator().manual_seed(3)
    _, latent = history_of(layer, 256, random, shape.spread)
    keys, values = tokens_of(layer, 256, random, shape.spread)
    exact = encode_operands(layer, following, num_kv_heads=shape.heads, dtype=torch.float32)
    narrow = encode_operands(layer, following, num_kv_heads=shape.heads)
    assert narrow.dtype == torch.float16
    results = [encode(keys, values, latents_for(latent, o), o) for o in (exact, narrow)]
    assert results[1].next_latents is None or results[1].next_latents.dtype == torch.float16
    for kind in ("key", "value"):
        layout = getattr(exact, f"{kind}s").layout
        (theirs, scales, _), (ours, own_scales, _) = (
            record_parts(getattr(r, f"{kind}_pages"), layout) for r in results
        )
        same = scales == own_scales
        assert same.double().mean() > 0.95
        moved = (ours.int() - theirs.int())[same].abs()
        if moved.numel():
            # A key that goes to its other level may move the values predicted from it by more than one.
            assert int(moved.max()) <= 1 or kind == "value"
            assert moved.double().mean() < 0.02


def test_tokens_without_a_finite_coefficient_are_marked():
    layer, following = random_layers(LAYERS["plain"])
    random = torch.Generator().manual_seed(4)
    _, latent = history_of(layer, 64, random)
    keys, values = tokens_of(layer, 64, random)
    for dtype in (torch.float32, torch.float16):
        operands = encode_operands(layer, following, dtype=dtype)
        latents = latents_for(latent, operands)
        clean = encode(keys, values, latents, operands)
        bad_keys, bad_values, bad_latents = keys.clone(), values.clone(), latents.clone()
        bad_keys[3, 5] = torch.nan
        bad_keys[60, 100] = torch.inf
        bad_values[9, 1] = -torch.inf
        bad_latents[20, 0] = torch.nan
        got = encode(bad_keys, bad_values, bad_latents, operands)
        for records, clean_records, described, marked in (
            (got.key_pages, clean.key_pages, operands.keys, [3, 20, 60]),
            (got.value_pages, clean.value_pages, operands.values, [3, 9, 20, 60]),
        ):
            codes, scales, _ = record_parts(records, described.layout)
            assert (scales == 255).nonzero().flatten().tolist() == marked
            others = torch.ones(64, dtype=torch.bool)
            others[marked] = False
            expected, expected_scales, _ = record_parts(clean_records, described.layout)
            assert torch.equal(codes[others], expected[others])
            assert torch.equal(scales[others], expected_scales[others])
            widths = torch.tensor(described.layout.widths, dtype=torch.int64)
            assert (codes[marked] == (1 << widths >> 1)).all()
        assert got.excess.isnan().nonzero().flatten().tolist() == [3, 9, 20, 60]
        assert got.next_latents.isnan().all(1).nonzero().flatten().tolist() == [3, 20, 60]


def test_huge_tokens_are_clipped_and_not_lost():
    layer, following = random_layers(LAYERS["first and wide"])
    keys, values = (torch.full((64, layer.features), 3e7) for _ in range(2))
    got = encode(keys, values, None, encode_operands(layer, following))
    for records in got[:2]:
        assert (records[:, -80:-16] == 254).all()
    assert (got.excess > 1e3).all()


def test_constant_tokens_have_the_smallest_scale():
    layer, following = random_layers(LAYERS["first and wide"])
    operands = encode_operands(layer, following, dtype=torch.float32)
    keys = operands.key_offset.expand(64, -1)
    got = encode(keys, operands.value_offset.expand(64, -1), None, operands)
    codes, scales, _ = record_parts(got.key_pages, operands.keys.layout)
    assert not scales.any()
    assert (codes == (1 << torch.tensor(operands.keys.layout.widths) >> 1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_codes_do_not_depend_on_how_tokens_are_chunked(dtype):
    layer, following = random_layers(LAYERS["plain"])
    random = torch.Generator().manual_seed(13)
    _, latent = history_of(layer, 448, random)
    keys, values = tokens_of(layer, 448, random)
    operands = encode_operands(layer, following, dtype=dtype)
    latents = latents_for(latent, operands)
    whole = encode(keys, values, latents, operands)
    sizes = [64, 192, 64, 128]
    chunks = [
        encode(*rows, operands)
        for rows in zip(*(t.split(sizes) for t in (keys, values, latents)), strict=True)
    ]
    for expected, parts in zip(whole, zip(*chunks, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), expected)


def test_outliers_are_marked_in_both_records():
    layer, following = random_layers(LAYERS["plain"])
    random = torch.Generator().manual_seed(5)
    _, latent = history_of(layer, 256, random)
    keys, values = tokens_of(layer, 256, random)
    operands = encode_operands(layer, following)
    got = encode(keys, values, latents_for(latent, operands), operands)
    before = [records.clone() for records in got[:2]]
    chosen = choose_outliers(got.excess, 64, 9)
    assert len(chosen) > 5
    for records, old in zip(got[:2], before, strict=True):
        clear_attended(records, chosen)
        attended = record_attended(records).flatten()
        assert (~attended).nonzero().flatten().tolist() == chosen.tolist()
        assert torch.equal(records[:, :-16], old[:, :-16])


def test_coefficients_of_no_width_change_nothing():
    layer, following = random_layers(LAYERS["plain"])
    random = torch.Generator().manual_seed(6)
    _, latent = history_of(layer, 64, random)
    keys, values = tokens_of(layer, 64, random)
    plain = plain_layer(layer, following)
    places = {
        kind: torch.randperm(layout.coefficients + 7, generator=random)[: layout.coefficients].sort().values
        for kind, layout in (("key", plain.key_layout), ("value", plain.value_layout))
    }

    def spread(matrix, kind, dim):
        """Insert rows, or columns, of nonsense."""
        shape = list(matrix.shape)
        shape[dim] = len(places[kind]) + 7
        wide = torch.full(shape, 3.0, dtype=torch.float64)
        return wide.index_copy_(dim, places[kind], matrix)

    def layout(kind, old):
        widths, groups = torch.zeros(2, old.coefficients + 7, dtype=torch.int64)
        widths[places[kind]] = torch.tensor(old.widths)
        groups[places[kind]] = torch.tensor(old.groups)
        return PageLayout(tuple(widths.tolist()), tuple(groups.tolist()), old.num_groups)

    operands = EncodeOperands.build(
        layout("key", plain.key_layout),
        layout("value", plain.value_layout),
        key_analysis=spread(plain.key_analysis, "key", 1),
        key_synthesis=spread(plain.key_synthesis, "key", 0),
        key_offset=plain.key_bias + layer.keys.mean,
        key_bias=plain.key_bias,
        value_analysis=spread(plain.value_analysis, "value", 1),
        value_synthesis=spread(plain.value_synthesis, "value", 0),
        value_offset=plain.value_bias + layer.values.mean,
        value_map=plain.value_map,
        latent_map=plain.latent_map,
        innovation=spread(plain.innovation, "key", 0),
        next_offset=plain.next_offset,
        transition=plain.transition,
        guards=tuple(Guard(c.guard.roots.double(), float(c.guard.limit)) for c in (layer.keys, layer.values)),
        dtype=torch.float32,
    )
    expected_operands = encode_operands(layer, following, dtype=torch.float32)
    expected = encode(keys, values, latents_for(latent, operands), expected_operands)
    got = encode(keys, values, latents_for(latent, operands), operands)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_what_does_not_fit_is_refused():
    layer, following = random_layers(LAYERS["plain"])
    operands = encode_operands(layer, following)
    rows, latents = torch.zeros(64, 128), torch.zeros(64, 16)
    with pytest.raises(ShapeError, match=r"floating keys \[multiple of 64, 128\], got float32 \[65, 128\]"):
        encode(torch.zeros(65, 128), rows, latents, operands)
    with pytest.raises(ShapeError, match=r"floating values .* got int64"):
        encode(rows, rows.long(), latents, operands)
    with pytest.raises(ShapeError, match="some latents"):
        encode(rows, rows, None, operands)
    with pytest.raises(ShapeError, match=r"latents \[64, 16\], got float32 \[64, 17\]"):
        encode(rows, rows, torch.zeros(64, 17), operands)
    guard = dataclasses.replace(layer.keys.guard, roots=torch.eye(64).expand(2, -1, -1))
    other = dataclasses.replace(layer, keys=dataclasses.replace(layer.keys, guard=guard))
    with pytest.raises(ConfigError, match="keys whose guard has the norm of their transform"):
        encode_operands(other, following)
