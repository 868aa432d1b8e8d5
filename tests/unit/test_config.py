import copy
import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aquakv.config import (
    PRESETS,
    AllocationConfig,
    CodecConfig,
    PredictorConfig,
    QuantizerConfig,
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
    assert config.allocation.bits == (2 if bits is None else bits)


def test_what_the_presets_are():
    paper, higgs = preset("paper"), preset("higgs")
    assert (paper.predictor.kind, higgs.predictor.kind) == ("dense", "mean")
    assert dataclasses.replace(higgs, preset="paper", predictor=paper.predictor) == paper
    assert paper.allocation.layer_bits(True) == 4
    assert paper.allocation.layer_bits(False) == 2
    # The first layer never gets fewer bits than the others.
    assert [preset("paper", b).allocation.layer_bits(True) for b in (1, 4, 5, 8)] == [4, 4, 5, 8]
    assert AllocationConfig(bits=3, first_layer_bits=None).layer_bits(True) == 3
    assert (paper.window.sink_tokens, paper.window.recent_window, paper.window.block_tokens) == (4, 0, 128)


@pytest.mark.parametrize("bits", [0, 0.5, 2.5, 9, -1, math.nan, math.inf])
def test_impossible_bits(bits):
    with pytest.raises(ConfigError, match=r"allocation\.bits"):
        preset("paper", bits)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"'papr'.*paper, higgs"):
        preset("papr")


def _paths(data, prefix=()):
    for key, value in data.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from _paths(value, (*prefix, key))


ALL = list(_paths(preset("paper").to_dict()))


def _parent(data, path):
    for key in path[:-1]:
        data = data[key]
    return data


@pytest.mark.parametrize("path", ALL, ids=".".join)
def test_every_key_is_needed_and_no_other_is_taken(path):
    data = preset("paper").to_dict()
    del _parent(data, path)[path[-1]]
    where = ".".join(("config", *path[:-1]))
    with pytest.raises(ConfigError, match=rf"^{where}: missing key '{path[-1]}'; expected: .*{path[-1]}"):
        CodecConfig.from_dict(data)
    data = preset("paper").to_dict()
    _parent(data, path)["extra"] = 1
    with pytest.raises(ConfigError, match=rf"^{where}: unknown key 'extra'; expected: .*{path[-1]}"):
        CodecConfig.from_dict(data)


# No field takes any of these: a bool is no number, NaN no size.
@pytest.mark.parametrize(
    "wrong", [True, {"x": 1}, math.nan, math.inf, [[1]], 10**400], ids=lambda w: str(w)[:9]
)
@pytest.mark.parametrize("path", ALL, ids=".".join)
def test_every_wrong_type_is_refused_by_its_full_path(path, wrong):
    if path in (("window", "sink_tokens"), ("window", "recent_window"), ("window", "block_tokens")) and (
        wrong == 10**400
    ):
        pytest.skip("a whole number of any size")
    data = preset("paper").to_dict()
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
    data["allocation"] = {"kind": "equal", "bits": 3, "first_layer_bits": None}
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
        (PredictorConfig, {"ridge": -1e-9}),
        (PredictorConfig, {"ridge": math.nan}),
        (PredictorConfig, {"value_inputs": ()}),
        (PredictorConfig, {"value_inputs": ("keys", "keys")}),
        (QuantizerConfig, {"grid_dim": 0}),
        (QuantizerConfig, {"grid_dim": 4}),
    ],
)
def test_impossible_settings(kind, changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        kind(**changes)


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
