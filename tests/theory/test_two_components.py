"""The algebra of docs/theory.md, equation by equation, and what real vectors in d dimensions say to it.

Where a figure is written out it was computed once by another program than the one under test.
"""

import math

import pytest
import torch

from personae.backbone.mixture import MixtureDenoiser
from personae.backbone.schedule import schedule
from personae.core import Batch, Client, ClientData, Training, stream, under
from personae.data.mixture import gaussian_mixture
from personae.local.fit import fit
from personae.personal.embedding import EMBEDDING
from personae.theory import two_components as theory

VECTORS = schedule(clip_sample=False)


def direction(d, norm_0, rng):
    mu = torch.randn(d, generator=rng).double()
    return norm_0 * mu / mu.norm()


def images(w, mu, repeats, n, rng):
    """`repeats` data sets of `n` vectors: [repeats, n, d]."""
    drawn = gaussian_mixture(torch.tensor([w, 1 - w]), torch.stack([mu, -mu]), repeats * n, rng)
    return drawn.pixels.double().view(repeats, n, -1)


def noised(x_0, t, rng):
    """(x_t, z)."""
    z = torch.randn(x_0.shape, generator=rng).double()
    signal, sigma = theory.signal_and_sigma(t)
    return signal * x_0 + sigma * z, z


def one_level(t):
    return torch.tensor([t]).double(), torch.ones(1).double()


def squared_error(w_hat, w, n):
    """n times the mean squared error, over repeats."""
    return n * float((w_hat - w).square().mean())


# --- 1 to 3: score and loss ----------------------------------------------------------------------------------------


def test_the_score_is_the_gradient_of_the_log_density():
    rng = stream(1)
    for case in range(50):
        d, t, w = 1 + case % 8, float(3 * torch.rand(1, generator=rng)), float(torch.rand(1, generator=rng))
        mu, x = direction(d, 0.1 + 0.06 * case, rng), (2 * torch.randn(d, generator=rng).double()).requires_grad_()
        (expected,) = torch.autograd.grad(theory.log_density(x, mu, w, t), x)
        assert (theory.score(x, mu, w, t) - expected).abs().max() < 1e-10


def test_the_log_density_is_that_of_two_gaussians():
    mu, x, w, t = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.3, 0.4]).double(), 0.3, 0.5
    normal = torch.distributions.MultivariateNormal
    eye, mu_t = torch.eye(2).double(), math.exp(-t) * mu
    density = w * normal(mu_t, eye).log_prob(x).exp() + (1 - w) * normal(-mu_t, eye).log_prob(x).exp()
    assert float(theory.log_density(x, mu, w, t)) == pytest.approx(math.log(density), abs=1e-12)


@pytest.mark.parametrize(
    ("d", "norm_0", "w", "w_hat", "t", "known"),
    [
        (4, 1, 0.3, 0.6, 0.5, 2.6371),
        (16, 2, 0.7, 0.2, 1.0, 3.1050),
        (8, 3, 0.1, 0.5, 0.3, 9.9277),
        (32, 1.5, 0.5, 0.9, 1.5, 1.8468),
    ],
)
def test_the_loss_is_what_drawing_gives(d, norm_0, w, w_hat, t, known):
    """200,000 draws of the full loss in d dimensions, within 4 standard errors of the two parts by quadrature."""
    rng = stream(2, d)
    mu, norm = direction(d, norm_0, rng), norm_0 * math.exp(-t)
    x_t, z = noised(images(w, mu, 1, 200_000, rng)[0], t, rng)
    errors = (theory.score(x_t, mu, w_hat, t) + z / theory.signal_and_sigma(t)[1]).square().sum(1)
    ours = theory.loss(w_hat, w, norm) + theory.loss_floor(w, norm, d, t)
    assert ours == pytest.approx(known, abs=6e-5)
    assert abs(float(errors.mean()) - ours) < 4 * float(errors.std()) / 200_000**0.5


