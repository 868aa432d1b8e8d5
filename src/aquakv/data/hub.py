"""Fetch named sets from the Hugging Face Hub through ``datasets``, which is an optional dependency."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from aquakv.data.files import record_text
from aquakv.errors import DataError

_INSTEAD = (
    "give --data-dir (or AQUAKV_DATA_DIR) with a copy, or use pydoc:… or stdlib:…, which are always there"
)
# The repository's loading script no longer runs in `datasets`; the archive beside it holds plain JSONL.
_LONGBENCH = "zip://data/{task}.jsonl::https://huggingface.co/datasets/THUDM/LongBench/resolve/main/data.zip"


def hub_wikitext2(split: str) -> Iterator[str]:
    """Yield WikiText-2 (raw) as one document: its lines, joined as they stand."""
    rows = _fetch(f"wikitext2:{split}", "Salesforce/wikitext", name="wikitext-2-raw-v1", split=split)
    text = "".join(row["text"] for row in rows)
    if text.strip():
        yield text


def hub_gsm8k(split: str) -> Iterator[str]:
    """Yield GSM8K's questions, each followed by its worked answer."""
    return _texts(f"gsm8k:{split}", "openai/gsm8k", name="main", split=split)


def hub_longbench(task: str) -> Iterator[str]:
    """Yield one LongBench task's contexts, each followed by its question."""
    return _texts(f"longbench/{task}", "json", data_files=_LONGBENCH.format(task=task), split="train")


def _texts(spec: str, *args: str, **kwargs: str) -> Iterator[str]:
    for number, row in enumerate(_fetch(spec, *args, **kwargs), start=1):
        text = record_text(row, f"record {number} of {spec}")
        if text.strip():
            yield text


def _fetch(spec: str, *args: str, **kwargs: str) -> Iterator[Mapping[str, Any]]:
    """Load a data set and iterate over its rows."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{spec} comes from the Hub, which needs the package datasets (pip install 'aquakv[hub]'); "
            f"else {_INSTEAD}"
        ) from error
    try:
        rows = datasets.load_dataset(*args, **kwargs)
    # Connections, proxies, parsers and the Hub itself fail with exceptions that share no base class.
    except Exception as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise DataError(f"{spec} could not be fetched from the Hub ({first_line}); {_INSTEAD}") from error
    yield from rows  # type: ignore[misc]
