"""Cut sources into token sequences of one length, mixing several sources in equal parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aquakv.data.sources import DataSource, open_source
from aquakv.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_sequences(
    specs: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    seq_len: int,
    data_dir: str | Path | None = None,
) -> Tensor:
    """Return consecutive, non-overlapping token sequences.

    A source's documents are tokenised without special tokens, joined by the tokenizer's end-of-sequence
    token (by a blank line where it has none), and cut in text order. Sequence ``i`` is the next one of source
    ``i % len(specs)``; no part of a source is used twice. Only as many documents are tokenised as are needed.
    A tokenizer that puts a token at the beginning of what it encodes has it at the beginning of every
    sequence, in place of one of the text: some models are lost without.

    Parameters
    ----------
    specs
        ``DATA`` arguments, see `load_texts`.
    tokenizer
        Of the model that is calibrated or evaluated.
    num_samples, seq_len
        Number of sequences in all, and tokens in each.
    data_dir
        Where named sets lie, see `load_texts`.

    Returns
    -------
    Tensor
        ``[num_samples, seq_len]`` int64.

    Raises
    ------
    DataError
        A source cannot be read, is named twice, or holds too little text.
    """
    for name, value in (("number of samples", num_samples), ("sequence length", seq_len)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise DataError(f"expected a {name} of at least 1, got {value!r}; give a positive whole number")
    sources = _distinct_sources([specs] if isinstance(specs, str) else list(specs), data_dir)
    shares = [(num_samples - i + len(sources) - 1) // len(sources) for i in range(len(sources))]
    cut = [
        _cut(source, tokenizer, share, seq_len) if share else torch.empty(0, seq_len, dtype=torch.int64)
        for source, share in zip(sources, shares, strict=True)
    ]
    counts = [len(part) for part in cut]
    if any(count < share for count, share in zip(counts, shares, strict=True)):
        raise DataError(_too_little(sources, counts, shares, num_samples, seq_len))
    return torch.stack([cut[i % len(cut)][i // len(cut)] for i in range(num_samples)])


def token_stream(
    spec: str, tokenizer: PreTrainedTokenizerBase, tokens: int, data_dir: str | Path | None = None
) -> Tensor:
    """Return a source's first tokens, at most ``tokens`` of them: ``[<= tokens]`` int64.

    Documents are tokenised without special tokens and joined by blank lines: fit to stand inside a prompt,
    which an end-of-sequence token would end.

    Raises
    ------
    DataError
        The source cannot be read or holds no text.
    """
    found = _first(_pieces(open_source(spec, data_dir), tokenizer, ends=False), tokens)
    if not len(found):
        raise DataError(f"expected text in {spec}, found none; name another source")
    return found


def _distinct_sources(specs: list[str], data_dir: str | Path | None) -> list[DataSource]:
    if not specs:
        raise DataError("expected at least one data source, got none; name one, such as pydoc:train")
    sources: dict[str, DataSource] = {}
    for spec in specs:
        source = open_source(spec, data_dir)
        if source.identity in sources:
            raise DataError(f"data source {spec} is named twice; name each source once")
        sources[source.identity] = source
    return list(sources.values())


def _cut(source: DataSource, tokenizer: PreTrainedTokenizerBase, count: int, seq_len: int) -> Tensor:
    """Return the source's first sequences, at most `count`: ``[<= count, seq_len]`` int64."""
    beginning = _beginning(tokenizer)[:seq_len]
    length = seq_len - len(beginning)
    stream = _first(_pieces(source, tokenizer), count * length)
    found = len(stream) // length if length else 0
    text = stream[: found * length].reshape(found, length)
    return torch.cat([beginning.expand(found, -1), text], 1)


def _beginning(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the token that the tokenizer puts first, ``[1]`` int64, or ``[0]`` if it puts none."""
    bos = getattr(tokenizer, "bos_token_id", None)
    begins = isinstance(bos, int) and tokenizer("a")["input_ids"][:1] == [bos]
    return torch.tensor([bos] if begins else [], dtype=torch.int64)


def _first(found: Iterator[Tensor], tokens: int) -> Tensor:
    """Return the first tokens of pieces ``[length]``, at most so many."""
    pieces: list[Tensor] = []
    held = 0
    for piece in found:
        pieces.append(piece)
        held += len(piece)
        if held >= tokens:
            break
    return torch.cat(pieces)[:tokens] if pieces else torch.empty(0, dtype=torch.int64)


def _pieces(source: DataSource, tokenizer: PreTrainedTokenizerBase, ends: bool = True) -> Iterator[Tensor]:
    """Yield each document's tokens ``[length]``, and the separator's between documents.

    With ``ends`` that is the end-of-sequence token, if there is one; else a blank line.
    """
    separator: Tensor | None = None
    for document in source.documents():
        if separator is not None:
            yield separator
        else:
            eos = tokenizer.eos_token_id if ends else None
            separator = torch.tensor([eos]) if isinstance(eos, int) else _tokenise(tokenizer, "\n\n")
        yield _tokenise(tokenizer, document)


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    # `verbose=False` silences the warning that the text is longer than the model's context: it is cut later.
    encoded = tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def _too_little(
    sources: list[DataSource], counts: list[int], shares: list[int], num_samples: int, seq_len: int
) -> str:
    held = ", ".join(
        f"{source.spec} has {count}"
        + (" or more" if count and count == share else "")
        + f" of {share} needed"
        for source, count, share in zip(sources, counts, shares, strict=True)
    )
    # Sequence i comes from source i % n, so source i runs out at sequence number count * n + i.
    possible = min(
        count * len(sources) + i
        for i, (count, share) in enumerate(zip(counts, shares, strict=True))
        if count < share
    )
    samples = f"the number of samples to {possible}, or " if possible else ""
    return (
        f"expected {num_samples} sequences of {seq_len} tokens, but {held}; "
        f"lower {samples}the sequence length, or name a longer source"
    )
