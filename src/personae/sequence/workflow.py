"""What a user does with a model that learns concept after concept: begin, teach, take up again, forget, draw.

    config.toml          the recipe with every value filled in
    environment.json     versions, platform, threads, commit
    events.jsonl         what has happened; it and what survived are told of in history.py
    samples/             what was drawn of each concept when it was new
    summary.json, report.html

Whatever stops a run loses the stretch of a lesson that was going on, and nothing before.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personae.artefact.folder import begun, held, refuse_existing
from personae.artefact.save import (
    digest,
    read_json,
    read_toml,
    write_bytes,
)
from personae.backbone.shipped import is_shipped
from personae.backbone.text2image import TextToImage
from personae.continual import learn
from personae.continual.contract import Continual, Forgets, caption, load_kept, words_of
from personae.core import Client, ClientData, Images, Round, State, Task, Watch, ignore, stream
from personae.errors import ArtefactError, ConfigError, DataError, Diverged, PersonaeError, ShapeError
from personae.evaluate.grids import save_grid
from personae.infer.regions import InRegions, Region
from personae.infer.sample import draw
from personae.infer.samplers import check_steps
from personae.personal.tokens import is_word
from personae.recipe.build import pictures_and_captions, with_absolute_path
from personae.recipe.config import SEQUENCE, plain, read_table
from personae.recipe.environment import keep_environment
from personae.sequence.concepts import general_prompts, given, read_concept
from personae.sequence.config import (
    Concept,
    SequenceRecipe,
    method_name,
    parse_sequence,
    refuse_used,
    sequence_toml,
)
from personae.sequence.history import History, data_of
from personae.sequence.model import model_for
from personae.sequence.report import write_sequence_report
from personae.sequence.scores import drift_of, loss_of, saying, scores_of

CLIENT = "own"


def run_sequence(
    recipe: str | Path, out: str | Path | None = None, *, overrides: Sequence[str] = (), watch: Watch = ignore
) -> SavedSequence:
    """Teach all concepts of a recipe, in a folder of its own, `runs/<name>` by default.

    Raises: ConfigError, DataError, ArtefactError (the folder exists).
    """
    plan, method = parse_sequence(*read_table(recipe, overrides))
    saved = begin_sequence(plan, method, out)
    with saved.dropped_if_refused():
        return saved.finish(watch)


def begin_sequence(
    plan: SequenceRecipe, method: Continual, out: str | Path | None = None, first: Sequence[Concept] = ()
) -> SavedSequence:
    """A folder in which nothing has been taught yet. What is to be taught `first` is looked at before there is one.

    Raises: ConfigError, ArtefactError, DataError.
    """
    plan = _absolute(plan)
    saved = SavedSequence(Path(out) if out is not None else Path("runs") / plan.name, plan, method)
    refuse_existing(saved.folder)
    saved.check([*plan.concepts, *first])
    with begun(saved.folder):
        write_bytes(saved.folder / "config.toml", sequence_toml(plan, method).encode())
    return saved


def is_sequence(folder: str | Path) -> bool:
    """Raises: ArtefactError, when its config.toml cannot be read."""
    config = Path(folder) / "config.toml"
    return config.is_file() and SEQUENCE in read_toml(config)


def open_sequence(folder: str | Path, device: str | None = None) -> SavedSequence:
    """Raises: ArtefactError, when the folder holds no such run."""
    path = Path(folder)
    if not is_sequence(path):
        raise ArtefactError(
            f"{path} holds no model that learns concept after concept; begin one with: personae learn {path} "
            '--model MODEL --method NAME --concept NAME --data DIR --noun "dog"'
        )
    where = path / "config.toml"
    plan, method = parse_sequence(read_toml(where), str(where))
    if device is not None:
        plan = dataclasses.replace(plan, machine=dataclasses.replace(plan.machine, device=device))
    return SavedSequence(path, plan, method)


@dataclasses.dataclass(frozen=True)
class SavedSequence:
    """A model on disk that learns concept after concept."""

    folder: Path
    recipe: SequenceRecipe
    method: Continual

    # --- what has happened ------------------------------------------------------------------------------------------

    @property
    def history(self) -> History:
        return History(self.folder)

    @property
    def events(self) -> list[dict[str, Any]]:
        return self.history.events

    @property
    def concepts(self) -> list[str]:
        """Who can be drawn, in the order of learning."""
        return [task.name for task in self.tasks]

    @property
    def tasks(self) -> list[Task]:
        wording = self.recipe.wording
        return [Task(event["concept"], event["word"], event["noun"], wording) for event in self.history.learned]

    @property
    def kept(self) -> State:
        """All that survived. Raises: ArtefactError."""
        return self.history.kept

    @property
    def summary(self) -> dict[str, Any]:
        return dict(read_json(self.folder / "summary.json"))

    def began_as(self, plan: SequenceRecipe, method: Continual) -> bool:
        """Whether the folder was made from these."""
        return (_absolute(plan), method) == (self.recipe, self.method)

    # --- what a user does -------------------------------------------------------------------------------------------

    def finish(self, watch: Watch = ignore) -> SavedSequence:
        """Teach what was being taught, then what the recipe lists and nobody has taught yet, then report.

        Raises: ArtefactError, when there is nothing that could be gone on with.
        """
        if (waiting := self.history.waiting) is not None:
            self.learn(waiting, watch=watch)
        taught = {event["concept"] for event in self.events}
        for concept in self.recipe.concepts:
            if concept.name not in taught:
                self.learn(concept, watch=watch)
        if not self.events:
            raise ArtefactError(
                f"{self.folder} was begun, and nothing taught yet; give the command that began it again"
            )
        self.report()
        return self

    @contextmanager
    def dropped_if_refused(self) -> Iterator[None]:
        """Remove a folder that was begun for what is now refused, unless something was taught or trained there.

        A disk that is full refuses nothing: such a run is gone on with.
        """
        try:
            yield
        except (ConfigError, DataError, ShapeError):
            if not self.events and not self.history.has_lesson:
                for name in ("config.toml", "environment.json"):
                    (self.folder / name).unlink(missing_ok=True)
            raise

    def learn(self, concept: Concept, *, watch: Watch = ignore) -> dict[str, Any]:
        """Teach one more concept. Returns its event. A lesson that was stopped is taken up where it was.

        Warns: UserWarning, when a lesson on another concept was stopped, which is given up.
        Raises: ConfigError, when the name has been used, or the model has no room; DataError, for the pictures;
        ArtefactError, when the model is not the one that the run began with.
        """
        concept = dataclasses.replace(concept, data=with_absolute_path(concept.data))
        with held(self.folder):
            refuse_used([event["concept"] for event in self.events], [concept.name])
            self.history.refuse_lost_events()
            torch.set_num_threads(self.recipe.machine.threads)
            machine = self.recipe.machine
            task = self.recipe.task(concept)
            model = self.model([*self.tasks, task])
            data = read_concept(concept, self.method, self.recipe, model.image_shape)
            model.captions.check(sorted({*data.train.captions, *data.heldout.captions}))
            if (waiting := self.history.waiting) is not None and waiting.name != concept.name:
                warnings.warn(f"the lesson on {waiting.name}, which was stopped, is given up", stacklevel=2)
            keep_environment(self.folder, machine.threads, machine.device)
            started = time.perf_counter()
            kept = self._taught(concept, task, data, model, watch)
            seconds = time.perf_counter() - started
            figures = self._figures(model, kept, [*self.tasks, task], data.heldout)
            self._refuse_diverged(concept, kept, figures)
            event = {
                "event": "learn",
                "concept": concept.name,
                "word": task.word,
                "noun": task.noun,
                "data": plain(concept.data),
                "images": digest(pictures_and_captions(data)),
                "base": digest(model.base()),
                "num_images": len(data.train),
                "seconds": round(seconds, 3),
                "bytes": kept.num_bytes(),
                "facts": dict(kept.facts),
                "learned_with": self._learns_with(),
                **figures,
            }
            self._draw(model, task)
            self.history.append(event, kept)
            at, stretches = len(self.concepts), self.recipe.lesson.stretches + 1
            total = max(at, len(self.recipe.concepts))
            watch(Round("learn", at, total, concept.name, stretches, stretches, math.nan, 0, 0, seconds, True))
        self.report()
        return event

    def forget(self, name: str) -> str:
        """Remove a concept, and what was drawn of it. Returns what could not be removed, in a sentence.

        Raises: ConfigError, for an unknown concept, and while a lesson waits to be gone on with.
        """
        with held(self.folder):
            there = self.concepts
            if name not in there:
                raise ConfigError(f"no concept is called {name!r} here; there are {', '.join(there) or 'none yet'}")
            if (waiting := self.history.waiting) is not None:
                raise ConfigError(
                    f"the lesson on {waiting.name!r} was stopped, and goes on from what is to be forgotten; finish it "
                    f"first: personae resume {self.folder}"
                )
            task = next(task for task in self.tasks if task.name == name)
            kept, own = self.kept, words_of(task)
            params = {key: value for key, value in kept.params.items() if key not in own}
            extras = {key: value for key, value in kept.extras.items() if _whose(key) != name}
            removed = len(kept.params) - len(params) + len(kept.extras) - len(extras)
            remains = self._remains(params)
            after = self._without(State(params, extras, kept.facts), [each for each in self.tasks if each != task])
            for drawn in (self.folder / "samples").glob(f"*/{name}.png"):
                drawn.unlink()
            event = {"event": "forget", "concept": name, "removed": removed, "remains": remains}
            self.history.append(event | {"bytes": after.num_bytes()}, after)
        self.report()
        return remains

    def sample(
        self,
        prompt: str,
        num_images: int = 16,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        regions: Sequence[Region] = (),
    ) -> Tensor:
        """Pictures of what a prompt says, uint8 [num_images, C, H, W]; concepts by their words, such as "a <rex>".
        Regions start from the same noise as the prompt alone.

        Raises: ConfigError, when a prompt or region says a word that nobody has taught, or is too long.
        """
        says = " ".join([prompt, *(region.caption for region in regions)]).lower()
        tasks, kept = self.tasks, self.kept  # together, and before the model is opened, which takes long
        _note_near_misses(says, tasks)
        known = {task.word for task in tasks}
        said = {piece for piece in _words_in(says) if piece not in known}
        if said:
            raise ConfigError(
                f"{', '.join(sorted(said))}: nobody has taught that; words are {', '.join(sorted(known)) or 'none yet'}"
            )
        torch.set_num_threads(self.recipe.machine.threads)
        model = self.model(tasks)
        self.method.compose(model, kept, [task.name for task in tasks if task.word in says])
        options = self.recipe.sampling
        return draw(
            InRegions(model, regions),
            (prompt,) * num_images,
            stream(seed, "sample", prompt),
            steps=options.steps if steps is None else steps,
            guidance=options.guidance if guidance is None else guidance,
        )

    def report(self) -> Path:
        """Write summary.json and report.html from what the folder holds."""
        return write_sequence_report(self.folder, self.recipe, self.method, self.events)

    # --- pieces -----------------------------------------------------------------------------------------------------

    def model(self, tasks: Sequence[Task]) -> TextToImage:
        """With the method's parts and a word for each of these. Raises: ArtefactError, ConfigError."""
        self._refuse_other_method()
        model = model_for(self.recipe, self.method, tasks)
        began = next((event["base"] for event in self.events if "base" in event), None)
        if began is not None and began != digest(model.base()):
            raise ArtefactError(
                f"the weights in {self.recipe.model} are not those that {self.folder} began with, and what was learned "
                "belongs to these; put the former pipeline back, or begin a new run"
            )
        return model

    def check(self, concepts: Sequence[Concept]) -> None:
        """So that what cannot be taught is refused before there is a folder. Raises: ConfigError, ArtefactError,
        DataError."""
        model = self.model([self.recipe.task(concept) for concept in concepts])
        check_steps("dpmsolver++", self.recipe.sampling.steps, model.schedule.num_timesteps)
        most, scoring = model.schedule.num_timesteps, self.recipe.scoring
        if max(scoring.loss_grid, scoring.draws) > most:
            raise ConfigError(
                f"scoring: loss_grid is {scoring.loss_grid}, draws {scoring.draws}; the model has {most} timesteps"
            )
        for concept in concepts:
            data = read_concept(concept, self.method, self.recipe, model.image_shape)
            model.captions.check(sorted({*data.train.captions, *data.heldout.captions}))

    def _taught(self, concept: Concept, task: Task, data: ClientData, model: TextToImage, watch: Watch) -> State:
        lesson, history, images = self.recipe.lesson, self.history, digest(pictures_and_captions(data))
        done, reached = history.reached(concept, images)
        given_ = given(self.method, self.recipe, task, model)
        rng = stream(self.recipe.seed, "lesson")  # every stretch begins with draws of its own
        client = Client(CLIENT, data, model, rng, tasks=(*self.tasks, task), given=given_)
        started, number = time.perf_counter(), len(self.concepts) + 1
        total = max(number, len(self.recipe.concepts))

        def after(count: int, state: State) -> None:
            history.reach(concept, images, count, state)
            loss, seconds = float(state.facts.get("loss", float("nan"))), time.perf_counter() - started
            watch(Round("learn", number, total, concept.name, count, lesson.stretches + 1, loss, 0, 0, seconds, False))

        return learn(
            self.method,
            lesson.training,
            client,
            self.kept,
            self.recipe.seed,
            stretches=lesson.stretches,
            done=done,
            reached=reached,
            after=after,
        )

    def _refuse_diverged(self, concept: Concept, kept: State, figures: Mapping[str, Any]) -> None:
        """Raises: Diverged, and the lesson is begun anew next time."""
        lost = [name for name, value in (*kept.params.items(), *kept.extras.items()) if not value.isfinite().all()]
        losses = [figures["drift"], figures["untaught"], *(score["loss"] for score in figures["scores"].values())]
        lost += ["what is measured of it"] * any(not math.isfinite(loss) for loss in losses)
        if lost:
            self.history.drop_lesson()
            raise Diverged(
                CLIENT,
                f"what was learned of concept {concept.name!r} is not finite in {lost[0]}; earlier concepts are as "
                "they were. Lower lesson.training.lr in config.toml, and teach it again",
            )

    def _learns_with(self) -> dict[str, Any]:
        """What has to stay as it is from the first concept on."""
        recipe, method = self.recipe, {"name": method_name(self.method), **plain(self.method)}
        fixed = {"wording": recipe.wording, "num_vectors": recipe.num_vectors}
        return fixed | {f"{SEQUENCE}.{key}": value for key, value in method.items()}

    def _refuse_other_method(self) -> None:
        """Raises: ArtefactError, when config.toml was edited where it matters to what is kept."""
        now = self._learns_with()
        began: dict[str, Any] = next((each["learned_with"] for each in self.events if "learned_with" in each), now)
        for key in sorted({*now, *began}):
            if began.get(key) != now.get(key):
                raise ArtefactError(
                    f"{self.folder / 'config.toml'} has {key} = {now.get(key)!r}, and what is kept there was learned "
                    f"with {began.get(key)!r}; put it back, or begin another run"
                )

    def _figures(self, model: TextToImage, kept: State, tasks: Sequence[Task], new: Images) -> dict[str, Any]:
        """The row of every matrix that this moment gives, and how far the model has moved from the untaught one."""
        nouns = frozenset(word for task in tasks for word in task.noun.split())
        others = general_prompts(model, self.recipe, self.recipe.scoring.num_general, nouns)
        drift = drift_of(model, kept, self.recipe, others)
        load_kept(model, State(), stream(self.recipe.seed, "untaught"))
        said = {task.name: self.method.said(task) for task in tasks}
        untaught = loss_of(model, self.recipe, saying(new, said[tasks[-1].name], tasks[-1].noun))
        self.method.compose(model, kept, [task.name for task in tasks])
        heldout = {**self._earlier(model), tasks[-1].name: new}
        scores = scores_of(model, self.recipe, heldout, said, {task.name: task.noun for task in tasks})
        return {"drift": drift, "untaught": untaught, "scores": scores}

    def _earlier(self, model: TextToImage) -> dict[str, Images]:
        """Held-out pictures of earlier concepts, to measure on, of those whose pictures are where they were."""
        found = {}
        for event in self.history.learned:
            try:
                concept = Concept(event["concept"], event["noun"], data_of(event["data"]))
                data = read_concept(concept, self.method, self.recipe, model.image_shape)
            except PersonaeError:
                continue
            if digest(pictures_and_captions(data)) == event["images"]:
                found[concept.name] = data.heldout
        return found

    def _draw(self, model: TextToImage, task: Task) -> None:
        """What the concept looks like now, in samples/<new concept>/<concept>.png, and what all others do; of those,
        while a recipe has more concepts to come, nothing is drawn."""
        options, count = self.recipe.sampling, self.recipe.scoring.num_images
        taught = {task.name, *(event["concept"] for event in self.events)}
        last = all(concept.name in taught for concept in self.recipe.concepts)
        for each in [*(self.tasks if last else ()), task]:
            said = (caption(each, self.method.said(each)),) * count
            rng = stream(self.recipe.seed, "shown", each.name)
            pictures = draw(model, said, rng, steps=options.steps, guidance=options.guidance)
            folder = self.folder / "samples" / task.name
            folder.mkdir(parents=True, exist_ok=True)
            save_grid(folder / f"{each.name}.png", pictures, columns=count)

    def _without(self, kept: State, tasks: Sequence[Task]) -> State:
        """What is kept without a concept; of what all share, where the method can take it out there."""
        if not isinstance(self.method, Forgets):
            return kept
        torch.set_num_threads(self.recipe.machine.threads)
        model = self.model(tasks)
        load_kept(model, kept, stream(self.recipe.seed, "forgetting"))
        last = frozenset(tasks[-1].noun.split()) if tasks else frozenset[str]()  # as in the last lesson
        return self.method.forget(model, kept, general_prompts(model, self.recipe, self.recipe.num_prompts, last))

    def _remains(self, params: Mapping[str, Tensor]) -> str:
        if all(map(is_word, params)) or isinstance(self.method, Forgets):
            return f"Nothing of it remains in the model: no other part had learned it. {LOGGED}"
        return (
            "Its word is gone. What it changed in weights that all concepts share cannot be taken out again: teach the "
            f"other concepts anew in another run, if it must be. {LOGGED}"
        )


