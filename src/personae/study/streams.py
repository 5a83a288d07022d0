"""Federated and continual at once: clients share what they may, and each one's concepts arrive over rounds.

A cell is a pair of a federated and a continual method, joined by `OverTasks`, over everybody's concepts. After each of
its concepts, a client's own model is asked for all of its concepts so far; what the server released by then is asked
for them by their nouns, and for pictures of the seen world. A concept's pictures are held-out ones.

A gain is by how much a loss is below that of the untaught model, which is told the noun. All pairs see the same
pictures and are asked the same noises.
"""

from __future__ import annotations

import dataclasses
import time
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from personae.aggregate.mean import mean
from personae.artefact.run_folder import RunFolder
from personae.backbone.text2image import TextToImage
from personae.continual import CONTINUAL, OverTasks
from personae.continual.contract import Continual
from personae.core import NAME_RULE, SAFE_NAME, Arrays, Images, Job, Method, State, Training, stream
from personae.data.emoji import SEEN_STYLES, emoji, scenes
from personae.data.tasks import Period, TaskStream, word_at
from personae.engine.in_process import InProcess
from personae.engine.task_population import TaskPopulation
from personae.errors import ConfigError
from personae.evaluate.over_tasks import scores_over_tasks
from personae.methods import METHODS
from personae.recipe.config import change, check_fields, nearest, plain, read_table
from personae.sequence.concepts import given, read_concept
from personae.sequence.config import CONSOLIDATION, METHOD, Concept, SequenceRecipe, parse_sequence
from personae.sequence.model import model_for
from personae.sequence.scores import loss_of
from personae.study.streams_report import answer
from personae.study.study import Answer, Cell, Row

Matrix = list[list[float | None]]

KEPT_LAYERS = ["*.lora_B"]
"""What `shared_rep` keeps where nobody says otherwise: with no steps for it alone that is FedSA-LoRA."""

UNASKED = Training(1, 1e-3, 1)
"""Of methods of which only the kind is asked."""


@dataclass(frozen=True)
class Pair:
    """Both by their names in recipes. `changes` are "key=value" of the recipe, in which [method] is the federated one
    and [continual] the other."""

    method: str
    continual: str
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Participant:
    """A client, and its concepts in the order in which they arrive."""

    name: str
    concepts: tuple[Concept, ...]


