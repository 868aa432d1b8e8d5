"""Calibration: from a model and some text to a codec."""

from aquakv.calibration.calibrate import CalibrationProgress, calibrate, calibrate_many, library_versions

__all__ = ["CalibrationProgress", "calibrate", "calibrate_many", "library_versions"]
