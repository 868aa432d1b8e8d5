"""Tables of the documents, each made from committed results."""

from tables import calibration, kernels, quality, speed

__all__ = ["TABLES"]

#: What makes the table of a name.
TABLES = {
    "competitors": quality.competitors,
    "end_to_end": speed.end_to_end,
    "memory": speed.memory,
    "grid": quality.grid,
    "multi_news": quality.multi_news,
    "drift": quality.drift,
    "ruler": quality.ruler,
    "calibration": calibration.calibration,
    "calibration_cpu": calibration.calibration_cpu,
    "calibration_precision": calibration.calibration_precision,
    "quality": quality.quality,
    "speed": speed.speed,
    "variants": quality.variants,
    "kernels": kernels.kernels,
    "encode_precision": kernels.encode_precision,
    "encode_kernels": kernels.encode_kernels,
    "pruning": quality.pruning,
}
