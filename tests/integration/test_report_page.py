"""The report in a real browser: on a phone, on a desk and on paper. Skipped where there is no Chromium."""

import html
import json
import os
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

import report_samples
from aquakv.evaluation.report import load, page
from tiny_models import codec_for

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
WIDTHS = {"phone": 390, "narrow window": 800, "desk": 1280}

pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason=f"no browser: none of {', '.join(NAMES)} is on the PATH, nor does CHROMIUM name one",
)

#: The page is looked at through a frame: windows cannot be as narrow as a phone.
HARNESS = """<!doctype html><html><head><meta charset="utf-8"></head>
<body style="margin:0"><iframe id="page" style="border:0;width:{width}px;height:{height}px" srcdoc="{page}">
</iframe><pre id="found"></pre><script>{script}</script></body></html>"""

LOOK = r"""
const errors = [];
window.addEventListener("error", event => errors.push(event.message));
const frame = document.getElementById("page");
frame.addEventListener("load", () => {
  const inner = frame.contentWindow, content = frame.contentDocument;
  const shown = element => element.getClientRects().length > 0;
  const all = selector => [...content.querySelectorAll(selector)].filter(shown);
  const overlaps = [];
  const outside = [];
  for (const figure of all("svg[role=img]")) {
    const around = figure.getBoundingClientRect();
    const texts = [...figure.querySelectorAll("text")];
    const labels = texts.map(text => [text.textContent, text.getBoundingClientRect()]);
    labels.forEach(([name, box], index) => {
      if (box.left < around.left - 1 || box.right > around.right + 1 || box.top < around.top - 1 ||
          box.bottom > around.bottom + 1) outside.push(name);
      for (const [other, its] of labels.slice(index + 1)) {
        const wide = Math.min(box.right, its.right) - Math.max(box.left, its.left);
        const high = Math.min(box.bottom, its.bottom) - Math.max(box.top, its.top);
        if (wide > 1 && high > 2) overlaps.push(`${name} / ${other}`);
      }
    });
  }
  const sizes = {};
  const walker = content.createTreeWalker(content.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.data.trim() || !shown(parent) || parent.closest("title") || parent.closest(".star")) continue;
    const svg = parent.closest("svg");
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    const size = parseFloat(inner.getComputedStyle(parent).fontSize) * scale;
    sizes[size.toFixed(2)] = node.data.trim().slice(0, 40);
  }
  const smallest = Math.min(...Object.keys(sizes).map(Number));
  document.getElementById("found").textContent = JSON.stringify({
    width: inner.innerWidth,
    scrollWidth: content.scrollingElement.scrollWidth,
    height: content.scrollingElement.scrollHeight,
    figures: all("svg[role=img]").length,
    empty: all("svg[role=img]").filter(svg => svg.getBoundingClientRect().height < 100).length,
    tables: all("table").length,
    wideBoxes: all(".scroll").filter(box => box.getBoundingClientRect().right > inner.innerWidth + 1).length,
    overlaps, outside, smallest, smallestText: sizes[smallest.toFixed(2)],
    loaded: inner.performance.getEntriesByType("resource").map(entry => entry.name),
    background: inner.getComputedStyle(content.body).backgroundColor,
    color: inner.getComputedStyle(content.body).color,
    errors,
  });
});
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Two reports: of every kind of section, and of all that is committed."""
    folder = tmp_path_factory.mktemp("report")
    codec_for("llama", "decode").save(folder / "codec.safetensors")
    samples = [*report_samples.write(folder), folder / "codec.safetensors"]
    return {"samples": page(load(samples)), "committed": page(load(sorted(RESULTS.glob("*.json"))))}


def _browse(folder, *options):
    """Run the browser; return what it prints, without the log of its own troubles."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--disable-background-networking",
        "--no-first-run",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=5000",
        *options,
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    return run.stdout


def _harness(folder, content, width, height):
    path = folder / "harness.html"
    path.write_text(
        HARNESS.format(width=width, height=height, page=html.escape(content), script=LOOK), encoding="utf-8"
    )
    return path.as_uri()


def _look(folder, content, width, *options):
    out = _browse(folder, "--dump-dom", *options, _harness(folder, content, width, 900))
    found = re.search(r'<pre id="found">(.*?)</pre>', out, re.DOTALL)
    assert found, out[-2000:]
    return json.loads(html.unescape(found[1]))


def _pixels(path):
    """Return the number of different rows of pixels of a PNG file, as filtered: a blank image has few."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    at, packed, header = 8, b"", b""
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, data = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        header = data if kind == b"IHDR" else header
        packed += data if kind == b"IDAT" else b""
        at += 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", header[:10])
    row = 1 + width * {2: 3, 6: 4}[colour] * depth // 8
    raw = zlib.decompress(packed)
    return width, height, len({raw[index * row : (index + 1) * row] for index in range(height)})


@pytest.mark.parametrize("which", ["samples", "committed"])
@pytest.mark.parametrize("device", list(WIDTHS))
def test_page_reads_well(pages, tmp_path, which, device):
    width = WIDTHS[device]
    found = _look(tmp_path, pages[which], width)
    assert found["width"] == width
    assert found["scrollWidth"] <= width  # tables scroll in their boxes, the page never sideways
    assert found["wideBoxes"] == 0
    assert found["figures"] >= 9
    assert found["empty"] == 0
    assert found["tables"] >= 10
    assert found["overlaps"] == []
    assert found["outside"] == []
    assert found["smallest"] >= 11, found["smallestText"]
    assert found["loaded"] == []
    assert found["errors"] == []


@pytest.mark.parametrize("device", ["phone", "desk"])
def test_screenshots(pages, tmp_path, device):
    width = WIDTHS[device]
    picture = tmp_path / f"{device}.png"
    _browse(
        tmp_path,
        f"--screenshot={picture}",
        f"--window-size={max(width, 520)},2400",
        _harness(tmp_path, pages["samples"], width, 2400),
    )
    wide, high, rows = _pixels(picture)
    assert wide >= width
    assert high > 2000
    assert rows > 500


def test_dark_where_people_like_it_so(pages, tmp_path):
    light = _look(tmp_path, pages["samples"], 1280)
    dark = _look(tmp_path, pages["samples"], 1280, "--blink-settings=preferredColorScheme=0")
    assert _lightness(light["background"]) > 0.9 > 0.3 > _lightness(light["color"])
    assert _lightness(dark["background"]) < 0.2 < 0.8 < _lightness(dark["color"])


def test_print(pages, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(pages["samples"], encoding="utf-8")
    _browse(tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer", path.as_uri())
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 20


def _lightness(colour):
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / (3 * 255)
