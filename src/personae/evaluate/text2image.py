"""Does a text-to-image model draw what captions of the emoji pack say: the style, and the thing?

Every figure stands beside the same figure on real renderings, without which it says little: the yardsticks are not
perfect, and none of them is a person's judgement. Pictures are bytes, as the pack's own.

Letters in shapes: `N` pictures, `K` candidates, `D` width of a text's vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from personae.core import stream
from personae.data.emoji import SEEN_STYLES, STYLES, named, pack
from personae.errors import ConfigError
from personae.evaluate.features import Features
from personae.evaluate.text2image_features import (
    SIZE,
    Share,
    TextEncoder,
    check_known,
    check_pictures,
    minilm,
    pooled,
    renderings,
    share_of,
    statistics,
    worn,
)

FIT = 1
"""Seed of the noise that is learned from: none of it is in what is measured."""

QUARTERS = 4

# --- styles ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StyleFound:
    """For how many pictures the right style was told: of all, and of those of each style."""

    overall: Share
    by_style: Mapping[str, Share]


@dataclass(frozen=True)
class StyleScore:
    """What a probe says of drawn pictures, and of real ones of names that it was not fitted on.

    `worn` are those real pictures with a little blur and noise. `chance` is that of a guess among the probe's styles.
    """

    drawn: StyleFound
    real: StyleFound
    worn: StyleFound
    chance: float


@dataclass(frozen=True)
class StyleProbe:
    """Tells styles apart by a logistic regression on features; `other_names` are those that it was not fitted on."""

    styles: tuple[str, ...]
    features: Features
    other_names: tuple[str, ...]
    real: StyleFound
    worn: StyleFound
    model: Any

    def tell(self, pictures: Tensor) -> tuple[str, ...]:
        """The most likely style of each picture, uint8 [N, 3, 32, 32]. Raises: ShapeError; DataError, without any."""
        check_pictures(pictures, "pictures", SIZE)
        return _told(self.styles, self.features, self.model, pictures)

    def score(self, pictures: Tensor, styles: Sequence[str]) -> StyleScore:
        """`styles` are those that were asked for, one for each picture.

        Shapes: pictures uint8 [N, 3, 32, 32].
        Raises: ConfigError, when one is none of the probe's, or there are too few; ShapeError; DataError, without
            pictures.
        """
        _check(pictures, {"style": (styles, self.styles)})
        found = _style_found(self.tell(pictures), styles)
        return StyleScore(found, self.real, self.worn, 1 / len(self.styles))


def fit_style_probe(
    styles: Sequence[str] = SEEN_STYLES, features: Features | None = None, seed: int = 0, quarter: int = 0
) -> StyleProbe:
    """Learn styles from real renderings of three quarters of the seen names, measured on the other names.

    Names are divided by family, so that no look-alike is on both sides. The four values of `quarter` leave out each
    name once: with all four probes, every name is judged by one that has not met it. Learned from are the renderings as
    they are, with noise, blurred, and both: a probe of clean ones alone fails on pictures that are a little soft or
    noisy, as drawn ones are. Without `features` those of `statistics`. Equal arguments give equal probes.

    Raises: ConfigError, when a style is unknown, there are fewer than two, or there is no such quarter.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    check_known("style", styles, STYLES)
    if len(set(styles)) < max(2, len(styles)):
        raise ConfigError(f"styles are {list(styles)}, expected two or more of {', '.join(STYLES)}, each once")
    if quarter not in range(QUARTERS):
        raise ConfigError(f"quarter is {quarter}, expected 0 to {QUARTERS - 1}")
    features = features or statistics()
    names, others = _divided(seed, quarter)
    pictures = torch.cat([renderings(style, names) for style in styles])
    learned = [pictures, worn(pictures, seed=FIT), worn(pictures, blur=False, seed=FIT), worn(pictures, 0.0)]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=1000))
    model.fit(features.extract(torch.cat(learned)).numpy(), np.tile(np.repeat(np.arange(len(styles)), len(names)), 4))
    heldout = torch.cat([renderings(style, others) for style in styles])
    right = [style for style in styles for _ in others]
    real, tired = (_style_found(_told(styles, features, model, p), right) for p in (heldout, worn(heldout)))
    return StyleProbe(tuple(styles), features, others, real, tired, model)


