"""The noise schedule, read from a diffusers scheduler so that any saved one can be used.

Letters in shapes: `B` batch, `T` timesteps, `*X` one x_0, an image or a vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusers import DDPMScheduler
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from personae.errors import ArtefactError, ConfigError

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True)
class Schedule:
    """x_t = sqrt(alpha_bar[t]) x_0 + sqrt(1 - alpha_bar[t]) noise, for t in 0..T-1.

    `config` is what a diffusers sampler is built from.
    Source: Ho et al. 2020, Eq. 4; v: Salimans and Ho 2022, appendix D.
    """

    alpha_bar: Float32[Tensor, " T"]
    prediction_type: str
    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ConfigError(
                f"prediction_type is {self.prediction_type!r}; expected one of {', '.join(PREDICTION_TYPES)}"
            )

    @property
    def num_timesteps(self) -> int:
        return len(self.alpha_bar)

    def _roots(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.alpha_bar.to(like.device)[t].view(-1, *[1] * (like.dim() - 1))
        return alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()

    def add_noise(
        self, x_0: Float[Tensor, " B *X"], noise: Float[Tensor, " B *X"], t: Int64[Tensor, " B"]
    ) -> Float[Tensor, " B *X"]:
        signal, sigma = self._roots(t, x_0)
        return signal * x_0 + sigma * noise

    def target(
        self, x_0: Float[Tensor, " B *X"], noise: Float[Tensor, " B *X"], t: Int64[Tensor, " B"]
    ) -> Float[Tensor, " B *X"]:
        """What the network should output."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x_0
        signal, sigma = self._roots(t, x_0)
        return signal * noise - sigma * x_0


def from_scheduler(scheduler: Any) -> Schedule:
    """From any diffusers scheduler that has `alphas_cumprod`."""
    alpha_bar = getattr(scheduler, "alphas_cumprod", None)
    if alpha_bar is None:
        raise ConfigError(
            f"{type(scheduler).__name__} has no discrete noise schedule; use a DDPM, DDIM or DPM-Solver scheduler"
        )
    return Schedule(alpha_bar.float(), scheduler.config.prediction_type, dict(scheduler.config))


def schedule(
    num_timesteps: int = 1000,
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear",
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
    clip_sample: bool = True,
) -> Schedule:
    """A fresh schedule. Linear beta 1e-4 to 0.02 over 1000 steps is that of Ho et al. 2020.

    `clip_sample` keeps predicted clean samples in [-1, 1] while sampling: right for pixels, wrong for vectors.
    """
    return from_scheduler(
        DDPMScheduler(
            num_train_timesteps=num_timesteps,
            beta_schedule=beta_schedule,
            prediction_type=prediction_type,
            clip_sample=clip_sample,
        )
    )


DISCRETE = tuple(
    f"{name}Scheduler"
    for name in (
        *("DDPM", "DDIM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LCM"),
        *("DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE", "KDPM2Discrete", "KDPM2AncestralDiscrete"),
        *("DEISMultistep", "UniPCMultistep", "SASolver", "TCD", "DDIMInverse", "DDIMParallel", "DDPMParallel"),
    )
)
"""Schedulers of diffusers whose files tell the betas that DDPM trains with. Others' would be read as linear ones."""


def load_schedule(folder: Path) -> Schedule:
    """Read `scheduler_config.json` from a folder that diffusers saved.

    Raises: ArtefactError, when there is none, or it is of a scheduler without DDPM's discrete schedule.
    """
    if not (folder / "scheduler_config.json").is_file():
        raise ArtefactError(
            f"no scheduler_config.json in {folder}; save the scheduler beside the model: scheduler.save_pretrained(...)"
        )
    try:
        config = DDPMScheduler.load_config(folder)
        kind = str(config.get("_class_name"))
        if kind not in DISCRETE or not {"beta_schedule", "trained_betas"} & config.keys():
            raise ArtefactError(
                f"{folder / 'scheduler_config.json'} is of {kind}, with no discrete betas; expected "
                "a DDPM, DDIM, PNDM, Euler, DPM-Solver or like one; save the model with the one that it was trained for"
            )
        return from_scheduler(DDPMScheduler.from_config(config))
    except (OSError, NotImplementedError, TypeError) as error:
        raise ArtefactError(f"{folder / 'scheduler_config.json'} cannot be read: {error}") from error
