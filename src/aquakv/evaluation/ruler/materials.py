"""What RULER's tasks are made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from aquakv.errors import ConfigError
from aquakv.evaluation.prompts import NOISE_NAME, Haystack, PromptWriter


@dataclass(frozen=True)
class Materials:
    """A writer and texts to hide things in.

    Attributes
    ----------
    writer
        Of the model's tokenizer.
    noise
        Sentences that say nothing, repeated.
    text
        Real text.
    """

    writer: PromptWriter
    noise: Haystack
    text: Haystack

    @classmethod
    def of(cls, writer: PromptWriter, data: str, most: int, data_dir: Path | None = None) -> Materials:
        """Take the text of a ``DATA`` argument, at most so many tokens of it."""
        noise = Haystack.of(writer, NOISE_NAME, most)
        return cls(writer, noise, Haystack.of(writer, data, most, data_dir))

    def largest(self, build: Callable[[int], str], room: int, least: int, most: int) -> tuple[int, Tensor]:
        """Return the largest number whose text fits into ``room`` tokens, and these.

        Parameters
        ----------
        build
            Returns a text that grows with a number.
        room
            Tokens at most.
        least, most
            The number at least and at most.

        Raises
        ------
        ConfigError
            Not even the least fits.
        """
        ids = self.writer.ids(build(least))
        if len(ids) > room:
            raise ConfigError(
                f"the length is too short: the shortest list takes {len(ids)} tokens where there is room for "
                f"{room}; give one longer by {len(ids) - room} or more"
            )
        found, fits, beyond = ids, least, most + 1
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            if beyond > most:  # nothing was too long yet: do not tokenise far too much
                middle = min(middle, 2 * fits)
            ids = self.writer.ids(build(middle))
            if len(ids) <= room:
                found, fits = ids, middle
            else:
                beyond = middle
        return fits, found
