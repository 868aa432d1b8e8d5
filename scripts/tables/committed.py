"""The committed results of benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

RESULTS = ROOT / "benchmarks" / "results"


def rows(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a benchmark's file and its rows; of a grid the first row stands for the file."""
    path = RESULTS / f"{name}.jsonl"
    if path.exists():
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return lines[0], lines
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content, content["rows"]
