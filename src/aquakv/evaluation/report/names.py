"""What methods are called, which belong together, and how they are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from aquakv.baselines import BASELINES
from aquakv.config import PRESETS
from aquakv.evaluation.report.load import Record

EXACT = "exact"

#: Competitors by their names on the command line.
SYSTEMS = {
    "rtn": "round-to-nearest",
    "kivi": "KIVI",
    "kvquant": "KVQuant",
    "quarot": "QuaRot",
    "turboquant": "TurboQuant",
    "turboquant-sketch": "TurboQuant, sketched keys",
    "higgs": "HIGGS",
    "kvtc": "KVTC-like",
    "fp8": "FP8",
    "quanto": "quanto (transformers)",
}

_EVICTION = {"h2o": "H2O", "snapkv": "SnapKV"}

#: Presets that are ours; the preset ``higgs`` is another's method.
OURS = ("storage", "decode", "paper")


@dataclass(frozen=True)
class Method:
    """What a row measures.

    Attributes
    ----------
    label
        As tables call it.
    family
        The same at any rate: what a line connects.
    ours
        Whether it is one of aquakv's presets.
    """

    label: str
    family: str
    ours: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether this is the exact cache."""
        return self.family == EXACT


def method_of(record: Record) -> Method:
    """Return what a row measures, by whichever fields say so."""
    found = _named(record)
    how = record.get("pruning")
    if isinstance(how, dict) and how.get("policy"):
        kept = how.get("keep")
        share = f"{100 * kept:.0f} %" if isinstance(kept, float) and kept <= 1 else f"{kept} tokens"
        by = f"{share} kept by {_EVICTION.get(how['policy'], how['policy'])}"
        return Method(f"{found.label}, {by}", f"{found.family}, {by}", found.ours)
    return found


def _named(record: Record) -> Method:
    if "kept" in record and "family" in record:  # a variant that was tried
        state = "kept" if record["kept"] else "discarded"
        label = ", ".join(filter(None, [record.text("contestant"), record.text("remark")]))
        return Method(label, f"{record['family']} variants, {state}", record["family"] in OURS)
    for name in ("contestant", "method"):
        value = record.get(name)
        if isinstance(value, dict):
            value = value.get("name") or value.get("spec") or value.get("codec")
        if value:
            return _of_spec(str(value), record)
    codec, other = record.get("codec"), record.get("baseline")
    if isinstance(codec, dict):
        return Method(str(codec.get("file")), str(codec.get("preset")), codec.get("preset") in OURS)
    if isinstance(other, dict):
        bits = other.get("bits")
        return _of_spec(f"{other.get('name')}:{bits:g}" if isinstance(bits, (int, float)) else str(other))
    return Method("exact cache", EXACT)


def _of_spec(spec: str, record: Record | None = None) -> Method:
    """Read a contestant: a preset with its bits, a competitor, a codec file, or the exact cache."""
    if spec == EXACT:
        return Method("exact cache", EXACT)
    if spec.endswith(".safetensors"):
        codec = record.get("codec") if record is not None else None
        name = PurePath(spec).name
        family = str(codec.get("preset", name)) if isinstance(codec, dict) else name
        return Method(name, family, family in OURS)
    name, colon, setting = spec.partition(":")
    if colon and name in BASELINES:
        bits, _, window = setting.partition("+")
        system = SYSTEMS.get(name, name)
        more = ", our window" if window else ""
        return Method(f"{system} {bits} bit{more}", f"{system}{more}")
    if spec in BASELINES and spec not in PRESETS:
        return Method(SYSTEMS.get(spec, spec), SYSTEMS.get(spec, spec))
    first, _, rest = spec.partition(" ")
    if first in PRESETS and (not rest or rest[0].isdigit()):
        family = "higgs (aquakv)" if first == "higgs" else first
        number = rest.removesuffix(" bit")
        return Method(f"{family} {number} bit" if number else family, family, first in OURS)
    return Method(spec, spec)


#: Stroke of presets: CSS variables, so that the page's dark mode has its own.
_PRESET_COLOURS = {"storage": "storage", "decode": "decode", "paper": "paper"}
#: Markers of presets are filled, all others hollow.
_PRESET_MARKERS = {"storage": "circle", "decode": "square", "paper": "up"}
_MARKERS = ("diamond", "down", "cross", "plus", "left", "right", "hexagon", "star", "bar", "up", "square", "circle")
_MUTED = 8


@dataclass(frozen=True)
class Style:
    """How a family is drawn.

    Attributes
    ----------
    colour
        Name of a CSS variable.
    marker
        Name of a shape.
    strong
        Thick line and filled markers.
    dash
        A dash pattern for the line.
    """

    colour: str
    marker: str
    strong: bool = False
    dash: str | None = None


def styles(families: list[str]) -> dict[str, Style]:
    """Return a style for every family; colours of other methods repeat, with other markers and dashes."""
    found: dict[str, Style] = {}
    others = 0
    for family in families:
        base = family.split(",")[0].split(" ")[0]
        if family in _PRESET_COLOURS:
            found[family] = Style(_PRESET_COLOURS[family], _PRESET_MARKERS[family], strong=True)
        elif base in _PRESET_COLOURS and base not in {f.split(",")[0] for f in found}:
            found[family] = Style(_PRESET_COLOURS[base], _PRESET_MARKERS[base], strong=True)
        elif family == EXACT:
            found[family] = Style("exact", "bar")
        else:
            dash = (None, "5 3", "2 3")[others // _MUTED % 3]
            found[family] = Style(f"muted-{others % _MUTED}", _MARKERS[others % len(_MARKERS)], dash=dash)
            others += 1
    return found
