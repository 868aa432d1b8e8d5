"""All competitors by name."""

from __future__ import annotations

from aquakv.baselines.base import WINDOW_SUFFIX, Baseline
from aquakv.baselines.fp8 import Float8
from aquakv.baselines.higgs import Higgs
from aquakv.baselines.kivi import Kivi
from aquakv.baselines.kvquant import KVQuant
from aquakv.baselines.kvtc import Kvtc
from aquakv.baselines.quanto import Quanto
from aquakv.baselines.quarot import QuaRot
from aquakv.baselines.rtn import RoundToNearest
from aquakv.baselines.turboquant import TurboQuant, TurboQuantSketch
from aquakv.config import WindowConfig
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
    """Return the competitor that ``NAME[:BITS][+window]`` names, not fitted to any model.

    With ``+window`` the tokens stay exact that stay exact in `AquaCache` by default, in place of those that
    the method's paper keeps.

    Raises
    ------
    ConfigError
        There is no such name, or it does not come with so many bits or with a window.

    Examples
    --------
    >>> baseline("kivi:2").label
    'kivi:2'
    """
    plain = spec.removesuffix(WINDOW_SUFFIX)
    window = None if plain == spec else WindowConfig()
    name, colon, bits = plain.partition(":")
    kind = BASELINES.get(name)
    if kind is None:
        raise ConfigError(
            f"unknown baseline {name!r}; expected NAME, NAME:BITS or either with {WINDOW_SUFFIX}, NAME being "
            f"one of: {', '.join(BASELINES)}"
        )
    if not colon:
        return kind(kind.default_bits, window)
    try:
        number = float(bits)
    except ValueError:
        example = f"{name}:{kind.default_bits:g}"
        raise ConfigError(
            f"baseline {spec!r}: expected bits as a number behind the colon, as in {example}"
        ) from None
    return kind(number, window)
