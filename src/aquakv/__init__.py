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
from aquakv.evaluation.quality import Quality, evaluate_quality

__all__ = [
    "AquaCache",
    "AquaKVError",
    "CacheStateError",
    "CodecConfig",
    "DecodeGraph",
    "Footprint",
    "InputError",
    "ModelCodec",
    "Quality",
    "WindowConfig",
    "__version__",
    "calibrate",
    "calibrate_many",
    "evaluate_quality",
    "preset",
]
