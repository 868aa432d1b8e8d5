"""The compressed cache."""

from aquakv.cache.aqua_cache import AquaCache
from aquakv.cache.aqua_layer import AquaLayer
from aquakv.cache.footprint import Footprint
from aquakv.cache.graph import DecodeGraph
from aquakv.cache.layout import TokenLayout
from aquakv.cache.records import Outliers
from aquakv.cache.storage import CodedPages, ExactTokens

__all__ = [
    "AquaCache",
    "AquaLayer",
    "CodedPages",
    "DecodeGraph",
    "ExactTokens",
    "Footprint",
    "Outliers",
    "TokenLayout",
]
