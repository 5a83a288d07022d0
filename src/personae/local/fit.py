"""The one training loop. Every stretch of gradient descent goes through it: `fit` for one client, `fit_together` for
several in one batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from personae.core import Arrays, Batch, Client, Denoiser, Images, Noised, Plan, Select, Training
from personae.errors import ConfigError, Diverged
from personae.objective.denoising import denoising, denoising_each, noised
from personae.personal.embedding import clients_in, is_per_client

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@dataclass(frozen=True)
class Fitted:
    """What a stretch of training leaves behind.

    `loss` is the mean over the steps, without penalties (nan after 0 steps); `moments` are the optimizer's tensors as
    "moments.<slot>.<parameter>", to be kept in a State's extras and given back to the next stretch.
    """

    loss: float
    moments: Arrays


def fit(client: Client, train: Select, how: Training, moments: Arrays | None = None) -> Fitted:
    """Train the parameters that `train` and the client's plan both allow, in place; all others keep their bits.

    Images are drawn with replacement, timesteps uniformly, noise in float32 on the CPU, all from the client's own
    generator, so that the same client in the same round sees the same draws on every device and engine.

    Raises: ConfigError, when nothing may move, or others are beside the client; Diverged, when the loss is not finite.
    """
    if client.beside:
        raise ConfigError(
            f"client {client.name!r} has {len(client.beside)} others beside it, and `fit` trains one client; "
            "train them with `fit_together`, or personalize one after the other"
        )
    (fitted,) = fit_together([client], train, how, moments)
    return fitted


def fit_together(
    clients: Sequence[Client], train: Select, how: Training, moments: Arrays | None = None
) -> list[Fitted]:
    """The same for several clients that share one model: each ends as it would alone, up to rounding.

    Every client draws from its own generator what it would draw alone; all of them go through the model in one batch.
    The sum of their losses is minimised, which moves each client's row by that client's own gradient, and gradients are
    clipped row by row. So what trains must be per client when there is more than one. One Fitted per client, in order.

    Raises: ConfigError, when nothing may move, or what does not belong to one client would; Diverged, which names the
    first client whose loss is not finite.
    """
    model, plan = clients[0].model, clients[0].plan
    wanted = {name: p for name, p in model.live().items() if train(name) and plan.may_move(name)}
    moving = {name: p for name, p in wanted.items() if p.is_floating_point()}  # places of neurons are whole numbers
    _check(clients, moving)
    for name, parameter in model.live().items():
        parameter.requires_grad_(name in moving)
    optimizers = _optimizers(moving, how, plan)
    _restore(optimizers, moving, moments or {})
    parameters = list(moving.values())
    for parameter in parameters:
        parameter.grad = None  # of a stretch that was interrupted
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    totals = [0.0] * len(clients)
    examples = [_Examples(model, client.data.train) for client in clients]
    model.train(True)
    for step in range(how.steps):
        for group, rate in groups:
            group["lr"] = rate * _pace(step, how)
        for _ in range(how.accumulate):
            with _precision(how, parameters[0].device):
                batch = _noised(clients, examples, how, parameters[0].device)
                losses = plan.loss(model, batch)[None] if plan.loss else denoising_each(model, batch, len(clients))
                whole = losses.sum() + sum((penalty(model, batch) for penalty in plan.penalties), losses.new_zeros(()))
            (whole / how.accumulate).backward()
            totals = [total + loss / how.accumulate for total, loss in zip(totals, losses.tolist(), strict=True)]
        if how.max_grad_norm is not None:
            _clip(parameters, how.max_grad_norm, len(clients))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for client, total in zip(clients, totals, strict=True):
            if not math.isfinite(total):
                raise Diverged(
                    client.name,
                    f"the loss is not finite after {step + 1} steps; lower the learning rate (now {how.lr:g})",
                )
    model.train(False)
    _refuse_infinite(clients, parameters, how)
    slots = _moments(optimizers, moving)
    return [
        Fitted(total / how.steps if how.steps else math.nan, _of_client(slots, row, len(clients)))
        for row, total in enumerate(totals)
    ]


def gradients(client: Client, only: Select, *, batches: int, batch_size: int, levels: int) -> Float[Tensor, "levels P"]:
    """Where the client's images pull parameters that stay where they are: the mean gradient of the denoising loss, at
    the timesteps of each of `levels` equal parts of the schedule.

    `P` numbers of all parameters that `only` selects, in the order of their names. Draws as `fit` does, in float32 and
    with all captions. Raises: ConfigError, when nothing is selected.
    """
    model = client.model
    moving = {name: p for name, p in sorted(model.live().items()) if only(name)}
    _check([client], moving)
    for name, parameter in model.live().items():
        parameter.requires_grad_(name in moving)
    examples, how = [_Examples(model, client.data.train)], Training(batches, 1.0, batch_size)
    device, steps = next(iter(moving.values())).device, model.schedule.num_timesteps
    found = torch.zeros(levels, sum(p.numel() for p in moving.values()))
    for level in range(levels):
        between = (level * steps // levels, (level + 1) * steps // levels)
        for _ in range(batches):
            loss = denoising(model, _noised([client], examples, how, device, between))
            parts = torch.autograd.grad(loss, list(moving.values()), allow_unused=True, materialize_grads=True)
            found[level] += torch.cat([part.flatten() for part in parts]).cpu() / batches
    return found


def _check(clients: Sequence[Client], moving: Mapping[str, nn.Parameter]) -> None:
    """Raises: ConfigError, unless these clients can train these parameters in one batch."""
    model, plan, names = clients[0].model, clients[0].plan, ", ".join(client.name for client in clients)
    if not moving:
        raise ConfigError(
            f"client {names!r} has nothing to train: no parameter is selected; "
            "does the backbone have the part that this method trains?"
        )
    held = clients_in(model.live())
    if held != len(clients) or any(client.model is not model for client in clients):
        raise ConfigError(
            f"{len(clients)} clients are to train ({names}), and their model holds {held}; "
            "load one model with a row for each of them"
        )
    if len(clients) == 1:
        return
    if shared := [name for name in moving if not is_per_client(name)]:
        raise ConfigError(
            f"{names} are to train together, but {len(shared)} of the parameters that would move are not per client "
            f"({', '.join(shared[:3])}{', ...' if len(shared) > 3 else ''}); train these clients one after the other"
        )
    if len({bool(client.data.train.captions) for client in clients}) > 1:
        raise ConfigError(f"{names} are to train together, but only some have captions; give all of them some, or none")
    if plan.loss or plan.penalties or any(client.plan != plan for client in clients):
        raise ConfigError(
            f"{names} are to train together, but have plans of their own, or a loss or penalties, which see one "
            "client's model; train these clients one after the other"
        )


@contextmanager
def _precision(how: Training, device: torch.device) -> Iterator[None]:
    """With bfloat16 on a CPU, attention goes by plain matrix products: its fused kernel's gradients take ten times as
    long there."""
    if how.precision == "float32":
        yield
        return
    with (
        torch.autocast(device.type, torch.bfloat16),
        sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext(),
    ):
        yield


class _Examples:
    """One client's images as the model denoises them. What a latent model's autoencoder makes of one is kept."""

    def __init__(self, model: Denoiser, images: Images) -> None:
        self._model, self._images = model, images
        self._as_they_are = tuple(images.pixels.shape[1:]) == tuple(model.sample_shape)
        self._kept: dict[int, Tensor] = {}

    def __call__(self, index: Tensor, device: torch.device) -> Tensor:
        if self._as_they_are:
            return self._model.encode(self._images.floats(index).to(device))
        wanted = index.tolist()
        if missing := [number for number in dict.fromkeys(wanted) if number not in self._kept]:
            with torch.autocast(device.type, enabled=False):
                made = self._model.encode(self._images.floats(torch.tensor(missing)).to(device))
            self._kept.update(zip(missing, made.cpu(), strict=True))
        return torch.stack([self._kept[number] for number in wanted]).to(device)


def _noised(
    clients: Sequence[Client],
    examples: Sequence[_Examples],
    how: Training,
    device: torch.device,
    between: tuple[int, int] | None = None,
) -> Noised:
    """Every client's examples, one client after the other, on their way through the model, at any timestep or at those
    from the first of `between` to before the second.

    Each generator gives what it would give alone, in the same order: images, timesteps, dropout, noise.
    """
    model: Denoiser = clients[0].model
    low, high = between or (0, model.schedule.num_timesteps)
    clean, times, dropped, captions = [], [], [], []
    for client, encoded in zip(clients, examples, strict=True):
        images = client.data.train
        index = torch.randint(len(images), (how.batch_size,), generator=client.rng)
        clean.append(encoded(index, device))
        times.append(torch.randint(low, high, (how.batch_size,), generator=client.rng))
        dropped.append(torch.rand(how.batch_size, generator=client.rng) < how.condition_dropout)
        captions += [images.captions[i] for i in index.tolist()] if images.captions else []
    x_0 = torch.cat(clean)
    each = (how.batch_size, *x_0.shape[1:])
    noise = torch.cat([torch.randn(each, generator=client.rng) for client in clients]).to(device)
    rows = torch.arange(len(clients), device=device).repeat_interleave(how.batch_size)
    cond = model.condition(Batch(x_0, torch.cat(dropped).to(device), tuple(captions), rows))
    return noised(model, x_0, torch.cat(times).to(device), noise, cond)


def _clip(parameters: Sequence[nn.Parameter], max_norm: float, num_clients: int) -> None:
    """Scale gradients down to `max_norm`: one client's over all parameters, several clients' row by row."""
    if num_clients == 1:
        nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1).norm(dim=1)
    scale = (max_norm / (norms + 1e-6)).clamp(max=1.0)  # as torch has it
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))


def _refuse_infinite(clients: Sequence[Client], parameters: Sequence[nn.Parameter], how: Training) -> None:
    for parameter in parameters:
        finite = parameter.detach().reshape(len(clients), -1).sum(1).isfinite().tolist()
        if not all(finite):
            name = clients[finite.index(False)].name
            raise Diverged(name, f"a trained parameter is not finite; lower the learning rate (now {how.lr:g})")


def _pace(step: int, how: Training) -> float:
    """The learning rate of one step as a factor: linear warm-up, then constant or half a cosine to zero."""
    warm = min(1.0, (step + 1) / how.warmup_steps) if how.warmup_steps else 1.0
    return warm if how.decay == "constant" else warm * (1 + math.cos(math.pi * step / how.steps)) / 2


def _optimizers(moving: Mapping[str, nn.Parameter], how: Training, plan: Plan) -> list[torch.optim.Optimizer]:
    """One optimizer per kind that the plan asks for, with one group per learning rate."""
    kinds: dict[str, dict[float, list[nn.Parameter]]] = {}
    for name, parameter in moving.items():
        kind = plan.optimizer(name) or how.optimizer
        kinds.setdefault(kind, {}).setdefault(plan.rate(name), []).append(parameter)
    return [
        OPTIMIZERS[kind](
            [{"params": parameters, "lr": how.lr * factor} for factor, parameters in factors.items()],
            lr=how.lr,
            weight_decay=how.weight_decay,
            fused=True,
        )
        for kind, factors in kinds.items()
    ]


def _moments(optimizers: Sequence[torch.optim.Optimizer], moving: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {
        f"moments.{slot}.{name}": value.detach().to("cpu", copy=True)
        for optimizer in optimizers
        for name, parameter in moving.items()
        for slot, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _of_client(moments: Arrays, row: int, num_clients: int) -> Arrays:
    """One client's rows. What has none, such as the count of steps, is everybody's."""
    return {key: value.chunk(num_clients)[row] if value.dim() else value for key, value in moments.items()}


def _restore(optimizers: Sequence[torch.optim.Optimizer], moving: Mapping[str, nn.Parameter], moments: Arrays) -> None:
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for key, value in moments.items():
        _, slot, name = key.split(".", 2)
        if name in moving:
            # All of them, "step" too: a fused optimizer counts on the parameter's own device.
            owner[moving[name]].state[moving[name]][slot] = value.to(moving[name].device, copy=True)
