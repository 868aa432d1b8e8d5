"""Policies that choose which tokens a cache evicts."""

from aquakv.eviction.h2o import H2O
from aquakv.eviction.policy import EvictionPolicy, PassScores
from aquakv.eviction.snapkv import SnapKV

__all__ = ["H2O", "EvictionPolicy", "PassScores", "SnapKV"]
