"""Naming a client's style from what it sends, or would: its description, the vector of its own word.

Letters in shapes: `K` clients, `S` styles, `D` numbers of a descriptor or of a token's vector, `V` known tokens, `N`
vectors of a word.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from personae.backbone.captions import Reader
from personae.backbone.text2image import TextToImage
from personae.core import Client, State, pick, stream
from personae.errors import ConfigError
from personae.methods.cluster_lora import DESCRIPTOR, LEVELS, ClusterLora, projected
from personae.personal.lora import is_lora
from personae.personal.tokens import is_word

# --- what the attacker compares with ---------------------------------------------------------------------------------


def word_descriptors(model: TextToImage, words: Mapping[str, str], width: int) -> dict[str, Float[Tensor, " D"]]:
    """By style, the description that a client would send if its pictures pulled its own words straight to the style's
    known word, at every level of noise alike.

    The attacker has the pipeline, as it is before anybody trains, and the recipe, which says new words and their number
    of vectors. It needs no picture; a style whose word the model does not understand it cannot know.

    Raises: ConfigError, when a style's word is not a single token.
    Source: ours, after the description of `ClusterLora`.
    """
    table = known_vectors(model)
    starts = [value for name, value in sorted(model.params().items()) if is_word(name)]
    found = {}
    for style, word in words.items():
        row = table[token_of(model, word)]
        uphill = torch.cat([(start - row).flatten() for start in starts if start.shape[-1:] == row.shape])
        found[style] = projected(uphill.repeat(LEVELS), width)
    return found


def shadow_descriptor(method: ClusterLora, client: Client) -> Float[Tensor, " D"]:
    """What somebody with public pictures of a style sends, who does all that a client does to describe itself.

    `client.model` has adapters and new words; it is left with what was learned.
    Source: ours.
    """
    model: Any = client.model
    initial = model.initial(stream(0, "shadow"))
    model.load(initial)
    only_words = dataclasses.replace(method, training=dataclasses.replace(method.training, steps=0))
    update, _ = only_words.local(client, State(pick(initial, is_lora)), State())
    return update.sent.extras[DESCRIPTOR]


def known_vectors(model: TextToImage) -> Float[Tensor, "V D"]:
    """Of all known tokens, as the text encoder looks them up; of the first encoder where there are two."""
    encoder: Any = _reader(model).encoder
    table: Tensor = encoder.get_input_embeddings().weight
    return table.detach()


def token_of(model: TextToImage, word: str) -> int:
    """Raises: ConfigError, when the word is not a single token."""
    tokenizer = _reader(model).tokenizer
    numbers = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(numbers) != 1:
        pieces = ", ".join(tokenizer.tokenize(word))
        raise ConfigError(f"the style's word {word!r} is {len(numbers)} tokens ({pieces}), expected one")
    return int(numbers[0])


def _reader(model: TextToImage) -> Reader:
    return typing.cast("Reader", model.captions.readers[0])


# --- how well it is named --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Naming:
    """How well styles are named: the first guess's share of right ones, the mean of 1 / rank of the right one, and what
    the first guess tells of the style, in bits, estimated from counts, which is too high where there are few clients.
    """

    top_1: float
    reciprocal_rank: float
    bits: float


def alike(descriptors: Float[Tensor, "K D"], known: Float[Tensor, "S D"]) -> Float[Tensor, "K S"]:
    """Cosines."""
    return normalize(descriptors.double(), dim=1) @ normalize(known.double(), dim=1).T


def naming(scores: Float[Tensor, "K S"], truth: Sequence[int]) -> Naming:
    """Of clients whose styles are `truth`, when those with the highest scores are guessed first.

    Of styles with equal scores the right one comes last: scores that say nothing name nothing.

    Raises: ConfigError, when there is not one style for each row, out of S.
    """
    if not truth or len(truth) != len(scores) or not all(0 <= style < scores.shape[1] for style in truth):
        raise ConfigError(f"{len(truth)} styles were given for scores {list(scores.shape)}, expected one for each row")
    right = torch.tensor(truth)
    own = scores[torch.arange(len(truth)), right]
    ranks = (scores >= own[:, None]).sum(1).double()
    first = scores.argmax(1)
    counts = torch.zeros(scores.shape[1], scores.shape[1], dtype=torch.float64)
    counts.index_put_((right, first), torch.ones(len(truth), dtype=torch.float64), accumulate=True)
    shares = counts / counts.sum()
    alone = shares.sum(1, keepdim=True) * shares.sum(0, keepdim=True)
    told = torch.where(shares > 0, shares * (shares / alone.clamp(min=1e-300)).clamp(min=1e-300).log2(), 0.0)
    return Naming(float((ranks == 1).double().mean()), float((1 / ranks).mean()), max(0.0, float(told.sum())))


def naming_by_chance(
    scores: Float[Tensor, "K S"], truth: Sequence[int], rng: torch.Generator, draws: int = 1000
) -> tuple[Naming, float]:
    """The same with styles shuffled among clients, on average, and the share of right ones that 95 % of shuffles do not
    pass: what an attacker without information comes to with these very scores."""
    found = [naming(scores, [truth[at] for at in torch.randperm(len(truth), generator=rng)]) for _ in range(draws)]
    mean = Naming(*(fmean(getattr(each, f.name) for each in found) for f in dataclasses.fields(Naming)))
    return mean, float(torch.tensor([each.top_1 for each in found]).quantile(0.95))


def word_rank(
    vectors: Float[Tensor, "N D"],
    table: Float[Tensor, "V D"],
    token: int,
    start: Float[Tensor, " D"] | None = None,
) -> int:
    """The place of a known token among all, by cosine to a word's vector: 1 is the nearest, V the farthest.

    Of a word with several vectors the best place counts. With `start`, the vector that all words began from, what
    counts is the way that both went from there.
    """
    begin = torch.zeros_like(table[0]) if start is None else start
    cosines = alike(vectors - begin, table - begin)
    return int((cosines > cosines[:, token, None]).sum(1).min()) + 1


# --- what a client might do about it ---------------------------------------------------------------------------------


def blurred(descriptors: Float[Tensor, "K D"], sigma: float, rng: torch.Generator) -> Float[Tensor, "K D"]:
    """Shortened to length 1 where they are longer, with noise N(0, sigma^2) on each number.

    Units: the noise is about sigma sqrt(D) long, beside descriptors of length 1.
    """
    lengths = descriptors.norm(dim=1, keepdim=True).clamp(min=1)
    return descriptors / lengths + sigma * torch.randn(descriptors.shape, generator=rng)
