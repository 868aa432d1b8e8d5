"""Load a causal language model and its tokenizer, and turn every failure into one line of advice."""

from __future__ import annotations

import errno
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aquakv.errors import ModelError
from aquakv.models.demo import DEMO, DEMO_MODELS, demo_model_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from aquakv.models.adapter import ModelAdapter

_log = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")

_EXPECTED = (
    f"{', '.join(DEMO_MODELS)}, a local directory, or a Hugging Face id such as "
    "HuggingFaceTB/SmolLM2-135M-Instruct"
)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_LONGEST_REASON = 180


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with its tokenizer.

    Attributes
    ----------
    model
        In eval mode, without gradients, on the chosen device.
    tokenizer
        The model's own.
    name
        The ``MODEL`` argument as given.
    path
        What transformers was given: a directory, or the Hub id.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    path: str

    @property
    def adapter(self) -> ModelAdapter:
        """For `aquakv.calibrate`, as a streamed model has it."""
        from aquakv.models.adapter import adapt

        return adapt(self.model)


def load_model(
    model: str,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str | None = None,
) -> LoadedModel:
    """Load a model for calibration or inference.

    Parameters
    ----------
    model
        ``demo``, ``demo:gemma3-270m``, a local directory, or a Hub id. A local directory wins over a Hub id
        of the same name.
    dtype
        ``auto`` (the checkpoint's own), ``float32``, ``bfloat16`` or ``float16``.
    device
        ``auto`` (CUDA where there is one, else the CPU), or a torch device such as ``cpu`` or ``cuda:1``.
    attn_implementation
        Passed to transformers; ``None`` lets it choose.

    Raises
    ------
    ModelError
        The model is missing, damaged, incomplete, of the wrong kind or too large, or a setting is not one
        of those above.
    """
    if dtype not in DTYPES:
        raise ModelError(f"expected a dtype out of {', '.join(DTYPES)}, got {dtype!r}; choose one of them")
    place = resolve_device(device)
    path = resolve_model(model)
    with quiet():
        config = load_config(model, path)
        tokenizer = load_tokenizer(model, path)
        loaded = _load_weights(model, path, config, dtype, attn_implementation)
        loaded = _place(model, loaded, place)
    loaded.eval()
    loaded.requires_grad_(False)
    return LoadedModel(loaded, tokenizer, model, path)


def resolve_device(device: str) -> torch.device:
    """Return a device from its name, ``auto`` included; raises `ModelError` as `load_model` does."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"expected a device such as auto, cpu, cuda or cuda:1, got {device!r}") from error
    if place.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (place.index or 0) >= count:
            raise ModelError(
                f"device {device} was asked for, but torch sees {count} CUDA devices here; "
                "choose --device cpu or auto, or install torch with CUDA on a machine that has a GPU"
            )
    elif place.type == "meta":
        raise ModelError("expected a device that holds weights, got 'meta'; choose auto, cpu or cuda")
    return place


def resolve_model(model: str) -> str:
    """Return what transformers takes for `model`: a checked directory, or a Hub id.

    Raises
    ------
    ModelError
        There is no such model.
    """
    if not isinstance(model, str) or not model.strip():
        raise ModelError(f"expected a model ({_EXPECTED}), got {model!r}")
    if model in DEMO_MODELS or model.startswith(f"{DEMO}:"):
        return str(demo_model_path(_log.info, model))
    try:
        directory = Path(model).expanduser()
        is_directory, exists = directory.is_dir(), directory.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"expected a model ({_EXPECTED}), got {model[:60]!r}…, which is no path") from error
    if is_directory:
        if not (directory / "config.json").is_file():
            raise ModelError(
                f"expected a model in the directory {model}, found no config.json there; "
                "give the directory that save_pretrained wrote"
            )
        return str(directory)
    if exists:
        raise ModelError(f"expected a model directory, found a file: {model}; give the directory it lies in")
    if not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise ModelError(f"no such directory: {model}; expected {_EXPECTED}")
    return model


def load_config(name: str, path: str) -> Any:
    """Return the configuration of the model that `resolve_model` found; raises `ModelError` as that does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    # transformers, safetensors, tokenizers and the Hub raise errors that share no base class.
    except Exception as error:
        raise _failure(name, path, "configuration", error) from error
    # The mapping is transformers' own list of what AutoModelForCausalLM takes.
    known = type(config) in AutoModelForCausalLM._model_mapping
    if not known or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"expected a causal (decoder-only) language model, got {name} of type "
            f"{getattr(config, 'model_type', None) or 'unknown'}; choose a text-generation model"
        )
    return config