@dataclass(frozen=True)
class Streams:
    """`recipe` gives the model, the lesson and the scoring; its concepts and method are left aside. A concept is there
    for `lesson.stretches` rounds, in each of which a client trains for `lesson.training`.

    `changes` are for every pair. `num_seen` things alone and as many scenes of the seen world are measured on.
    """

    recipe: str
    clients: tuple[Participant, ...]
    pairs: tuple[Pair, ...]
    seeds: tuple[int, ...] = (0,)
    num_seen: int = 32
    changes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names, both = [each.name for each in self.clients], [(pair.method, pair.continual) for pair in self.pairs]
        if not names or len(set(names)) < len(names) or not all(map(SAFE_NAME.fullmatch, names)):
            raise ConfigError(f"clients are {names}; expected one or more, each with a name of its own: {NAME_RULE}")
        if few := [each.name for each in self.clients if len(each.concepts) < 2]:
            raise ConfigError(f"{', '.join(few)} have fewer than two concepts; nothing can be forgotten")
        if not both or len(set(both)) < len(both):
            raise ConfigError(f"pairs are {both}; expected one or more, each once")
        if not self.seeds or self.num_seen < 1:
            raise ConfigError(f"seeds are {list(self.seeds)} and num_seen {self.num_seen}; expected some, at least 1")
        for pair in self.pairs:
            self.read(pair, 0)

    def cells(self, found: Sequence[Row]) -> Sequence[Cell]:
        return [
            {"method": pair.method, "continual": pair.continual, "seed": seed}
            for seed in self.seeds
            for pair in self.pairs
        ]

    def measure(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        """A cell that was stopped is measured from its first round."""
        pair = next(p for p in self.pairs if (p.method, p.continual) == (cell["method"], cell["continual"]))
        recipe, method = self.read(pair, seed + int(cell["seed"]))
        people = arriving(self.clients, recipe, method.continual)
        with TemporaryDirectory() as place:
            moments, cost = followed(people, method, recipe.seed, Path(place) / "run")
        return {
            "concepts": {each.name: [concept.name for concept in each.concepts] for each in self.clients},
            **_known(people, method.continual, recipe, moments),
            **_of_the_seen(people, recipe, moments, self.num_seen),
            **cost,
        }

    def answer(self, found: Sequence[Row]) -> Answer:
        methods = {name: federated(name, UNASKED) for name in METHODS}
        return answer(found, methods, {name: continual_by_name(name) for name in CONTINUAL})

    def read(self, pair: Pair, seed: int) -> tuple[SequenceRecipe, OverTasks]:
        """Raises: ConfigError, also for a pair that does not go together, with the reason."""
        table, _ = read_table(self.recipe, [*self.changes, f"seed={seed}"])
        table.pop("concepts", None)
        table[METHOD] = {"name": pair.continual, **_needed(pair.continual)}
        for each in pair.changes:
            change(table, each)
        own = table.pop("method", {})
        recipe, continual = parse_sequence(table, f"pair {pair.method}, {pair.continual}")
        return recipe, OverTasks(federated(pair.method, recipe.lesson.training, own), continual)


# --- methods by their names -------------------------------------------------------------------------------------------


def federated(name: str, training: Training, options: Mapping[str, Any] | None = None) -> Method:
    """With `training` in a round; none of a tail alone and none when all is over, unless `options` give them some.

    Raises: ConfigError.
    """
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is unknown{nearest(name, METHODS)}")
    kind, own = METHODS[name], plain(training)
    stretches = [key for key, hint in typing.get_type_hints(kind).items() if hint is Training]
    table: dict[str, Any] = {key: {**own, "steps": 0} if key in ("tail", "adapt") else own for key in stretches}
    table |= {"personal_layers": KEPT_LAYERS} if name == "shared_rep" else {}
    problems: list[str] = []
    method = check_fields(kind, {**table, **(options or {})}, "method.", problems)
    if problems:
        raise ConfigError(f"{name}: {'; '.join(problems)}")
    return typing.cast("Method", method)


def continual_by_name(name: str) -> Continual:
    """As its defaults have it."""
    return typing.cast("Continual", check_fields(CONTINUAL[name], _needed(name), "", []))


def _needed(name: str) -> dict[str, Any]:
    """What a continual method has no default for."""
    return {"consolidation": dict(CONSOLIDATION)} if name == "dsc" else {}


# --- clients whose concepts arrive ------------------------------------------------------------------------------------


def arriving(clients: Sequence[Participant], recipe: SequenceRecipe, continual: Continual) -> TaskPopulation:
    """Everybody's stream of tasks, and the one model. Raises: ArtefactError, ConfigError, DataError."""
    placed = {each.name: [_placed(concept, at) for at, concept in enumerate(each.concepts, 1)] for each in clients}
    longest = max(placed.values(), key=len)
    model = model_for(recipe, continual, [recipe.task(concept) for concept in longest])
    streams = {
        name: TaskStream(tuple(_period(concept, recipe, continual, model) for concept in concepts))
        for name, concepts in placed.items()
    }
    return TaskPopulation(model, streams, tuple(placed))


def _placed(concept: Concept, place: int) -> Concept:
    """Called by its place, so that its word is the one that all clients' models have there."""
    return dataclasses.replace(concept, name=word_at(place).strip("<>"))


def _period(concept: Concept, recipe: SequenceRecipe, continual: Continual, model: TextToImage) -> Period:
    task, data = recipe.task(concept), read_concept(concept, continual, recipe, model.image_shape)
    model.captions.check(sorted({*data.train.captions, *data.heldout.captions}))
    return Period(task, data, recipe.lesson.stretches, given(continual, recipe, task, model))


# --- the rounds -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """After a round in which some concept ended: what the server released, and what every client keeps."""

    round: int
    released: Arrays
    kept: Mapping[str, State]

    def own(self, name: str) -> Arrays:
        """What this client draws with."""
        return {**self.released, **self.kept[name].params}


def followed(people: TaskPopulation, method: OverTasks, seed: int, folder: Path) -> tuple[list[Moment], dict[str, Any]]:
    """All rounds, in process, with a stop wherever a concept ends: the run goes on from there in the same bits.

    The cost: bytes that a client sends, by round; bytes that it keeps in the end; seconds of one processor.
    """
    job, seconds = Job(method, people, people, people.rounds, seed, mean, folder=folder), 0.0
    moments: list[Moment] = []
    for number in sorted({last for own in people.streams.values() for last in own.last_rounds}):
        started = time.process_time()
        run = InProcess().run(dataclasses.replace(job, rounds=number), resume=bool(moments))
        seconds += time.process_time() - started
        kept = {name: RunFolder(folder).last_kept(name) for name in people.train}
        moments.append(Moment(number, run.server.params, kept))
    sent = {
        name: [record["clients"][name]["bytes_up"] for record in run.rounds if name in record["clients"]]
        for name in people.train
    }
    bytes_kept = {name: state.num_bytes() for name, state in moments[-1].kept.items()}
    return moments, {"bytes_up": sent, "bytes_kept": bytes_kept, "learning_seconds": round(seconds, 3)}


# --- what is known ----------------------------------------------------------------------------------------------------


def _known(
    people: TaskPopulation, continual: Continual, recipe: SequenceRecipe, moments: Sequence[Moment]
) -> dict[str, Any]:
    """By client: each concept's loss by the untaught model, and after each concept the gain on all so far, of its own
    model and of what was released, which knows nouns alone. The latter is None where nothing was."""
    model, start = people.model, _untaught(people)
    found: dict[str, Any] = {"untaught": {}, "gains": {}, "shared": {} if moments[-1].released else None}
    for name, own in people.streams.items():
        heldout = [period.data.heldout for period in own.periods]
        by_noun = [_by_noun(period, continual) for period in own.periods]
        after = [moment for moment in moments if moment.round in own.last_rounds]
        model.load(start)
        found["untaught"][name] = untaught = [loss_of(model, recipe, each) for each in by_noun]
        found["gains"][name] = _gains(model, [moment.own(name) for moment in after], heldout, untaught, recipe)
        if moments[-1].released:
            released = [{**start, **moment.released} for moment in after]
            found["shared"][name] = _gains(model, released, by_noun, untaught, recipe)
    return found


def _gains(
    model: Any, after: Sequence[Arrays], heldout: Sequence[Images], untaught: Sequence[float], recipe: SequenceRecipe
) -> Matrix:
    scoring = recipe.scoring
    scores = scores_over_tasks(
        model, after, heldout, grid=scoring.loss_grid, draws=scoring.loss_draws, seed=recipe.seed
    )
    return [[None if s is None else s + before for s, before in zip(row, untaught, strict=True)] for row in scores]


def _by_noun(period: Period, continual: Continual) -> Images:
    """A concept's held-out pictures, told as somebody says them who does not know the word."""
    held, said = period.data.heldout, continual.said(period.task)
    return dataclasses.replace(held, captions=tuple(text.replace(said, period.task.noun) for text in held.captions))


def _of_the_seen(
    people: TaskPopulation, recipe: SequenceRecipe, moments: Sequence[Moment], count: int
) -> dict[str, Any]:
    """Of things alone and of scenes that the model was pre-trained on: the untaught model's loss, and by how much it is
    higher with what was released after each task, None where nothing was, and with each client's own model in the end.
    """
    things, model, start, found = emoji(SEEN_STYLES, "seen").images, people.model, _untaught(people), dict[str, Any]()
    order = torch.randperm(len(things), generator=stream(recipe.seed, "seen"))[:count]
    for kind, images in {"things": things[order], "scenes": scenes(count, recipe.seed).images}.items():
        losses = []
        released = [{**start, **moment.released} for moment in moments if moment.released]
        for params in (start, *released, *(moments[-1].own(name) for name in people.train)):
            model.load(params)
            losses.append(loss_of(model, recipe, images))
        changes = [loss - losses[0] for loss in losses[1:]]
        own = dict(zip(people.train, changes[len(released) :], strict=True))
        found[kind] = {"untaught": losses[0], "released": changes[: len(released)] or None, "own": own}
    return {"seen": found}


def _untaught(people: TaskPopulation) -> Arrays:
    return people.model.initial(stream(0, "untaught"))
