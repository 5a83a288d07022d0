"""Reading a prompt back from what a text encoder makes of it.

A causal encoder's state at a place depends on the tokens up to there, and on nothing behind. So whoever has the encoder
tries every token at the first place, keeps the one whose state is nearest, and goes on to the next.

Letters in shapes: `L` tokens, `D` width of a state, `V` known tokens, `U` vectors that no known token has, `N` tokens.
"""

from __future__ import annotations

import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from personae.backbone.captions import Reader
from personae.backbone.text2image import TextToImage
from personae.errors import ConfigError

AT_ONCE = 256
"""Tokens that are tried in one batch."""

REMEMBERED_BYTES = 2**28
"""Of states that follow beginnings which were tried before: captions begin alike."""

FITTING_STEPS = 300
NEAR_ENOUGH = 0.03
"""Of `doubt`: a vector with a smaller residual is not sought again from another start."""


@dataclass(frozen=True)
class Guess:
    """What was read: tokens behind the start mark, up to the end mark where one was met.

    `residuals` are the distances of the states from those of the nearest known tokens, as shares of their lengths.
    Tokens from V on are vectors that no known token has, in the order of `vectors` [U, D], which were found for them.
    """

    tokens: tuple[int, ...]
    residuals: tuple[float, ...]
    vectors: Float[Tensor, "U D"]


