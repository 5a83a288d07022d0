"""K components with shared means, sum_k w_k N(mean_k, I): what a client's logits do, and how well they can be learned.

The backbone is the means; a client's own part is K logits, an additive bias on the responsibilities. Sections 8 and
9 of docs/theory.md in code; an equation number in a docstring is one of that page. Everything is float64.

A noise level enters as `means` scaled by sqrt(alpha_bar), since every component keeps unit covariance. Errors are given
as n E|w_hat - w|^2, the mean squared error times the number of points.

Letters in shapes: `N` points, `K` components, `D` width, `R` repeats, `T` timesteps; `*X` any leading shape.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from personae.errors import ShapeError
from personae.theory.two_components import likelihood_levels, normal_nodes, signal_and_sigma

# --- the density and its score ---------------------------------------------------------------------------------------


def log_density(x: Float[Tensor, "*X D"], logits: Float[Tensor, " K"], means: Float[Tensor, "K D"]) -> Tensor:
    """log sum_k softmax(logits)_k N(x; mean_k, I). (8.1)"""
    constant = x.shape[-1] / 2 * math.log(2 * math.pi)
    joint = logits.log_softmax(-1) + x @ means.mT - means.square().sum(-1) / 2
    return joint.logsumexp(-1) - x.square().sum(-1) / 2 - constant


def responsibilities(x: Float[Tensor, "*X D"], logits: Tensor, means: Float[Tensor, "K D"]) -> Tensor:
    """The posterior of the component, in which the logits are a bias. (8.2)

    `logits` broadcast against [*X, K]: with a row of them for each of N clients, [N, 1, K], the result is [N, *X, K].
    """
    return (logits + x @ means.mT - means.square().sum(-1) / 2).softmax(-1)


def score(x: Float[Tensor, "*X D"], logits: Tensor, means: Float[Tensor, "K D"]) -> Tensor:
    """The gradient of `log_density` in x. (8.3)"""
    return responsibilities(x, logits, means) @ means - x


# --- the loss of one noise level -------------------------------------------------------------------------------------


def excess_loss(x_t: Float[Tensor, "N D"], guess: Tensor, logits: Tensor, means: Tensor) -> Float[Tensor, ""]:
    """What the score loss has above its least value, |M (r_hat - r)|^2, averaged over the points. (8.4)"""
    gap = responsibilities(x_t, guess, means) - responsibilities(x_t, logits, means)
    return (gap @ means).square().sum(-1).mean()


def excess_gradient(x_t: Float[Tensor, "N D"], guess: Tensor, logits: Tensor, means: Tensor) -> Float[Tensor, " K"]:
    """Of `excess_loss` in `guess`: 2 mean J(r_hat) G (r_hat - r). (8.5)"""
    r = responsibilities(x_t, guess, means)
    pull = (r - responsibilities(x_t, logits, means)) @ means @ means.mT
    return 2 * _spread(r, pull).mean(0)


def excess_hessian(x_t: Float[Tensor, "N D"], logits: Tensor, means: Tensor) -> Float[Tensor, "K K"]:
    """Of `excess_loss` where the guess is true: 2 mean J G J. (8.6)"""
    r = responsibilities(x_t, logits, means)
    moved = torch.diag_embed(r) - r[:, :, None] * r[:, None, :]
    return 2 * (moved @ (means @ means.mT) @ moved).mean(0)


def _spread(r: Float[Tensor, "*X K"], v: Float[Tensor, "*X K"]) -> Float[Tensor, "*X K"]:
    """J(r) v with J(r) = diag r - r r^T, the derivative of a softmax."""
    return r * (v - (r * v).sum(-1, keepdim=True))


# --- denoising is likelihood -----------------------------------------------------------------------------------------


def likelihood_by_denoising(
    x_0: Float[Tensor, " D"],
    logits: Float[Tensor, " K"],
    means: Float[Tensor, "K D"],
    *,
    end: float = 8.0,
    num_levels: int = 400,
    num_nodes: int = 40,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """-log q_0(x_0) as the DDPM losses of all noise levels added up, and an end term that forgets the logits. (8.7)

    Their sum is the negative log-likelihood, wherever the levels end. The expectation over the noise is a product of
    Gauss-Hermite rules, num_nodes^D points, so keep D at 1 or 2.
    """
    z, share = _normal_grid(num_nodes, len(x_0))
    total = x_0.new_zeros(())
    for t, weight in zip(*(levels.tolist() for levels in likelihood_levels(end, num_levels)), strict=True):
        signal, sigma = signal_and_sigma(t)
        s = score(signal * x_0 + sigma * z, logits, signal * means)
        total = total + weight * (share @ (s.square().sum(1) + 2 * (s * z).sum(1) / sigma))
    signal, sigma = signal_and_sigma(end)
    last = share @ log_density(signal * x_0 + sigma * z, logits, signal * means)
    return total + end * len(x_0), -last


def _normal_grid(num_nodes: int, width: int) -> tuple[Float[Tensor, "Q D"], Float[Tensor, " Q"]]:
    """Points and probabilities that integrate against N(0, I)."""
    nodes, probability = normal_nodes(num_nodes)
    points = torch.cartesian_prod(*[nodes] * width).view(-1, width)
    return points, torch.cartesian_prod(*[probability] * width).view(-1, width).prod(1)


# --- errors that theory gives ----------------------------------------------------------------------------------------


def oracle_error(weights: Float[Tensor, " K"]) -> float:
    """With every point's component known: 1 - |w|^2. (8.8)"""
    return float(1 - weights.square().sum())


