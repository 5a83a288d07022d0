"""The records and Protocols that every room shares: one noun (State), the verbs of a Method, and a Plan.

Letters in shapes: `B` batch, `N` images, `M` of them by index, `T` timesteps, `*X` one x_0.
Images are shaped [C, H, W]; a vector-valued yardstick such as the Gaussian mixture uses [D] in their place, so
shapes below say `...` where either may stand. `*X` is one of these too, the same throughout a call.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor, nn

from personae.errors import ConfigError

Arrays = Mapping[str, Tensor]
"""Tensors by canonical name: the names of the bare diffusers model, and of the parts beside it."""

Facts = Mapping[str, int | float | str | bool]
"""Flat scalars that cross the wire: no None, no nesting."""

Select = Callable[[str], bool]
"""A question about a parameter's name."""

Cond = Any
"""What a denoiser is told beside x_t and t. Only the denoiser that made it looks inside."""


OptimizerName = Literal["adam", "adamw", "sgd"]

T = TypeVar("T")

# --- questions about names ---------------------------------------------------------------------------------------


def everything(name: str) -> bool:
    return True


def nothing(name: str) -> bool:
    return False


def under(*prefixes: str) -> Select:
    """True for a name that starts with one of `prefixes`."""
    return lambda name: name.startswith(prefixes)


def neither(*selects: Select) -> Select:
    """True for a name that none of `selects` claims."""
    return lambda name: not any(select(name) for select in selects)


def pick(arrays: Arrays, select: Select) -> dict[str, Tensor]:
    return {name: value for name, value in arrays.items() if select(name)}


def divide(arrays: Arrays, personal: Select) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split into (shared, personal)."""
    return pick(arrays, neither(personal)), pick(arrays, personal)


# --- randomness --------------------------------------------------------------------------------------------------


def stream(seed: int, *keys: str | int) -> torch.Generator:
    """A generator of its own for every purpose, so that no draw depends on who drew before.

    Equal arguments give equal draws on every machine; different keys give independent ones.
    """
    text = "\x1f".join(str(key) for key in (seed, *keys))
    value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(value)


# --- data --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Some images and what is known of each.

    `pixels` are bytes in 0..255, or floats already in the model's range. `captions` has one text per image, or none at
    all.
    """

    pixels: UInt8[Tensor, "N ..."] | Float32[Tensor, "N ..."]
    labels: Int64[Tensor, " N"] | None = None
    captions: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Int64[Tensor, " M"] | Sequence[int]) -> Images:
        index = torch.as_tensor(index, dtype=torch.long)
        return Images(
            self.pixels[index],
            None if self.labels is None else self.labels[index],
            tuple(self.captions[i] for i in index.tolist()) if self.captions else (),
        )

    def floats(self, index: Int64[Tensor, " M"] | None = None) -> Float32[Tensor, "M ..."]:
        """Bytes are mapped from 0..255 to [-1, 1], floats are left as they are. Without an index all N of them."""
        pixels = self.pixels if index is None else self.pixels[index]
        return pixels.float().div_(127.5).sub_(1.0) if pixels.dtype == torch.uint8 else pixels


def joined(parts: Sequence[Images]) -> Images:
    """All of them, in order. Labels and captions stay where every part has some."""
    labels = [part.labels for part in parts if part.labels is not None]
    told = all(part.captions for part in parts)
    return Images(
        torch.cat([part.pixels for part in parts]),
        torch.cat(labels) if len(labels) == len(parts) else None,
        tuple(caption for part in parts for caption in part.captions) if told else (),
    )


@dataclass(frozen=True)
class ClientData:
    """One client's images: `train` is learned from, `heldout` only measured on."""

    train: Images
    heldout: Images


@dataclass(frozen=True)
class Batch:
    """What one step of training or sampling sees of the data.

    `unconditional` is True where the null vector stands in; `clients` says whose part stands for each example, by its
    row in the model, and may be left out where the model holds one client's.
    """

    images: Float[Tensor, "B ..."]
    unconditional: Bool[Tensor, " B"]
    captions: tuple[str, ...] = ()
    clients: Int64[Tensor, " B"] | None = None

    def __len__(self) -> int:
        return len(self.images)


