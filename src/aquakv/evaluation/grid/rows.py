"""What a cell's row says."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from aquakv.baselines import Baseline
from aquakv.codec import ModelCodec
from aquakv.config import to_dict
from aquakv.evaluation.grid.cells import Cell
from aquakv.evaluation.grid.isolate import Failure
from aquakv.evaluation.methods import Method, baseline_fields
from aquakv.models.loading import LoadedModel

Row = dict[str, Any]


def measured_row(
    cell: Cell, loaded: LoadedModel, method: Method, fields: dict[str, Any], elapsed: float
) -> Row:
    """Return the row of a cell that was measured; a failed one if its figures are none.

    Parameters
    ----------
    cell, loaded, method
        What was measured.
    fields
        The task's.
    elapsed
        Seconds; of methods that were evaluated together an equal share.
    """
    if reason := _useless(method, fields):
        return failed_row(cell, Failure("ValueError", reason), elapsed)
    described = {
        "codec": _codec_fields(cell, method) if isinstance(method, ModelCodec) else None,
        "baseline": None,
        "model_dtype": str(loaded.model.dtype).removeprefix("torch."),
    }
    if isinstance(method, Baseline):
        described["baseline"] = baseline_fields(method, cell.calibration_fields)
    return _common(cell, "ok", elapsed) | described | fields


def failed_row(cell: Cell, failure: Failure, elapsed: float) -> Row:
    """Return the row of a cell that could not be measured."""
    return _common(cell, "failed", elapsed) | {"error": failure.message, "error_type": failure.kind}


def _common(cell: Cell, status: str, elapsed: float) -> Row:
    return {
        "key": cell.key,
        "status": status,
        "command": "eval grid",
        "model": cell.model.name,
        "dtype": cell.model.dtype,
        "method": cell.method,
        "task": cell.task.task.name,
        **cell.task.settings,
        "batch_size": cell.task.batch_size,
        "calibration": cell.calibration_fields,
        "elapsed_s": round(elapsed, 3),
    }


def _codec_fields(cell: Cell, codec: ModelCodec) -> dict[str, Any]:
    config = json.dumps(to_dict(codec.config), sort_keys=True, separators=(",", ":"))
    return {
        "file": Path(cell.method).name if cell.file_sha256 else None,
        "preset": codec.config.preset,
        "bits": codec.config.allocation.bits,
        "sha256": cell.file_sha256,
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
    }


def _useless(method: Method, fields: dict[str, Any]) -> str | None:
    """Say why figures are none, if they are."""
    if path := _not_finite(fields):
        return f"expected finite figures, got {path}"
    if method is not None and fields.get("bits_per_value", 0) is None:
        return (
            "nothing was compressed: the method keeps sinks and the newest tokens exact; give longer inputs"
        )
    return None


def _not_finite(value: Any, path: str = "") -> str | None:
    if isinstance(value, dict):
        items = [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    else:
        return f"{path} {value}" if isinstance(value, float) and not math.isfinite(value) else None
    return next((found for key, item in items if (found := _not_finite(item, key))), None)
