"""Train the small classifiers that features are taken from, and write them into the package.

    python benchmarks/train_classifiers.py digits mnist5k fashion faces

A fixed 80 % of each data set is trained on; the accuracy on the other 20 % is printed and stored in the file's
metadata. The same machine and versions give the same bytes. All four take about 150 CPU-seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from personae.core import Images, stream
from personae.data import digits, faces, fashion, mnist5k
from personae.data.sources import FASHION_ROOT
from personae.evaluate.features import NATIVE_SIZES, WEIGHTS, SmallCNN, untrained

EPOCHS = {"digits": 60, "mnist5k": 15, "fashion": 8, "faces": 10}
BATCH_SIZE = 64
PEAK_RATE = 5e-3
FASHION_IMAGES = 20_000
"""The first of the 60,000 training images: enough for features, and a third of the time."""
FACES = range(10_000, 20_000)
"""Numbers of the faces: runs draw theirs from 0 on, so that no classifier has seen those of a run of up to 10,000."""


def train(name: str, images: Images) -> tuple[SmallCNN, float]:
    """A trained network, and its accuracy on the fifth that it has not seen."""
    torch.manual_seed(0)
    order = torch.randperm(len(images), generator=stream(0, "classifier", name))
    cut = len(images) * 4 // 5
    known, asked = images[order[:cut]], images[order[cut:]]
    net, rng = untrained(name), stream(0, "classifier", name, "batches")
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_RATE, weight_decay=0.01)
    num_steps = EPOCHS[name] * (cut // BATCH_SIZE)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=num_steps)
    for _ in range(EPOCHS[name]):
        for index in torch.randperm(cut, generator=rng).split(BATCH_SIZE)[: cut // BATCH_SIZE]:
            pixels = known.pixels[index].float() / 255
            pixels = pixels if name == "faces" else shifted(pixels, rng)  # all faces are drawn at the same place
            loss = cross_entropy(net(pixels), known.labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
    net.eval()
    with torch.no_grad():
        guesses = torch.cat([net(part.float() / 255).argmax(1) for part in asked.pixels.split(500)])
    return net, float((guesses == asked.labels).double().mean())


def shifted(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """The batch moved by up to 2 pixels of 28, or 1 of 8. Shapes: [N, 1, H, W]."""
    reach = 2 if pixels.shape[-1] > 8 else 1
    down, right = torch.randint(0, 2 * reach + 1, (2,), generator=rng).tolist()
    height, width = pixels.shape[2:]
    return pad(pixels, [reach] * 4)[:, :, down : down + height, right : right + width]


def load(name: str, fashion_root: Path) -> Images:
    if name == "fashion":
        return fashion("train", fashion_root).images[torch.arange(FASHION_IMAGES)]
    if name == "faces":
        return faces(FACES.stop).images[FACES]
    return {"digits": digits, "mnist5k": mnist5k}[name]().images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(NATIVE_SIZES))
    parser.add_argument("--fashion-root", type=Path, default=Path(FASHION_ROOT))
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names:
        net, accuracy = train(name, load(name, arguments.fashion_root))
        path = arguments.out / f"{name}.safetensors"
        save_file(net.state_dict(), path, metadata={"data": name, "heldout_accuracy": f"{accuracy:.4f}"})
        print(f"{name}: held-out accuracy {accuracy:.4f}, wrote {path}")


if __name__ == "__main__":
    main()
