"""K components with shared means: every formula against a slower way to the same number."""

import math
from functools import partial

import pytest
import torch

from personae.backbone.mixture import MixtureDenoiser
from personae.backbone.schedule import schedule
from personae.core import Batch, stream
from personae.errors import ShapeError
from personae.personal.embedding import EMBEDDING, NULL_EMBEDDING
from personae.theory.components import (
    cramer_rao,
    divergence,
    excess_gradient,
    excess_hessian,
    excess_loss,
    high_noise_limit,
    learn_logits,
    likelihood_by_denoising,
    log_density,
    logits_gradient,
    matched,
    maximum_likelihood,
    oracle_error,
    project,
    projection_error,
    responsibilities,
    score,
    two_component_limit,
)
from personae.theory.two_components import cramer_rao as two_component_bound

SCHEDULE = schedule(clip_sample=False)
ALPHA_BAR = SCHEDULE.alpha_bar.double()


def vector(values):
    return torch.tensor(values, dtype=torch.float64)


WEIGHTS = vector([0.1, 0.2, 0.3, 0.4])


def normal(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def orthogonal(num, norm, width=None):
    return norm * torch.eye(num, width or num, dtype=torch.float64)


def drawn(weights, means, shape, rng):
    """Points [*shape, D] of the mixture."""
    labels = torch.multinomial(weights, math.prod(shape), replacement=True, generator=rng)
    return means[labels].view(*shape, -1) + normal(rng, *shape, means.shape[1])


def cases(num):
    """Random logits and means, 2 to 6 components in 2 to 8 dimensions, with the generator that made them."""
    rng = stream(11, "cases")
    for case in range(num):
        components, width = 2 + case % 5, 2 + case % 7
        yield normal(rng, components), 1.5 * normal(rng, components, width), rng


# --- the density and its score ---------------------------------------------------------------------------------------


def test_the_density_is_that_of_torch():
    for logits, means, rng in cases(10):
        x = 2 * normal(rng, 7, means.shape[1])
        each = torch.distributions.Independent(torch.distributions.Normal(means, 1.0), 1)
        whole = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=logits), each)
        assert (log_density(x, logits, means) - whole.log_prob(x)).abs().max() < 1e-12


def test_the_score_is_the_gradient_of_the_log_density():
    for logits, means, rng in cases(50):
        x = (2 * normal(rng, 1, means.shape[1])).requires_grad_()
        (slope,) = torch.autograd.grad(log_density(x, logits, means).sum(), x)
        assert (score(x, logits, means) - slope).abs().max() < 1e-10


@torch.no_grad()
def test_it_is_the_librarys_denoiser():
    """Noise that `MixtureDenoiser` predicts, in float64, is -sigma times the score of the scaled means."""
    for logits, means, rng in cases(20):
        model = MixtureDenoiser(means, SCHEDULE)
        logits, means = logits.float(), means.float()  # what it can hold
        model.load({"means": means, EMBEDDING: logits[None], NULL_EMBEDDING: torch.zeros(1, len(logits))})
        t = torch.randint(1000, (6,), generator=rng)
        x_t = 2 * normal(rng, 6, means.shape[1])
        model.double()
        told = model.forward(x_t, t, model.condition(Batch(x_t, torch.zeros(6, dtype=torch.bool))))
        for row, level in enumerate(ALPHA_BAR[t]):
            expected = -(1 - level).sqrt() * score(x_t[row], logits.double(), level.sqrt() * means.double())
            assert (told[row] - expected).abs().max() < 1e-10


# --- the loss of one noise level -------------------------------------------------------------------------------------


def test_the_excess_is_what_the_denoising_loss_has_above_its_least_value():
    """The loss against the noise itself, of a guess less that of the truth, on 400,000 common draws."""
    rng = stream(3)
    logits, guess, means = normal(rng, 3), normal(rng, 3), 1.5 * normal(rng, 3, 2)
    level = torch.tensor(0.5).double()
    signal, sigma = level.sqrt(), (1 - level).sqrt()
    x_0, z = drawn(logits.softmax(0), means, (400_000,), rng), normal(rng, 400_000, 2)
    x_t = signal * x_0 + sigma * z
    losses = [(score(x_t, own, signal * means) + z / sigma).square().sum(1) for own in (guess, logits)]
    excess = excess_loss(x_t, guess, logits, signal * means)
    standard_error = (losses[0] - losses[1]).std() / math.sqrt(len(x_t))
    assert excess > 20 * standard_error, "or the comparison says nothing"
    assert abs((losses[0] - losses[1]).mean() - excess) < 4 * standard_error


