"""What a caption becomes for the U-Net: by one text encoder, as in Stable Diffusion 1 and 2, or by two, as in XL.

Letters in shapes: `B` texts, `L` tokens, `D` width of a token's vector, `P` width of what stands for a whole text.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from personae.errors import ConfigError
from personae.personal.lora import TEXT, TEXT_2
from personae.personal.tokens import TOKENS, NewWords, Words

AS_USUAL = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Attention as it goes where nobody chooses: a caption has the same bits whoever asks first."""

REMEMBERED = 4096
"""Captions, whose vectors are kept while nothing in the text encoders moves."""


@dataclass(frozen=True)
class Second:
    """The other tokenizer and text encoder of an XL pipeline.

    `zeros_for_empty` is diffusers' `force_zeros_for_empty_prompt`: what guidance leads away from is zeros, not the
    empty text.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModelWithProjection
    zeros_for_empty: bool = True


class Reader(nn.Module):
    """A tokenizer, its text encoder, and the new words of both. Nothing in the encoder itself needs a gradient yet."""

    def __init__(self, tokenizer: CLIPTokenizer, encoder: nn.Module, words: Words | None, front: str) -> None:
        super().__init__()
        self.tokenizer, self.encoder = tokenizer, encoder.requires_grad_(False)
        # The vectors of all known tokens, wherever this version of transformers keeps them.
        table = typing.cast("nn.Embedding", typing.cast("Any", encoder).get_input_embeddings())
        self.words = None if words is None else NewWords(words, tokenizer, table, front)

    def forward(self, texts: Sequence[str], every_layer: bool = False) -> Any:
        """The encoder's own answer."""
        numbers = self.tokens(texts).to(next(self.encoder.parameters()).device)
        return self.encoder(numbers, output_hidden_states=every_layer)

    def tokens(self, texts: Sequence[str]) -> Int64[Tensor, "B L"]:
        """Padded to the text encoder's length.

        Raises: ConfigError, when a text is longer than that: diffusers would cut it with no more than a log line.
        """
        length = typing.cast("Any", self.encoder).config.max_position_embeddings
        rows = [self._numbers(text) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if len(row) > length:
                raise ConfigError(
                    f"the caption {text!r} has {len(row)} tokens, of which this model reads {length}; shorten it"
                )
        pad = self.tokenizer.pad_token_id
        return torch.tensor([row + [pad] * (length - len(row)) for row in rows])

    def _numbers(self, text: str) -> list[int]:
        """Of a text's tokens, between the marks of its two ends."""
        pieces = [text] if self.words is None else self.words.pieces(text)
        numbers = [self.tokenizer.bos_token_id]
        for piece in pieces:
            known = [piece] if isinstance(piece, int) else self.tokenizer(piece, add_special_tokens=False)["input_ids"]
            numbers += known
        return [*numbers, self.tokenizer.eos_token_id]


class Captions(nn.Module):
    """Of one text encoder the last states; of two the last but one of both, side by side, and the second's projection
    of the whole text, which XL adds to the time embedding.

    What is unconditional reads the empty text, or, where XL's pipeline says so, zeros. diffusers' own pipeline puts
    these in the place of a negative prompt that is not given; so do we, in sampling and in training alike. A caption
    that happens to be empty is the empty text on all of them, as diffusers has it for prompts.

    XL's published second encoder takes a text with new words to end at the last of these: its settings are older than
    such words. Words are trained and drawn so here because diffusers draws them so.
    """

    def __init__(
        self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, second: Second | None, words: Words | None
    ) -> None:
        super().__init__()
        both = [(tokenizer, text_encoder), *([] if second is None else [(second.tokenizer, second.text_encoder)])]
        self.readers = nn.ModuleList(
            Reader(own, encoder, words, front) for (own, encoder), front in zip(both, TOKENS, strict=False)
        )
        self.zeros_for_empty = second is not None and second.zeros_for_empty
        self._answers = _last if second is None else _last_but_one
        self._told: dict[str, tuple[Tensor, ...]] = {}

    def forward(self, captions: Sequence[str], unconditional: Bool[Tensor, " B"]) -> list[Float[Tensor, "B ..."]]:
        """Of each caption the vectors of its tokens [B, L, D] and, of two encoders, of the whole text [B, P].

        They carry gradients where what makes them moves.
        """
        texts = ["" if alone else text for alone, text in zip(unconditional.tolist(), captions, strict=True)]
        different = list(dict.fromkeys(texts))
        rows = torch.tensor([different.index(text) for text in texts], device=unconditional.device)
        found = [value[rows] for value in self._encoded(different)]
        if self.zeros_for_empty:
            found = [value.masked_fill(unconditional.view(-1, *[1] * (value.dim() - 1)), 0) for value in found]
        return found

    def check(self, captions: Sequence[str]) -> None:
        """Raises: ConfigError, when a caption is longer than the encoders read."""
        for reader in self._all():
            reader.tokens(captions)

    def encoders(self) -> dict[str, nn.Module]:
        """By the front of their parameters' names."""
        return {front: reader.encoder for front, reader in zip((TEXT, TEXT_2), self._all(), strict=False)}

    def tokenizers(self) -> list[CLIPTokenizer]:
        return [reader.tokenizer for reader in self._all()]

    def live(self) -> dict[str, nn.Parameter]:
        """Of new words."""
        return {name: row for words in self._words() for name, row in words.live().items()}

    def initial(self) -> dict[str, Tensor]:
        """Of new words."""
        return {name: row for words in self._words() for name, row in words.initial().items()}

    def recompute(self) -> None:
        """Layers run again where their gradients are taken, instead of keeping what these need."""
        for reader in self._all():
            encoder: Any = reader.encoder
            enable = getattr(encoder, "activation_checkpointing_enable", None)  # as newer transformers call it
            (enable or encoder.gradient_checkpointing_enable)({"use_reentrant": False})

    def forget(self) -> None:
        """After something in the encoders has changed."""
        self._told.clear()

    def _encoded(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        moves = any(parameter.requires_grad for parameter in self.parameters())
        if torch.is_grad_enabled() and moves:
            self._told.clear()
            return self._answers(self._all(), texts)
        if new := [text for text in texts if text not in self._told]:
            if len(self._told) > REMEMBERED:
                self._told.clear()
                new = list(texts)
            training, device = self.training, next(self.parameters()).device
            self.eval()
            with torch.no_grad(), torch.autocast(device.type, enabled=False), sdpa_kernel(AS_USUAL):
                self._told |= dict(zip(new, zip(*self._answers(self._all(), new), strict=True), strict=True))
            self.train(training)
        return tuple(map(torch.stack, zip(*(self._told[text] for text in texts), strict=True)))

    def _all(self) -> list[Reader]:
        return typing.cast("list[Reader]", list(self.readers))

    def _words(self) -> list[NewWords]:
        return [reader.words for reader in self._all() if reader.words is not None]


def _last(readers: Sequence[Reader], texts: Sequence[str]) -> tuple[Tensor, ...]:
    (reader,) = readers
    return (reader(texts)[0],)


def _last_but_one(readers: Sequence[Reader], texts: Sequence[str]) -> tuple[Tensor, ...]:
    found = [reader(texts, every_layer=True) for reader in readers]
    return torch.cat([each.hidden_states[-2] for each in found], dim=-1), found[-1].text_embeds


def added(pooled: Float[Tensor, "B P"] | None, height: int, width: int) -> Mapping[str, Tensor] | None:
    """What diffusers tells XL's U-Net beside the tokens' vectors: the whole text, and three pairs of numbers.

    These are the picture's size before it was scaled, where it was cut, and its size now. Ours were not cut, and of the
    size before no more is known than of the size now.
    """
    if pooled is None:
        return None
    sizes = pooled.new_tensor([height, width, 0, 0, height, width], dtype=torch.float32)
    return {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)}
