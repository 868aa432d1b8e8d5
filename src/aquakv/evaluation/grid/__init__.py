"""Grids: models × methods × tasks out of one file, measured cell by cell into a file of rows."""

from aquakv.evaluation.grid.cells import Cell, cells_of
from aquakv.evaluation.grid.config import GridConfig, read_grid
from aquakv.evaluation.grid.ledger import Ledger, latest_rows, read_rows
from aquakv.evaluation.grid.run import GridProgress, pending, run_grid

__all__ = [
    "Cell",
    "GridConfig",
    "GridProgress",
    "Ledger",
    "cells_of",
    "latest_rows",
    "pending",
    "read_grid",
    "read_rows",
    "run_grid",
]
