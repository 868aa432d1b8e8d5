"""Numerical building blocks that know nothing of codecs or models."""

from aquakv.numerics.grids import GaussianGrid, available_grids, load_grid
from aquakv.numerics.least_squares import AffineMap, explained_variance, ridge
from aquakv.numerics.moments import StreamingMoments
from aquakv.numerics.orthogonal import hadamard, orthogonal_matrix
from aquakv.numerics.packing import byte_table, pack, packed_words, unpack, unpack_lookup

__all__ = [
    "AffineMap",
    "GaussianGrid",
    "StreamingMoments",
    "available_grids",
    "byte_table",
    "explained_variance",
    "hadamard",
    "load_grid",
    "orthogonal_matrix",
    "pack",
    "packed_words",
    "ridge",
    "unpack",
    "unpack_lookup",
]