def projection_error(weights: Float[Tensor, " K"], means: Float[Tensor, "K D"]) -> float:
    """Of `project`, exactly and for every n: (1 - |w|^2) + tr (V^T G V)^-1. (8.10)"""
    v = _contrasts(len(means), means.dtype)
    return oracle_error(weights) + float(torch.linalg.inv(v.mT @ means @ means.mT @ v).trace())


def cramer_rao(
    weights: Float[Tensor, " K"], means: Float[Tensor, "K D"], num_draws: int, rng: torch.Generator
) -> float:
    """What no unbiased estimator beats: tr (V^T F V)^-1 with F = E[(r/w)(r/w)^T]. (8.11)

    The expectation is over `num_draws` points of every component, weighted as the components are.
    """
    ratio = responsibilities(_strata(means, num_draws, rng), weights.log(), means) / weights
    information = torch.einsum("k,knl,knm->lm", weights, ratio, ratio) / num_draws
    v = _contrasts(len(means), means.dtype)
    return float(torch.linalg.inv(v.mT @ information @ v).trace())


def divergence(
    weights: Float[Tensor, " K"],
    means: Float[Tensor, "K D"],
    logits: Float[Tensor, " L"],
    learned: Float[Tensor, "L D"],
    num_draws: int,
    rng: torch.Generator,
) -> float:
    """KL(truth || learned) in nats, from `num_draws` points of every true component, weighted as these are."""
    x = _strata(means, num_draws, rng)
    ratio = log_density(x, weights.log(), means) - log_density(x, logits, learned)
    return float(weights @ ratio.mean(1))


def _strata(means: Float[Tensor, "K D"], num: int, rng: torch.Generator) -> Float[Tensor, "K N D"]:
    """`num` points of every component."""
    return means[:, None] + torch.randn(len(means), num, means.shape[1], generator=rng, dtype=means.dtype)


def _contrasts(num: int, dtype: torch.dtype) -> Float[Tensor, "K J"]:
    """V: an orthonormal basis of the directions in which weights can move, those that sum to zero."""
    return torch.linalg.svd(torch.ones(1, num, dtype=dtype)).Vh[1:].mT


# --- estimators ------------------------------------------------------------------------------------------------------


def project(x_0: Float[Tensor, "*R N D"], means: Float[Tensor, "K D"]) -> Float[Tensor, "*R K"]:
    """The weights, summing to one, whose mean is nearest to that of the points; some may be negative. (8.9)"""
    v = _contrasts(len(means), means.dtype)
    middle = means.mean(0)
    return 1 / len(means) + (x_0.mean(-2) - middle) @ torch.linalg.pinv(v.mT @ means) @ v.mT


def maximum_likelihood(
    x_0: Float[Tensor, "*R N D"], means: Float[Tensor, "K D"], *, max_steps: int = 20_000, tolerance: float = 1e-8
) -> Float[Tensor, "*R K"]:
    """The weights of greatest likelihood by EM, w <- mean r, which cannot stop elsewhere: -log q is convex in w. (8.12)

    It ends when no weight moves by more than `tolerance` in a step.
    """
    joint = x_0 @ means.mT - means.square().sum(-1) / 2
    ratio = (joint - joint.amax(-1, keepdim=True)).exp()
    weights = torch.full((*x_0.shape[:-2], len(means)), 1 / len(means), dtype=x_0.dtype)
    for _ in range(max_steps):
        before = weights
        mixed = (ratio @ weights[..., None]).reciprocal()
        weights = weights * (ratio * mixed).mean(-2)
        if (weights - before).abs().max() < tolerance:
            break
    return weights


