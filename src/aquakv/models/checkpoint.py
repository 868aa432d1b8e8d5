"""Read a model's weights from safetensors files, some tensors at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from aquakv.errors import ModelError, UnsupportedModelError
from aquakv.models.placement import owner_of
from aquakv.models.weights import place_tensor

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass
class CheckpointWeights:
    """The tensors of a checkpoint, under the names that transformers gives them in the model.

    transformers' own rules turn the checkpoint's names into the model's, and join tensors that the model has
    in one (the experts of mixtures, say).

    Attributes
    ----------
    directory
        Where the files are.
    files
        The file of each of the checkpoint's tensors.
    """

    directory: Path
    files: dict[str, str]
    _rules: Any = field(default=None, repr=False)
    _sources: dict[str, list[str]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, directory: Path) -> CheckpointWeights:
        """Look up which tensors a checkpoint has.

        Raises
        ------
        ModelError
            There is none in the directory, or its index is damaged.
        """
        index = directory / _INDEX
        try:
            if index.is_file():
                files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            else:
                with safe_open(directory / _SINGLE, framework="pt") as file:
                    files = dict.fromkeys(file.keys(), _SINGLE)
        except FileNotFoundError as error:
            raise ModelError(
                f"expected {_SINGLE} or {_INDEX} in {directory}, found neither; streaming reads safetensors "
                "files only: load the model as a whole (--no-stream), or save it again with save_pretrained"
            ) from error
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"the list of weights in {directory} is damaged ({type(error).__name__}); copy it afresh"
            ) from error
        missing = sorted(name for name in set(files.values()) if not (directory / name).is_file())
        if missing:
            raise ModelError(
                f"the weights in {directory} are incomplete: {len(missing)} files are missing "
                f"(first {missing[0]}); copy or download them again"
            )
        return cls(directory, files)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum((self.directory / name).stat().st_size for name in set(self.files.values()))

    def dtype(self) -> torch.dtype | None:
        """Return the dtype of the first floating tensor."""
        for name, file_name in self.files.items():
            with self._open(file_name) as file:
                kind = _DTYPES.get(file.get_slice(name).get_dtype())
            if kind is not None:
                return kind
        return None

    def prepare(self, model: PreTrainedModel, names: list[str]) -> None:
        """Work out where a model's tensors come from.

        Raises
        ------
        ModelError
            The checkpoint lacks some of ``names``.
        UnsupportedModelError
            The checkpoint's form is one that cannot be read in parts.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        if getattr(model.config, "quantization_config", None) is not None:
            raise UnsupportedModelError(
                f"the weights in {self.directory} are quantised, which streaming does not read; load the "
                "model as a whole (--no-stream)"
            )
        self._rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in self._rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self._rules if isinstance(rule, WeightConverter)]
        wanted: dict[str, Tensor] = model.state_dict()
        self._sources, several = {}, False
        for key in self.files:
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
            if name not in wanted and key in wanted:
                name, pattern = key, None
            self._sources.setdefault(name, []).append(key)
            converter = next((c for c in converters if pattern in c.source_patterns), None)
            several = several or (converter is not None and len(converter.target_patterns) > 1)
        if several:
            raise UnsupportedModelError(
                f"model type {model.config.model_type!r}: its checkpoint has tensors that make several of "
                "the model's, which streaming does not read; load the model as a whole (--no-stream)"
            )
        tied = _tied(model)
        absent = sorted(name for name in names if tied.get(name, name) not in self._sources)
        if absent:
            raise ModelError(
                f"the weights in {self.directory} are incomplete: {len(absent)} tensors are missing "
                f"(first {absent[0]}); copy or download them again"
            )

    def read(self, model: PreTrainedModel, names: list[str], device: torch.device) -> None:
        """Set the named tensors of a model, on the CPU."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        tied = _tied(model)
        aliases = {name: tied[name] for name in names if name in tied and name not in self._sources}
        # The model's own names first: a source that is read for an alias must not stay where it was put.
        kept = {source: _tensor(model, source) for source in aliases.values() if source not in names}
        keys = [key for name in names for key in self._sources[aliases.get(name, name)]]
        with ExitStack() as stack:
            opened: dict[str, Any] = {}
            for key in keys:
                if self.files[key] not in opened:
                    opened[self.files[key]] = stack.enter_context(self._open(self.files[key]))
            state = {key: opened[self.files[key]].get_slice(key) for key in keys}
            config = LoadStateDictConfig(
                dtype=model.dtype,
                dtype_plan=model._get_dtype_plan(model.dtype),
                weight_mapping=self._rules,
                device_map={"": "cpu"},
            )
            try:
                with _no_bars():
                    report, _ = convert_and_load_state_dict_in_model(model, state, config)
            except (SafetensorError, OSError, RuntimeError) as error:
                raise ModelError(
                    f"the weights in {self.directory} cannot be read ({' '.join(str(error).split())[:160]}); "
                    "copy or download them again"
                ) from error
        wrong = sorted(str(item[0]) for item in report.mismatched_keys) + sorted(report.conversion_errors)
        if wrong:
            raise ModelError(
                f"the weights in {self.directory} do not fit config.json: {len(wrong)} tensors are of "
                f"another shape (first {wrong[0]}); copy both from the same place"
            )
        for name, source in aliases.items():
            place_tensor(*owner_of(model, name), _tensor(model, source))
        for source, tensor in kept.items():
            place_tensor(*owner_of(model, source), tensor)

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.directory / name, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"the weights in {self.directory / name} cannot be read ({' '.join(str(error).split())}); "
                "copy or download the file again"
            ) from error


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for every layer."""
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()


def _tied(model: PreTrainedModel) -> dict[str, str]:
    """Return the parameters that are others under another name."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _tensor(model: PreTrainedModel, name: str) -> Tensor:
    return getattr(*owner_of(model, name))


_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
