"""Documents say what the committed results say."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "make_tables.py"


def test_tables_are_those_of_the_committed_results():
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_readme_holds_every_table():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- table:(\w+) -->\n(.*?)<!-- end -->", readme, flags=re.DOTALL)
    assert [name for name, _ in blocks] == ["quality", "speed"]
    assert all(body.startswith("|") and "table:" not in body for _, body in blocks)
