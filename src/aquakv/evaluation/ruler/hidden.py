"""Tasks about sentences hidden in a text: needles, and chains of assignments (arXiv:2404.06654 §3)."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from torch import Tensor

from aquakv.evaluation.prompts import Prompt, Wording
from aquakv.evaluation.ruler import words
from aquakv.evaluation.ruler.materials import Materials

Text = Literal["noise", "text", "needles"]
Kind = Literal["words", "numbers", "uuids"]

_MAKERS: dict[Kind, Callable[[int, Random], list[str]]] = {
    "words": words.pairs,
    "numbers": words.numbers,
    "uuids": words.uuids,
}

#: Needles at most where these are the text.
_MOST_NEEDLES = 1 << 20

#: Variables of a chain: the first and four hops.
_CHAIN = 5


@dataclass(frozen=True)
class Needles:
    """Needles in a haystack (NIAH).

    Attributes
    ----------
    text
        What hides them: noise, real text, or other needles.
    keys, values
        What they are.
    num_keys, num_values
        Keys that real text hides, and values of each.
    num_queries
        Keys asked for.
    """

    text: Text
    keys: Kind = "words"
    values: Kind = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    def __call__(self, materials: Materials, length: int, rng: Random) -> Prompt:
        """Write a prompt of ``length`` tokens, or somewhat less where needles are the text."""
        # Drawn first: the answers are the same however much text there is room for.
        own = rng.getrandbits(64)
        keys = _MAKERS[self.keys](self.num_keys, rng)
        asked = rng.sample(keys, self.num_queries)
        values = _MAKERS[self.values](self.num_keys * self.num_values, rng)
        held = [(key, values[i * self.num_values :][: self.num_values]) for i, key in enumerate(keys)]
        answers = [value for key, its in held if key in asked for value in its]
        sentences = [self._sentence(key, value) for key, its in held for value in its]

        def body(room: int) -> Tensor:
            if self.text == "needles":
                return self._among_others(materials, sentences[0], keys[0], room, own)
            writer, rest = materials.writer, Random(own)
            needles = [writer.ids(f"\n{sentence}\n") for sentence in sentences]
            depths = [rest.random() for _ in needles]
            haystack = materials.noise if self.text == "noise" else materials.text
            return haystack.hide(room, needles, depths, rest)

        return materials.writer.write(length, self._wording(asked, len(answers) > 1), body, answers)

    def _sentence(self, key: str, value: str) -> str:
        return f"One of the special magic {self.values} for {key} is: {value}."

    def _wording(self, asked: list[str], several: bool) -> Wording:
        named = " and ".join(filter(None, [", ".join(asked[:-1]), asked[-1]]))
        kind = self.values if several else self.values.removesuffix("s")
        what = f"special magic {kind} for {named} in the text above"
        verb = "are" if several else "is"
        return Wording(
            f"Special magic {self.values} are hidden in the following text. Remember them: you will be asked "
            "about them.\n\n",
            f"What {verb} {'all ' if several else ''}the {what}?",
            f"The {what} {verb}",
        )

    def _among_others(self, materials: Materials, sentence: str, key: str, room: int, seed: int) -> Tensor:
        """Return lines of needles, as many as there is room for, the one asked for anywhere among them."""

        def build(others: int) -> str:
            rng = Random(seed)
            keys = [other for other in _MAKERS[self.keys](others + 1, rng) if other != key][:others]
            values = _MAKERS[self.values](others, rng)
            lines = [self._sentence(*pair) for pair in zip(keys, values, strict=True)]
            lines.insert(rng.randrange(others + 1), sentence)
            return "\n".join(lines)

        return materials.largest(build, room, 1, _MOST_NEEDLES)[1]


def variable_tracking(materials: Materials, length: int, rng: Random) -> Prompt:
    """Write a prompt of ``length`` tokens that asks for all variables of one chain (VT)."""
    variables = words.letters(_CHAIN, rng, 5, string.ascii_uppercase)
    value = words.numbers(1, rng, 5)[0]
    sources = [value, *(f"VAR {name}" for name in variables)]
    writer = materials.writer
    lines = [
        writer.ids(f"\nVAR {name} = {source}\n") for name, source in zip(variables, sources, strict=False)
    ]
    depths = sorted(rng.random() for _ in lines)
    wording = Wording(
        "Variables are assigned in the following text, here and there. Remember their values.\n\n",
        f"Which variables are assigned the value {value} in the text above, directly or by another variable? "
        f"Name all {_CHAIN} of them.",
        f"The {_CHAIN} variables that are assigned the value {value} are:",
    )
    return writer.write(
        length, wording, lambda room: materials.noise.hide(room, lines, depths, rng), variables
    )
