"""The page around a report's sections: one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from aquakv._version import __version__
from aquakv.evaluation.report import formats
from aquakv.evaluation.report.load import Inputs
from aquakv.evaluation.report.markup import Markup, tag
from aquakv.evaluation.report.section import Section, grouped
from aquakv.evaluation.report.sections import sections
from aquakv.evaluation.report.sections.comparison import Least, least_bits

DEFAULT_TITLE = "KV-cache compression, measured"

#: Increases of perplexity that the page's beginning names the fewest bits for.
_LIMITS = (0.005, 0.01)

#: The page loads nothing and runs nothing: the browser sees to it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(inputs: Inputs, title: str = DEFAULT_TITLE) -> str:
    """Return a report as one HTML page.

    Parameters
    ----------
    inputs
        What it is made of; see `aquakv.evaluation.report.load`.
    title
        The page's heading.

    Raises
    ------
    DataError
        There is nothing to show.
    """
    shown = sections(inputs)
    style = resources.files("aquakv.evaluation.report").joinpath("page.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content=f"aquakv {__version__}"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    body = tag(
        "body",
        tag("a", "To the figures", href=f"#{shown[0].name}", class_="skip"),
        tag("header", tag("h1", title), _said(inputs), _contents(shown)),
        tag("main", _glance(inputs), [_section(one) for one in shown]),
        tag("footer", tag("p", f"Written by aquakv {__version__}, from the files named below each table.")),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _section(one: Section) -> Markup:
    heading = f"{one.name}-title"
    return tag(
        "section",
        tag("h2", one.title, id=heading),
        tag("p", one.intro, class_="intro"),
        one.body,
        id=one.name,
        class_="part-of-page",
        aria_labelledby=heading,
    )


def _said(inputs: Inputs) -> Markup:
    files = list(dict.fromkeys([source.name for source in inputs.sources] + [c.name for c in inputs.codecs]))
    count = f"{len(inputs.records):,} row{'s' * (len(inputs.records) != 1)}"
    what = f"{count} from {len(files)} file{'s' * (len(files) != 1)}"
    return tag("p", f"{what}. Quality is relative to the same model with an exact cache.", class_="lead")


def _contents(shown: Sequence[Section]) -> Markup:
    links = [tag("li", tag("a", one.title, href=f"#{one.name}")) for one in shown]
    return tag("nav", tag("ul", links), aria_label="Contents")


def _glance(inputs: Inputs) -> Markup | None:
    """Name the fewest bits that stay within a small loss, for every model and text that allows it."""
    found = [one for limit in _LIMITS for one in least_bits(inputs.records, limit)]
    best: list[Least] = []
    for members in grouped(found, lambda one: one.model).values():
        for same in grouped(members, lambda one: one.limit).values():
            one = min(same, key=lambda one: one.bits)
            if (one.model, one.label) not in [(other.model, other.label) for other in best]:
                best.append(one)
    if not best:
        return None
    cards = [
        tag(
            "li",
            tag("p", tag("b", formats.fixed(one.bits, 2)), " bits", class_="figure"),
            tag(
                "p",
                f"{one.label}: {formats.increase(one.increase)} perplexity, the fewest bits within "
                f"{formats.percent_tick(one.limit)} of the exact cache",
            ),
            tag("p", f"{one.model}, {one.text}", class_="where"),
        )
        for one in best
    ]
    heading = tag("h2", "At a glance", id="glance-title")
    return tag(
        "section", heading, tag("ul", cards, class_="cards"), class_="glance", aria_labelledby="glance-title"
    )