LOGGED = "That it was taught, from which folder, and its figures stay in events.jsonl and the report."


def _whose(key: str) -> str | None:
    """Of "pool.rex/...", as methods name what they keep of one concept, "rex". Names of concepts may have dots."""
    front, own, _ = key.partition("/")
    return front.partition(".")[2] if own else None


def _note_near_misses(says: str, tasks: Sequence[Task]) -> None:
    """Warns: UserWarning, when a prompt has a concept's name without its word."""
    for task in tasks:
        if task.word not in says and re.search(rf"(?<![\w<])(<\s*)?{re.escape(task.name.lower())}(?![\w>])", says):
            warnings.warn(f"the prompt says {task.name}, and not {task.word}, which draws the concept", stacklevel=3)


def _words_in(prompt: str) -> list[str]:
    """Everything that looks like a taught word."""
    return re.findall(r"<[^<>\s]+>", prompt.lower())


def _absolute(plan: SequenceRecipe) -> SequenceRecipe:
    """Paths as they must stand in a run's folder: independent of where the command was called."""
    model = plan.model if is_shipped(plan.model) else str(Path(plan.model).resolve())
    concepts = tuple(dataclasses.replace(each, data=with_absolute_path(each.data)) for each in plan.concepts)
    return dataclasses.replace(plan, model=model, concepts=concepts)
