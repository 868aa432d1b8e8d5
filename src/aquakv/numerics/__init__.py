"""Numerical building blocks that know nothing of codecs or models."""

from aquakv.numerics.cubic_levels import cubic_level_table, cubic_levels, nearest_cubic_level
from aquakv.numerics.grids import GaussianGrid, available_grids, load_grid
from aquakv.numerics.klt import WeightedKlt, shrink_covariance, symmetric_root, two_stage_klt, weighted_klt
from aquakv.numerics.least_squares import AffineMap, explained_variance, ridge
from aquakv.numerics.moments import StreamingMoments
from aquakv.numerics.orthogonal import hadamard, orthogonal_matrix
from aquakv.numerics.packing import byte_table, pack, packed_words, unpack, unpack_lookup
from aquakv.numerics.planes import allocate_fields, place_fields, plane_gains, planes_hold
from aquakv.numerics.rans import EntropyCoded, SymbolTables
from aquakv.numerics.reduced_rank import reduce_rank
from aquakv.numerics.water_filling import (
    allocate_widths,
    fill_bytes,
    theta_for,
    unit_distortions,
    widths_at,
)

__all__ = [
    "AffineMap",
    "EntropyCoded",
    "GaussianGrid",
    "StreamingMoments",
    "SymbolTables",
    "WeightedKlt",
    "allocate_fields",
    "allocate_widths",
    "available_grids",
    "byte_table",
    "cubic_level_table",
    "cubic_levels",
    "explained_variance",
    "fill_bytes",
    "hadamard",
    "load_grid",
    "nearest_cubic_level",
    "orthogonal_matrix",
    "pack",
    "packed_words",
    "place_fields",
    "plane_gains",
    "planes_hold",
    "reduce_rank",
    "ridge",
    "shrink_covariance",
    "symmetric_root",
    "theta_for",
    "two_stage_klt",
    "unit_distortions",
    "unpack",
    "unpack_lookup",
    "weighted_klt",
    "widths_at",
]