# --- the noun ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What one side knows, and what it sends.

    `params` load into the denoiser by name; `extras` are other tensors (moments, anchors); `facts` are scalars.
    """

    params: Arrays = field(default_factory=dict)
    extras: Arrays = field(default_factory=dict)
    facts: Facts = field(default_factory=dict)

    def num_bytes(self) -> int:
        """Size on the wire before framing: tensors at their own width, facts as UTF-8 text of key and value."""
        tensors = sum(a.numel() * a.element_size() for part in (self.params, self.extras) for a in part.values())
        return tensors + sum(len(f"{key}{value}".encode()) for key, value in self.facts.items())

    def num_values(self) -> int:
        """How many numbers `params` holds."""
        return sum(array.numel() for array in self.params.values())


@dataclass(frozen=True)
class Update:
    """What one client sends after one round. `since` is the server round that it started from; the engine sets it."""

    client: str
    num_examples: int
    sent: State
    metrics: Mapping[str, float] = field(default_factory=dict)
    since: int = 0

    def num_bytes(self) -> int:
        """Everything that leaves the client: the State, its metrics like facts, and 8 bytes for `num_examples`."""
        return self.sent.num_bytes() + State(facts=self.metrics).num_bytes() + 8


class Updates(Protocol):
    """A round's accepted updates. They are walked once, in client-name order, by exactly one of these calls."""

    def __iter__(self) -> Iterator[Update]: ...
    def combined(self) -> Arrays:
        """The updates' `params` combined by the recipe's rule."""
        ...

    def among(self, clients: Collection[str]) -> Updates:
        """The same, restricted to some clients."""
        ...


# --- gradient descent --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """Everything that one stretch of gradient descent needs.

    Units: `steps` optimizer steps; `batch_size` images per step and accumulation part.
    `condition_dropout` is the share of examples whose personal part is replaced by the null one in training.
    """

    steps: int
    lr: float
    batch_size: int
    optimizer: OptimizerName = "adam"
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    max_grad_norm: float | None = 1.0
    accumulate: int = 1
    condition_dropout: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        problems = [
            f"{n} is {getattr(self, n)}, expected at least 0"
            for n in ("steps", "weight_decay", "warmup_steps")
            if getattr(self, n) < 0
        ]
        problems += [
            f"{n} is {getattr(self, n)}, expected at least 1"
            for n in ("batch_size", "accumulate")
            if getattr(self, n) < 1
        ]
        if not self.lr > 0:
            problems.append(f"lr is {self.lr}, expected above 0")
        if not 0 <= self.condition_dropout <= 1:
            problems.append(f"condition_dropout is {self.condition_dropout}, expected 0 to 1")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            problems.append(f"max_grad_norm is {self.max_grad_norm}, expected above 0, or left out")
        if problems:
            raise ConfigError("training: " + "; ".join(problems))


class NoiseSchedule(Protocol):
    """A variance-preserving schedule: x_t = sqrt(alpha_bar[t]) x_0 + sqrt(1 - alpha_bar[t]) noise."""

    @property
    def prediction_type(self) -> str: ...
    @property
    def alpha_bar(self) -> Float32[Tensor, " T"]: ...
    @property
    def config(self) -> Mapping[str, Any]:
        """What a diffusers sampler is built from."""
        ...

    @property
    def num_timesteps(self) -> int: ...
    def add_noise(
        self, x_0: Float[Tensor, " B *X"], noise: Float[Tensor, " B *X"], t: Int64[Tensor, " B"]
    ) -> Float[Tensor, " B *X"]: ...
    def target(
        self, x_0: Float[Tensor, " B *X"], noise: Float[Tensor, " B *X"], t: Int64[Tensor, " B"]
    ) -> Float[Tensor, " B *X"]: ...


class Denoiser(Protocol):
    """A network that predicts noise, clean sample or velocity, and the parts attached to it.

    `load` is absolute: afterwards the model is the frozen base plus exactly the given parts, whatever was there before.
    It may hold several clients at once: what is per client then has a row for each, and all else they share.
    """

    @property
    def schedule(self) -> NoiseSchedule: ...
    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one x_0, without the batch."""
        ...

    def encode(self, images: Float[Tensor, "B ..."]) -> Float[Tensor, " B *X"]: ...
    def decode(self, x_0: Float[Tensor, " B *X"]) -> Float[Tensor, "B ..."]: ...
    def condition(self, batch: Batch) -> Cond: ...
    def forward(self, x_t: Float[Tensor, " B *X"], t: Int64[Tensor, " B"], cond: Cond) -> Float[Tensor, " B *X"]:
        """Units: t in [0, T)."""
        ...

    def initial(self, rng: torch.Generator, only: Select = everything) -> Arrays:
        """Freshly drawn values for the names that may move and that `only` selects."""
        ...

    def params(self) -> Arrays:
        """Copies of what may move or travel."""
        ...

    def live(self) -> Mapping[str, nn.Parameter]:
        """The same names, but the parameters themselves, for an optimizer."""
        ...

    def base(self) -> Arrays:
        """The frozen rest, read-only."""
        ...

    def load(self, params: Arrays, num_clients: int = 1) -> None:
        """Another number of clients than before makes what is per client a new parameter.

        Shapes: what is per client has `num_clients` rows.
        Raises: MismatchedNames or ShapeError, before anything has changed.
        """
        ...

    def train(self, mode: bool = True) -> Any: ...