def load_tokenizer(name: str, path: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model that `resolve_model` found; raises `ModelError` as that does."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        # Without its files, transformers may build an empty tokenizer instead of failing.
        is_empty = len(tokenizer) == 0 or not tokenizer("a b", add_special_tokens=False)["input_ids"]
    except Exception as error:
        raise _failure(name, path, "tokenizer", error) from error
    if is_empty:
        raise ModelError(
            f"the tokenizer of {name} is missing or empty; put its tokenizer.json beside config.json"
        )
    return tokenizer


def _load_weights(
    name: str, path: str, config: Any, dtype: str, attn_implementation: str | None
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        # Typed by transformers as the model alone.
        pair: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=False,
            # Reported below, by name, rather than raised with a pointer to a table in the log.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (ValueError, ImportError) as error:
        if attn_implementation is not None and "attention" in str(error).lower().replace("attn", "attention"):
            raise ModelError(
                f"attention {attn_implementation!r} cannot be used here ({_one_line(error)}); "
                "choose sdpa or eager, or leave it out"
            ) from error
        raise _failure(name, path, "weights", error) from error
    except Exception as error:
        raise _failure(name, path, "weights", error) from error
    loaded, report = pair
    # transformers fills what a checkpoint lacks with random numbers and only warns.
    absent = sorted(map(str, report["missing_keys"])) + sorted(map(str, report["mismatched_keys"]))
    if absent:
        raise ModelError(
            f"the weights of {name} are incomplete: {len(absent)} tensors are missing or of the wrong shape "
            f"(first {absent[0]}); {_mend(path)}"
        )
    return loaded


def _place(name: str, loaded: PreTrainedModel, place: torch.device) -> PreTrainedModel:
    try:
        return loaded.to(place)  # type: ignore[arg-type]
    except torch.OutOfMemoryError as error:
        raise _failure(name, str(place), "weights", error) from error
    # torch built without a device says so with an AssertionError.
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"{name} could not be moved to device {place} ({_one_line(error)}); choose cpu or auto"
        ) from error


def _failure(name: str, path: str, part: str, error: Exception) -> ModelError:
    """Say in one line what failed and what to do about it."""
    causes = list(_chain(error))
    reason = _one_line(error)
    if any(isinstance(cause, OSError) and cause.errno == errno.ENOSPC for cause in causes):
        return ModelError(
            f"no space is left on the disk for {name}; free some, or set HF_HOME to another disk"
        )
    if any(isinstance(cause, MemoryError | torch.OutOfMemoryError) for cause in causes):
        return ModelError(
            f"{name} does not fit in memory; choose a smaller model, dtype bfloat16, or device cpu"
        )
    if "trust_remote_code" in reason:
        return ModelError(
            f"{name} needs code from its own repository, which aquakv does not run; "
            "choose a model that transformers supports itself"
        )
    if not Path(path).is_dir() and (part != "weights" or _is_hub_failure(causes)):
        return ModelError(_hub_message(name, part, causes, reason))
    return ModelError(f"the {part} of {name} could not be loaded ({reason}); {_mend(path)}")


def _hub_message(name: str, part: str, causes: list[BaseException], reason: str) -> str:
    kinds = {type(cause).__name__ for cause in causes}
    if "GatedRepoError" in kinds:
        return f"{name} is gated on the Hub; accept its terms on its page, then run: hf auth login"
    if kinds & {"RepositoryNotFoundError", "HFValidationError"}:
        return f"no model {name} on the Hub, nor a directory of that name here; expected {_EXPECTED}"
    if "RevisionNotFoundError" in kinds or ("EntryNotFoundError" in kinds and not _is_offline(kinds)):
        return f"{name} on the Hub has no usable {part} ({reason}); choose another model"
    if "couldn't connect" in reason or _is_offline(kinds):
        reason = "no connection"
    return (
        f"{name} is no directory here and its {part} could not be had from the Hub ({reason}); "
        f"check the name and the connection, give a local directory, or use {DEMO}"
    )


def _is_hub_failure(causes: list[BaseException]) -> bool:
    modules = {(type(cause).__module__ or "").partition(".")[0] for cause in causes}
    return bool(modules & {"huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests"})


def _is_offline(kinds: set[str]) -> bool:
    return bool(kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectTimeout"})


def _mend(path: str) -> str:
    if Path(path).is_dir():
        return f"check or copy afresh the files in {path}"
    return "delete its folder in the Hub cache and try again, or choose another model"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and those it arose from."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _one_line(error: BaseException) -> str:
    """Return the error's first sentence or so, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' bars, warnings and log lines, and put everything back afterwards.

    Download bars of the Hub stay: they go to stderr and are the only sign of life for minutes.
    """
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_logging

    hub_logger = logging.getLogger("huggingface_hub")
    verbosity, hub_level = transformers_logging.get_verbosity(), hub_logger.level
    had_bars, hub_had_bars = (
        transformers_logging.is_progress_bar_enabled(),
        not hub.are_progress_bars_disabled(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        # transformers' switch turns the Hub's bars too.
        if hub_had_bars:
            hub.enable_progress_bars()
        hub_logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            hub_logger.setLevel(hub_level)
            transformers_logging.set_verbosity(verbosity)
            if had_bars:
                transformers_logging.enable_progress_bar()
            if not hub_had_bars:
                hub.disable_progress_bars()
