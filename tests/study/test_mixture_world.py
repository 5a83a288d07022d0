"""Federations on Gaussian mixtures: side by side is one after the other, and what is said to be known is."""

import pytest
import torch

from personae.backbone.mixture import MixtureDenoiser
from personae.core import Client, ClientData, Training, everything, stream, under
from personae.errors import ConfigError
from personae.local.fit import fit
from personae.methods.spire import Spire
from personae.personal.embedding import EMBEDDING, NULL_EMBEDDING
from personae.study.mixture_world import MOST_IMAGES, SCHEDULE, adapt, federate, make_world

NAMES = ["a", "b", "c"]


def world(seed=0):
    return make_world(NAMES, num_components=3, width=4, norm=3.0, concentration=0.3, seed=seed)


@pytest.mark.parametrize("moving", [everything, under("embedding.")])
def test_side_by_side_is_what_fit_does_one_after_the_other(moving):
    start = {"means": world().start.float(), EMBEDDING: torch.ones(1, 3) / 3, NULL_EMBEDDING: torch.zeros(1, 3)}
    images = [world().images(name, num) for name, num in zip(NAMES, (5, 20, 50), strict=True)]
    how = Training(30, 0.03, 16, max_grad_norm=None)
    found = adapt(start, images, [stream(7, name) for name in NAMES], moving, how, [10, 30])
    for row, name in enumerate(NAMES):
        for steps in (10, 30):
            model = MixtureDenoiser(world().start, SCHEDULE)
            model.load(start)
            data = ClientData(images[row], images[row])
            fit(Client(name, data, model, stream(7, name)), moving, Training(steps, 0.03, 16, max_grad_norm=None))
            for key, value in model.params().items():
                assert torch.allclose(found[steps][key][row], value, atol=1e-5), (name, steps, key)
    moved = (found[30]["means"] - start["means"]).abs().max()
    assert (moved > 0.1) if moving is everything else (moved == 0)


def test_means_are_orthogonal_and_the_start_is_elsewhere():
    made = world()
    assert torch.allclose(made.means @ made.means.T, 9 * torch.eye(3).double(), atol=1e-12)
    assert min(made.mean_errors(made.start)) > 1
    assert made.mean_errors(made.means.flip(0)) == pytest.approx([0, 0, 0])
    assert all(weights.sum() == pytest.approx(1) and weights.min() > 0.009 for weights in made.weights.values())
    assert not torch.equal(world(1).means, made.means)


def test_fewer_images_are_a_part_of_more():
    few, many = world().images("a", 5), world().images("a", 50)
    assert torch.equal(few.pixels, many.pixels[:5])
    shares = torch.bincount(world().images("b", MOST_IMAGES).labels, minlength=3) / MOST_IMAGES
    assert (shares - world().weights["b"]).abs().max() < 0.03
    with pytest.raises(ConfigError, match="expected at most 5000"):
        world().images("a", MOST_IMAGES + 1)


def test_the_truth_has_no_divergence_and_a_shifted_one_has_half_its_square():
    made = world()
    logits = made.weights["a"].log()
    assert made.divergence("a", logits, made.means) == pytest.approx(0, abs=1e-12)
    shift = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    assert made.divergence("a", logits, made.means + shift) == pytest.approx(0.5, abs=0.08)
    average = torch.stack(list(made.weights.values())).mean(0)
    assert made.population_divergence(NAMES, average.log(), made.means) == pytest.approx(0, abs=1e-12)


def test_a_run_taken_up_ends_in_the_same_bits_and_slows_down_late(tmp_path):
    made = world()

    def run(name, rounds, lr):
        early, late = (Spire(Training(2, rate, 8), Training(2, rate, 8), 2.5) for rate in (0.02, lr))
        found = federate(made, NAMES, 30, early=early, late=late, rounds=rounds, folder=tmp_path / name)
        return found.server.params["means"], len(found.rounds)

    slow, rounds = run("slow", 10, 0.002)
    assert rounds == 10
    again, _ = run("slow", 10, 0.002)
    steady, _ = run("steady", 10, 0.02)
    early, _ = run("early", 7, 0.02)
    assert torch.equal(slow, again)
    assert 0 < (slow - early).norm() < (steady - early).norm()
