"""What methods are called, which belong together, and how they are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from aquakv.baselines import BASELINES
from aquakv.config import PRESETS
from aquakv.evaluation.report.load import Record

EXACT = "exact"
EXACT_LABEL = "exact cache"

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

#: What families are called that keep our exact tokens.
_WINDOW = ", our window"

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
    return Method(EXACT_LABEL, EXACT)


def _of_spec(spec: str, record: Record | None = None) -> Method:
    """Read a contestant: a preset with its bits, a competitor, a codec file, or the exact cache."""
    if spec == EXACT:
        return Method(EXACT_LABEL, EXACT)
    if spec.endswith(".safetensors"):
        codec = record.get("codec") if record is not None else None
        name = PurePath(spec).name
        family = str(codec.get("preset", name)) if isinstance(codec, dict) else name
        return Method(name, family, family in OURS)
    name, colon, setting = spec.partition(":")
    if colon and name in BASELINES:
        bits, _, window = setting.partition("+")
        system = SYSTEMS.get(name, name)
        more = _WINDOW if window else ""
        return Method(f"{system} {bits}\u00a0bit{more}", f"{system}{more}")
    if spec in BASELINES and spec not in PRESETS:
        return Method(SYSTEMS.get(spec, spec), SYSTEMS.get(spec, spec))
    first, _, rest = spec.partition(" ")
    if first in PRESETS and (not rest or rest[0].isdigit()):
        family = "higgs (aquakv)" if first == "higgs" else first
        number = rest.removesuffix(" bit")
        return Method(f"{family} {number}\u00a0bit" if number else family, family, first in OURS)
    return Method(spec, spec)


#: Markers of presets are filled, all others hollow; their colours are CSS variables of their names.
_PRESET_MARKERS = {"storage": "circle", "decode": "square", "paper": "up"}
_MARKERS = (
    "diamond",
    "down",
    "cross",
    "plus",
    "left",
    "right",
    "hexagon",
    "star",
    "pentagon",
    "up",
    "square",
    "circle",
)
_DASHES = (None, "6 3", "2 3")
_MUTED = 8

#: Competitors look the same in every figure.
_SLOTS = {
    name: slot
    for slot, name in enumerate(
        (
            "KVTC-like",
            "KIVI",
            "KVQuant",
            "HIGGS",
            "TurboQuant",
            "QuaRot",
            "quanto (transformers)",
            "FP8",
            "TurboQuant, sketched keys",
            "round-to-nearest",
        )
    )
}


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
    others = len(_SLOTS)
    for family in families:
        base = family.replace(",", " ").split()[0]
        if base in _PRESET_MARKERS:
            seen = sum(style.colour == base for style in found.values())
            mark = _PRESET_MARKERS[base] if not seen else _MARKERS[(seen - 1) % len(_MARKERS)]
            found[family] = Style(base, mark, strong=True, dash=_DASHES[min(seen, len(_DASHES) - 1)])
        elif family in (EXACT, EXACT_LABEL):
            found[family] = Style("exact", "diamond")
        else:
            system = family.removesuffix(_WINDOW)
            slot = _SLOTS.get(system, others)
            others += system not in _SLOTS
            windowed = system != family  # the colour of the system, another marker and dash
            mark = _MARKERS[(slot + 5 * windowed) % len(_MARKERS)]
            dash = _DASHES[(slot // _MUTED + 2 * windowed) % len(_DASHES)]
            found[family] = Style(f"muted-{slot % _MUTED}", mark, dash=dash)
    return found
