"""Write the tables of README.md and docs from the committed results; ``--check`` only compares.

    python scripts/make_tables.py [--check]

A table stands between ``<!-- table:NAME -->`` and ``<!-- end -->``; `tables` has one function for each.
"""

from __future__ import annotations

import argparse
import re
import sys

from tables import TABLES
from tables.committed import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = []
    names = ("calibration", "competitors", "evaluation", "kernels", "variants")
    documents = [ROOT / "docs" / f"{name}.md" for name in names]
    for path in (ROOT / "README.md", *documents):
        old = path.read_text(encoding="utf-8")
        new = re.sub(
            r"(<!-- table:(\w+) -->\n).*?(<!-- end -->)",
            lambda match: match[1] + TABLES[match[2]]() + "\n" + match[3],
            old,
            flags=re.DOTALL,
        )
        if new != old:
            stale.append(path.name)
            if not options.check:
                path.write_text(new, encoding="utf-8")
    if options.check and stale:
        sys.exit(f"{', '.join(stale)} differ from benchmarks/results; run python scripts/make_tables.py")


if __name__ == "__main__":
    main()
