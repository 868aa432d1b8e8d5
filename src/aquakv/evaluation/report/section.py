"""What sections of a report are made of, and what they say of where figures come from."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from aquakv.evaluation.report.load import Record, Source
from aquakv.evaluation.report.markup import Markup, join, tag

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)

#: Data as people call it.
DATA_TITLES = {
    "wikitext2:test": "WikiText-2",
    "wikitext2:validation": "WikiText-2, validation",
    "pydoc:test": "Python documentation",
    "stdlib:test": "Python source",
    "longbench/multi_news": "news",
    "gsm8k:test": "school mathematics",
}

_MODELS = {"demo": "SmolLM2-135M-Instruct"}


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes
    ----------
    name
        What links lead to.
    title
        Its heading.
    intro
        What it compares.
    body
        Figures and tables.
    """

    name: str
    title: str
    intro: str
    body: Markup


def model_title(record: Record) -> str:
    """Return what people call a row's model."""
    name = record.text("model", "model not named")
    return _MODELS.get(name, name)


def data_title(record: Record) -> str:
    """Return what people call a row's data."""
    names = record.get("data", "")
    names = [names] if isinstance(names, str) else list(names)
    return ", ".join(DATA_TITLES.get(str(name), str(name)) for name in names)


def device_of(record: Record) -> str:
    """Return what a row was measured on: its own word, else its file's."""
    return record.text("device", record.source.device or "device not named")


def file_title(record: Record) -> str:
    """Return what people call a row's file."""
    return record.source.name.removesuffix(".json").replace("-", " ")


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Return items by a key, in the order of their first appearance."""
    found: dict[Key, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def by_file(
    name: str,
    title: str,
    intro: str,
    rows: Sequence[Record],
    parts: Callable[[Sequence[Record]], Sequence[Markup | None]],
) -> Section | None:
    """Return a section with a group for every file and device, or None without rows.

    Parameters
    ----------
    name, title, intro
        See `Section`.
    rows
        All of its rows.
    parts
        Returns what is in a group, between its heading and where its figures come from.
    """
    if not rows:
        return None
    groups = grouped(rows, lambda row: (row.source.name, device_of(row)))
    body = [
        tag(
            "section",
            tag("h3", f"{file_title(members[0])}, {device}"),
            *parts(members),
            provenance(members),
        )
        for (_, device), members in groups.items()
    ]
    return Section(name, title, intro, join(body))


def provenance(records: Sequence[Record]) -> Markup:
    """Say which files figures come from, and on what, with which versions and commit they were measured."""
    lines = []
    for source, of_source in grouped(records, lambda record: record.source.name).items():
        said = grouped(
            of_source, lambda record: (device_of(record), record.text("git_sha"), id(record.source))
        )
        for (device, commit, _), rows in said.items():
            lines.append(tag("li", _origin(source, rows[0].source, device, commit)))
    return tag("ul", lines, class_="source")


def _origin(name: str, source: Source, device: str, commit: str) -> Markup:
    dirty = commit.endswith("-dirty")
    short = commit.removesuffix("-dirty")[:10]
    versions = ", ".join(
        f"{library} {version}" for library, version in source.versions.items() if library != "python"
    )
    parts = [device, versions or "versions not named"]
    parts.append(f"commit {short}{', changed' if dirty else ''}" if short else "commit not named")
    note = tag("span", f" Note: {source.note.rstrip('.')}.") if source.note else None
    return Markup(tag("b", name) + tag("span", ": " + "; ".join(parts) + ".") + (note or ""))