def _told(styles: Sequence[str], features: Features, model: Any, pictures: Tensor) -> tuple[str, ...]:
    return tuple(styles[number] for number in model.predict(features.extract(pictures).numpy()))


def _divided(seed: int, quarter: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The seen names, but for a quarter of their families, and the names of that quarter."""
    family = {name: pack().things[name].family for name in named("seen")}
    families = sorted(set(family.values()))
    order = torch.randperm(len(families), generator=stream(seed, "style probe")).tolist()
    begin, end = (at * len(families) // QUARTERS for at in (quarter, quarter + 1))
    kept_out = {families[place] for place in order[begin:end]}
    names = tuple(name for name in family if family[name] not in kept_out)
    return names, tuple(name for name in family if family[name] in kept_out)


def _style_found(told: Sequence[str], styles: Sequence[str]) -> StyleFound:
    right = [a == b for a, b in zip(told, styles, strict=True)]
    by_style = {
        style: share_of([r for r, s in zip(right, styles, strict=True) if s == style])
        for style in dict.fromkeys(styles)
    }
    return StyleFound(share_of(right), by_style)


# --- names -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NameFound:
    """For how many pictures the right name is the first of all candidates, or among the first five."""

    top_1: Share
    top_5: Share


@dataclass(frozen=True)
class NameScore:
    """What was found of drawn pictures, and of real renderings of the same names in the same styles.

    `worn` are those renderings with a little blur and noise. Chance is 1 in `candidates`.
    """

    drawn: NameFound
    real: NameFound
    worn: NameFound
    candidates: int
    features: str


@dataclass(frozen=True)
class NameMaps:
    """From a picture's features to its name's vector, for each style by a map that never saw that style.

    `vectors` are those of all names of `names`, less their mean, to unit length.
    """

    names: tuple[str, ...]
    vectors: Float[Tensor, "K D"]
    features: Features
    encoder: str
    maps: Mapping[str, Any]

    def score(
        self,
        pictures: Tensor,
        names: Sequence[str],
        styles: Sequence[str],
        candidates: Sequence[str] | None = None,
    ) -> NameScore:
        """An image-text score: is the vector of the name asked for the nearest to what the map makes of the picture?

        `names` and `styles` are those that captions asked for; `candidates` are all names of the maps when left out.
        This is no CLIP score and cannot be compared with one; it compares models with each other and with real
        renderings under the same features, encoder and candidates. A map has met every name, in other styles: the
        figure says whether the thing is recognisable as drawn elsewhere. It does not say that the model draws something
        new. A seen name in a seen style is right when it comes out as in training, and a copy of the training picture
        scores as the real one does.

        Shapes: pictures uint8 [N, 3, 32, 32].
        Raises: ConfigError, when a name or a style is unknown; ShapeError; DataError, without pictures.
        """
        candidates = self.names if candidates is None else tuple(candidates)
        check_known("candidate", candidates, self.names)
        _check(pictures, {"name": (names, candidates), "style": (styles, tuple(self.maps))})
        vectors = self.vectors[[self.names.index(name) for name in candidates]]
        right = torch.tensor([candidates.index(name) for name in names])
        real = _real(names, styles)
        drawn, whole, tired = (
            _name_found(_ranks(self._alike(shown, styles, vectors), right)) for shown in (pictures, real, worn(real))
        )
        return NameScore(drawn, whole, tired, len(candidates), f"{self.features.name} to {self.encoder}")

    def _alike(self, pictures: Tensor, styles: Sequence[str], vectors: Tensor) -> Tensor:
        """Cosines [N, K]."""
        found = self.features.extract(pictures).double().numpy()
        mapped = [self.maps[style].predict(row[None])[0] for style, row in zip(styles, found, strict=True)]
        return normalize(torch.from_numpy(np.stack(mapped)).float(), dim=1) @ vectors.T


def fit_name_maps(
    features: Features,
    encoder: TextEncoder | None = None,
    names: Sequence[str] | None = None,
    styles: Sequence[str] = STYLES,
    strength: float = 300.0,
) -> NameMaps:
    """Ridge regressions from features of real renderings to centred vectors of their names: one for each style, on all
    others of `styles`, as they are and `worn`.

    Without `names` all of the pack, without an encoder that of `minilm`. 1,010 names in five styles take over a minute
    with the features lite0. `strength` is the ridge's, chosen for these.

    Raises: ConfigError, when a name or style is unknown, there are too few of either, or a package is missing.
    """
    from sklearn.linear_model import Ridge

    names = tuple(named("all") if names is None else names)
    check_known("name", names, named("all"))
    check_known("style", styles, STYLES)
    if len(set(names)) < max(2, len(names)) or len(set(styles)) < max(2, len(styles)):
        raise ConfigError(f"{len(names)} names and {len(styles)} styles were given, expected two or more, each once")
    encoder = encoder or minilm()
    vectors = encoder.encode([pack().things[name].words for name in names])
    centred = vectors - vectors.mean(0)
    real = {style: renderings(style, names) for style in styles}
    found = {s: features.extract(torch.cat([r, worn(r, seed=FIT)])).double().numpy() for s, r in real.items()}
    wanted = np.tile(centred.double().numpy(), (2 * (len(styles) - 1), 1))
    maps = {
        style: Ridge(alpha=strength).fit(np.concatenate([found[other] for other in styles if other != style]), wanted)
        for style in styles
    }
    return NameMaps(names, normalize(centred, dim=1), features, encoder.name, maps)


def nearest_name(
    pictures: Tensor,
    names: Sequence[str],
    styles: Sequence[str],
    candidates: Sequence[str] | None = None,
    features: Features | None = None,
) -> NameScore:
    """Is the real rendering of the name and style asked for the nearest of all candidates' renderings in that style?

    By cosine of features, those of `pooled` when left out, which need no package. `candidates` are the seen names when
    left out. A picture that is equally near to several counts as wrong. A real rendering is its own nearest: the figure
    of `worn` ones says more. A model passes by copying its training pictures, too: read the copy ratio beside it.

    Shapes: pictures uint8 [N, 3, 32, 32].
    Raises: ConfigError, when a name or a style is unknown; ShapeError; DataError, without pictures.
    """
    candidates = named("seen") if candidates is None else tuple(candidates)
    check_known("candidate", candidates, named("all"))
    _check(pictures, {"name": (names, candidates), "style": (styles, STYLES)})
    features = features or pooled()
    right = torch.tensor([candidates.index(name) for name in names])
    known = {style: _unit(features, renderings(style, candidates)) for style in dict.fromkeys(styles)}

    def ranked(shown: Tensor) -> Tensor:
        found = _unit(features, shown)
        return torch.cat([_ranks((known[s] @ f)[None], r[None]) for s, f, r in zip(styles, found, right, strict=True)])

    real = _real(names, styles)
    drawn, whole, tired = (_name_found(ranked(shown)) for shown in (pictures, real, worn(real)))
    return NameScore(drawn, whole, tired, len(candidates), features.name)


def _real(names: Sequence[str], styles: Sequence[str]) -> Tensor:
    return torch.cat([renderings(style, [name]) for name, style in zip(names, styles, strict=True)])


def _unit(features: Features, pictures: Tensor) -> Tensor:
    return normalize(features.extract(pictures), dim=1)


def _ranks(alike: Float[Tensor, "N K"], right: Int64[Tensor, " N"]) -> Int64[Tensor, " N"]:
    """The place of the right candidate, from 1; the last of those that are equally near."""
    return (alike >= alike.gather(1, right[:, None])).sum(1)


def _name_found(ranks: Tensor) -> NameFound:
    return NameFound(*(share_of((ranks <= count).tolist()) for count in (1, 5)))


# --- checks ----------------------------------------------------------------------------------------------------------


def _check(pictures: Tensor, asked: Mapping[str, tuple[Sequence[str], Sequence[str]]]) -> None:
    """`asked` holds for each kind one word per picture, and the words that are known."""
    check_pictures(pictures, "pictures", SIZE)
    for kind, (words, known) in asked.items():
        if isinstance(words, str) or len(words) != len(pictures):
            raise ConfigError(f"{len(words)} {kind}s were given for {len(pictures)} pictures, expected one for each")
        check_known(kind, words, known)
