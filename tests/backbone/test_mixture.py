import math

import pytest
import torch

from personae.backbone.mixture import MixtureDenoiser
from personae.backbone.schedule import schedule
from personae.core import Batch, Client, ClientData, Images, Training, stream, under
from personae.errors import ConfigError, MismatchedNames, ShapeError
from personae.infer.sample import sample
from personae.local.fit import fit
from personae.personal.embedding import EMBEDDING, NULL_EMBEDDING

VECTORS = schedule(clip_sample=False)


def mixture(means, logits):
    model = MixtureDenoiser(torch.as_tensor(means), VECTORS)
    model.load({**model.initial(stream(0)), EMBEDDING: torch.as_tensor(logits).float().view(1, -1)})
    return model


def drawn(means, counts, seed):
    """Exactly `counts[k]` points around mean k."""
    centres = means.repeat_interleave(torch.tensor(counts), 0)
    return centres + torch.randn(centres.shape, generator=stream(seed))


def score(model, x_t, t):
    """-noise / sigma."""
    cond = model.condition(Batch(x_t, torch.zeros(len(x_t), dtype=torch.bool)))
    sigma = (1 - VECTORS.alpha_bar.to(x_t.dtype)[t]).sqrt()
    return -model.forward(x_t, t, cond) / sigma[:, None]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_the_score_is_the_gradient_of_the_log_density(dtype, tolerance):
    rng = stream(7)
    for case in range(50):
        num_components, width = 2 + case % 5, 2 + case % 7
        means = 2 * torch.randn(num_components, width, generator=rng)
        model = mixture(means, torch.randn(num_components, generator=rng)).to(dtype)
        t = torch.randint(1000, (1,), generator=rng)
        x_t = torch.randn(1, width, generator=rng).to(dtype).requires_grad_()
        scaled = VECTORS.alpha_bar.to(dtype)[t].sqrt() * model.means
        log_density = (model.part.embedding.weight[0].log_softmax(0) - (x_t - scaled).square().sum(1) / 2).logsumexp(0)
        (expected,) = torch.autograd.grad(log_density, x_t)
        assert (score(model, x_t, t) - expected).abs().max() < tolerance


@torch.no_grad()
def test_two_opposite_components_give_the_tanh_form():
    """s = tanh(mu_t.x + b) mu_t - x with b = log(w / (1 - w)) / 2."""
    mean, weight, t = torch.tensor([1.0, -0.5, 2.0]), 0.2, torch.tensor([10, 300, 800])
    model = mixture(torch.stack([mean, -mean]), [math.log(weight), math.log(1 - weight)])
    x_t = torch.randn(3, 3, generator=stream(1))
    mean_t = VECTORS.alpha_bar[t].sqrt()[:, None] * mean
    bend = torch.tanh((mean_t * x_t).sum(1) + math.log(weight / (1 - weight)) / 2)
    assert torch.allclose(score(model, x_t, t), bend[:, None] * mean_t - x_t, atol=1e-5)


@torch.no_grad()
def test_only_differences_of_logits_count():
    means, x_t, t = torch.eye(3), torch.randn(5, 3, generator=stream(1)), torch.full((5,), 200)
    near, far = mixture(means, [1.0, 0.0, -1.0]), mixture(means, [5.0, 4.0, 3.0])
    assert torch.allclose(score(near, x_t, t), score(far, x_t, t), atol=1e-6)


def test_ddim_draws_the_mixing_weights():
    """4000 draws: one standard error of a weight is at most 0.008; 100 steps add a little. Accepted: 0.03."""
    means, weights = torch.tensor([[4.0, 0.0], [-4.0, 0.0], [0.0, 4.0]]), torch.tensor([0.5, 0.3, 0.2])
    images = sample(mixture(means, weights.log()), 4000, stream(3), sampler="ddim", steps=100, batch_size=4000)
    nearest = torch.cdist(images, means).argmin(1)
    assert (torch.bincount(nearest, minlength=3) / 4000 - weights).abs().max() < 0.03
    spread = (images - means[nearest]).var(0)
    assert (spread - 1).abs().max() < 0.1


def test_gradient_descent_on_the_logits_recovers_the_weights():
    """2000 points of known composition: the error left is that of noise and timesteps drawn. Accepted: 0.03."""
    means, counts = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 3.0]]), [1000, 300, 700]
    model, images = mixture(means, [0.0, 0.0, 0.0]), Images(drawn(means, counts, 2))
    client = Client("c0", ClientData(images, images), model, stream(4))
    fit(client, under("embedding."), Training(steps=400, lr=0.05, batch_size=256, decay="cosine"))
    found = model.params()[EMBEDDING][0].softmax(0)
    assert (found - torch.tensor(counts) / 2000).abs().max() < 0.03
    assert torch.equal(model.params()["means"], means)


def test_the_null_vector_stands_for_equal_weights():
    model = mixture([[1.0], [-1.0]], [3.0, -3.0])
    cond = model.condition(Batch(torch.zeros(2, 1), torch.tensor([False, True])))
    assert cond.tolist() == [[3.0, -3.0], [0.0, 0.0]]


def test_initial_values_are_the_means_it_was_made_with():
    model = mixture([[1.0], [-1.0]], [3.0, -3.0])
    model.load({name: value + 1 for name, value in model.params().items()})
    values = model.initial(stream(0))
    assert values.keys() == model.live().keys() == {"means", EMBEDDING, NULL_EMBEDDING}
    assert values["means"].tolist() == [[1.0], [-1.0]] and not values[EMBEDDING].any()
    assert model.initial(stream(0), under("embedding.")).keys() == {EMBEDDING}


def test_what_the_formula_does_not_cover_is_refused():
    with pytest.raises(ConfigError, match="predicts the noise"):
        MixtureDenoiser(torch.eye(2), schedule(prediction_type="sample"))
    with pytest.raises(ShapeError, match=r"means are \[2\], expected \[K, D\]"):
        MixtureDenoiser(torch.zeros(2), VECTORS)
    with pytest.raises(MismatchedNames, match="2 missing"):
        mixture([[1.0], [-1.0]], [0.0, 0.0]).load({"means": torch.zeros(2, 1)})