def device_of(model: Denoiser) -> torch.device:
    """Where a denoiser is, also one of which nothing may move."""
    parameters: Mapping[str, Tensor] = model.live() or model.base()
    return next(iter(parameters.values())).device


@dataclass(frozen=True)
class Noised:
    """One training batch on its way through the denoiser."""

    x_0: Float[Tensor, " B *X"]
    t: Int64[Tensor, " B"]
    noise: Float[Tensor, " B *X"]
    x_t: Float[Tensor, " B *X"]
    cond: Cond
    prediction: Float[Tensor, " B *X"]


Loss = Callable[[Denoiser, Noised], Float[Tensor, ""]]
Penalty = Callable[[Denoiser, Noised], Float[Tensor, ""]]


def constant(value: T) -> Callable[[str], T]:
    return lambda name: value


@dataclass(frozen=True)
class Plan:
    """How local training is bent.

    What may move, what is added to the loss, and by name: a factor on the learning rate, and another optimizer than the
    Training's (None: the Training's).
    """

    may_move: Select = everything
    penalties: tuple[Penalty, ...] = ()
    rate: Callable[[str], float] = constant(1.0)
    optimizer: Callable[[str], OptimizerName | None] = constant(None)
    loss: Loss | None = None


CONCEPT = "{concept}"


@dataclass(frozen=True)
class Task:
    """A concept that somebody teaches a model: its name, the new word that stands for it, and what it is one of.

    `wording` is what is said of pictures that say nothing themselves, with CONCEPT for "a <rex>".
    """

    name: str
    word: str
    noun: str
    wording: str = CONCEPT


@dataclass(frozen=True)
class Given:
    """What a continual method asks for beside the concept's own images.

    `prior` shows other things of the same noun, drawn by the model as it was before anybody taught it; `prompts` are
    captions of other things, the same ones for every concept.
    """

    prior: Images | None = None
    prompts: tuple[str, ...] = ()