def learn_logits(
    x_0: Float[Tensor, "R N D"],
    means: Float[Tensor, "K D"],
    alpha_bar: Float[Tensor, " T"],
    *,
    steps: int,
    lr: float,
    rng: torch.Generator,
) -> Float[Tensor, "R K"]:
    """Logits by DDPM training: Adam on the noise-prediction loss from zero, all points in every step, fresh noise.

    The gradient meets a point and its noise only through their products with the K means, so that neither time nor
    memory knows D beyond the first line. (8.13) Two things average the noise out: every draw is used with both signs,
    and the rate falls to zero along half a cosine.
    """
    products, gram = x_0 @ means.mT, means @ means.mT
    values, vectors = torch.linalg.eigh(gram)
    shape = vectors * values.clamp(min=0).sqrt()  # products of noise with the means are N(0, G)
    logits = torch.nn.Parameter(torch.zeros(len(x_0), len(means), dtype=x_0.dtype))
    optimizer = torch.optim.Adam([logits], lr=lr)
    pace = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        levels = alpha_bar[torch.randint(len(alpha_bar), (*products.shape[:2], 1), generator=rng)]
        noise = torch.randn(products.shape, generator=rng, dtype=x_0.dtype) @ shape.mT
        now = logits.detach()[:, None]
        slopes = [logits_gradient(now, products, signed, gram, levels) for signed in (noise, -noise)]
        logits.grad = (slopes[0] + slopes[1]).mean(1) / 2
        optimizer.step()
        pace.step()
    return logits.detach()


def logits_gradient(
    logits: Tensor,
    products: Float[Tensor, "*X K"],
    noise: Float[Tensor, "*X K"],
    gram: Float[Tensor, "K K"],
    alpha_bar: Tensor,
) -> Float[Tensor, "*X K"]:
    """Of |eps_hat - z|^2 in the logits, from mean_k.x_0, mean_k.z and G alone. (8.13)

    Shapes: logits and alpha_bar broadcast against [*X, K].
    """
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    bias = signal * (signal * products + sigma * noise) - alpha_bar * gram.diagonal() / 2
    r = (logits + bias).softmax(-1)
    missing = sigma * (products - r @ gram) - signal * noise
    return -2 * alpha_bar * sigma * _spread(r, missing)


# --- a backbone that is wrong ----------------------------------------------------------------------------------------


def high_noise_limit(
    weights: Float[Tensor, " K"], means: Float[Tensor, "K D"], learned: Float[Tensor, "K D"]
) -> Float[Tensor, " K"]:
    """Where `project` on the learned means ends, however many points: outside of [0, 1] if they are bad enough. (9.1)

    Training on a single noise level ends there too as the level grows, if it lies in [0, 1], and at its edge otherwise.
    """
    return project((weights @ means)[None], learned)


def two_component_limit(
    weight: float, norm: float, scale: float, degrees: float, alpha_bar: Float[Tensor, " T"]
) -> float:
    """The weight that DDPM training over all noise levels ends at, for means mu and -mu of this norm. (9.2)

    The backbone's mu is scaled and turned. Its loss needs one direction only, that of the learned mu, along which a
    point of component S = +-1 is N(S signal norm cos, 1): Gauss-Hermite for the noise, a grid refined thrice for b.
    """
    z, share = normal_nodes(80)
    signal, cosine = alpha_bar.sqrt()[:, None, None], math.cos(math.radians(degrees))
    sign = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    prior = torch.tensor([[weight], [1 - weight]], dtype=torch.float64) * share
    bend = signal * scale * norm * (sign * signal * norm * cosine + z)  # [T, 2, Q]
    levels = (alpha_bar * (1 - alpha_bar))[:, None, None] * prior * norm**2 * scale

    def loss(b: float) -> float:
        told = torch.tanh(bend + b)
        return float((levels * (scale * told.square() - 2 * cosine * sign * told)).sum())

    best, width = 0.0, 4.0
    for _ in range(4):
        best = min((best + width * step / 20 for step in range(-20, 21)), key=loss)
        width /= 10
    return 1 / (1 + math.exp(-2 * best))


def matched(learned: Float[Tensor, "_ _"], means: Float[Tensor, "K D"]) -> list[int]:
    """Which learned mean stands for each true one, so that the sum of squared distances is least."""
    if learned.shape != means.shape:
        raise ShapeError(f"learned means are {list(learned.shape)} and means {list(means.shape)}, expected the same")
    cost = torch.cdist(means, learned).square()
    return [int(column) for column in linear_sum_assignment(cost.detach().numpy())[1]]
