"""All competitors by name."""

from __future__ import annotations

from aquakv.baselines.base import Baseline
from aquakv.baselines.fp8 import Float8
from aquakv.baselines.higgs import Higgs
from aquakv.baselines.kivi import Kivi
from aquakv.baselines.kvquant import KVQuant
from aquakv.baselines.kvtc import Kvtc
from aquakv.baselines.quanto import Quanto
from aquakv.baselines.quarot import QuaRot
from aquakv.baselines.rtn import RoundToNearest
from aquakv.baselines.turboquant import TurboQuant, TurboQuantSketch
from aquakv.errors import ConfigError

_KINDS: tuple[type[Baseline], ...] = (
    RoundToNearest,
    Kivi,
    KVQuant,
    QuaRot,
    TurboQuant,
    TurboQuantSketch,
    Higgs,
    Kvtc,
    Float8,
    Quanto,
)

#: The competitors, by the name that ``--baseline`` takes.
BASELINES: dict[str, type[Baseline]] = {kind.name: kind for kind in _KINDS}


def baseline(spec: str) -> Baseline:
    """Return the competitor that ``NAME`` or ``NAME:BITS`` names, not fitted to any model.

    Raises
    ------
    ConfigError
        There is no such name, or it does not come with so many bits.

    Examples
    --------
    >>> baseline("kivi:2").label
    'kivi:2'
    """
    name, colon, bits = spec.partition(":")
    kind = BASELINES.get(name)
    if kind is None:
        raise ConfigError(f"unknown baseline {name!r}; expected one of: {', '.join(BASELINES)}")
    if not colon:
        return kind(kind.default_bits)
    try:
        number = float(bits)
    except ValueError:
        example = f"{name}:{kind.default_bits:g}"
        raise ConfigError(
            f"baseline {spec!r}: expected bits as a number behind the colon, as in {example}"
        ) from None
    return kind(number)
