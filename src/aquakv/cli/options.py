"""Arguments, options and displays that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Protocol

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import PreTrainedModel

from aquakv.errors import ConfigError
from aquakv.models.demo import DEMO_MODELS, demo_model_path
from aquakv.models.loading import LoadedModel, load_model

#: What is meant for people goes to stderr; results go to stdout.
messages = Console(stderr=True)


#: Models that take more than this part of the free memory are read layer by layer.
STREAM_FROM = 0.5


class Dtype(StrEnum):
    """Dtypes that a model can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="'demo', 'demo:gemma3-270m', a directory or a Hugging Face id.")
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        envvar="AQUAKV_DATA_DIR",
        help="Where named sets lie, such as wikitext2/test.txt; else they come from the Hub.",
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, …")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Dtype to load the model in.")]
SeqLen = Annotated[int, typer.Option("--seq-len", min=2, help="Tokens of each sequence.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences at once.")]
Offload = Annotated[
    str,
    typer.Option(
        "--offload",
        help="What waits in host memory between layers: none, hidden (hidden states), all (keys and values "
        "too), or auto: as little as the device has room for.",
    ),
]
Overlap = Annotated[
    bool | None,
    typer.Option(
        "--overlap/--no-overlap",
        help="Fit a layer while the next one is observed. [default: on a GPU with room for both]",
    ),
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]

DATA_HELP = (
    "pydoc:train|test, stdlib:train|test, wikitext2:validation|test, longbench/TASK, gsm8k:test, or a text "
    "or JSONL file."
)


class _Counter(Protocol):
    @property
    def done(self) -> float: ...
    @property
    def total(self) -> int: ...


class _NamedModel(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def model(self) -> PreTrainedModel: ...


def load(model: str, dtype: Dtype, device: str) -> LoadedModel:
    """Load a model, saying what takes long."""
    if model in DEMO_MODELS:
        demo_model_path(lambda text: messages.print(f"[dim]{text}[/dim]", highlight=False), model)
    return load_model(model, dtype.value, device)


def longest(model: PreTrainedModel) -> int | None:
    """Return the most tokens that a model takes, if it says so."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def require_length(seq_len: int, loaded: _NamedModel) -> None:
    """Raise before anything is tokenised if sequences are longer than the model takes."""
    most = longest(loaded.model)
    if most is not None and seq_len > most:
        raise ConfigError(
            f"{seq_len} tokens are more than {loaded.name}'s maximum of {most}; give {most} or less"
        )


@contextmanager
def progress_bar(label: str, unit: str) -> Iterator[Callable[[_Counter], None]]:
    """Show a progress bar with time left on stderr; yields the function to report to."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    # Off a terminal a bar could only be printed once, at the end, beside the one line of an error.
    with Progress(*columns, console=messages, disable=not messages.is_terminal) as progress:
        task = progress.add_task(label, total=None)

        def report(state: _Counter) -> None:
            layer, layers = getattr(state, "layer", None), getattr(state, "num_layers", None)
            where = "" if layer is None else f", layer {layer + 1}/{layers}"
            if phase := getattr(state, "phase", None):
                where += f", {phase}, {getattr(state, 'tokens_per_second', 0.0):,.0f} tokens/s"
            progress.update(task, description=label + where, completed=state.done, total=state.total)

        yield report


def increase(relative_increase: float, stderr: float) -> str:
    """Format the relative increase of perplexity with its standard error."""
    return f"{100 * relative_increase:+.2f} ± {100 * stderr:.2f} %"


def mebibytes(count: int) -> str:
    """Format bytes."""
    return f"{count / 2**20:.2f} MiB"