def test_gradient_and_hessian_are_those_of_autograd():
    for logits, means, rng in cases(10):
        x_t, guess = 2 * normal(rng, 40, means.shape[1]), normal(rng, len(logits)).requires_grad_()
        (slope,) = torch.autograd.grad(excess_loss(x_t, guess, logits, means), guess)
        assert (excess_gradient(x_t, guess.detach(), logits, means) - slope).abs().max() < 1e-12
        curved = torch.autograd.functional.hessian(partial(excess_loss, x_t, logits=logits, means=means), logits)
        assert (excess_hessian(x_t, logits, means) - curved).abs().max() < 1e-10


def test_the_hessian_is_blind_to_the_shift_that_softmax_ignores_and_to_nothing_else():
    rng = stream(5)
    means, logits = 1.5 * normal(rng, 4, 6), normal(rng, 4)
    values, vectors = torch.linalg.eigh(excess_hessian(drawn(logits.softmax(0), means, (500,), rng), logits, means))
    assert abs(values[0]) < 1e-12 < 1e-4 < values[1]
    assert (vectors[:, 0].abs() - 0.5).abs().max() < 1e-6


@pytest.mark.parametrize(("num_components", "width"), [(3, 2), (4, 5), (5, 3)])
@pytest.mark.parametrize("level", [0.8, 0.3])
def test_one_noise_level_has_no_false_stationary_point_within_reach(num_components, width, level):
    """Damped Gauss-Newton descent from 40 starts on the loss of one noise level ends at the truth from all of them.

    Not proved for K above 2.
    """
    rng = stream(7, num_components, int(10 * level))
    means = math.sqrt(level) * 1.5 * normal(rng, num_components, width)
    logits, guess = normal(rng, num_components), 1.5 * normal(rng, 40, num_components)
    x_t = drawn(logits.softmax(0), means, (150,), rng)
    r, gram, damping = responsibilities(x_t, logits, means), means @ means.mT, torch.full((40, 1, 1), 1e-2).double()

    def parts(guess):
        found = responsibilities(x_t, guess[:, None], means)
        moved = torch.diag_embed(found) - found[..., None] * found[..., None, :]
        pull = (found - r) @ gram
        loss = (pull * (found - r)).sum(2).mean(1)
        return loss, (moved @ pull[..., None]).mean(1), (moved @ gram @ moved).mean(1)

    for _ in range(80):
        loss, slope, curvature = parts(guess)
        tried = guess - torch.linalg.solve(curvature + damping * torch.eye(num_components), slope)[..., 0]
        better = parts(tried)[0] <= loss
        guess = torch.where(better[:, None], tried, guess)
        damping = torch.where(better[:, None, None], damping / 3, damping * 5).clamp(1e-12, 1e6)
    assert (guess.softmax(1) - logits.softmax(0)).abs().max() < 1e-6


# --- denoising is likelihood -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_components", [3, 4, 5])
def test_the_ddpm_losses_of_all_levels_add_up_to_the_likelihood(num_components):
    rng = stream(13, num_components)
    logits, means = normal(rng, num_components), 1.5 * normal(rng, num_components, 2)
    x_0 = drawn(logits.softmax(0), means, (1,), rng)[0]
    levels, end = likelihood_by_denoising(x_0, logits, means)
    assert abs(levels + end + log_density(x_0, logits, means)) < 1e-5
    other, other_end = likelihood_by_denoising(x_0, logits.flip(0), means)
    assert abs(other - levels) > 1e-3, "the identity is tested where logits matter"
    assert abs(other_end - end) < 1e-5, "the end term forgets the logits"