def test_the_target_has_the_posterior_as_its_mean():
    """Images whose x_t falls into one narrow place: 4 standard errors."""
    w, norm_0, t, rng = 0.3, 1.5, 1.2, stream(3)  # late enough that signal and noise differ
    x_0 = theory.along(images(w, torch.tensor([norm_0]).double(), 1, 400_000, rng), torch.ones(1))[0]
    x_t, z = noised(x_0, t, rng)
    y = theory.target(x_0, z, norm_0, t)
    for place in (-1.0, 0.0, 0.8):
        near = (x_t - place).abs() < 0.05
        bend = torch.tanh(norm_0 * math.exp(-t) * x_t[near] + theory.bias(w))
        assert abs(float((y[near] - bend).mean())) < 4 * float(y[near].std()) / int(near.sum()) ** 0.5


# --- 4: the gradient -------------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_loss():
    h = 1e-4
    for w, w_hat, norm in [(0.3, 0.6, 1.0), (0.05, 0.5, 0.2), (0.8, 0.3, 2.0), (0.5, 0.9, 3.0)]:
        b = theory.bias(w_hat)
        up, down = (float(theory.weight(torch.tensor(b + s, dtype=torch.float64))) for s in (h, -h))
        numeric = (theory.loss(up, w, norm) - theory.loss(down, w, norm)) / (2 * h)
        assert theory.gradient(w_hat, w, norm) == pytest.approx(numeric, rel=1e-6)
        in_weight = (theory.loss(w_hat + h, w, norm) - theory.loss(w_hat - h, w, norm)) / (2 * h)
        assert theory.gradient_in_weight(w_hat, w, norm) == pytest.approx(in_weight, rel=1e-5)


def test_there_is_one_stationary_point():
    """The gradient has the sign of w_hat - w, everywhere on a grid, and vanishes at w."""
    for norm in (0.05, 0.2, 0.5, 1.0, 2.0, 3.5, 5.0):
        for w in (0.05, 0.2, 0.5, 0.8, 0.97):
            for w_hat in torch.linspace(0.01, 0.99, 41).tolist():
                gradient = theory.gradient(w_hat, w, norm)
                assert abs(w_hat - w) < 1e-6 or gradient * (w_hat - w) > 0, (norm, w, w_hat)
            assert theory.gradient(w, w, norm) == 0


@pytest.mark.parametrize(("norm", "known"), [(0.2, 10), (0.5, 16), (1.0, 38), (2.0, 328)])
def test_descent_ends_at_the_weight_the_sooner_the_less_the_modes_are_apart(norm, known):
    """Steps of 1 / (2 |mu_t|^2) from 1/2 until within 1e-6 of 0.3."""
    b, steps = 0.0, 0
    while abs((w_hat := 1 / (1 + math.exp(-2 * b))) - 0.3) >= 1e-6:
        b -= theory.gradient(w_hat, 0.3, norm) / (2 * norm**2)
        steps += 1
    assert steps == known


@pytest.mark.parametrize("w_hat", [0.999, 0.5, 0.001])
def test_with_steps_below_one_over_the_curvature_descent_never_overshoots(w_hat):
    for w, norm in [(0.3, 1.0), (0.05, 0.3), (0.9, 2.0)]:
        b, goal = theory.bias(w_hat), theory.bias(w)
        for _ in range(30):
            after = b - theory.gradient(1 / (1 + math.exp(-2 * b)), w, norm) / theory.curvature_bound(norm)
            assert abs(after - goal) <= abs(b - goal) and (after - goal) * (b - goal) >= 0
            b = after


def test_the_curvature_bound_is_its_formula():
    u = torch.linspace(-1, 1, 20_001).double()
    steepest = 1 + 4 * float((u - u**3).abs().max())
    assert theory.curvature_bound(1.5) == pytest.approx(2 * 1.5**2 * steepest, rel=1e-6)


@pytest.mark.parametrize("norm", [1.0, 3.0, 6.0])
def test_integrals_stay_exact_where_the_modes_are_far_apart(norm):
    """Beside a grid a hundred times as fine, by the midpoint rule."""
    x = (torch.arange(400_000).double() + 0.5) * (24 + 2 * norm) / 400_000 - 12 - norm
    w, w_hat = 0.3, 0.6
    density = w * (-((x - norm) ** 2) / 2).exp() + (1 - w) * (-((x + norm) ** 2) / 2).exp()
    apart = torch.tanh(norm * x + theory.bias(w_hat)) - torch.tanh(norm * x + theory.bias(w))
    expected = norm**2 * float((density * apart.square()).sum() / density.sum())
    assert theory.loss(w_hat, w, norm) == pytest.approx(expected, rel=1e-9)


