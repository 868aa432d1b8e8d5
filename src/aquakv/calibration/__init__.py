"""Calibration: from a model and some text to a codec."""

from aquakv.calibration.calibrate import calibrate, calibrate_many
from aquakv.calibration.job import library_versions
from aquakv.calibration.progress import CalibrationProgress
from aquakv.calibration.store import RunStore

__all__ = ["CalibrationProgress", "RunStore", "calibrate", "calibrate_many", "library_versions"]