@final
class PromptInverter:
    """The attacker: it has the pipeline that all have, and states of prompts that it has not.

    With new words in the pipeline, whatever their vectors are, it may also look for the vectors of as many tokens that
    it does not know.

    Raises: ConfigError, for a pipeline with two text encoders, whose states are not read here.
    Source: ours. Published inverters learn to read what a whole text is pooled into (Morris et al. 2023, Vec2Text,
    arXiv:2310.06816); states of single tokens need no learning.
    """

    def __init__(self, model: TextToImage) -> None:
        readers = list(model.captions.readers)
        if len(readers) > 1:
            raise ConfigError("prompts are read back from pipelines with one text encoder, and this one has two")
        self._model = model.train(False)
        self._reader = typing.cast("Reader", readers[0])
        table = typing.cast("Any", self._reader.encoder).get_input_embeddings().weight
        self.num_known, width = len(table), table.shape[1]
        most = max(1, REMEMBERED_BYTES // (table.element_size() * self.num_known * width))
        self._remembered = lru_cache(maxsize=most)(lambda before: self._next(before, self.num_known))

    def guess(self, states: Float[Tensor, "L D"], doubt: float | None = None) -> Guess:
        """Token by token. The first state is the start mark's, which says nothing.

        Where the nearest known token leaves a residual above `doubt`, a vector is sought whose state is nearer, as long
        as the pipeline has a new word's row for it; without a `doubt` known tokens are all there is.
        """
        mark, end = self._reader.tokenizer.bos_token_id, self._reader.tokenizer.eos_token_id
        tokens, residuals, found = [int(mark)], list[float](), 0
        for state in states[1:].detach():
            before = tuple(tokens)
            ends = self._next(before, self.num_known + found) if found else self._remembered(before)
            apart = (ends - state).norm(dim=1) / state.norm()
            token = int(apart.argmin())
            residuals.append(float(apart[: self.num_known].min()))
            if doubt is not None and float(apart[token]) > doubt and found < len(self._rows()):
                token = self.num_known + found
                self._seek(before, token, state, int(apart[: self.num_known].argmin()), NEAR_ENOUGH * doubt)
                found += 1
            tokens.append(token)
            if token == end:
                break
        return Guess(tuple(tokens[1:]), tuple(residuals), self._rows()[:found].clone())

    def tokens(self, text: str) -> tuple[int, ...]:
        """Of a text, as `guess` should find them: behind the start mark, up to the end mark."""
        row = self._reader.tokens([text])[0].tolist()
        return tuple(row[1 : row.index(self._reader.tokenizer.eos_token_id, 1) + 1])

    def text(self, tokens: Sequence[int]) -> str:
        """Known tokens as text, "?" for the others."""
        marks = (self._reader.tokenizer.bos_token_id, self._reader.tokenizer.eos_token_id)
        read = [self._reader.tokenizer.decode([t]) if t < self.num_known else "? " for t in tokens if t not in marks]
        words = [str(word) for word in read]
        return "".join(word if word.endswith(" ") else f"{word} " for word in words).strip()

    def _rows(self) -> Float[Tensor, "U D"]:
        """The new words' vectors, which stand for tokens from V on."""
        words = self._reader.words
        return torch.cat([row.detach() for row in words.rows]) if words is not None else torch.zeros(0, 1)

    def _states(self, tokens: Int64[Tensor, "N L"]) -> Float[Tensor, "N D"]:
        """The last place's states."""
        encoder = self._reader.encoder
        device = next(encoder.parameters()).device
        return torch.cat([encoder(part.to(device))[0][:, -1] for part in tokens.split(AT_ONCE)]).float()

    @torch.no_grad()
    def _next(self, before: tuple[int, ...], num: int) -> Float[Tensor, "N D"]:
        """The state behind this beginning for each of the first `num` tokens."""
        return self._states(torch.cat([torch.tensor(before).expand(num, -1), torch.arange(num)[:, None]], dim=1)).cpu()

    def _seek(
        self, before: tuple[int, ...], token: int, state: Float[Tensor, " D"], nearest: int, enough: float
    ) -> None:
        """Give a new word's token the vector whose state is nearest to the one that came.

        From several starts, since a search may end at a vector that gives nearly that state and is another one.
        """
        words, table = self._reader.words, typing.cast("Any", self._reader.encoder).get_input_embeddings().weight
        assert words is not None, "only a pipeline with new words has rows to fit"
        row, at = divmod(token - words.first, words.options.num_vectors)
        vectors, asked = words.rows[row], torch.tensor([[*before, token]])
        begin = list(words.initial().values())[row][at].to(vectors.device)
        best, best_residual = begin, float("inf")
        for start in (begin, torch.zeros_like(begin), table[nearest].detach()):
            with torch.no_grad():
                vectors[at] = start
            self._fit(vectors, at, asked, state)
            with torch.no_grad():
                residual = float((self._states(asked)[0].cpu() - state).norm() / state.norm())
                if residual < best_residual:
                    best, best_residual = vectors[at].clone(), residual
            if best_residual < enough:
                break
        with torch.no_grad():
            vectors[at] = best
        self._model.captions.forget()

    def _fit(
        self, vectors: torch.nn.Parameter, at: int, asked: Int64[Tensor, "N L"], state: Float[Tensor, " D"]
    ) -> None:
        """Descend from where `vectors[at]` is; its word's other vectors stay."""
        wanted, others = state.to(vectors.device), torch.arange(len(vectors), device=vectors.device) != at
        options: dict[str, Any] = {"tolerance_grad": 1e-9, "tolerance_change": 1e-12, "line_search_fn": "strong_wolfe"}
        search = torch.optim.LBFGS([vectors], max_iter=FITTING_STEPS, **options)

        def far() -> Tensor:
            search.zero_grad()
            loss = (self._states(asked)[0] - wanted).square().sum()
            loss.backward()
            assert vectors.grad is not None, "the state depends on the token's vector"
            vectors.grad[others] = 0
            return loss

        vectors.requires_grad_(True)
        with torch.enable_grad():
            search.step(far)  # type: ignore[no-untyped-call]
        vectors.requires_grad_(False)
        vectors.grad = None


def noisy_states(states: Float[Tensor, "L D"], noise: float, rng: torch.Generator) -> Float[Tensor, "L D"]:
    """What a client might send in the place of its states: `noise` is in standard deviations of all their numbers."""
    return states + noise * states.std() * torch.randn(states.shape, generator=rng)


def share_right(guessed: Sequence[int], tokens: Sequence[int], places: Collection[int] | None = None) -> float:
    """Of the prompt's tokens at these places, all of them by default, the share that the guess has at the same place.

    Raises: ConfigError, without a place.
    """
    wanted = range(len(tokens)) if places is None else sorted(places)
    if not wanted:
        raise ConfigError("a share of no tokens was asked for")
    return sum(at < len(guessed) and guessed[at] == tokens[at] for at in wanted) / len(wanted)
