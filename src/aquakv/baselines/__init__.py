"""Competitors: other methods to compress KV caches, implemented from their papers.

All have the face of a transformers cache, hold what they compress as packed bytes, and are measured like
`AquaCache`.

>>> from aquakv.baselines import baseline                                    # doctest: +SKIP
>>> method = baseline("kvquant:3").fit(model, tokens)                        # doctest: +SKIP
>>> cache = method.cache(model)                                              # doctest: +SKIP
>>> model.generate(**inputs, past_key_values=cache)                          # doctest: +SKIP
>>> method.footprint(cache).bits_per_value                                   # doctest: +SKIP
"""

from aquakv.baselines.base import Baseline
from aquakv.baselines.cache import BaselineCache
from aquakv.baselines.registry import BASELINES, baseline
from aquakv.baselines.rows import RowsCache

__all__ = ["BASELINES", "Baseline", "BaselineCache", "RowsCache", "baseline"]