SAFE_NAME = re.compile(r"(?!.*-(real|before)$)[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
"""What a client may be called, since files are named after it; "-real" and "-before" name its grids of samples."""

NAME_RULE = (
    "up to 64 letters, digits, '.', '_' and '-', without a '.' in front, and with another end than -real or -before"
)


@dataclass(frozen=True)
class Client:
    """One participant, as it sees itself in one round. The engine has loaded `model` before any method sees it.

    `beside` are others that personalize in the same batch, each from its own data and generator; `model` then holds a
    row for each of `together`. Where concepts arrive one after the other, `tasks` are those so far, the present one
    last, and `data` is of that one alone; `ends_task` says that it is learned in this round for the last time.
    """

    name: str
    data: ClientData
    model: Denoiser
    rng: torch.Generator
    plan: Plan = Plan()
    beside: tuple[Client, ...] = ()
    tasks: tuple[Task, ...] = ()
    given: Given = Given()
    ends_task: bool = False

    @property
    def together(self) -> tuple[Client, ...]:
        """This client, then those beside it."""
        return (self, *self.beside)

    @property
    def task(self) -> Task:
        """The concept that is being learned."""
        return self.tasks[-1]

    def update(self, sent: State, **metrics: float) -> Update:
        return Update(self.name, len(self.data.train), sent, metrics)


# --- the verbs ----------------------------------------------------------------------------------------------


class Method(Protocol):
    """A federated method: a frozen dataclass of hyperparameters. State goes in and comes out; nothing is remembered."""

    @property
    def personal(self) -> Select:
        """Names that never leave a client."""
        ...

    def init(self, initial: Arrays) -> State:
        """Server, once."""
        ...

    def broadcast(self, server: State, client: str) -> State:
        """Server, to one client."""
        ...

    def local(self, client: Client, got: State, kept: State) -> tuple[Update, State]:
        """Client, one round: what it sends, and what it keeps."""
        ...

    def aggregate(self, server: State, updates: Updates) -> State:
        """Server, one round."""
        ...

    def release(self, server: State) -> State:
        """Server, at any time: what a client is sent to personalize with, and what is evaluated."""
        ...

    def personalize(self, client: Client, got: State, kept: State) -> State:
        """Client: what it samples with, given what was released. Sends nothing.

        A client with others beside it is given only to a method whose personal part is per client. Nothing was kept
        then, and what is returned has a row for each.
        """
        ...


# --- the seam ----------------------------------------------------------------------------------------------------


class Members(Protocol):
    """The server's half of the participants: who they are, and who takes part when."""

    @property
    def train(self) -> Sequence[str]:
        """Clients that take part in rounds."""
        ...

    @property
    def new(self) -> Sequence[str]:
        """Clients that come afterwards and only personalize."""
        ...

    def initial(self, seed: int) -> Arrays: ...
    def cohort(self, round: int, seed: int, known: Sequence[str]) -> Sequence[str]:
        """Who takes part, out of the training clients that can be reached now."""
        ...


class Site(Protocol):
    """The clients' half: makes one client with its own data and a model to work in."""

    def client(self, name: str, when: int | str, seed: int) -> Client:
        """`when` is the round, or the name of a later stage; it decides the client's random draws."""
        ...


Rule = Callable[[Iterator[Update]], Arrays]
"""From a round's updates to tensors."""


@dataclass(frozen=True)
class Job:
    """One federated run, whichever engine carries it.

    `max_examples` caps the weight that one client can claim. `minimum` is how many updates a round needs; clients that
    fail or are refused beyond that are counted and left out (None: everyone's update is needed). `clip_norm` is the
    largest L2 norm of a client's change that is taken as it is; a larger one is scaled down. `folder` None keeps
    everything in memory.
    """

    method: Method
    members: Members
    site: Site
    rounds: int
    seed: int
    rule: Rule
    max_examples: int = 1_000_000
    minimum: int | None = None
    clip_norm: float | None = None
    folder: Path | None = None
    checkpoint_every: int = 1


@dataclass(frozen=True)
class Round:
    """What a watcher sees when a client has finished, and (with `done`) when its round or stage has.

    Bytes and seconds are of this round so far; `refused` clients failed or sent what could not be taken. In stage
    "measure", of a study, `client` names a cell and the counts are of cells; in "learn", of a taught model, it names
    a concept, rounds are concepts and the counts are of stretches, and of one more: what is kept, measured and drawn.
    """

    stage: Literal["train", "personalize", "evaluate", "measure", "learn"]
    round: int
    rounds: int
    client: str
    clients_done: int
    clients: int
    loss: float
    bytes_up: int
    bytes_down: int
    seconds: float
    done: bool
    refused: int = 0


@dataclass(frozen=True)
class Traffic:
    """Bytes that one client sent and received over a run."""

    up: int = 0
    down: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.up + other.up, self.down + other.down)


@dataclass(frozen=True)
class Run:
    """What an engine returns: what the server released, every client's personal state, and what it cost.

    Traffic counts the rounds, and the one download of the released model before a client personalizes.
    """

    server: State
    personal: Mapping[str, State]
    traffic: Mapping[str, Traffic]
    rounds: Sequence[Mapping[str, Any]]


Watch = Callable[[Round], None]
"""Is told where a run stands."""


def ignore(round: Round) -> None:
    """The watcher that does nothing."""


class Engine(Protocol):
    def run(self, job: Job, *, resume: bool = False, watch: Watch = ignore) -> Run: ...