def test_the_loss_of_one_level_is_not_convex_in_the_weight():
    losses = [theory.loss(w_hat, 0.01, 2.0) for w_hat in (0.076, 0.077, 0.078)]
    assert losses[0] + losses[2] < 2 * losses[1]


# --- 5: estimators from the mean -----------------------------------------------------------------------------------


def test_the_bound_is_the_error_of_the_whole_mean_and_its_projection_loses_the_dimension():
    """3,000 data sets of 100 vectors in 16 dimensions: 5 % for the whole mean, 6 % for the projections."""
    w, d, norm_0, t, n, rng = 0.3, 16, 2.0, 0.5, 100, stream(4)
    signal, sigma = theory.signal_and_sigma(t)
    mu = direction(d, norm_0, rng)
    x_0 = images(w, mu, 3000, n, rng)
    x_t, z = noised(x_0, t, rng)
    whole = (x_t.mean(1) - (2 * w - 1) * signal * mu).square().sum(1) / (4 * (signal * norm_0) ** 2)
    assert n * float(whole.mean()) == pytest.approx(theory.mean_vector_bound(w, signal * norm_0, d), rel=0.05)

    y = theory.target(theory.along(x_0, mu), theory.along(z, mu), norm_0, t)
    found = {
        signal * norm_0: theory.projection(theory.along(x_t, mu), signal * norm_0),
        sigma * norm_0: theory.projection(norm_0 * y, norm_0),
        norm_0: theory.projection(theory.along(x_0, mu), norm_0),
    }
    for norm, w_hat in found.items():
        assert squared_error(w_hat, w, n) == pytest.approx(theory.projection_variance(w, norm), rel=0.06)
        assert abs(float(w_hat.mean()) - w) < 4 * float(w_hat.std()) / 3000**0.5


# --- 6: maximum likelihood -------------------------------------------------------------------------------------------


def test_the_losses_of_all_levels_add_up_to_the_log_likelihood():
    rng = stream(5)
    for case in range(20):
        d, w = 1 + case % 2, 0.04 + 0.048 * case
        mu, x_0 = direction(d, 0.2 + 0.17 * case, rng), 2 * torch.randn(d, generator=rng).double()
        left, right = theory.likelihood_identity(x_0, mu, w)
        assert abs(left - right) < 1e-5


def test_the_identity_holds_at_any_end_and_needs_its_term():
    """What is left of w_hat in the last noise falls like e^-2t: visible at 1, gone at 8."""
    mu, x_0, apart = torch.tensor([1.5]).double(), torch.tensor([0.7]).double(), {}
    for end in (1.0, 8.0):
        signal, _ = theory.signal_and_sigma(end)
        last = [float(theory.log_density(signal * x_0, mu, w, end)) for w in (0.2, 0.8)]
        apart[end] = abs(last[0] - last[1])
        left, right = theory.likelihood_identity(x_0, mu, 0.2, end)
        assert abs(left - right) < 1e-5
    assert apart[1.0] > 0.1 > 1e-3 > apart[8.0]


@pytest.mark.parametrize("w", [0.5, 0.3, 0.1])
@pytest.mark.parametrize("norm_0", [0.5, 1.0, 2.0, 3.0])
def test_the_loss_weighted_as_likelihood_reaches_the_cramer_rao_bound(w, norm_0):
    averaged, _ = theory.sandwich(w, norm_0, *theory.likelihood_levels(num_levels=120))
    assert averaged == pytest.approx(theory.cramer_rao(w, norm_0), rel=1e-4)


def test_training_with_likelihood_weights_gives_the_estimate_of_maximum_likelihood_for_every_sample():
    """Four data sets of 60 images; the limit is that of the grid on which the slope is interpolated."""
    x_0 = theory.along(images(0.3, torch.tensor([1.0]).double(), 4, 60, stream(6)), torch.ones(1))
    trained = theory.ddpm(x_0, 1.0, *theory.likelihood_levels(num_levels=40), spacing=0.05)
    likeliest = theory.maximum_likelihood(x_0, 1.0)
    assert (trained - likeliest).abs().max() < 1e-3
    assert (likeliest - 0.3).abs().max() > 0.05


