"""diffusers' samplers, each with the options that we give it, and the one loop that takes their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from personae.core import Cond, Denoiser, NoiseSchedule
from personae.errors import ConfigError

Sampler = Literal[
    "ddpm",
    "ddim",
    "ddim_eta1",
    "euler",
    "euler_ancestral",
    "heun",
    "lms",
    "pndm",
    "lcm",
    "deis",
    "unipc",
    "dpmsolver++",
    "dpmsolver++_karras",
    "dpmsolver++_2s",
    "dpmsolver++_3m",
    "sde-dpmsolver++",
]


@dataclass(frozen=True)
class Kind:
    """A scheduler of diffusers. `step` are arguments of its steps; `draws` says that these draw noise; `alone` that it
    counts its steps while it does, so that several generators cannot share one; `divides` that the number of steps must
    divide that of timesteps; `most` how many steps there may be, and how few timesteps not."""

    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    step: Mapping[str, Any] = field(default_factory=dict)
    draws: bool = False
    alone: bool = False
    divides: bool = False
    most: int | None = None


TRAILING = {"timestep_spacing": "trailing"}
"""The first step is at the noisiest level that training saw."""

PLUS_PLUS = {**TRAILING, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}

SAMPLERS: Mapping[str, Kind] = {
    "ddpm": Kind("DDPMScheduler", TRAILING, draws=True, divides=True),
    "ddim": Kind("DDIMScheduler", TRAILING, divides=True),
    "ddim_eta1": Kind("DDIMScheduler", TRAILING, {"eta": 1.0}, draws=True, divides=True),
    "euler": Kind("EulerDiscreteScheduler", TRAILING),
    "euler_ancestral": Kind("EulerAncestralDiscreteScheduler", TRAILING, draws=True, alone=True),
    "heun": Kind("HeunDiscreteScheduler", TRAILING),
    "lms": Kind("LMSDiscreteScheduler", TRAILING),
    "pndm": Kind("PNDMScheduler", {**TRAILING, "skip_prk_steps": True}),
    "lcm": Kind("LCMScheduler", draws=True, alone=True, most=50),
    "deis": Kind("DEISMultistepScheduler", TRAILING),
    "unipc": Kind("UniPCMultistepScheduler", TRAILING),
    "dpmsolver++": Kind("DPMSolverMultistepScheduler", PLUS_PLUS),
    "dpmsolver++_karras": Kind("DPMSolverMultistepScheduler", {**PLUS_PLUS, "use_karras_sigmas": True}),
    "dpmsolver++_2s": Kind(
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero", "lower_order_final": True},
    ),
    "dpmsolver++_3m": Kind("DPMSolverMultistepScheduler", {**PLUS_PLUS, "solver_order": 3}),
    "sde-dpmsolver++": Kind(
        "DPMSolverMultistepScheduler", {**PLUS_PLUS, "algorithm_type": "sde-dpmsolver++"}, draws=True, alone=True
    ),
}


def kind_of(sampler: str) -> Kind:
    """Raises: ConfigError, for an unknown name."""
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler is {sampler!r}; expected one of {', '.join(SAMPLERS)}")
    return SAMPLERS[sampler]


def check_steps(sampler: Sampler, steps: int, num_timesteps: int) -> None:
    """Raises: ConfigError, when the steps are out of range, or do not divide the timesteps evenly for DDPM and DDIM.

    diffusers' DDPM and DDIM go down by whole strides of T // steps: with a remainder the last steps would remove less
    noise than the schedule says, and every image would come out paler without a word.
    """
    if not 1 <= steps <= num_timesteps:
        raise ConfigError(f"{steps} sampling steps were asked for, expected 1 to {num_timesteps}")
    kind = kind_of(sampler)
    if kind.most is not None and (steps > kind.most or num_timesteps < kind.most):
        raise ConfigError(
            f"{steps} sampling steps of {num_timesteps} timesteps were asked for; {sampler} takes at most {kind.most} "
            f"steps, of at least {kind.most} timesteps"
        )
    if kind.divides and num_timesteps % steps:
        near = sorted((n for n in range(1, num_timesteps + 1) if num_timesteps % n == 0), key=lambda n: abs(n - steps))
        raise ConfigError(
            f"{steps} sampling steps do not divide the {num_timesteps} timesteps, which {sampler} needs; "
            f"take {near[0]} or {near[1]}, or the sampler dpmsolver++"
        )


def scheduler_for(sampler: Sampler, schedule: NoiseSchedule, steps: int) -> Any:
    """A fresh scheduler at its first step. A used one must not be: what it remembers belongs to other images."""
    import diffusers  # slow to import, and recipes name samplers only

    kind = kind_of(sampler)
    made = getattr(diffusers, kind.scheduler)
    # What it takes, and not the note of which values were defaults: diffusers would put its own in their places.
    config = {name: value for name, value in schedule.config.items() if name in signature(made.__init__).parameters}
    scheduler = made.from_config(config, **kind.options)
    scheduler.set_timesteps(steps)
    return scheduler


def times_of(scheduler: Any) -> list[float]:
    """The time of every call of the model, in order; more calls than steps for Heun and PNDM."""
    # For some counts, 61 of 1000 for example, rounding makes diffusers append a step at -1.
    times: list[float] = scheduler.timesteps[scheduler.timesteps >= 0].tolist()
    return times


def walk(
    model: Denoiser,
    kind: Kind,
    scheduler: Any,
    x_t: Float[Tensor, " B *X"],
    conds: Sequence[Cond],
    guidance: float,
    rngs: Sequence[torch.Generator],
    calls: slice = slice(None),
) -> Float[Tensor, " B *X"]:
    """The scheduler's steps for these calls of the model. With two conditions, the client's and the null one, the
    prediction is guided. What draws takes each client's noise from that client's generator."""
    for t in times_of(scheduler)[calls]:
        times = torch.full((len(x_t),), int(t), dtype=torch.long, device=x_t.device)
        scaled = scheduler.scale_model_input(x_t, t)
        predictions = [model.forward(scaled, times, cond) for cond in conds]
        guided = predictions[0] if len(predictions) == 1 else predictions[1].lerp(predictions[0], guidance)
        if kind.draws:
            each = zip(guided.chunk(len(rngs)), x_t.chunk(len(rngs)), rngs, strict=True)
            x_t = torch.cat([scheduler.step(own, t, x, generator=rng, **kind.step).prev_sample for own, x, rng in each])
        else:
            x_t = scheduler.step(guided, t, x_t, **kind.step).prev_sample
    return x_t
