"""The one training loop. Every stretch of gradient descent on a client goes through `fit`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from personae.core import Arrays, Batch, Client, Plan, Select, Training
from personae.errors import ConfigError, FederationError
from personae.objective.denoising import denoising, noised

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

    Raises: ConfigError, when nothing may move; FederationError, when the loss is not finite.
    """
    model, plan, images = client.model, client.plan, client.data.train
    moving = {name: p for name, p in model.live().items() if train(name) and plan.may_move(name)}
    if not moving:
        raise ConfigError(
            f"client {client.name!r} has nothing to train: no parameter is selected; "
            "does the backbone have the part that this method trains?"
        )
    for name, parameter in model.live().items():
        parameter.requires_grad_(name in moving)
    optimizers = _optimizers(moving, how, plan)
    _restore(optimizers, moving, moments or {})
    parameters = list(moving.values())
    for parameter in parameters:
        parameter.grad = None  # of a stretch that was interrupted
    device = parameters[0].device
    loss_of = plan.loss or denoising
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    total = 0.0
    model.train(True)
    for step in range(how.steps):
        for group, rate in groups:
            group["lr"] = rate * _pace(step, how)
        for _ in range(how.accumulate):
            index = torch.randint(len(images), (how.batch_size,), generator=client.rng)
            x_0 = images.floats(index)
            t = torch.randint(model.schedule.num_timesteps, (len(x_0),), generator=client.rng)
            dropped = torch.rand(len(x_0), generator=client.rng) < how.condition_dropout
            captions = tuple(images.captions[i] for i in index.tolist()) if images.captions else ()
            with torch.autocast(device.type, torch.bfloat16, enabled=how.precision == "bfloat16"):
                clean = model.encode(x_0.to(device))
                noise = torch.randn(clean.shape, generator=client.rng).to(device)
                cond = model.condition(Batch(x_0, dropped.to(device), captions))
                batch = noised(model, clean, t.to(device), noise, cond)
                loss = loss_of(model, batch)
                whole = loss + sum((penalty(model, batch) for penalty in plan.penalties), loss.new_zeros(()))
            (whole / how.accumulate).backward()
            total += loss.item() / how.accumulate
        if how.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, how.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(total):
            raise FederationError(
                f"client {client.name!r}: the loss is not finite after {step + 1} steps; "
                f"lower the learning rate (now {how.lr:g})"
            )
    model.train(False)
    if not all(math.isfinite(parameter.detach().sum().item()) for parameter in parameters):
        raise FederationError(
            f"client {client.name!r}: a trained parameter is not finite; lower the learning rate (now {how.lr:g})"
        )
    return Fitted(total / how.steps if how.steps else math.nan, _moments(optimizers, moving))


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


def _restore(optimizers: Sequence[torch.optim.Optimizer], moving: Mapping[str, nn.Parameter], moments: Arrays) -> None:
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for key, value in moments.items():
        _, slot, name = key.split(".", 2)
        if name in moving:
            # All of them, "step" too: a fused optimizer counts on the parameter's own device.
            owner[moving[name]].state[moving[name]][slot] = value.to(moving[name].device, copy=True)
