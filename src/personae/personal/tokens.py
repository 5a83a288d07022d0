"""New words of a text encoder, each a few vectors of its own beside the table of known tokens.

A word's vectors are one parameter, "tokens.<word>" [V, D]. They are no part of the table. Where a model has two text
encoders, a word has "tokens_2.<word>" [V, D'] beside the second one's table as well.

Letters in shapes: `B` batch, `L` tokens, `V` vectors of a word, `D` width of a token's vector.

Source: Gal et al. 2022, Textual Inversion, arXiv:2208.01618. Several vectors for a word: appendix B there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from personae.errors import ConfigError

TOKENS = ("tokens.", "tokens_2.")
"""The fronts of words' names, by text encoder."""


def is_word(name: str) -> bool:
    return name.startswith(TOKENS)


@dataclass(frozen=True)
class Words:
    """New words, such as "<rex>", each of `num_vectors` vectors that start as that of `start`, a known word; or one
    known word for each new one."""

    words: tuple[str, ...]
    start: str | tuple[str, ...]
    num_vectors: int = 1

    @property
    def starts(self) -> dict[str, str]:
        """The known word by the new one."""
        known = (self.start,) * len(self.words) if isinstance(self.start, str) else self.start
        return dict(zip(self.words, known, strict=True))

    def __post_init__(self) -> None:
        if not isinstance(self.start, str) and len(self.start) != len(self.words):
            raise ConfigError(
                f"tokens: start is {len(self.start)} words for {len(self.words)} new ones; expected one for each, or "
                "one for all"
            )
        odd = [word for word in self.words if word != word.lower() or word.split() != [word]]
        if not self.words or odd or len(set(self.words)) != len(self.words) or self.num_vectors < 1:
            raise ConfigError(
                f"tokens: words are {list(self.words)} of {self.num_vectors} vectors; expected different words in "
                "lower case without white space, such as <rex>, and at least 1 vector"
            )


def plain(text: str, options: Words) -> str:
    """The text with the known word in the place of every new one; where that stands beside it already, once."""
    said: list[tuple[str, bool]] = []
    for piece in cut(text, options.words):
        new = piece.lower() in options.words
        said += [(word, new) for word in (options.starts[piece.lower()] if new else piece).split()]
    kept: list[tuple[str, bool]] = []
    for word, new in said:
        if not kept or word.lower() != kept[-1][0].lower() or not (new or kept[-1][1]):
            kept.append((word, new))
    return " ".join(word for word, _ in kept)


def cut(text: str, words: Sequence[str]) -> list[str]:
    """A text in pieces, of which every new word is one. Of two that begin alike the longer one is meant."""
    longest = sorted(words, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, longest))})", text, flags=re.IGNORECASE)
    return [piece.strip() for piece in pieces if piece.strip()]


class NewWords(nn.Module):
    """The rows of new words, which stand in for a table's rows wherever their numbers appear.

    Numbers from `first` on, the table's length, are new rows, in the order of the words. `front` stands before the
    words in the names of their parameters.

    Raises: ConfigError, when the tokenizer already knows a word as one token, or does not know `start`.
    """

    def __init__(self, options: Words, tokenizer: Any, table: nn.Embedding, front: str = TOKENS[0]) -> None:
        super().__init__()
        self._front = front
        self.options, self.first, self._table = options, table.num_embeddings, [table]
        vocabulary = set(tokenizer.get_vocab())
        for word in options.words:
            if word in vocabulary or len(tokenizer.tokenize(word)) < 2:
                raise ConfigError(
                    f"tokens: the tokenizer already knows {word!r}; choose a word that it does not, such as <{word}>"
                )
        numbers = {known: tokenizer(known, add_special_tokens=False)["input_ids"] for known in options.starts.values()}
        for word, known in options.starts.items():
            if len(numbers[known]) != 1:
                raise ConfigError(
                    f"tokens: {word!r} is to start from {known!r}, its noun, which is {len(numbers[known])} tokens "
                    f"({', '.join(tokenizer.tokenize(known))}), expected one; choose a simpler noun"
                )
        shape = (options.num_vectors, table.embedding_dim)
        self._begin = {
            front + word: table.weight[numbers[known][0]].detach().expand(shape).clone()
            for word, known in options.starts.items()
        }
        self.rows = nn.ParameterList([nn.Parameter(row.clone()) for row in self._begin.values()])
        table.register_forward_pre_hook(self._hide)
        table.register_forward_hook(self._put)

    def live(self) -> dict[str, nn.Parameter]:
        return {self._front + word: row for word, row in zip(self.options.words, self.rows, strict=True)}

    def initial(self) -> dict[str, Tensor]:
        """The vectors of the words to start from; nothing is drawn."""
        return {name: row.to("cpu", copy=True) for name, row in self._begin.items()}

    def pieces(self, text: str) -> list[str | int]:
        """A text cut at the new words; of these their numbers, one for each vector."""
        parts: list[str | int] = []
        for piece in cut(text.lower(), self.options.words):
            if piece in self.options.words:
                begin = self.first + self.options.words.index(piece) * self.options.num_vectors
                parts += range(begin, begin + self.options.num_vectors)
            else:
                parts.append(piece)
        return parts

    def _hide(self, table: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The table looks up its first row for numbers that it does not have."""
        self._asked = inputs[0]
        return (inputs[0].where(inputs[0] < self.first, 0),)

    def _put(
        self, table: nn.Module, inputs: tuple[Tensor, ...], output: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L D"]:
        asked = self._asked - self.first
        rows = torch.cat(list(self.rows)).to(output.dtype)
        return torch.where((asked >= 0)[..., None], rows[asked.clamp(min=0)], output)
