"""What commands that evaluate are given: a codec, a competitor, or neither."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from aquakv.baselines import BASELINES, Baseline, baseline
from aquakv.cli import options
from aquakv.cli.commands.calibrate import DEFAULT_DATA
from aquakv.codec import ModelCodec
from aquakv.data import token_sequences
from aquakv.errors import ConfigError
from aquakv.evaluation.methods import Method, baseline_fields, coded_tokens, fresh_cache
from aquakv.evaluation.results import file_sha256
from aquakv.models.loading import LoadedModel

Codec = Annotated[
    Path | None,
    typer.Option("--codec", help="Codec file; without one the exact cache alone is measured."),
]
BaselineName = Annotated[
    str | None,
    typer.Option(
        "--baseline",
        metavar="NAME[:BITS][+window]",
        help=f"A competitor in place of a codec: {', '.join(BASELINES)}; +window: with our exact tokens.",
    ),
]
CalibrationData = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration-data",
        help="Text for competitors that are fitted to the model first; repeat to mix in equal parts. "
        f"[default: {DEFAULT_DATA}]",
    ),
]
CalibrationSamples = Annotated[
    int, typer.Option("--calibration-samples", min=1, help="Sequences of that text.")
]
CalibrationSeqLen = Annotated[
    int, typer.Option("--calibration-seq-len", min=2, help="Tokens of each of these.")
]


@dataclass(frozen=True)
class CalibrationText:
    """What competitors that need it are fitted to."""

    data: list[str] | None
    samples: int
    seq_len: int
    data_dir: Path | None

    @property
    def names(self) -> list[str]:
        """The sources, by name."""
        return self.data or DEFAULT_DATA

    def fitted(self, method: Baseline, loaded: LoadedModel) -> Baseline:
        """Return a method fitted to the model, if it needs that."""
        if not method.needs_fit:
            return method
        options.require_length(self.seq_len, loaded)
        tokens = token_sequences(self.names, loaded.tokenizer, self.samples, self.seq_len, self.data_dir)
        if options.messages.is_terminal:
            text = f"fitting {method.label} to {tokens.numel()} tokens"
            options.messages.print(f"[dim]{text}[/dim]", highlight=False)
        return method.fit(loaded.model, tokens)


@dataclass(frozen=True)
class Subject:
    """What a command evaluates.

    Attributes
    ----------
    codec, file
        A codec and its file.
    baseline
        A competitor. Neither this nor a codec: the exact cache.
    text
        What a competitor is fitted to.
    """

    codec: ModelCodec | None
    file: Path | None
    baseline: Baseline | None
    text: CalibrationText

    @classmethod
    def of(cls, codec: Path | None, baseline_name: str | None, text: CalibrationText) -> Subject:
        """Read what was asked for; raises `ConfigError` or `CodecFileError` if it cannot be had."""
        if codec is not None and baseline_name is not None:
            raise ConfigError("expected --codec or --baseline, got both; evaluate them one after the other")
        return cls(
            None if codec is None else ModelCodec.load(codec),
            codec,
            None if baseline_name is None else baseline(baseline_name),
            text,
        )

    @property
    def method(self) -> Method:
        """The codec, the competitor, or None."""
        return self.codec or self.baseline

    @property
    def name(self) -> str:
        """What messages call it."""
        if self.baseline is not None:
            return f"baseline {self.baseline.name}"
        return "the exact cache" if self.codec is None else "the codec"

    def fitted(self, loaded: LoadedModel) -> Subject:
        """Return it ready for a model; what cannot be had is refused before anything is evaluated."""
        found = self
        if self.baseline is not None:
            found = dataclasses.replace(self, baseline=self.text.fitted(self.baseline, loaded))
        fresh_cache(loaded.model, found.method)
        return found

    def require_something_coded(self, seq_len: int) -> None:
        """Raise if a cache of so many tokens would hold no codes when the last of them is computed."""
        if coded_tokens(self.method, seq_len - 1) == 0:
            raise ConfigError(
                f"--seq-len {seq_len} is too short: nothing would be compressed ({self.name} keeps sinks and "
                "the newest tokens exact); give longer sequences"
            )

    def fields(self) -> dict[str, Any]:
        """Return what a result says of it, under ``codec`` and ``baseline``."""
        return {"codec": self._codec_fields(), "baseline": self._baseline_fields()}

    def _codec_fields(self) -> dict[str, Any] | None:
        if self.codec is None or self.file is None:
            return None
        sha256 = file_sha256(self.file)
        return {"file": self.file.name, "preset": self.codec.config.preset, "sha256": sha256}

    def _baseline_fields(self) -> dict[str, Any] | None:
        if self.baseline is None:
            return None
        text = self.text
        calibration = {"data": text.names, "samples": text.samples, "seq_len": text.seq_len}
        return baseline_fields(self.baseline, calibration)
