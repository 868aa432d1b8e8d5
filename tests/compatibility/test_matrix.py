"""Every cell of docs/compatibility.md: a feature works with a model, or is refused with a reason.

`scripts/make_compatibility.py` runs this module and writes what it finds.
"""

import pytest

from aquakv import AquaCache
from aquakv.errors import CacheStateError, UnsupportedModelError
from aquakv.models.adapter import adapt
from features import FEATURES
from rows import REFUSED, SUPPORTED, refused_model
from tiny_models import codec_for

#: Features that are refused, by feature and model (None: all of them): the error, and what it says. For what
#: transformers itself refuses, in words of its own that change with its versions, the table has ours.
REFUSALS = {
    ("contrastive", None): (ValueError, "Contrastive Search requires `trust_remote_code=True`"),
    ("assisted, no exact window", None): (
        (CacheStateError, ValueError),
        "build the cache with a recent_window of at least|requires a cache that can be cropped",
    ),
    ("past 128 tokens", "llama-dynamic"): (CacheStateError, "changes its frequencies"),
    ("past 128 tokens", "phi3-longrope"): (CacheStateError, "changes its frequencies"),
}


REASONS = {
    "contrastive": "transformers 5 has no contrastive search of its own, only code to fetch from the Hub",
    "assisted, no exact window": (
        "tokens that were proposed in vain may be compressed by then; build the cache with a recent_window "
        "of at least as many tokens as are proposed at once"
    ),
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kind", SUPPORTED)
def test_feature(kind, feature, record_property):
    refusal = REFUSALS.get((feature, kind)) or REFUSALS.get((feature, None))
    if refusal is None:
        FEATURES[feature](kind)
        record_property("cell", [SUPPORTED[kind], feature, None])
        return
    error, message = refusal
    reason = REASONS.get(feature)
    with pytest.raises(error, match=message) as caught:
        FEATURES[feature](kind)
    record_property("cell", [SUPPORTED[kind], feature, reason or str(caught.value)])


@pytest.mark.parametrize("name", REFUSED)
def test_refused_model(name, record_property):
    title, _, reason = REFUSED[name]
    model = refused_model(name)
    for attempt in (lambda: adapt(model), lambda: AquaCache(model, codec_for("llama"))):
        with pytest.raises(UnsupportedModelError, match=f"'{name}' is not supported: .*({reason})") as error:
            attempt()
        assert str(error.value).isprintable()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    record_property("refused", [title, str(error.value)])
