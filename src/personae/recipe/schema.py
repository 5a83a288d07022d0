"""What a recipe may say: fields here are keys of the TOML."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from personae.core import Method
from personae.errors import ConfigError
from personae.infer.samplers import Sampler
from personae.personal.delta import Delta
from personae.personal.lora import Lora
from personae.personal.tokens import Words


@dataclass(frozen=True)
class Partition:
    """How one source is spread over clients.

    "dirichlet": class proportions drawn with concentration `alpha`; "by_label": `classes_per_client` classes each;
    "by_attribute": one attribute or its absence each; "iid": at random; "unseen": as `data.partition.unseen` says, with
    `classes_per_client` or `alpha`, `images_per_client` and `images_per_new`; "fixed_new": as
    `data.partition.fixed_new` says, with `alpha`, `classes_per_client` and `images_per_new`.
    The last `num_new` of `num_clients` are held out of training and only personalize afterwards.
    """

    kind: Literal["iid", "by_label", "dirichlet", "by_attribute", "unseen", "fixed_new"]
    num_clients: int
    num_new: int = 0
    alpha: float | None = None
    classes_per_client: int | None = None
    min_images: int = 10
    images_per_client: int | None = None
    images_per_new: int | None = None


@dataclass(frozen=True)
class Data:
    """Where the images come from.

    `source` is a named data set, "clients" (`path` holds one sub-folder of images per client) or "folder" (`path` holds
    images, optionally in one sub-folder per label, and `partition` spreads them). Without a partition, "folder",
    "identity" and "thing" are the images of one client, which is called `name`.

    `heldout` is the share of each client's images that is only measured on, `heldout_new` that of a new client's where
    it is another one. `pooled` trains on everybody's images in one place, as a reference. `caption` is said of images
    that come without one, for models that read captions, and of "emoji" in place of their own; a "thing" is called so
    in its captions. `styles` and `names` are for "emoji" and "scenes", `told` for "emoji" alone, `style` and `person`
    for "identity", `thing`, a name, for "thing".
    """

    source: Literal[
        "digits", "mnist5k", "fashion", "faces", "emoji", "scenes", "thing", "identity", "clients", "folder"
    ]
    heldout: float = 0.2
    heldout_new: float | None = None
    path: str | None = None
    size: int | None = None
    channels: Literal[1, 3] = 3
    num_images: int | None = None
    on_unreadable: Literal["error", "skip"] = "error"
    new: tuple[str, ...] = ()
    partition: Partition | None = None
    pooled: bool = False
    name: str = "own"
    caption: str | None = None
    styles: tuple[str, ...] | None = None
    names: Literal["seen", "held_out", "all", "common"] | None = None
    told: bool | None = None
    style: str | None = None
    person: int | None = None
    thing: str | None = None


@dataclass(frozen=True)
class Embedding:
    """The client's vector: how many numbers, where they enter the backbone, and how they start."""

    width: int
    place: Literal["time", "blocks", "input", "token", "gate"] = "time"
    start: Literal["noise", "zero"] = "noise"


@dataclass(frozen=True)
class Backbone:
    """A U-Net by `preset`, or any local diffusers folder by `folder`, which then also brings its noise schedule.

    A folder may be a text-to-image pipeline of Stable Diffusion's kind. `frozen` keeps all its weights as they are, so
    that only the parts beside them train: `lora`, `delta`, `words`, and the embedding, which there may enter at "time"
    or "token". `half` and `recompute` save memory, as TextToImage says.
    """

    preset: Literal["tiny", "tiny_attention", "small", "cifar"] | None = None
    folder: str | None = None
    scale_shift: bool = False
    num_timesteps: int = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    embedding: Embedding | None = None
    frozen: bool = False
    lora: Lora | None = None
    delta: Delta | None = None
    words: Words | None = None
    half: bool = False
    recompute: bool = False


@dataclass(frozen=True)
class Aggregation:
    """The rule that combines a round's updates, and what one client's update may be.

    A robust rule withstands `attackers` of a round's clients. `clip_norm` is the longest change of the model that an
    update may make, in L2 norm over all that is sent; longer ones are shortened. `max_examples` is the largest number
    of examples that a client may claim.
    """

    rule: str = "mean"
    attackers: int = 0
    clip_norm: float | None = None
    max_examples: int = 1_000_000


@dataclass(frozen=True)
class Federation:
    """How many clients a round needs, and how long a server waits for them.

    `minimum` is how many updates a round needs, everyone's of the cohort when left out: clients that fail, are refused
    or come too late beyond that are counted and left out. The rest is for engine "flower": a round ends for those who
    have not answered after `deadline_seconds`, or, once `minimum` have, after `times_median` times the median of their
    own times, but not before `least_seconds`; it waits `wait_seconds` for enough clients to appear.

    Clients named in `late` take part from round `late_from` on, as somebody does who hears of it later.
    """

    minimum: int | None = None
    late: tuple[str, ...] = ()
    late_from: int = 1
    deadline_seconds: float = 3600.0
    times_median: float = 3.0
    least_seconds: float = 10.0
    wait_seconds: float = 300.0


@dataclass(frozen=True)
class Sampling:
    """How images are drawn. `steps` are sampler steps."""

    sampler: Sampler = "ddim"
    steps: int = 50
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance):
            raise ConfigError(f"guidance is {self.guidance}, expected a finite number")


@dataclass(frozen=True)
class Evaluation:
    """What is measured after training.

    `features` names the feature map ("digits", "mnist5k", "fashion", "lite0", "none", or a TorchScript file's path);
    None takes the data set's own where there is one. `num_images` are drawn per client. `loss_grid` timesteps and
    `loss_draws` noises per held-out image fix the denoising loss. In a run of one client, every `preview_rounds` rounds
    a few pictures show how far it is (0: never).
    """

    num_images: int = 200
    features: str | None = None
    loss_grid: int = 10
    loss_draws: int = 4
    kid_subset_size: int = 50
    kid_subsets: int = 50
    preview_rounds: int = 0


@dataclass(frozen=True)
class Machine:
    """Where it runs. Results have the same bits only for the same `threads` and `device`."""

    threads: int = 2
    device: str = "cpu"
    checkpoint_every: int = 1

    def __post_init__(self) -> None:
        for name in ("threads", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class Recipe:
    """One run. `cohort` is the number of clients per round, all of them when left out."""

    name: str
    rounds: int
    data: Data
    backbone: Backbone
    method: Method
    seed: int = 0
    engine: str = "in_process"
    cohort: int | None = None
    aggregation: Aggregation = field(default_factory=Aggregation)
    federation: Federation = field(default_factory=Federation)
    sampling: Sampling = field(default_factory=Sampling)
    evaluation: Evaluation = field(default_factory=Evaluation)
    machine: Machine = field(default_factory=Machine)
