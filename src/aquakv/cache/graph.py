"""Repeat decode steps as a CUDA graph: one launch a step, in place of hundreds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from aquakv.cache.aqua_cache import AquaCache
from aquakv.cache.repeating_cache import Steady
from aquakv.errors import CacheStateError, ConfigError, ShapeError
from aquakv.models.adapter import adapt
from aquakv.models.versions import CACHE_ARGUMENTS, given_cache

#: Computes a step anew from what its inputs hold now; returns the same tensor every time.
Replay = Callable[[], Tensor]

#: Takes a step as a function of no arguments, which reads and writes tensors that stay where they are, and
#: returns its replay. It may run the step, but need not: whoever captures replays at once.
Capture = Callable[[Callable[[], Tensor]], Replay]

#: Capturing takes longer than a step; it must save so many before the cache needs more room.
LEAST_REPEATS = 8

#: Arguments of a forward pass that a repeated step takes, or that do not matter to a single token.
_KNOWN = frozenset(
    {
        "input_ids",
        "attention_mask",
        "position_ids",
        "use_cache",
        "return_dict",
        "logits_to_keep",
        *CACHE_ARGUMENTS,
    }
)


@dataclass(frozen=True)
class _Captured:
    """A captured step: what it is good for, its inputs ``[rows, 1]``, how to repeat it."""

    steady: Steady
    input_ids: Tensor
    position_ids: Tensor
    replay: Replay


class DecodeGraph:
    """Decode steps of a model with an `AquaCache`, repeated as a CUDA graph where that is possible.

    A step of one token a row in which kernels attend to the codes does the same work as the one before
    it. It is captured once and repeated then; the host only counts the columns. A block that falls due is
    compressed behind such a step, as that attends to its exact tokens; its codes go where there is room
    for them, and the same graph is repeated afterwards. Once the room is used up, one step of the model's
    own makes more of it, and the next is captured anew. Nothing is captured that would be repeated less
    than `LEAST_REPEATS` times before that. Whatever is not such a step is the model's own as well.
    Results are the same.

    Parameters
    ----------
    model
        The model, all of it on one CUDA device.
    cache
        A cache of this model. It may be used otherwise in between.
    capture
        How steps are captured: as a CUDA graph by default.

    Raises
    ------
    ConfigError
        The model is not on one device (CUDA with the default ``capture``), some of its weights are
        offloaded, or no step through the cache can be captured; the message says why.

    Examples
    --------
    >>> with DecodeGraph(model, cache):                                   # doctest: +SKIP
    ...     model.generate(**inputs, past_key_values=cache)

    Notes
    -----
    As with kernels in general (see `AquaCache`), the attention mask of repeated steps is taken to say of
    older tokens what it said when it was last looked at, and to let the new ones be seen. It is looked at in
    steps that are the model's own and whenever a block is compressed.
    """

    def __init__(self, model: PreTrainedModel, cache: AquaCache, *, capture: Capture | None = None) -> None:
        if cache.decoder is not model.get_decoder():
            raise ConfigError("DecodeGraph: the cache was built for another model")
        reason = cache.why_no_graphs()
        if reason is None and model.config.get_text_config(decoder=True)._attn_implementation != "sdpa":
            reason = "the model does not attend by sdpa"
        if reason is not None:
            raise ConfigError(f"DecodeGraph: no step can be captured: {reason}")
        device = _only_device(model)
        if capture is None and device.type != "cuda":
            raise ConfigError(
                f"DecodeGraph: expected a model on one CUDA device, got one on {device}; move it there, or "
                "decode without a graph"
            )
        self._capture = capture or CudaCapture(device)
        self._model = model
        self._cache = cache
        self._forward: Callable[..., Any] = model.forward
        self._captured: _Captured | None = None
        self._inside = False

    @property
    def repeats(self) -> bool:
        """Whether a step is captured that is good for repeating now."""
        held = self._captured
        return held is not None and held.steady is self._cache.steady(held.steady.masked)

    @torch.no_grad()
    def step(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Feed one token a row.

        Parameters
        ----------
        input_ids
            ``[rows, 1]`` int64.
        attention_mask
            ``[rows, columns]``, the new one included, nonzero where tokens may be attended to; None if all
            but padding may, which the cache knows from the prompt's mask.
        position_ids
            ``[rows or 1, 1]`` int64; by default each row's last position plus 1.

        Returns
        -------
        Tensor
            ``[rows, 1, vocabulary]``: logits.

        Raises
        ------
        CacheStateError
            The cache is empty, or a row's newest token was evicted and there are no ``position_ids``.
        ShapeError
            There is not one token for each row of the cache.
        """
        positions = self._cache.layout.positions
        if positions is None:
            raise CacheStateError("DecodeGraph.step: the cache is empty; feed the prompt to the model first")
        if tuple(input_ids.shape) != (len(positions), 1):
            raise ShapeError(
                f"DecodeGraph.step: expected input_ids [{len(positions)}, 1], got {list(input_ids.shape)}"
            )
        if position_ids is None and not self._cache.layout.ends_with_newest:
            raise CacheStateError(
                "DecodeGraph.step: a sequence's newest token was evicted, so the next one's position is not "
                "known; pass position_ids"
            )
        if position_ids is None:
            position_ids = positions[:, -1:].long().to(input_ids.device) + 1
        masked, compresses = attention_mask is not None, self._cache.compresses_next
        steady = self._cache.steady(masked)
        captured = self._captured
        if captured is not None and captured.steady is steady:
            captured.input_ids.copy_(input_ids)
            captured.position_ids.copy_(position_ids)
            try:
                self._cache.repeat_step(captured.position_ids)
                logits = captured.replay().clone()
                if compresses:
                    self._cache.compress_due(attention_mask)
                return logits
            except BaseException:
                self._cache.give_up_step()
                raise
        if captured is not None and not self._cache.lasts(captured.steady, masked):
            self._captured = captured = None  # what it holds is free before anything grows or is captured
        if steady is None or compresses or self._cache.moves_within(LEAST_REPEATS):
            return self._pass(input_ids, position_ids, attention_mask).logits
        try:
            self._captured = self._captured_step(steady, input_ids, position_ids, attention_mask)
            return self._captured.replay().clone()
        except BaseException:
            self._cache.give_up_step()
            raise

    def _pass(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> Any:
        return self._forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=self._cache,
            use_cache=True,
        )

    def _captured_step(
        self, steady: Steady, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None
    ) -> _Captured:
        """Capture this step without replaying it; all kernels have run in the step before, as it must be."""
        tokens, positions = input_ids.clone(), position_ids.expand(len(input_ids), 1).clone()
        self._cache.prepare_step(positions, attention_mask)
        # The step knows the mask. The model, which would look at it, attends to nothing but views.
        replay = self._capture(lambda: self._pass(tokens, positions, None).logits)
        return _Captured(steady, tokens, positions, replay)

    # --- under model.generate -------------------------------------------------------------------------------

    def __enter__(self) -> DecodeGraph:
        """Let the model's own forward passes with this cache be repeated where they can."""
        if self._inside:
            raise CacheStateError("DecodeGraph: entered twice")
        self._inside = True
        self._forward = self._model.forward
        original, own = self._forward, "forward" in vars(self._model)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if args or not self._takes(kwargs):
                return original(*args, **kwargs)
            logits = self.step(kwargs["input_ids"], kwargs.get("attention_mask"), kwargs.get("position_ids"))
            return CausalLMOutputWithPast(logits=logits, past_key_values=self._cache)

        self._restore = (lambda: setattr(self._model, "forward", original)) if own else self._forget
        self._model.forward = forward
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the model its forward pass back, and free the graph."""
        self._restore()
        self._inside, self._captured = False, None

    def _forget(self) -> None:
        del self._model.forward

    def _takes(self, arguments: dict[str, Any]) -> bool:
        """Tell whether a forward pass is a step of this cache with nothing unusual about it."""
        tokens, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        return (
            given_cache(arguments) is self._cache
            and isinstance(tokens, Tensor)
            and tuple(tokens.shape) == (self._cache.layout.rows, 1)
            and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2))
            and arguments.get("use_cache", True) is not False
            and arguments.get("return_dict", True) is not False
            and all(name in _KNOWN or value is None or value is False for name, value in arguments.items())
        )


class CudaCapture:
    """Captures steps as CUDA graphs, each in a pool of memory of its own, which goes with the graph.

    Parameters
    ----------
    device
        Where all of a step runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def __call__(self, step: Callable[[], Tensor]) -> Replay:
        """Capture a step, which does not run."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may do as they like meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            out = step()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def _only_device(model: PreTrainedModel) -> torch.device:
    """Return where all of a model is and computes."""
    adapter = adapt(model)
    devices = {parameter.device for parameter in model.parameters()}
    devices |= {adapter.device, *(adapter.layer_device(index) for index in range(len(adapter.layers)))}
    if torch.device("meta") in devices:
        raise ConfigError(
            "DecodeGraph: some of the model's weights are offloaded, and a graph cannot load them; decode "
            "without a graph"
        )
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ConfigError(
            f"DecodeGraph: expected a model on one CUDA device, got one on {names}; move it there, or decode "
            "without a graph"
        )
    return devices.pop()
