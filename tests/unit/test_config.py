import copy
import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aquakv.config import (
    DEFAULT_BITS,
    PRESETS,
    AllocationConfig,
    CodecConfig,
    GuardConfig,
    PredictorConfig,
    QuantizerConfig,
    TransformConfig,
    WindowConfig,
    preset,
)
from aquakv.errors import ConfigError


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("bits", [None, *range(1, 9)])
def test_a_preset_survives_json_unchanged(name, bits):
    config = preset(name, bits)
    assert CodecConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.preset == name
    assert config.allocation.bits == (DEFAULT_BITS[name] if bits is None else bits)


FINITE = {"allow_nan": False, "allow_infinity": False}
POSITIVE = st.floats(1e-6, 1e6)


def _some(*names):
    return st.lists(st.sampled_from(names), min_size=1, unique=True).map(tuple)


@st.composite
def configs(draw):
    """Any configuration that is allowed."""
    adaptive = draw(st.booleans())
    bits = st.floats(0.05, 8) if adaptive else st.integers(1, 8).map(float)
    rank = st.none() | st.integers(1, 10**6)
    scope = st.sampled_from(["all-heads", "head", "two-stage"])
    return CodecConfig(
        preset=draw(st.text(max_size=9)),
        predictor=draw(
            st.builds(
                PredictorConfig,
                kind=st.sampled_from(["none", "mean", "linear"]),
                key_inputs=_some("previous_keys", "previous_values"),
                value_inputs=_some("keys", "previous_keys", "previous_values"),
                history=st.integers(1, 8),
                first_layer_values=st.booleans(),
                key_rank=rank,
                value_rank=rank,
                ridge=st.floats(0, **FINITE),
            )
        ),
        transform=draw(
            st.builds(
                TransformConfig,
                kind=st.just("klt") if adaptive else st.sampled_from(["hadamard", "identity"]),
                max_group_size=st.integers(1, 4096),
                key_scope=scope,
                value_scope=scope,
                first_stage=st.integers(0, 4096),
                metric_floor=POSITIVE,
                shrinkage=st.floats(0, 1, exclude_max=True),
            )
        ),
        allocation=draw(
            st.builds(
                AllocationConfig,
                kind=st.just("water-filling" if adaptive else "equal"),
                bits=bits,
                first_layer_bits=st.none() | bits,
                widths=st.sets(st.integers(1, 8), min_size=1).map(sorted).map(tuple),
                importance=st.sampled_from(["equal", "measured"]),
                importance_exponent=st.floats(0, 1),
            )
        ),
        quantizer=draw(
            st.builds(
                QuantizerConfig,
                kind=st.sampled_from(["scalar", "entropy"] if adaptive else ["grid"]),
                grid_dim=st.sampled_from([1, 2]),
                arithmetic=st.booleans(),
                rate_weight=st.floats(0, **FINITE),
            )
        ),
        guard=draw(st.builds(GuardConfig, st.none() | POSITIVE, st.floats(0, 1, exclude_min=True))),
        window=draw(st.builds(WindowConfig, st.integers(0), st.integers(0), st.integers(1))),
    )


@given(configs())
def test_any_configuration_survives_json_unchanged(config):
    assert CodecConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config


def test_what_the_presets_are():
    paper, higgs = preset("paper"), preset("higgs")
    assert (paper.predictor.kind, higgs.predictor.kind) == ("linear", "mean")
    assert dataclasses.replace(higgs, preset="paper", predictor=paper.predictor) == paper
    assert paper.allocation.layer_bits(True) == 4
    assert paper.allocation.layer_bits(False) == 2
    # The first layer never gets fewer bits than the others.
    assert [preset("paper", b).allocation.layer_bits(True) for b in (1, 4, 5, 8)] == [4, 4, 5, 8]
    assert AllocationConfig(bits=3, first_layer_bits=None).layer_bits(True) == 3
    storage, decode = preset("storage"), preset("decode")
    assert [c.quantizer.kind for c in (paper, storage, decode)] == ["grid", "entropy", "scalar"]
    assert [c.transform.kind for c in (paper, storage, decode)] == ["hadamard", "klt", "klt"]
    assert (storage.predictor.history, decode.predictor.history) == (3, 1)
    assert (decode.predictor.key_rank, decode.predictor.value_rank) == (64, None)
    assert (decode.predictor.value_inputs, decode.transform.key_scope) == (("keys",), "head")
    assert [preset(name).guard.threshold for name in PRESETS] == [None, None, 16.0, 8.0]
    assert len({preset(name).window for name in PRESETS}) == 1
    assert (paper.window.sink_tokens, paper.window.recent_window, paper.window.block_tokens) == (4, 0, 128)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("bits", [0, 0.049, 8.01, 9, -1, math.nan, math.inf])