# --- estimators, beside the errors that theory gives -----------------------------------------------------------------


def test_projection_is_exact_on_means_and_sums_to_one():
    means = 1.5 * normal(stream(1), 4, 7)
    assert (project((WEIGHTS @ means)[None], means) - WEIGHTS).abs().max() < 1e-12
    assert torch.allclose(project(normal(stream(2), 5, 30, 7), means).sum(1), torch.ones(5).double())


def test_the_projections_error_is_its_formula_at_every_width():
    """4000 data sets of 20 points: one standard error is about 1.5 %. Accepted: 6 %."""
    for width in (4, 12):
        means = orthogonal(4, 1.5, width)
        found = project(drawn(WEIGHTS, means, (4000, 20), stream(4, width)), means)
        error = 20 * (found - WEIGHTS).square().sum(1).mean()
        assert abs(error / projection_error(WEIGHTS, means) - 1) < 0.06


def test_em_ends_where_the_likelihood_has_no_slope():
    rng = stream(6)
    x_0 = drawn(WEIGHTS, orthogonal(4, 2.0), (3, 500), rng)
    found = maximum_likelihood(x_0, orthogonal(4, 2.0))
    r = responsibilities(x_0, found.log()[:, None], orthogonal(4, 2.0))
    assert (r.mean(1) - found).abs().max() < 1e-6
    best = log_density(x_0[0], found[0].log(), orthogonal(4, 2.0)).mean()
    for _ in range(20):
        near = (found[0].log() + 0.05 * normal(rng, 4)).softmax(0)
        assert log_density(x_0[0], near.log(), orthogonal(4, 2.0)).mean() < best


def test_two_components_have_the_bound_of_the_two_component_formula():
    """The weights are w and 1 - w, so the summed error is twice that of w."""
    means = vector([[1.0, 0.0], [-1.0, 0.0]])
    weights = vector([0.3, 0.7])
    assert abs(cramer_rao(weights, means, 200_000, stream(8)) / (2 * two_component_bound(0.3, 1.0)) - 1) < 0.01
    assert abs(projection_error(weights, means) - 2 * (0.3 * 0.7 + 1 / 4)) < 1e-12


def test_bounds_are_in_order_and_close_to_the_oracle_when_components_are_apart():
    for norm in (0.7, 1.5, 3.0):
        bound = cramer_rao(WEIGHTS, orthogonal(4, norm), 20_000, stream(9))
        assert oracle_error(WEIGHTS) < bound < projection_error(WEIGHTS, orthogonal(4, norm))
    far = orthogonal(4, 8.0)
    assert abs(cramer_rao(WEIGHTS, far, 20_000, stream(9)) / oracle_error(WEIGHTS) - 1) < 0.01


def test_the_gradient_is_that_of_the_librarys_loss():
    rng = stream(10)
    means, x_0, z = 1.5 * normal(rng, 4, 6), 2 * normal(rng, 30, 6), normal(rng, 30, 6)
    model = MixtureDenoiser(means, SCHEDULE)
    means = means.float().double()
    model.load({"means": means.float(), EMBEDDING: torch.zeros(1, 4), NULL_EMBEDDING: torch.zeros(1, 4)})
    model.double()
    t = torch.randint(1000, (30,), generator=rng)
    level = ALPHA_BAR[t][:, None]
    x_t = level.sqrt() * x_0 + (1 - level).sqrt() * z
    told = model.forward(x_t, t, model.condition(Batch(x_t, torch.zeros(30, dtype=torch.bool))))
    (told - z).square().sum().backward()
    found = logits_gradient(torch.zeros(4).double(), x_0 @ means.mT, z @ means.mT, means @ means.mT, level)
    assert (found.sum(0) - model.part.embedding.weight.grad[0]).abs().max() < 1e-9


def agreement(weights, means, repeats, rng, *, steps=600, lr=0.03):
    """The distance of DDPM training to maximum likelihood over that of maximum likelihood to the truth, same data."""
    x_0 = drawn(weights, means, (repeats, 400), rng)
    likelihood = maximum_likelihood(x_0, means)
    ddpm = learn_logits(x_0, means, ALPHA_BAR, steps=steps, lr=lr, rng=rng).softmax(1)
    return float(((ddpm - likelihood).square().sum() / (likelihood - weights).square().sum()).sqrt())


