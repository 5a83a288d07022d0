"""Clients that come when groups are there: are they told apart, does it help them, does it harm the others?

In every federation one style is withheld: its clients come in round `late_from`, and with them one client of each other
style, another one for each withheld style. "words": everybody's words and descriptions, with which all others begin.
"together": nobody is late. "late": they come in that round. "without": they never come. "adapt": a newcomer of a known
style trains alone, round after round, from its group's adapter and from nothing; its groups are those of "without", and
its oracle is the loss that it has in "together".

Losses are those of everybody's adapter as the run leaves it: with `method.adapt.steps` 0 that is the group's, and says
what newcomers did to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personae.aggregate.membership import NEWCOMER, groups_in
from personae.core import Arrays, Job, State, pick
from personae.data.emoji import STYLES
from personae.engine.in_process import personalize_one
from personae.engine.rounds import load_parts
from personae.errors import ConfigError
from personae.evaluate.loss import denoising_loss
from personae.methods.cluster_lora import ClusterLora
from personae.personal.lora import is_lora
from personae.recipe.build import Clients, build_clients, build_job
from personae.recipe.config import load_recipe
from personae.recipe.saved import SavedRun
from personae.recipe.workflow import open_run
from personae.study.bench import adapting, trained
from personae.study.by_style import WORDS_ONLY, kept_in, server_of, styles_of
from personae.study.newcomers_report import answer
from personae.study.study import Answer, Cell, Row, where

KINDS = ("late", "without")


@dataclass(frozen=True)
class Newcomers:
    """`withheld` styles, one in each federation; a newcomer trains alone for `adapt_rounds` rounds of the method."""

    recipe: str
    withheld: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    late_from: int = 6
    adapt_rounds: int = 16
    changes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := [style for style in self.withheld if style not in STYLES]:
            raise ConfigError(f"withheld styles are {', '.join(unknown)}, expected some of {', '.join(STYLES)}")
        if not self.withheld or not self.seeds or self.adapt_rounds < 1:
            raise ConfigError("withheld styles, seeds, and adapt_rounds of 1 or more are needed")
        recipe = load_recipe(self.recipe, self.changes)
        if not isinstance(recipe.method, ClusterLora) or recipe.cohort is not None:
            raise ConfigError(
                f"{self.recipe} is of another method, or takes some of its clients in a round; expected cluster_lora "
                "with all, so that every newcomer comes when it is said to"
            )
        if not recipe.method.grouping_rounds < self.late_from <= recipe.rounds:
            raise ConfigError(
                f"late_from is {self.late_from}, expected more than the method's grouping_rounds "
                f"{recipe.method.grouping_rounds}, to the run's {recipe.rounds} rounds"
            )

    def cells(self, found: Sequence[Row]) -> Sequence[Cell]:
        words: list[dict[str, Any]] = [{"stage": "words", "seed": seed} for seed in self.seeds]
        if len(where(found, stage="words")) < len(words):
            return words
        together: list[dict[str, Any]] = [{"stage": "together", "seed": seed} for seed in self.seeds]
        federations: list[dict[str, Any]] = [
            {"stage": stage, "withheld": style, "seed": seed}
            for seed in self.seeds
            for style in self.withheld
            for stage in KINDS
        ]
        adapted: list[dict[str, Any]] = [
            {"stage": "adapt", "withheld": row["withheld"], "client": name, "seed": row["seed"]}
            for row in where(found, stage="late")
            if where(found, stage="without", withheld=row["withheld"], seed=row["seed"])
            for name in row["newcomers"]
            if row["styles"][name] != row["withheld"]
        ]
        return [*words, *together, *federations, *adapted]

    def measure(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        seed, style = seed + int(cell["seed"]), str(cell.get("withheld", ""))
        if cell["stage"] == "adapt":
            return self._adapt(cell, seed, folder)
        if cell["stage"] == "words":
            done = trained(_folder(folder, cell), self.recipe, [*self.changes, *WORDS_ONLY], seed)
            return {"seconds": done.summary["wall_seconds"]}
        changes = list(self.changes)
        if cell["stage"] != "together":
            rounds = load_recipe(self.recipe, self.changes).rounds
            when = self.late_from if cell["stage"] == "late" else rounds + 1
            changes += [f"federation.late={_listed(self._late(style, seed))}", f"federation.late_from={when}"]
        kept = kept_in(_folder(folder, {"stage": "words", "seed": cell["seed"]}))
        done = trained(_folder(folder, cell), self.recipe, changes, seed, kept)
        figures: dict[str, Any] = {
            "losses": {name: figure["heldout_loss"] for name, figure in done.summary["clients"].items()},
            "styles": styles_of(build_clients(done.recipe), done.recipe.data.styles),
        }
        if cell["stage"] == "late":
            facts = server_of(done.folder).facts
            figures["newcomers"] = {
                name: {
                    "likeness": facts[f"{NEWCOMER}likeness of {name}"],
                    "redundancy": facts[f"{NEWCOMER}redundancy of {name}"],
                }
                for name in self._late(style, seed)
            }
            figures["groups"] = groups_in(server_of(done.folder).facts)
        return figures

    def _adapt(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        """Losses before the first round and after each, with equal words, rounds and draws from both starts."""
        name = str(cell["client"])
        run = open_run(_folder(folder, {**cell, "stage": "without"}))
        kept = kept_in(_folder(folder, {"stage": "words", "seed": cell["seed"]}))[name]
        clients, method = build_clients(run.recipe), run.recipe.method
        assert isinstance(method, ClusterLora), "checked when the study was read"
        still = adapting(method, dataclasses.replace(method.adapt, steps=0))
        job = build_job(dataclasses.replace(run.recipe, method=still), clients, run.denoiser, None)
        nothing = method.init(run.job.members.initial(seed))
        losses = {
            start: self._alone(job, personalize_one(job, released, kept, name).params, kept, name, run, clients)
            for start, released in (("group", run.released), ("nothing", nothing))
        }
        return {"losses": losses, "style": styles_of(clients, run.recipe.data.styles)[name]}

    def _alone(self, job: Job, params: Arrays, kept: State, name: str, run: SavedRun, clients: Clients) -> list[float]:
        """Rounds of the method with nobody else in them: what the client sends comes back to it as it is."""
        losses, evaluation = list[float](), run.recipe.evaluation
        for number in range(self.adapt_rounds + 1):
            got = State(pick(params, is_lora))
            if number:
                client = job.site.client(name, number, job.seed)
                load_parts(client, got.params, kept.params, job.seed)
                update, kept = job.method.local(client, got, kept)
                got = update.sent
            params = {**got.params, **kept.params}
            run.denoiser.load(params)
            grid, draws = evaluation.loss_grid, evaluation.loss_draws  # those of the oracle's loss
            losses.append(
                denoising_loss(run.denoiser, clients.data[name].heldout, grid=grid, draws=draws, seed=job.seed)
            )
        return losses

    # --- who is late -------------------------------------------------------------------------------------------------

    def _late(self, withheld: str, seed: int) -> list[str]:
        """All clients of the withheld style, and one of each other: the first, the second and so on in their turn."""
        recipe = load_recipe(self.recipe, [*self.changes, f"seed={seed}"])
        styles = styles_of(build_clients(recipe), recipe.data.styles)
        late = [name for name in styles if styles[name] == withheld]
        for style in dict.fromkeys(styles.values()):
            if style != withheld:
                own, turn = [name for name in styles if styles[name] == style], [w for w in self.withheld if w != style]
                late.append(own[turn.index(withheld) % len(own)])
        return sorted(late)

    # --- the answer --------------------------------------------------------------------------------------------------

    def answer(self, found: Sequence[Row]) -> Answer:
        return answer(found)


def _listed(names: Sequence[str]) -> str:
    return "[" + ",".join(f'"{name}"' for name in names) + "]"


def _folder(folder: Path, cell: Cell) -> Path:
    return folder / "runs" / "-".join(str(cell[key]) for key in ("stage", "withheld", "seed") if key in cell)