def test_the_likeliest_weight_is_the_mean_responsibility_and_nothing_is_likelier():
    mu, rng = torch.tensor([1.2]).double(), stream(7)
    x = images(0.3, mu, 1, 200, rng)[0]
    w_hat = float(theory.maximum_likelihood(theory.along(x, mu), 1.2))
    responsibility = (1 + torch.tanh(x[:, 0] * 1.2 + theory.bias(w_hat))) / 2
    assert float(responsibility.mean()) == pytest.approx(w_hat, abs=1e-9)
    best = float(theory.log_density(x, mu, w_hat, 0.0).sum())
    assert all(float(theory.log_density(x, mu, w_hat + step, 0.0).sum()) < best for step in (-0.01, 0.01))


def test_a_sample_that_is_all_on_one_side_gives_a_weight_of_one():
    assert theory.maximum_likelihood(torch.full((1, 5), 3.0).double(), 1.0).tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("w", [0.5, 0.3, 0.1, 0.02])
def test_the_information_of_all_levels_is_that_of_the_image_and_most_of_it_is_where_the_modes_merge(w):
    norm_0 = 6.0
    times, weights = theory.likelihood_levels(num_levels=100)
    norms = norm_0 * (-times).exp()
    rates = torch.tensor([theory.information_rate(w, norm) for norm in norms.tolist()]).double()
    information = 4 * (w * (1 - w)) ** 2 / theory.cramer_rao(w, norm_0)
    assert float(weights @ rates) == pytest.approx(information, rel=1e-4)
    middle = (norms > 0.4) & (norms < 2.5)
    assert 0.82 < float((weights * rates)[middle].sum()) / information < 0.95
    peak = {0.5: 1.12, 0.3: 1.15, 0.1: 1.29, 0.02: 1.52}[w]
    around = [theory.information_rate(w, norm) for norm in (peak - 0.02, peak, peak + 0.02)]
    assert around[1] == max(around)


@pytest.mark.parametrize("norm_0", [0.5, 1.0, 2.0, 4.0])
def test_the_bounds_stand_in_order(norm_0):
    for w in (0.02, 0.3, 0.5):
        bound, averaged = theory.cramer_rao(w, norm_0), theory.projection_variance(w, norm_0)
        assert w * (1 - w) < bound < averaged == theory.mean_vector_bound(w, norm_0, 1)
        assert averaged < theory.mean_vector_bound(w, norm_0 * math.exp(-0.1), 2)


# --- 7: finite samples -----------------------------------------------------------------------------------------------

TIMES = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0)
KNOWN = {
    0.5: (1.1424, 1.2100, (1.204, 1.153, 1.148, 1.176, 1.204, 1.210), (13.7, 3.90, 1.98, 1.42, 1.235, 1.21)),
    1.0: (0.3985, 0.4600, (0.535, 0.423, 0.405, 0.431, 0.455, 0.460), (6.78, 1.89, 0.893, 0.582, 0.475, 0.460)),
    2.0: (0.2267, 0.2725, (0.932, 0.370, 0.238, 0.246, 0.268, 0.272), (13.2, 3.28, 1.10, 0.485, 0.299, 0.273)),
    3.0: (0.2109, 0.2378, (6.04, 0.973, 0.281, 0.216, 0.234, 0.238), (103, 17.8, 3.03, 0.710, 0.288, 0.239)),
}
"""n Var for w = 0.3 by |mu|: the bound, the projection (iii), and by time with averaged noise and with one draw."""


@pytest.mark.parametrize("norm_0", KNOWN)
def test_the_variances_are_the_known_ones(norm_0):
    bound, projected, averaged, one_draw = KNOWN[norm_0]
    assert theory.cramer_rao(0.3, norm_0) == pytest.approx(bound, abs=6e-5)
    assert theory.projection_variance(0.3, norm_0) == pytest.approx(projected, abs=6e-5)
    for t, known_averaged, known_one_draw in zip(TIMES, averaged, one_draw, strict=True):
        found = theory.sandwich(0.3, norm_0, *one_level(t))
        assert found == pytest.approx((known_averaged, known_one_draw), rel=5e-3)