def test_ddpm_training_finds_the_maximum_of_the_likelihood():
    assert agreement(vector([0.5, 0.3, 0.2]), orthogonal(3, math.sqrt(2), 8), 6, stream(12)) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(("num_components", "width", "separation"), [(4, 16, 1), (4, 16, 2), (8, 32, 1)])
def test_ddpm_training_finds_the_maximum_of_the_likelihood_for_more_components(num_components, width, separation):
    weights = torch.arange(1.0, num_components + 1).double()
    means = orthogonal(num_components, math.sqrt(2) * separation, width)
    assert (
        agreement(weights / weights.sum(), means, 20, stream(12, num_components, separation), steps=1000, lr=0.02) < 0.2
    )


def test_the_divergence_is_that_of_two_gaussians():
    """KL(N(a, I) || N(b, I)) = |a - b|^2 / 2, and 0 of a mixture to itself."""
    one, other = vector([[1.0, 0.0]]), vector([[0.0, 2.0]])
    weight, logit = torch.ones(1).double(), torch.zeros(1).double()
    assert abs(divergence(weight, one, logit, other, 100_000, stream(1)) - 2.5) < 0.03
    means = orthogonal(4, 2.0)
    assert abs(divergence(WEIGHTS, means, WEIGHTS.log() + 3, means, 100, stream(1))) < 1e-12


# --- a backbone that is wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "degrees", "high_noise", "every_level"),
    [
        (0.6, 0, -0.167, 0.0855),
        (0.8, 0, 0.0, 0.0953),
        (1.0, 0, 0.1, 0.1),
        (1.25, 0, 0.180, 0.1025),
        (1.5, 0, 0.233, 0.1034),
        (1.0, 10, 0.106, 0.1007),
        (1.0, 20, 0.124, 0.1016),
        (1.0, 40, 0.194, 0.1111),
    ],
)
def test_a_wrong_mean_moves_the_weight_by_as_much_as_the_page_says(scale, degrees, high_noise, every_level):
    """w = 0.1, |mu| = 2. The last column was found independently on a grid of the logit with step 0.005."""
    angle = math.radians(degrees)
    mean = vector([2.0, 0.0])
    wrong = scale * vector([2 * math.cos(angle), 2 * math.sin(angle)])
    weights = vector([0.1, 0.9])
    limit = high_noise_limit(weights, torch.stack([mean, -mean]), torch.stack([wrong, -wrong]))
    assert abs(limit[0] - high_noise) < 6e-4
    assert abs(limit[0] - (0.5 - 0.4 * math.cos(angle) / scale)) < 1e-6
    every = ALPHA_BAR[5::10]  # one level in ten: the loss is smooth in it
    assert abs(two_component_limit(0.1, 2.0, scale, degrees, every) - every_level) < 0.003


def test_the_limit_is_where_training_on_much_data_ends():
    """30,000 points on a mean that is 0.6 of the true one; one standard error is 0.002. Accepted: 0.008."""
    mean, rng = vector([[2.0], [-2.0]]), stream(14)
    weights = vector([0.1, 0.9])
    x_0 = drawn(weights, mean, (1, 30_000), rng)
    found = learn_logits(x_0, 0.6 * mean, ALPHA_BAR[5::10], steps=100, lr=0.1, rng=rng).softmax(1)
    assert abs(found[0, 0] - two_component_limit(0.1, 2.0, 0.6, 0, ALPHA_BAR[5::10])) < 0.008


def test_means_are_matched_whatever_their_order():
    means = normal(stream(15), 5, 3)
    order = torch.tensor([3, 0, 4, 1, 2])
    learned = torch.empty_like(means)
    learned[order] = means + 0.01
    assert matched(learned, means) == order.tolist()
    with pytest.raises(ShapeError, match=r"learned means are \[4, 3\] and means \[5, 3\]"):
        matched(means[:4], means)
