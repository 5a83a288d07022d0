"""A few losses as they were recorded: a refactoring leaves them alone, a change of results explains itself.

To record them again: python tests/golden/test_losses.py --record
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from personae.aggregate import mean
from personae.backbone.mixture import MixtureDenoiser
from personae.backbone.mlp import MLPDenoiser
from personae.backbone.schedule import schedule
from personae.backbone.unet import preset
from personae.core import Client, ClientData, Images, Job, Training, everything, stream
from personae.engine.in_process import InProcess
from personae.engine.population import Population
from personae.local.fit import fit
from personae.methods.spire import Spire

RECORD = Path(__file__).with_name("losses.json")


def discs(name, size):
    """8x8 bytes: a bright disc of its own size per client, at a random place."""
    places = torch.randint(2, 6, (12, 2), generator=stream(0, name)).float()
    rows, columns = torch.arange(8).view(1, 8, 1), torch.arange(8).view(1, 1, 8)
    far = (rows - places[:, :1, None]) ** 2 + (columns - places[:, 1:, None]) ** 2
    images = Images((255 * (far <= size)).to(torch.uint8)[:, None])
    return ClientData(images, images)


def unet_spire():
    """Mean loss of every client in each of three rounds of SPIRE."""
    data = {"c0": discs("c0", 1), "c1": discs("c1", 4), "c2": discs("c2", 9)}
    training = Training(steps=4, lr=2e-3, batch_size=4, condition_dropout=0.1)
    members = Population(preset("tiny", schedule(100), size=8, channels=1, embedding_width=16), data, tuple(data))
    job = Job(Spire(training, training), members, members, rounds=3, seed=0, rule=mean)
    return [client["loss"] for record in InProcess().run(job).rounds for client in record["clients"].values()]


def stretches(model, images):
    """Mean loss of three stretches of ten steps."""
    model.load(model.initial(stream(0)))
    client = Client("c0", ClientData(images, images), model, stream(1))
    how = Training(steps=10, lr=0.01, batch_size=8, optimizer="adamw", weight_decay=0.1, warmup_steps=3, decay="cosine")
    return [fit(client, everything, how).loss for _ in range(3)]


def mlp():
    model = MLPDenoiser((2,), schedule(prediction_type="v_prediction"), width=16, num_blocks=2, embedding_width=4)
    return stretches(model, Images(torch.randn(20, 2, generator=stream(2))))


def mixture():
    model = MixtureDenoiser(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0]]), schedule(clip_sample=False))
    return stretches(model, Images(torch.randn(20, 2, generator=stream(2)) + torch.tensor([2.0, 0.0])))


CASES = {"unet_spire": unet_spire, "mlp": mlp, "mixture": mixture}


@pytest.mark.parametrize("case", CASES)
def test_losses_are_as_recorded(case):
    assert CASES[case]() == pytest.approx(json.loads(RECORD.read_text())[case], abs=1e-4)


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    losses = {case: [round(loss, 6) for loss in run()] for case, run in CASES.items()}
    RECORD.write_text(json.dumps(losses, indent=1) + "\n")
    sys.stdout.write(f"wrote {RECORD}\n")
