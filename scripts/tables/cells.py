"""What tables call methods and data, and cells that several of them have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from aquakv.evaluation.report import names

#: What the columns are called; other data by their name.
TITLES = {
    "wikitext2:test": "WikiText-2",
    "pydoc:test": "Python documentation",
    "stdlib:test": "Python source",
    "longbench/multi_news": "news",
    "gsm8k:test": "school mathematics",
}

#: How contestants are called that are no presets; "+window": with the exact tokens of the presets.
SYSTEMS = names.SYSTEMS | {
    "kvquant": "KVQuant, 1 % outliers",
    "quanto": "transformers' QuantizedCache (quanto)",
}

#: Columns of a method's rate and quality.
QUALITY_TITLES = ("bits per value", "with exact tokens", "perplexity", "mean KL (nats)", "same top")


def table(titles: Sequence[str], lines: Iterable[Sequence[str]], note: str = "") -> str:
    """Return a table in Markdown: titles, lines of cells, and a paragraph below."""
    text = [f"| {' | '.join(cells)} |" for cells in (titles, *lines)]
    text.insert(1, "| --- " * len(titles) + "|")
    return "\n".join([*text, "", note] if note else text)


def by_contestant(all_rows: list[dict[str, Any]]) -> dict[str, dict[tuple[str, int], dict[str, Any]]]:
    """Return rows by contestant, then by data and sequence length."""
    found: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for row in all_rows:
        found.setdefault(row["contestant"], {})[row["data"], row["seq_len"]] = row
    return found


def measured_with(content: dict[str, Any]) -> str:
    """Return a file's version of torch and its device."""
    return f"torch {content['versions']['torch']}, {content['device']}"


def title(row: dict[str, Any], lengths: set[int]) -> str:
    """Return a column's title: the data, its length where several are there, and whether it is unseen."""
    name = TITLES.get(row["data"], row["data"])
    if row["seq_len"] != min(lengths):
        name += f", {row['seq_len']}"
    return name + ("*" if row.get("unseen") else "")


def system_and_setting(method: str) -> tuple[str, str]:
    """Return what a table calls a method that a grid or a benchmark names."""
    name, _, setting = method.partition(":")
    if setting:
        bits, _, window = setting.partition("+")
        return SYSTEMS[name], f"{bits} bit, our window" if window else f"{bits} bit"
    preset, bits = name.split()
    return f"**aquakv {preset}**", f"{bits} bit"


def quality_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells below `QUALITY_TITLES`."""
    return [
        f"{row['bits_per_value']:.2f}",
        f"{row['bits_per_value_total']:.2f}" if row["bits_per_value_total"] else "",
        f"{100 * row['relative_increase']:+.2f} %",
        f"{row['mean_kl']:.4f}",
        f"{100 * row['top1_agreement']:.1f} %",
    ]
