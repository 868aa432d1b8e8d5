"""Text to calibrate and evaluate on: named sets, the running Python's own texts, or any file."""

from aquakv.data.files import read_records
from aquakv.data.sequences import token_sequences, token_stream
from aquakv.data.sources import DataSource, DataSummary, describe, load_texts, named_file, open_source

__all__ = [
    "DataSource",
    "DataSummary",
    "describe",
    "load_texts",
    "named_file",
    "open_source",
    "read_records",
    "token_sequences",
    "token_stream",
]