@pytest.mark.parametrize(("norm_0", "known"), [(0.5, (1.1434, 6.3)), (1.0, (0.3995, 2.4)), (2.0, (0.2273, 1.9))])
def test_the_ordinary_loss_over_all_steps_is_nearly_the_best_there_is(norm_0, known):
    """Of every fifth step; that some stand for all is tested below."""
    averaged, one_draw = theory.sandwich(0.3, norm_0, *theory.noise_loss_levels(VECTORS, 5))
    assert averaged == pytest.approx(known[0], abs=2e-4) and one_draw == pytest.approx(known[1], abs=0.06)
    assert 1 < averaged / theory.cramer_rao(0.3, norm_0) < 1.005


@pytest.mark.parametrize("w", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("norm_0", [0.5, 1.0, 2.0, 3.0, 4.0])
def test_so_it_is_at_every_weight_and_separation_and_one_draw_costs_its_noise(w, norm_0):
    averaged, one_draw = theory.sandwich(w, norm_0, *theory.noise_loss_levels(VECTORS, 40))
    bound = theory.cramer_rao(w, norm_0)
    assert 1 < averaged / bound < 1.005
    assert 5 < one_draw / bound < 14.5
    assert 44 < (one_draw - averaged) / (0.1 * averaged) < 132  # passes to be within a tenth


def test_the_same_loss_without_sigma_squared_drowns_in_the_noise_of_one_draw():
    times, _ = theory.noise_loss_levels(VECTORS)
    _, one_draw = theory.sandwich(0.3, 1.0, times, torch.full_like(times, 1 / len(times)))
    assert one_draw > 300 * theory.cramer_rao(0.3, 1.0)


def test_one_step_in_forty_stands_for_all_of_a_schedule():
    every, some = (theory.sandwich(0.3, 2.0, *theory.noise_loss_levels(VECTORS, k)) for k in (1, 40))
    assert some == pytest.approx(every, rel=1e-3)


def test_the_slope_is_that_of_the_loss_in_d_dimensions():
    """By autograd, through the vectors and the score; for 2 data sets of 5 vectors."""
    w_hat, norm_0, t, rng = 0.4, 1.3, 0.3, stream(8)
    mu = direction(7, norm_0, rng)
    x_0 = images(0.3, mu, 2, 5, rng)
    x_t, z = noised(x_0, t, rng)
    signal, sigma = theory.signal_and_sigma(t)
    b = torch.full((2,), theory.bias(w_hat)).double().requires_grad_()
    bend = torch.tanh(x_t @ (signal * mu) + b[:, None])[..., None]
    losses = (bend * signal * mu - x_t + z / sigma).square().sum(2).mean(1)
    (expected,) = torch.autograd.grad(losses.sum(), b)
    found = theory.slope_of_draws(b.detach(), theory.along(x_0, mu), theory.along(z, mu), norm_0, t)
    assert torch.allclose(found, expected, atol=1e-10)


def test_the_interpolated_descent_ends_where_the_plain_one_does():
    x_0, norm_0 = theory.along(images(0.3, torch.tensor([2.0]).double(), 3, 50, stream(9)), torch.ones(1)), 2.0
    times, weights = theory.noise_loss_levels(VECTORS, 400)
    nodes = list(zip(*(part.tolist() for part in theory.normal_nodes(24)), strict=True))

    def slope(b):
        total = torch.zeros_like(b)
        for t, share in zip(times.tolist(), weights.tolist(), strict=True):
            for z, chance in nodes:
                total += share * chance * theory.slope_of_draws(b, x_0, torch.tensor(z, dtype=torch.float64), norm_0, t)
        return total

    plain = theory.minimize(slope, 1.0, torch.zeros(3).double())
    assert (theory.ddpm(x_0, norm_0, times, weights) - plain).abs().max() < 3e-4


@pytest.mark.parametrize(("norm_0", "t"), [(1.0, 0.2), (1.0, 1.0), (2.0, 0.5), (2.0, 2.0)])
def test_at_one_level_the_errors_are_those_of_the_formula(norm_0, t):
    """800 data sets of 400 vectors in 3 dimensions; the standard error of a mean square is 5 %, accepted are 20 %."""
    w, n, rng = 0.3, 400, stream(10, str(norm_0), str(t))
    mu = direction(3, norm_0, rng)
    x_0 = images(w, mu, 800, n, rng)
    z = theory.along(torch.randn(x_0.shape, generator=rng), mu)
    x_0 = theory.along(x_0, mu)
    averaged, one_draw = theory.sandwich(w, norm_0, *one_level(t))
    assert squared_error(theory.ddpm(x_0, norm_0, *one_level(t)), w, n) == pytest.approx(averaged, rel=0.2)
    assert squared_error(theory.ddpm_one_draw(x_0, z, norm_0, t), w, n) == pytest.approx(one_draw, rel=0.2)


def test_errors_fall_like_one_over_n_and_do_not_know_the_dimension():
    """400 data sets each, |mu| = 1; one point's standard error is 7 %, the slope's 0.035, accepted are 0.15."""
    w, levels, errors = 0.3, theory.noise_loss_levels(VECTORS, 100), {}
    for d, n in [(4, 50), (4, 100), (4, 200), (4, 400), (4, 800), (1, 200), (64, 200)]:
        rng = stream(11, d, n)
        mu = direction(d, 1.0, rng)
        x_0 = theory.along(images(w, mu, 400, n, rng), mu)
        trained, likeliest = theory.ddpm(x_0, 1.0, *levels, spacing=0.05), theory.maximum_likelihood(x_0, 1.0)
        errors[d, n] = squared_error(trained, w, n)
        apart = float((trained - likeliest).square().mean() / (likeliest - w).square().mean()) ** 0.5
        assert apart < 0.1  # what it has beyond maximum likelihood is a twentieth of the error of that
    bound = theory.cramer_rao(w, 1.0)
    assert all(error == pytest.approx(bound, rel=0.2) for error in errors.values())
    log_n = torch.tensor([50.0, 100, 200, 400, 800]).log()
    log_error = torch.tensor([errors[4, n] / n for n in (50, 100, 200, 400, 800)]).log()
    centred = log_n - log_n.mean()
    assert float(centred @ log_error / centred.square().sum()) == pytest.approx(-1, abs=0.15)


# --- the library's own stack -----------------------------------------------------------------------------------------


def denoiser(mu):
    return MixtureDenoiser(torch.stack([mu, -mu]), VECTORS)


@torch.no_grad()
def test_the_librarys_denoiser_has_this_score():
    rng, w = stream(12), 0.2
    mu = direction(5, 2.5, rng)
    logits = torch.tensor([[math.log(w), math.log(1 - w)]])
    model = denoiser(mu).double()
    model.load({**model.params(), EMBEDDING: logits.double()})
    times = theory.ou_time(VECTORS.alpha_bar)
    for step in (0, 50, 300, 999):
        x_t = 2 * torch.randn(20, 5, generator=rng).double()
        cond = model.condition(Batch(x_t, torch.zeros(20, dtype=torch.bool)))
        noise = model.forward(x_t, torch.full((20,), step), cond)
        t = float(times[step])
        expected = -theory.signal_and_sigma(t)[1] * theory.score(x_t, mu, w, t)
        assert (noise - expected).abs().max() < 1e-5  # its schedule and its means are float32


def test_fitting_only_the_librarys_embedding_recovers_the_weight():
    """2,000 vectors in 8 dimensions: other training noise moves the weight by 0.006, another sample by 0.011."""
    w, mu = 0.3, direction(8, 2.0, stream(13))
    drawn = gaussian_mixture(torch.tensor([w, 1 - w]), torch.stack([mu, -mu]), 2000, stream(14))
    client = Client("c0", ClientData(drawn, drawn), denoiser(mu), stream(15))
    fit(client, under("embedding."), Training(steps=500, lr=0.05, batch_size=512, decay="cosine"))
    found = float(client.model.params()[EMBEDDING][0].softmax(0)[0])
    likeliest = float(theory.maximum_likelihood(theory.along(drawn.pixels, mu), 2.0))
    assert abs(found - likeliest) < 0.025
    assert abs(found - w) < 0.05
    assert torch.equal(client.model.params()["means"], torch.stack([mu, -mu]).float())


def test_the_images_of_these_tests_have_the_weight_that_they_say():
    """The helper draws w of the images around mu; were it 1 - w, everything above would recover that."""
    x = images(0.3, torch.tensor([4.0]).double(), 1, 20_000, stream(16))
    assert float((x > 0).double().mean()) == pytest.approx(0.3, abs=0.02)
