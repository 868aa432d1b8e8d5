"""Result files: one JSON object per evaluation, one table of rows per committed benchmark."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from aquakv.calibration import library_versions
from aquakv.evaluation.quality import Quality
from aquakv.files import atomic_write

SCHEMA_VERSION = 1


def environment() -> dict[str, Any]:
    """Return what every result carries: versions, device and the code's git commit (None outside a clone)."""
    return {"versions": library_versions(), "device": device_name(), "git_sha": git_sha()}


def device_name() -> str:
    """Return the GPU's name, or the processor with the number of threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_processor()}, {torch.get_num_threads()} threads"


def git_sha() -> str | None:
    """Return the commit of the source tree that this package runs from, with ``-dirty`` if it was changed.

    The environment variable AQUAKV_GIT_SHA says it for a tree that was copied, whatever git finds there.
    """
    if told := os.environ.get("AQUAKV_GIT_SHA"):
        return told
    here = Path(__file__).resolve().parent
    try:
        top = _git(here, "rev-parse", "--show-toplevel")
        if (Path(top) / "src" / "aquakv") not in here.parents:
            return None  # installed inside somebody else's repository
        changed = _git(here, "status", "--porcelain", "--untracked-files=no", "--", "src")
        return _git(here, "rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def quality_fields(quality: Quality) -> dict[str, Any]:
    """Return the quality figures under the names that result files use."""
    return {
        "tokens": quality.tokens,
        "bits_per_value": quality.bits_per_value,
        "bits_per_value_total": quality.bits_per_value_total,
        "perplexity": quality.perplexity,
        "baseline_perplexity": quality.baseline_perplexity,
        "relative_increase": quality.relative_increase,
        "relative_increase_stderr": quality.relative_increase_stderr,
        "mean_kl": quality.mean_kl,
        "top1_agreement": quality.top1_agreement,
    }


def pruned_quality_fields(quality: Quality) -> dict[str, Any]:
    """Return the figures of a cache that may have evicted tokens: those of `quality_fields`, and its size."""
    bits = quality.bits_per_original_value
    return {
        **quality_fields(quality),
        "bits_per_original_value": bits,
        "bytes_vs_bf16": None if bits is None else bits / 16,
    }


def file_sha256(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Mapping[str, Any], what: str = "result") -> None:
    """Write a JSON file, all or nothing.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with atomic_write(path, what) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_benchmark(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a benchmark's rows with what they were measured on."""
    write_json(path, {"schema_version": SCHEMA_VERSION, **environment(), "rows": list(rows)}, "benchmark")


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
