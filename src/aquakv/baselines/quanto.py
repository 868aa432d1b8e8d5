"""Transformers' own quantised cache, with its quanto backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import Cache, PreTrainedModel, QuantizedCache

from aquakv.baselines.base import Baseline, largest_group
from aquakv.baselines.encoded import TensorCoder
from aquakv.cache.footprint import Footprint
from aquakv.cache.records import storage_bytes
from aquakv.config import WindowConfig
from aquakv.errors import ConfigError, UnsupportedModelError
from aquakv.models.adapter import ModelAdapter, adapt


@dataclass(frozen=True)
class Quanto(Baseline):
    """``transformers.QuantizedCache`` with the backend ``quanto``, through its public interface.

    Asymmetric rounding in groups of 64 neighbouring features of a head (or the largest divisor of its size
    below that), steps and zero points in the model's dtype. It keeps up to `residual` newest tokens exact
    and, whenever these are full, decodes and quantises its whole history anew; the first pass is quantised in
    full, so sequences are fed in passes of `residual` tokens (which transformers 5.17 quantises one pass
    later). Not append-only, hence without a single-pass protocol.
    """

    bits: float = 4
    group: int = 64
    residual: int = 128

    name: ClassVar[str] = "quanto"
    source: ClassVar[str] = "transformers.QuantizedCache"
    choices: ClassVar[tuple[float, ...]] = (2, 4)
    default_bits: ClassVar[float] = 4
    at_once: ClassVar[bool] = False
    single_pass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            raise ConfigError("baseline quanto: transformers' cache knows no other window; leave it out")

    @property
    def own_windows(self) -> tuple[WindowConfig, WindowConfig]:
        """Up to `residual` newest tokens."""
        return WindowConfig(0, 0, self.residual), WindowConfig(0, 0, self.residual)

    def coders(self, adapter: ModelAdapter, order: int) -> tuple[TensorCoder, TensorCoder] | None:
        """Return None: transformers encodes."""
        return None

    def cache(self, model: PreTrainedModel) -> Cache:
        """Return an empty cache.

        Raises
        ------
        ConfigError
            The package optimum-quanto is not installed, or does not work here.
        UnsupportedModelError
            Transformers' quantised cache does not take the model.
        """
        require_quanto()
        adapter = adapt(model)
        try:
            return QuantizedCache(
                "quanto",
                adapter.config,
                nbits=int(self.bits),
                q_group_size=largest_group(adapter.head_dim, self.group),
                residual_length=self.residual,
            )
        except ValueError as error:
            raise UnsupportedModelError(
                f"baseline quanto: transformers refuses the model: {error}"
            ) from error

    def footprint(self, cache: Cache) -> Footprint:
        """Return what the cache holds, by part."""
        every_layer: list[Any] = cache.layers
        layers = [layer for layer in every_layer if layer.is_initialized]
        codes = scales = tail = coded = total = itemsize = 0
        for layer in layers:
            for quantized, rest in (
                (layer._quantized_keys, layer.keys),
                (layer._quantized_values, layer.values),
            ):
                packed, *others = (_held(getattr(quantized, name)) for name in ("_data", "_scale", "_shift"))
                codes, scales = codes + packed, scales + sum(others)
                tail += storage_bytes(rest)
                itemsize = quantized.dtype.itemsize
                coded, total = coded + quantized.numel(), total + quantized.numel() + rest.numel()
        return Footprint(
            code_bytes=codes,
            scale_bytes=scales,
            outlier_bytes=0,
            position_bytes=0,
            spare_bytes=0,
            sink_bytes=0,
            tail_bytes=tail,
            other_layer_bytes=0,
            coded_values=coded,
            total_values=total,
            original_values=total,
            exact_cache_bytes=total * itemsize,
        )


def require_quanto() -> None:
    """Raise `ConfigError` if optimum-quanto cannot be imported."""
    try:
        import optimum.quanto  # noqa: F401
    except Exception as error:  # it compiles extensions when imported: anything may go wrong there
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            "baseline quanto: needs the package optimum-quanto, whose import failed here "
            f"({reason}); install it with pip install 'aquakv[quanto]', or choose another baseline"
        ) from error


def _held(tensor: Tensor) -> int:
    """Return the bytes of a tensor, or of the tensors that one of quanto's types is made of."""
    if not hasattr(tensor, "__tensor_flatten__") or type(tensor) is Tensor:
        return storage_bytes(tensor)
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return sum(_held(getattr(tensor, name)) for name in names)
