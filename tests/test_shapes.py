"""The shapes that annotations promise are checked in every test: the hook in conftest.py is really on."""

from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

from personae.backbone.mlp import MLPDenoiser
from personae.backbone.schedule import schedule
from personae.core import Batch, Images
from personae.data.sources import shrink
from personae.evaluate.features import SmallCNN, resized
from personae.infer.sample import to_bytes
from personae.objective.denoising import noised
from personae.personal.embedding import ClientEmbedding

SOURCE = Path(__file__).resolve().parent.parent / "src/personae"


def bytes_of(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


def test_every_file_that_says_shapes_is_checked(checked):
    files = [f.relative_to(SOURCE) for f in SOURCE.rglob("*.py") if "from jaxtyping import" in f.read_text("utf-8")]
    names = {".".join(file.with_suffix("").parts) for file in files}
    assert len(names) > 10
    unchecked = {name for name in names if not any(f"{name}.".startswith(f"{known}.") for known in checked)}
    assert unchecked == {"core"}  # its Protocols have nothing to run, and its records are checked one by one


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: shrink(bytes_of(2, 8, 8), None),  # no axis of channels
        lambda: shrink(bytes_of(2, 1, 8, 6), None),  # not square
        lambda: shrink(bytes_of(2, 1, 8, 8).float(), 4),  # no bytes
        lambda: to_bytes(bytes_of(2, 1, 8, 8)),  # no floats
        lambda: resized(torch.zeros(1, 8, 8), 4),
        lambda: ClientEmbedding(4, 4)(torch.zeros(3, 1, dtype=torch.bool)),
        lambda: Images(bytes_of(2, 1, 8, 8), torch.zeros(3, dtype=torch.long)),  # a label too many
        lambda: Batch(torch.zeros(2, 3), torch.zeros(1, dtype=torch.bool)),
    ],
)
def test_a_wrong_argument_is_found(wrong):
    with pytest.raises(TypeCheckError, match="parameters"):
        wrong()


@pytest.mark.parametrize(("noise", "t"), [((4, 3), 4), ((4, 2, 1), 4), ((4, 2), 3), ((2,), 4)])
def test_a_batch_that_would_be_broadcast_is_found(noise, t):
    model = MLPDenoiser((2,), schedule(10))
    with pytest.raises(TypeCheckError, match="parameters"):
        noised(model, torch.zeros(4, 2), torch.zeros(t, dtype=torch.long), torch.zeros(noise), None)


def test_a_wrong_result_is_found():
    net = SmallCNN(8)
    net.hidden = nn.Linear(net.hidden.in_features, 63)  # of 64 features
    with pytest.raises(TypeCheckError, match="return value"):
        net.features(torch.zeros(2, 1, 8, 8))
