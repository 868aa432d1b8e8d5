"""HTML and SVG as a tree of tags, whose text is escaped wherever it comes from."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Markup(str):
    """Text that is HTML already; any other string is escaped where it is used."""

    __slots__ = ()


#: Elements that have no end tag in HTML.
_VOID = frozenset({"meta", "br", "hr", "col"})


def escaped(value: object) -> str:
    """Return a value as text of an element or an attribute: nothing of it is markup."""
    text = html.escape(str(value), quote=True)
    # Control characters and lone surrogates are no characters of a page.
    return "".join(c if c in "\n\t" or (c.isprintable() or c.isspace()) else "\ufffd" for c in text)


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """Return an element.

    Parameters
    ----------
    name
        Of the element.
    children
        Markup, or text, which is escaped; None is left out, iterables are laid out flat.
    attributes
        An underscore at the end is dropped, others become hyphens: ``class_``, ``aria_label``. None and False
        leave the attribute out, True gives it no value. Numbers are rounded to hundredths.
    """
    parts = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escaped(_short(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    inner = join(*children)
    if name in _VOID:
        return Markup(f"<{name}{parts}>")
    return Markup(f"<{name}{parts}>{inner}</{name}>")


def join(*children: object) -> Markup:
    """Return markup and escaped text one behind the other."""
    return Markup("".join(_flat(children)))


def _flat(children: Iterable[object]) -> Iterable[str]:
    for child in children:
        if child is None:
            continue
        if isinstance(child, Markup):
            yield child
        elif isinstance(child, (list, tuple)):
            yield from _flat(child)
        else:
            yield escaped(child)


def _short(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return value
