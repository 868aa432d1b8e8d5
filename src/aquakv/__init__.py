"""aquakv: KV-cache compression for long-context language models.

>>> from aquakv import AquaCache                                             # doctest: +SKIP
>>> cache = AquaCache(model, "codec.safetensors")                            # doctest: +SKIP
>>> model.generate(**inputs, past_key_values=cache)                          # doctest: +SKIP
"""

from aquakv._version import __version__
from aquakv.cache import AquaCache, DecodeGraph, Footprint
from aquakv.calibration import calibrate, calibrate_many
from aquakv.codec import ModelCodec
from aquakv.config import CodecConfig, WindowConfig, preset
from aquakv.errors import AquaKVError, CacheStateError, InputError
from aquakv.evaluation.pruned import evaluate_pruning
from aquakv.evaluation.quality import Quality, evaluate_quality
from aquakv.eviction import H2O, EvictionPolicy, SnapKV

__all__ = [
    "H2O",
    "AquaCache",
    "AquaKVError",
    "CacheStateError",
    "CodecConfig",
    "DecodeGraph",
    "EvictionPolicy",
    "Footprint",
    "InputError",
    "ModelCodec",
    "Quality",
    "SnapKV",
    "WindowConfig",
    "__version__",
    "calibrate",
    "calibrate_many",
    "evaluate_pruning",
    "evaluate_quality",
    "preset",
]
