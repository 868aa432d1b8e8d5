"""What is evaluated: the exact cache, a codec's, or a competitor's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from aquakv.baselines import BASELINES, Baseline, RowsCache, baseline
from aquakv.cache import AquaCache, Footprint
from aquakv.cache.fused import why_not_fused
from aquakv.calibration import calibrate_many
from aquakv.codec import ModelCodec
from aquakv.config import PRESETS, preset
from aquakv.errors import ConfigError

#: A codec, a competitor fitted to the model, or None for the exact cache.
Method = ModelCodec | Baseline | None

#: What `prepare` calls the exact cache.
EXACT = "exact"


def fresh_cache(model: PreTrainedModel, method: Method, padded: bool = False) -> Cache:
    """Return an empty cache for a model.

    Parameters
    ----------
    model
        The model.
    method
        None for the exact cache.
    padded
        Whether rows may be padded on the left.

    Raises
    ------
    CodecMismatchError
        The codec belongs to another model.
    ConfigError
        The competitor was not fitted, or does not take heads of the model's size.
    """
    if method is None:
        return DynamicCache(config=model.config)
    if isinstance(method, Baseline):
        return RowsCache(model, method) if padded else method.cache(model)
    # Where codes cannot be attended to, decoding them in every pass would only cost time.
    return AquaCache(model, method, keep_decoded=why_not_fused(method) is not None)


def held_by(method: Method, cache: Cache) -> Footprint | None:
    """Return what a cache of `fresh_cache` holds, by part; None for the exact cache."""
    if method is None:
        return None
    if isinstance(cache, RowsCache):
        return cache.footprint()
    if isinstance(method, Baseline):
        return method.footprint(cache)
    assert isinstance(cache, AquaCache)  # made by `fresh_cache`
    return cache.footprint()


def coded_tokens(method: Method, length: int) -> int | None:
    """Return how many tokens a cache of ``length`` tokens holds as codes; None for the exact cache."""
    if method is None:
        return None
    if isinstance(method, Baseline):
        return max(method.coded_tokens(length))
    return method.config.window.coded_tokens(length)


def allows_single_pass(method: Method) -> bool:
    """Say whether one forward pass over whole sequences can tell what a method's cache gives."""
    return not isinstance(method, Baseline) or method.single_pass


def require_method(spec: str) -> None:
    """Raise `ConfigError` if this is no specification that `prepare` takes; files are not looked at."""
    if spec == EXACT or is_codec_file(spec):
        return
    if found := _preset_of(spec):
        preset(*found)
    elif _is_baseline(spec):
        baseline(spec)
    else:
        raise _unknown(spec)


def is_codec_file(spec: str) -> bool:
    """Say whether a specification is a codec file's path."""
    return spec.endswith(".safetensors") or Path(spec).is_file()


def baseline_fields(method: Baseline, calibration: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a result says of a competitor; ``calibration`` is the text that it was fitted to."""
    return {
        "name": method.name,
        "bits": method.bits,
        "source": method.source,
        **method.settings,
        "table_bytes": method.table_bytes,
        "calibration": dict(calibration) if method.needs_fit and calibration is not None else None,
    }


def needs_text(specs: Sequence[str]) -> bool:
    """Say whether `prepare` needs tokens for any of these."""
    return any(_preset_of(spec) or (_is_baseline(spec) and baseline(spec).needs_fit) for spec in specs)


def prepare(specs: Sequence[str], model: PreTrainedModel, tokens: Tensor | None = None) -> dict[str, Method]:
    """Return methods by their specifications, calibrated on or fitted to a model.

    Codecs are calibrated side by side, and a competitor's fit serves all its rates.

    Parameters
    ----------
    specs
        ``exact``; a preset with its bits, ``"decode 2.3"``; a competitor, ``kivi:2`` or ``kvquant:3+window``;
        or a codec file's path.
    model
        The model.
    tokens
        ``[sequences, seq_len]`` int64 token ids to calibrate on; see `needs_text`.

    Raises
    ------
    ConfigError
        A specification is none of these, or needs tokens and there are none.
    CodecFileError
        A codec file is missing or damaged.
    """
    if tokens is None and needs_text(specs):
        raise ConfigError("expected text to calibrate on: presets and some competitors are fitted to a model")
    configs = {spec: preset(*found) for spec in specs if (found := _preset_of(spec))}
    codecs = calibrate_many(model, tokens, configs) if configs and tokens is not None else {}
    fits: dict[str, Baseline] = {}
    return {spec: codecs[spec] if spec in codecs else _one(spec, model, tokens, fits) for spec in specs}


def _one(spec: str, model: PreTrainedModel, tokens: Tensor | None, fits: dict[str, Baseline]) -> Method:
    if spec == EXACT:
        return None
    if is_codec_file(spec):
        return ModelCodec.load(Path(spec))
    if not _is_baseline(spec):
        raise _unknown(spec)
    method = baseline(spec)
    if not method.needs_fit or tokens is None:
        return method
    if method.name not in fits:
        fits[method.name] = method.fit(model, tokens)
    return dataclasses.replace(fits[method.name], bits=method.bits, window=method.window)


def _unknown(spec: str) -> ConfigError:
    return ConfigError(
        f"expected {EXACT}, a preset with its bits such as 'decode 2.3' ({', '.join(PRESETS)}), a "
        f"competitor such as kivi:2 ({', '.join(BASELINES)}) or a codec file, got {spec!r}"
    )


def _is_baseline(spec: str) -> bool:
    return spec.partition("+")[0].partition(":")[0] in BASELINES


def _preset_of(spec: str) -> tuple[str, float] | None:
    """Return the preset and bits that a specification names, if it does."""
    name, space, bits = spec.partition(" ")
    if not space or name not in PRESETS:
        return None
    try:
        return name, float(bits)
    except ValueError:
        raise ConfigError(f"expected a preset with its bits, such as '{name} 2', got {spec!r}") from None