def test_impossible_bits(name, bits):
    with pytest.raises(ConfigError, match=r"allocation\.bits"):
        preset(name, bits)


def test_fractions_of_bits_where_they_can_be_had():
    for name in ("paper", "higgs"):
        for bits in (0.5, 2.5):
            with pytest.raises(ConfigError, match=r"allocation\.bits"):
                preset(name, bits)
    for name in ("storage", "decode"):
        assert [preset(name, bits).allocation.bits for bits in (0.05, 0.5, 2.25, 8)] == [0.05, 0.5, 2.25, 8]


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"'papr'.*paper, higgs, storage, decode"):
        preset("papr")


def _paths(data, prefix=()):
    for key, value in data.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from _paths(value, (*prefix, key))


ALL = list(_paths(preset("decode").to_dict()))


def _parent(data, path):
    for key in path[:-1]:
        data = data[key]
    return data


@pytest.mark.parametrize("path", ALL, ids=".".join)
def test_every_key_is_needed_and_no_other_is_taken(path):
    data = preset("decode").to_dict()
    del _parent(data, path)[path[-1]]
    where = ".".join(("config", *path[:-1]))
    with pytest.raises(ConfigError, match=rf"^{where}: missing key '{path[-1]}'; expected: .*{path[-1]}"):
        CodecConfig.from_dict(data)
    data = preset("decode").to_dict()
    _parent(data, path)["extra"] = 1
    with pytest.raises(ConfigError, match=rf"^{where}: unknown key 'extra'; expected: .*{path[-1]}"):
        CodecConfig.from_dict(data)


# No field takes any of these: a bool is no number, NaN no size.
@pytest.mark.parametrize(
    "wrong", [True, {"x": 1}, math.nan, math.inf, [[1]], 10**400], ids=lambda w: str(w)[:9]
)
@pytest.mark.parametrize("path", ALL, ids=".".join)
def test_every_wrong_type_is_refused_by_its_full_path(path, wrong):
    if path[-1] in ("sink_tokens", "recent_window", "block_tokens", "key_rank", "value_rank") and (
        wrong == 10**400
    ):
        pytest.skip("a whole number of any size")
    if path[-1] in ("first_layer_values", "arithmetic") and wrong is True:
        pytest.skip("a switch")
    data = preset("decode").to_dict()
    _parent(data, path)[path[-1]] = wrong
    # Below `config`, with the field's own name; messages of nested objects go deeper.
    with pytest.raises(ConfigError, match=path[-1]):
        CodecConfig.from_dict(data)


@pytest.mark.parametrize("data", [None, [], "paper", 3])
def test_only_objects(data):
    with pytest.raises(ConfigError, match="config: expected an object"):
        CodecConfig.from_dict(data)


def test_whole_numbers_are_taken_as_floats_and_null_where_allowed():
    data = preset("paper").to_dict()
    data["allocation"].update(bits=3, first_layer_bits=None)
    config = CodecConfig.from_dict(data)
    assert config.allocation == AllocationConfig(bits=3.0, first_layer_bits=None)
    assert isinstance(config.allocation.bits, float)
    data["allocation"]["bits"] = None
    with pytest.raises(ConfigError, match=r"allocation\.bits"):
        CodecConfig.from_dict(data)
    data = preset("paper").to_dict()
    data["window"]["sink_tokens"] = 4.0
    with pytest.raises(ConfigError, match=r"window\.sink_tokens: expected int, got float"):
        CodecConfig.from_dict(data)


