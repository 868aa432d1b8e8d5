"""Prompts of an exact number of tokens, with things hidden in a text at chosen places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from aquakv.data import token_stream
from aquakv.errors import ConfigError, DataError

#: Text that says nothing, repeated, as in Landmark Attention's passkey task (arXiv:2305.16300) and RULER.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

#: What `--data` calls it.
NOISE_NAME = "noise"

#: Stands for a turn while a chat template is taken apart.
_PLACE = "@@TURN@@"


@dataclass(frozen=True)
class Prompt:
    """A context, a question about it, and what is right.

    Attributes
    ----------
    context, question
        ``[tokens]`` int64: what is fed first, and what is fed once that is compressed. The question ends
        where the model's reply goes on.
    answers
        Strings that a right reply holds.
    answer
        ``[tokens]`` int64 with which a right reply begins, where there is but one; None where it is not asked
        how likely that is.
    """

    context: Tensor
    question: Tensor
    answers: tuple[str, ...]
    answer: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens of context and question."""
        return len(self.context) + len(self.question)


@dataclass(frozen=True)
class Wording:
    """What frames a context.

    Attributes
    ----------
    instruction
        Said before the context.
    question
        Asked behind it.
    reply
        How the model's reply begins; it is left to go on from there.
    """

    instruction: str
    question: str
    reply: str


class PromptWriter:
    """Writes prompts for a tokenizer, in its chat template where it has one.

    Every part is tokenised by itself, so that the number of tokens is exact and a text may be cut anywhere.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._head, self._tail = _frame(tokenizer)
        self._bos = _bos(tokenizer) if not self._head else []

    def ids(self, text: str) -> Tensor:
        """Return a text's tokens ``[tokens]`` int64, without special ones that it does not spell out."""
        found: Any = self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
        return torch.tensor(found["input_ids"], dtype=torch.int64)

    def count(self, text: str) -> int:
        """Return how many tokens a text has."""
        return len(self.ids(text))

    def write(
        self,
        length: int,
        wording: Wording,
        body: Callable[[int], Tensor],
        answers: Sequence[str],
        answer: str | None = None,
    ) -> Prompt:
        """Write a prompt of at most ``length`` tokens.

        Parameters
        ----------
        length
            Tokens of context and question; just so many, if ``body`` returns as many as it may.
        wording
            What frames the context.
        body
            Returns the context's tokens, given how many there is room for.
        answers, answer
            See `Prompt`; ``answer`` as text that follows the reply's beginning.

        Raises
        ------
        ConfigError
            There is no room for any context.
        """
        opening = torch.cat(
            [torch.tensor(self._bos, dtype=torch.int64), self.ids(self._head + wording.instruction)]
        )
        question = self.ids(f"\n\n{wording.question}{self._tail or chr(10)}{wording.reply}")
        expected = None
        if answer is not None:
            space, expected = self._continuation(answer)
            question = torch.cat([question, space])
        room = length - len(opening) - len(question)
        if room < 1:
            raise ConfigError(
                f"length {length} is too short: instruction and question alone take "
                f"{len(opening) + len(question)} tokens; give a longer one"
            )
        return Prompt(torch.cat([opening, body(room)]), question, tuple(answers), expected)

    def _continuation(self, answer: str) -> tuple[Tensor, Tensor]:
        """Return the tokens of a text behind a space: those of the space alone, then the others."""
        ids = self.ids(f" {answer}")
        spaces = 0
        while spaces < len(ids) - 1 and not str(self.tokenizer.decode(ids[spaces : spaces + 1])).strip():
            spaces += 1
        return ids[:spaces], ids[spaces:]


@dataclass(frozen=True)
class Haystack:
    """Text to hide something in.

    Attributes
    ----------
    stream
        ``[tokens]`` int64; it is read in a circle.
    shifts
        Whether every prompt begins somewhere else in it.
    """

    stream: Tensor
    shifts: bool

    @classmethod
    def of(cls, writer: PromptWriter, data: str, most: int, data_dir: Path | None = None) -> Haystack:
        """Return the text of a ``DATA`` argument, or `NOISE_NAME`; at most so many tokens of it.

        Raises
        ------
        DataError
            There is no such text.
        """
        if data == NOISE_NAME:
            return cls(writer.ids(f" {NOISE}"), False)
        return cls(token_stream(data, writer.tokenizer, most, data_dir), True)

    def take(self, tokens: int, rng: Random) -> Tensor:
        """Return so many successive tokens."""
        first = rng.randrange(len(self.stream)) if self.shifts else 0
        return self.stream[(torch.arange(tokens) + first) % len(self.stream)]

    def hide(self, room: int, needles: Sequence[Tensor], depths: Sequence[float], rng: Random) -> Tensor:
        """Return ``room`` tokens of text with needles in it.

        Parameters
        ----------
        room
            Tokens in all.
        needles
            Tokens of each.
        depths
            For each needle, how much of the text is before it: 0 to 1.
        rng
            Where the text comes from.

        Raises
        ------
        ConfigError
            The needles alone are longer.
        """
        rest = room - sum(map(len, needles))
        if rest < 0:
            raise ConfigError(
                f"the length is too short: {len(needles)} needles take {room - rest} tokens where there is "
                f"room for {room}; give one longer by {-rest} or more"
            )
        text, parts, start = self.take(rest, rng), [], 0
        for depth, needle in sorted(zip(depths, needles, strict=True), key=lambda pair: pair[0]):
            end = round(depth * rest)
            parts += [text[start:end], needle]
            start = end
        return torch.cat([*parts, text[start:]])


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return what a chat template sets before and behind a turn; nothing where there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return "", ""
    turn = [{"role": "user", "content": _PLACE}]
    try:
        text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates are programs of the model's maker
        raise DataError(f"the tokenizer's chat template does not take a user's turn ({error})") from error
    head, place, tail = text.partition(_PLACE)
    if not place:
        raise DataError("the tokenizer's chat template does not say what the user says")
    return head, tail


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token that the tokenizer begins a text with, if it does."""
    first: list[int] = list(tokenizer("a")["input_ids"])[:1]
    return first if first == [tokenizer.bos_token_id] else []
