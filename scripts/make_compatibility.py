"""Run the compatibility tests and write docs/compatibility.md from what they find; ``--check`` only compares.

    python scripts/make_compatibility.py [--check]

A test that fails leaves no table: a cell is "works", or the number of the reason for which it is refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "compatibility.md"
TESTS = ROOT / "tests" / "compatibility"

HEAD = """\
# Compatibility

Written by `scripts/make_compatibility.py` from [tests/compatibility](../tests/compatibility), which build
tiny models of every type with random weights; CI repeats it with the oldest transformers that is supported,
5.17, and with 5.24. ✓: the test passes. A number: refused, for the reason below. What each column checks is
said in [features.py](../tests/compatibility/features.py).

Sizes, vocabularies and biases do not matter to the cache; what matters is how a model rotates and caches its
keys. That is found by calling its attention, so models that are not listed work, or are refused, by the same
rules.
Where a model's rotary frequencies change as a sequence grows, its tiny model's do so at 128 tokens. Phi 3 in
transformers drops the cache there of its own accord and goes on with an exact one.
"""


class Collector:
    """Collects what the tests record."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, str | None]] = {}
        self.refused: list[tuple[str, str]] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Take what a test that ended has recorded (called by pytest)."""
        for name, value in report.user_properties if report.when == "call" else ():
            if name == "cell":
                model, feature, reason = value
                self.cells.setdefault(model, {})[feature] = reason
            elif name == "refused":
                self.refused.append(tuple(value))


def document(found: Collector) -> str:
    reasons: list[str] = []

    def cell(reason: str | None) -> str:
        if reason is None:
            return "✓"
        if reason not in reasons:
            reasons.append(reason)
        return str(reasons.index(reason) + 1)

    models = list(found.cells)
    features = list(found.cells[models[0]])
    if any(list(cells) != features for cells in found.cells.values()):
        sys.exit("some cells are missing: run all tests of tests/compatibility")
    lines = [HEAD, "## Supported models", ""]
    half = -(-len(features) // 2)
    for part in (features[:half], features[half:]):
        lines += [f"| model | {' | '.join(part)} |", "| --- " * (len(part) + 1) + "|"]
        lines += [
            f"| {model} | {' | '.join(cell(found.cells[model][feature]) for feature in part)} |"
            for model in models
        ]
        lines.append("")
    lines += [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    lines += ["", "## Refused models", "", "| model | what `AquaCache` says |", "| --- | --- |"]
    lines += [f"| {model} | {reason} |" for model, reason in found.refused]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with the document instead of writing it"
    )
    check = parser.parse_args().check
    found = Collector()
    if pytest.main(["-q", "--rootdir", str(ROOT), str(TESTS)], plugins=[found]):
        sys.exit("compatibility tests fail; the document is left as it is")
    text = document(found)
    if not check:
        DOCUMENT.write_text(text, encoding="utf-8")
    elif not DOCUMENT.exists() or DOCUMENT.read_text(encoding="utf-8") != text:
        sys.exit(f"{DOCUMENT.name} is not what the tests find; run python scripts/make_compatibility.py")


if __name__ == "__main__":
    main()