def test_from_dict_leaves_its_argument_alone():
    data = preset("paper").to_dict()
    before = copy.deepcopy(data)
    CodecConfig.from_dict(data)
    assert data == before


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((PredictorConfig, {"ridge": value}) for value in (-1e-9, math.nan, math.inf)),
        *((PredictorConfig, {"value_inputs": value}) for value in ((), ("keys", "keys"))),
        *(
            (PredictorConfig, {"key_inputs": value})
            for value in ((), ("previous_values", "previous_keys", "previous_values"))
        ),
        *((PredictorConfig, {"history": value}) for value in (0, 9, -1)),
        *((PredictorConfig, {name: value}) for name in ("key_rank", "value_rank") for value in (0, -3)),
        *((TransformConfig, {"max_group_size": value}) for value in (0, 4097)),
        *((TransformConfig, {"first_stage": value}) for value in (-1, 4097)),
        *((TransformConfig, {"metric_floor": value}) for value in (0, -1, math.nan, math.inf)),
        *((TransformConfig, {"shrinkage": value}) for value in (-0.1, 1, math.nan)),
        *((AllocationConfig, {"bits": value}) for value in (0.99, 1.5, 8.5)),
        *((AllocationConfig, {"first_layer_bits": value}) for value in (0, 2.5, 9, math.nan)),
        *(
            (AllocationConfig, {"kind": "water-filling", "bits": value})
            for value in (0, 0.049, 8.01, math.nan)
        ),
        *(
            (AllocationConfig, {"kind": "water-filling", "widths": value})
            for value in ((), (0, 1), (2, 1), (1, 1), (4, 9), (-1,))
        ),
        *((AllocationConfig, {"importance_exponent": value}) for value in (-0.01, 1.01, math.nan)),
        *((QuantizerConfig, {"grid_dim": value}) for value in (0, 4)),
        *((QuantizerConfig, {"rate_weight": value}) for value in (-0.1, math.nan, math.inf)),
        *((GuardConfig, {"threshold": value}) for value in (0, -1, math.nan, math.inf)),
        *((GuardConfig, {"max_fraction": value}) for value in (0, -0.1, 1.01, math.nan)),
        *((WindowConfig, {"sink_tokens": value}) for value in (-1,)),
        *((WindowConfig, {"recent_window": value}) for value in (-1,)),
        *((WindowConfig, {"block_tokens": value}) for value in (0, -1)),
    ],
    ids=str,
)
def test_impossible_settings(kind, changes):
    with pytest.raises(ConfigError, match=rf"^\w+\.{list(changes)[-1]}: ") as error:
        kind(**changes)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("base", PRESETS)
@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        ("transform", "hadamard"),
        ("transform", "identity"),
        ("transform", "klt"),
        ("allocation", "equal"),
        ("allocation", "water-filling"),
        ("quantizer", "grid"),
        ("quantizer", "scalar"),
        ("quantizer", "entropy"),
    ],
)
def test_stages_that_do_not_go_together(base, stage, kind):
    data = preset(base, 2).to_dict()
    data[stage]["kind"] = kind
    kinds = tuple(data[name]["kind"] for name in ("transform", "allocation", "quantizer"))
    fits = {("klt", "water-filling", q) for q in ("scalar", "entropy")}
    fits |= {(t, "equal", "grid") for t in ("hadamard", "identity")}
    if kinds in fits:
        assert CodecConfig.from_dict(data).to_dict() == data
        return
    with pytest.raises(ConfigError, match=r"^(quantizer|transform|allocation)\.kind: ") as error:
        CodecConfig.from_dict(data)
    assert any(name in str(error.value) for name in kinds)


def test_how_many_tokens_the_guard_keeps():
    guard = GuardConfig(threshold=8.0, max_fraction=0.05)
    assert [guard.most(tokens) for tokens in (1, 8, 39, 40, 128)] == [1, 1, 1, 2, 6]


def test_grid_dimension():
    assert [QuantizerConfig().dim_for(b) for b in range(1, 9)] == [1, 2, 2, 2, 1, 1, 1, 1]
    assert [QuantizerConfig(grid_dim=1).dim_for(b) for b in range(1, 9)] == [1] * 8


@given(
    window=st.builds(WindowConfig, st.integers(0, 5), st.integers(0, 9), st.integers(1, 7)),
    length=st.integers(0, 60),
)
def test_coded_tokens_is_what_gathers_token_by_token(window, length):
    coded = 0
    for tokens in range(1, length + 1):
        if tokens - window.sink_tokens - window.recent_window - coded >= window.block_tokens:
            coded += window.block_tokens
    assert window.coded_tokens(length) == coded
    tail = length - coded - window.sink_tokens
    assert coded == 0 or window.recent_window <= tail <= window.recent_window + window.block_tokens - 1
