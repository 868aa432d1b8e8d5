"""Reports: one self-contained HTML page from results, benchmarks, grids and codecs."""

from aquakv.evaluation.report.load import Inputs, load
from aquakv.evaluation.report.page import DEFAULT_TITLE, page

__all__ = ["DEFAULT_TITLE", "Inputs", "load", "page"]
