"""Two Gaussians whose mixing weight is all that a client has to learn: score, loss, estimators, and their variances.

Sections 1 to 7 of docs/theory.md in code; an equation number in a docstring is one of that page. The setting is
q_0 = w N(mu, I) + (1 - w) N(-mu, I), with mu known and w the client's one number, under the Ornstein-Uhlenbeck process
x_t = e^-t x_0 + sigma_t z. Everything is float64.

The mean at time t is mu_t = e^-t mu; `norm` is its length |mu_t|, which at t = 0 is |mu|. Only the coordinate along mu
tells anything about w (1.4), so what follows the score takes that one coordinate instead of vectors.

Letters in shapes: `d` width, `n` images, `*R` independent repeats of a data set, `L` noise levels, `Q` nodes of a
quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from personae.core import NoiseSchedule

# --- 1. setting ----------------------------------------------------------------------------------------------------


def bias(w: float) -> float:
    """b = log(w / (1 - w)) / 2, the form in which w enters the score (1.2)."""
    return math.log(w / (1 - w)) / 2


def weight(b: Tensor) -> Tensor:
    """w = 1 / (1 + e^-2b), the inverse of `bias` (1.2)."""
    return torch.sigmoid(2 * b)


def signal_and_sigma(t: float) -> tuple[float, float]:
    """e^-t and sigma_t = sqrt(1 - e^-2t), what x_t has of x_0 and of noise (1.1)."""
    return math.exp(-t), math.sqrt(-math.expm1(-2 * t))


def ou_time(alpha_bar: Tensor) -> Tensor:
    """The time at which e^-t = sqrt(alpha_bar): t = -log(alpha_bar) / 2, for each step of a schedule (1.3)."""
    return -alpha_bar.double().log() / 2


def along(x: Tensor, mu: Tensor) -> Tensor:
    """The coordinate mu.x / |mu|, distributed as w N(|mu|, 1) + (1 - w) N(-|mu|, 1) whatever d is (1.4).

    Shapes: x [*R, n, d], mu [d]; returns [*R, n].
    """
    return x.double() @ (mu.double() / mu.double().norm())


# --- 2. the score --------------------------------------------------------------------------------------------------


def log_density(x: Tensor, mu: Tensor, w: float, t: float) -> Tensor:
    """log q_t(x) of the mixture at time t (2.1).

    Shapes: x [..., d], mu [d]; returns [...].
    """
    mu_t = math.exp(-t) * mu
    gaussian = -(x.square().sum(-1) + mu_t.square().sum() + mu.numel() * math.log(2 * math.pi)) / 2
    along_mean = x @ mu_t
    return gaussian + torch.logaddexp(math.log(w) + along_mean, math.log(1 - w) - along_mean)


def score(x: Tensor, mu: Tensor, w: float, t: float) -> Tensor:
    """The gradient of log q_t: tanh(mu_t.x + b) mu_t - x (2.2).

    Shapes: x [..., d], mu [d]; returns [..., d].
    Source: w = 1/2 is the form of Shah, Chen and Klivans 2023; the summary of SPIRE's Lemma 4.1 gives this one.
    """
    mu_t = math.exp(-t) * mu
    return torch.tanh(x @ mu_t + bias(w))[..., None] * mu_t - x


# --- 3. the loss ---------------------------------------------------------------------------------------------------


@cache
def normal_nodes(num_nodes: int) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite nodes and probabilities, E f(z) = sum_q probability_q f(node_q) for z ~ N(0, 1).

    Shapes: both [Q].
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def image_nodes(w: float, norm: float) -> tuple[Tensor, Tensor]:
    """Nodes and probabilities of an image's coordinate along mu, w N(norm, 1) + (1 - w) N(-norm, 1) (1.4).

    An even grid, not Gauss-Hermite: tanh(norm x) is too steep for polynomials where norm is 3 or more, while on even
    nodes the error falls exponentially with their number.

    Shapes: both [2 Q].
    """
    z = torch.linspace(-10, 10, 401, dtype=torch.float64)
    probability = (-z.square() / 2).softmax(0)
    return torch.cat([norm + z, z - norm]), torch.cat([w * probability, (1 - w) * probability])


def expected(f: Callable[[Tensor], Tensor], w: float, norm: float) -> float:
    """E f(x) for x the coordinate of x_t along mu, |mu_t| being `norm`."""
    x, probability = image_nodes(w, norm)
    return float((probability * f(x)).sum())


def loss(w_hat: float, w: float, norm: float) -> float:
    """The part of the DDPM loss that depends on w_hat: norm^2 E(T_hat - T)^2 (3.1)."""

    def squared(x: Tensor) -> Tensor:
        return (torch.tanh(norm * x + bias(w_hat)) - torch.tanh(norm * x + bias(w))).square()

    return norm**2 * expected(squared, w, norm)


def loss_floor(w: float, norm: float, d: int, t: float) -> float:
    """The rest of the DDPM loss, which no w_hat changes: d e^-2t / sigma_t^2 + norm^2 E sech^2 (3.2)."""
    signal, sigma = signal_and_sigma(t)
    spread = expected(lambda x: 1 - torch.tanh(norm * x + bias(w)).square(), w, norm)
    return d * signal**2 / sigma**2 + norm**2 * spread


def target(x_0: Tensor, z: Tensor, norm_0: float, t: float) -> Tensor:
    """What T_hat regresses on, y = (x_0 - e^-t z / sigma_t) / |mu|, whose mean given x_t is T (3.3).

    Shapes: x_0 and z, coordinates along mu, broadcast together.
    """
    signal, sigma = signal_and_sigma(t)
    return (x_0 - signal / sigma * z) / norm_0


# --- 4. the gradient -----------------------------------------------------------------------------------------------


def gradient(w_hat: float, w: float, norm: float) -> float:
    """dL_t/db_hat = 2 norm^2 E[(T_hat - T) sech^2(mu_t.x_t + b_hat)], which has the sign of b_hat - b (4.1)."""

    def slope(x: Tensor) -> Tensor:
        bend_hat, bend = torch.tanh(norm * x + bias(w_hat)), torch.tanh(norm * x + bias(w))
        return (bend_hat - bend) * (1 - bend_hat.square())

    return 2 * norm**2 * expected(slope, w, norm)


def gradient_in_weight(w_hat: float, w: float, norm: float) -> float:
    """dL_t/dw_hat = (dL_t/db_hat) / (2 w_hat (1 - w_hat)) (4.2)."""
    return gradient(w_hat, w, norm) / (2 * w_hat * (1 - w_hat))


def curvature_bound(norm: float) -> float:
    """|d^2 L_t / db_hat^2| is nowhere above 2 norm^2 (1 + 4 max|u - u^3|), about 5.08 norm^2 (4.3)."""
    return 2 * norm**2 * (1 + 4 * 2 / (3 * math.sqrt(3)))


# --- 5. estimators from the mean, and the bound ----------------------------------------------------------------------


def projection(x: Tensor, norm: float) -> Tensor:
    """w_hat = 1/2 + mean(x) / (2 norm), unbiased wherever E x = (2w - 1) norm (5.2).

    Three of them: (i) x_t, with |mu_t|; (ii) |mu| y, the target of one noise per image, with |mu|; (iii) x_0 with |mu|,
    which is (ii) with the noise averaged out.

    Shapes: x [*R, n], coordinates along mu; returns [*R].
    """
    return 0.5 + x.mean(-1) / (2 * norm)


def projection_variance(w: float, norm: float) -> float:
    """n E(w_hat - w)^2 of `projection`: w (1 - w) + 1 / (4 norm^2), exactly and for every n and d (5.3).

    `norm` is |mu_t| for (i), sigma_t |mu| for (ii) and |mu| for (iii).
    """
    return w * (1 - w) + 1 / (4 * norm**2)


def mean_vector_bound(w: float, norm: float, d: int) -> float:
    """n times the bound w (1 - w) / n + d / (4 |mu_t|^2 n), the squared error of the whole mean vector (5.1).

    Source: a summary of SPIRE gives this form as its Theorem 4.2; the derivation beside (5.1) is ours.
    """
    return w * (1 - w) + d / (4 * norm**2)


# --- 6. DDPM training is maximum likelihood --------------------------------------------------------------------------


@cache
def likelihood_levels(end: float = 8.0, num_levels: int = 400) -> tuple[Tensor, Tensor]:
    """Times in (0, end) and weights with sum_l weight_l f(t_l) = int_0^end f dt: weight 1 in Ornstein-Uhlenbeck time.

    Gauss-Legendre in sqrt(t), where the integrands of (6.1) are smooth down to 0.

    Shapes: both [L].
    """
    nodes, weights = np.polynomial.legendre.leggauss(num_levels)
    root = math.sqrt(end) * (nodes + 1) / 2
    return torch.from_numpy(root**2), torch.from_numpy(weights * math.sqrt(end) / 2 * 2 * root)


def likelihood_identity(x_0: Tensor, mu: Tensor, w: float, end: float = 8.0) -> tuple[float, float]:
    """Both sides of (6.1): -log q_0(x_0), and what the DDPM losses of all noise levels add up to.

    The expectation over the noise is a product of Gauss-Hermite rules, so keep d at 1 or 2.

    Shapes: x_0 and mu [d].
    """
    d = mu.numel()
    nodes, probability = normal_nodes(80)
    z = torch.cartesian_prod(*[nodes] * d).view(-1, d)
    chance = torch.cartesian_prod(*[probability] * d).view(-1, d).prod(1)
    total = 0.0
    for t, share in zip(*(levels.tolist() for levels in likelihood_levels(end)), strict=True):
        signal, sigma = signal_and_sigma(t)
        noise_score = z / sigma
        error = (score(signal * x_0 + sigma * z, mu, w, t) + noise_score).square().sum(1)
        total += share * float(chance @ (error - noise_score.square().sum(1)))
    signal, sigma = signal_and_sigma(end)
    last = float(chance @ log_density(signal * x_0 + sigma * z, mu, w, end))
    return -float(log_density(x_0, mu, w, 0.0)), total + end * d - last


def maximum_likelihood(x_0: Tensor, norm_0: float) -> Tensor:
    """The w_hat of largest likelihood, where the mean of tanh(mu.x_0 + b) is tanh b, the fixed point of EM (6.2).

    The log-likelihood is concave in w, so its slope changes sign once and bisection cannot miss it; where it never
    does, in small samples, w_hat is 0 or 1.

    Shapes: x_0 [*R, n], coordinates along mu; returns [*R].
    """
    low, high = torch.full(x_0.shape[:-1], -20.0).double(), torch.full(x_0.shape[:-1], 20.0).double()
    for _ in range(45):
        middle = (low + high) / 2
        rising = torch.tanh(norm_0 * x_0 + middle[..., None]).mean(-1) > middle.tanh()
        low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
    return weight((low + high) / 2)


def cramer_rao(w: float, norm_0: float) -> float:
    """n times the smallest variance of an unbiased estimator from n images: 4 (w (1 - w))^2 / Var T (6.3)."""
    mean = 2 * w - 1  # of T, since E tanh(mu.x_0 + b) = tanh b
    variance = expected(lambda x: (torch.tanh(norm_0 * x + bias(w)) - mean).square(), w, norm_0)
    return 4 * (w * (1 - w)) ** 2 / variance


def information_rate(w: float, norm: float) -> float:
    """Information about b per unit of time at the noise level where |mu_t| is `norm`: 2 norm^2 E sech^4 (6.4).

    Its integral over all times is the information in the clean image, Var T.
    """
    return 2 * norm**2 * expected(lambda x: (1 - torch.tanh(norm * x + bias(w)).square()).square(), w, norm)


# --- 7. finite samples -----------------------------------------------------------------------------------------------


def noise_loss_levels(schedule: NoiseSchedule, every: int = 1) -> tuple[Tensor, Tensor]:
    """Times of a discrete schedule's steps, and the weights with which the ordinary noise-prediction loss is the mean
    over them of sigma_t^2 L_t (7.1).

    `every` takes one step in so many, in the middle of each stretch: weighted like this, the loss is smooth in time.

    Shapes: both [L].
    """
    alpha_bar = schedule.alpha_bar.double()[every // 2 :: every]
    return ou_time(alpha_bar), (1 - alpha_bar) / len(alpha_bar)


def minimize(slope: Callable[[Tensor], Tensor], step: float, start: Tensor, most: int = 20_000) -> Tensor:
    """Gradient descent on the bias from `start`, until no weight moves by more than 1e-6 in a step, or `most` steps.

    In a small sample the minimum may lie at w = 0 or 1, an infinite bias: there the descent ends on its way.

    Shapes: start [*R], `slope` from [*R] to [*R]; returns the weights [*R].
    """
    b, w_hat = start, weight(start)
    for _ in range(most):
        b = b - step * slope(b)
        before, w_hat = w_hat, weight(b)
        if (w_hat - before).abs().max() < 1e-6:
            break
    return w_hat


def ddpm(x_0: Tensor, norm_0: float, times: Tensor, weights: Tensor, spacing: float = 0.03) -> Tensor:
    """The w_hat that gradient descent on the DDPM loss of some images ends at, from w_hat = 1/2 (7.2).

    The loss is sum_l weights_l L_{t_l}, its noise averaged for every image, as fresh noise in every step does it. Its
    slope is the mean over the images of a smooth function of image and bias, which is computed once, on a grid of
    `spacing`, and interpolated linearly. The step is 1 / sum_l weights_l 2 |mu_t|^2, about the largest curvature.

    Shapes: x_0 [*R, n], coordinates along mu; times and weights [L]; returns [*R].
    """
    images, biases = even_grid(float(x_0.abs().max()), spacing), even_grid(6.0, spacing)
    slopes = on_grid(x_0, images) @ slope_table(images, biases, norm_0, times, weights)
    curvature = float((2 * weights * (-2 * times).exp()).sum()) * norm_0**2

    def slope(b: Tensor) -> Tensor:
        return (slopes * on_grid(b.clamp(biases[0], biases[-1])[..., None], biases)).sum(-1)

    return minimize(slope, 1 / curvature, torch.zeros(x_0.shape[:-1]).double())


def slope_table(x_0: Tensor, b: Tensor, norm_0: float, times: Tensor, weights: Tensor, num_nodes: int = 32) -> Tensor:
    """What one image contributes to the slope of the noise-averaged loss, for every image and every bias (7.2).

    Shapes: x_0 [X], coordinates along mu, and b [B]; times and weights [L]; returns [X, B].
    """
    table = torch.zeros(len(x_0), len(b)).double()
    nodes, probabilities = normal_nodes(num_nodes)
    for t, share in zip(times.tolist(), weights.tolist(), strict=True):
        for z, probability in zip(nodes, probabilities.tolist(), strict=True):
            table += share * probability * slope_of_draws(b, x_0[:, None, None], z, norm_0, t)
    return table


def even_grid(reach: float, spacing: float) -> Tensor:
    """Points `spacing` apart from -reach to reach or a little beyond."""
    num = math.ceil(reach / spacing) + 1
    return spacing * torch.arange(-num, num + 1).double()


def on_grid(values: Tensor, grid: Tensor) -> Tensor:
    """The mean over n values, each shared between its two neighbours on the grid: f interpolated is on_grid @ f(grid).

    Shapes: values [*R, n], grid [G] evenly spaced; returns [*R, G].
    """
    place = (values - grid[0]) / (grid[1] - grid[0])
    left = place.floor().long().clamp(0, len(grid) - 2)
    right_share = (place - left) / values.shape[-1]
    shares = torch.zeros(*values.shape[:-1], len(grid)).double()
    shares.scatter_add_(-1, left, 1 / values.shape[-1] - right_share)
    return shares.scatter_add_(-1, left + 1, right_share)


def ddpm_one_draw(x_0: Tensor, z: Tensor, norm_0: float, t: float) -> Tensor:
    """The same with one noise level and one noise per image, drawn once and kept (7.2).

    Shapes: x_0 and z [*R, n], coordinates along mu; returns [*R].
    """
    step = 1 / (2 * (math.exp(-t) * norm_0) ** 2)
    return minimize(lambda b: slope_of_draws(b, x_0, z, norm_0, t), step, torch.zeros(x_0.shape[:-1]).double())


def slope_of_draws(b: Tensor, x_0: Tensor, z: Tensor, norm_0: float, t: float) -> Tensor:
    """The derivative by b of |mu_t|^2 mean_i (tanh(mu_t.x_t,i + b) - y_i)^2, one data set's loss at one level (7.2).

    Shapes: b [*R]; x_0 [*R, n] and z, coordinates along mu; returns [*R].
    """
    signal, sigma = signal_and_sigma(t)
    norm = signal * norm_0
    bend = torch.tanh(norm * (signal * x_0 + sigma * z) + b[..., None])
    return 2 * norm**2 * ((bend - target(x_0, z, norm_0, t)) * (1 - bend.square())).mean(-1)


def sandwich(w: float, norm_0: float, times: Tensor, weights: Tensor) -> tuple[float, float]:
    """The limit of n E(w_hat - w)^2 for the minimizer of the DDPM loss sum_l weights_l L_{t_l} (7.3).

    The first number is for noise that is averaged; the second for one level, drawn uniformly, and one noise per image.

    Shapes: times and weights [L].
    """
    x_0, chance_x = image_nodes(w, norm_0)
    z, chance_z = normal_nodes(80)
    psi, squares, curvature = torch.zeros_like(x_0), 0.0, 0.0
    for t, share in zip(times.tolist(), weights.tolist(), strict=True):
        signal, sigma = signal_and_sigma(t)
        factor = share * (signal * norm_0) ** 2
        bend = torch.tanh(signal * norm_0 * (signal * x_0[:, None] + sigma * z) + bias(w))
        sech2 = 1 - bend.square()
        part = factor * (bend - target(x_0[:, None], z, norm_0, t)) * sech2
        psi += part @ chance_z
        squares += len(times) * float(chance_x @ part.square() @ chance_z)
        curvature += factor * float(chance_x @ sech2.square() @ chance_z)
    slope_of_weight = 2 * w * (1 - w)
    averaged = float(chance_x @ psi.square())
    return slope_of_weight**2 * averaged / curvature**2, slope_of_weight**2 * squares / curvature**2
