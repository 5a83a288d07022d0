"""What a server can learn of clients that group by style, and what an encoded prompt would give away.

The study plays both sides. Clients train as a recipe says; what the server holds afterwards is what attackers get, and
what clients keep says whether they are right. Every attack stands beside the same with what it knows mixed up.

"run": the recipe is trained. "shadow": somebody describes public pictures of a style as a client would, of "other"
things than the clients have, or of the "same" ones, which the recipe names and everybody knows. "prompts": prompts are
read back from a text encoder's states, "sent" with the style's known word ("told"), with the client's own word ("own"),
or with neither ("neutral"): this one an inference server gets, as plain text. "styles": a client's style is named from
its description, and from its own word's vector, which it does not send. "noise": the same, and the grouping itself,
with noise on the descriptions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from personae.aggregate.membership import groups_in
from personae.artefact.run_folder import RunFolder
from personae.artefact.save import load_state, save_state
from personae.backbone.shipped import model_folder
from personae.core import Arrays, Client, ClientData, Images, State, stream
from personae.data.emoji import SEEN_STYLES, emoji, named, pack
from personae.errors import ConfigError
from personae.evaluate.grouping import adjusted_rand
from personae.methods.cluster_lora import DESCRIPTOR, SEEN, ClusterLora
from personae.personal.tokens import TOKENS, cut, plain
from personae.recipe.config import load_recipe
from personae.recipe.schema import Recipe
from personae.recipe.workflow import open_run
from personae.study.bench import trained
from personae.study.by_style import server_of, style_of
from personae.study.leakage_report import ATTACKERS, THINGS, answer_of
from personae.study.study import Answer, Cell, Row, where

if TYPE_CHECKING:
    from personae.attack.prompts import Guess, PromptInverter
    from personae.backbone.text2image import TextToImage

SENT = ("told", "own", "neutral")
DOUBT = 0.01
"""The residual above which a state without noise is taken to be of no known token. Those of known ones are rounding."""


@dataclass(frozen=True)
class Leakage:
    """`recipe` trains cluster_lora on styles of the emoji pack with words of the clients' own, with these changes.

    `num_prompts` of the clients' captions are read back, with noise of `state_noises` standard deviations on their
    states. Attackers describe each style `num_shadows` times, from `shadow_images` pictures, of things that no client
    has or of those that clients have, and once from its known word alone. `noises` on descriptions are drawn
    `num_draws` times.
    """

    recipe: str = "collaborative/styles"
    changes: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    num_prompts: int = 15
    state_noises: tuple[float, ...] = (0.0, 0.1, 0.3, 1.0, 3.0)
    num_shadows: int = 3
    shadow_images: int = 56
    noises: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5)
    num_draws: int = 50

    def __post_init__(self) -> None:
        least = {"num_prompts": 2, "num_shadows": 1, "shadow_images": 1, "num_draws": 1}
        problems = [
            f"{n} is {getattr(self, n)}, expected at least {m}" for n, m in least.items() if getattr(self, n) < m
        ]
        for name in ("noises", "state_noises"):
            if not getattr(self, name) or min(getattr(self, name)) < 0:
                problems.append(f"{name} are {list(getattr(self, name))}, expected one or more, at least 0")
        if not self.seeds:
            problems.append("seeds are missing")
        if (most := len(named("seen"))) < self.shadow_images:
            problems.append(f"shadow_images is {self.shadow_images}, and of {most} public names")
        if problems:
            raise ConfigError("; ".join(problems))

    def cells(self, found: Sequence[Row]) -> Sequence[Cell]:
        runs: list[Cell] = [{"stage": "run", "seed": seed} for seed in self.seeds]
        ready = where(found, stage="run")
        if len(ready) < len(runs):
            return runs
        shadows: list[Cell] = [
            {"stage": "shadow", "things": things, "style": style, "seed": row["seed"]}
            for row in ready
            for things in THINGS
            for style in row["styles"]
        ]
        if len(where(found, stage="shadow")) < len(shadows):
            return [*runs, *shadows]
        rest: list[Cell] = []
        for seed in self.seeds:
            for sent in SENT:
                noises = self.state_noises[:1] if sent == "neutral" else self.state_noises
                rest += [{"stage": "prompts", "sent": sent, "noise": noise, "seed": seed} for noise in noises]
            rest.append({"stage": "styles", "seed": seed})
            rest += [{"stage": "noise", "noise": noise, "seed": seed} for noise in self.noises]
        return [*runs, *shadows, *rest]

    def measure(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        seed += int(cell["seed"])
        if cell["stage"] == "run":
            return self._run(seed, folder / "runs" / str(cell["seed"]))
        sides = _sides(folder / "runs" / str(cell["seed"]))
        if cell["stage"] == "shadow":
            things, style = str(cell["things"]), str(cell["style"])
            return self._shadow(sides, things, style, seed, _shadows(folder, cell, things, style))
        if cell["stage"] == "prompts":
            return self._prompts(sides, str(cell["sent"]), float(cell["noise"]), seed)
        known = self._known(
            sides, {things: [_shadows(folder, cell, things, style) for style in sides.styles] for things in THINGS}
        )
        if cell["stage"] == "styles":
            return self._styles(sides, known, seed)
        return self._noise(sides, known, float(cell["noise"]), seed)

    # --- the pieces of a measurement ---------------------------------------------------------------------------------

    def _run(self, seed: int, folder: Path) -> Mapping[str, Any]:
        _check(load_recipe(self.recipe, self.changes))
        run = trained(folder, self.recipe, self.changes, seed)
        return {"styles": list(_styles_of(run.recipe)), "seconds": run.summary["wall_seconds"]}

    def _shadow(self, sides: Sides, things: str, style: str, seed: int, to: Path) -> Mapping[str, Any]:
        from personae.attack.styles import shadow_descriptor

        public = _public_pictures(things, style, sides.recipe)
        if len(public) < self.shadow_images:
            told = {
                "other": "there are {} names of pre-training that no client of {} has; lower it, or give the clients "
                "fewer names with data.names",
                "same": "there are {} names that clients of {} have; lower it, or give them more with data.names",
            }[things].format(len(public), sides.recipe.name)
            raise ConfigError(f"shadow_images is {self.shadow_images}, and {told}")
        model, found = open_run(sides.folder).denoiser, []
        for number in range(self.num_shadows):
            rng = stream(seed, "shadow", style, number)
            images = public[torch.randperm(len(public), generator=rng)[: self.shadow_images]]
            data = ClientData(images, images)
            found.append(shadow_descriptor(sides.method, Client(f"shadow-{number}", data, model, rng)))
        to.parent.mkdir(parents=True, exist_ok=True)
        save_state(to, State(extras={DESCRIPTOR: torch.stack(found)}))
        return {"num_shadows": len(found)}

    def _prompts(self, sides: Sides, sent: str, noise: float, seed: int) -> Mapping[str, Any]:
        from personae.attack.prompts import noisy_states, share_right

        inverter, model = _inverter(sides.recipe), open_run(sides.folder)
        texts, guesses = [], []
        for number, (client, caption) in enumerate(sides.captions(self.num_prompts, seed)):
            text = sides.worded(caption, sent, client)
            encoder: Any = model.model(client)
            with torch.no_grad():
                states = encoder.captions([text], torch.tensor([False]))[0][0].float().cpu()
            # What is behind the prompt's end is not asked for, so the attacker is spared it.
            states = states[: len(inverter.tokens(text)) + 1]
            states = noisy_states(states, noise, stream(seed, "states", sent, str(noise), number))
            texts.append((client, text))
            guesses.append(inverter.guess(states, DOUBT + 1.25 * noise))  # whether there is an own word, nobody says
        read = [guess.tokens for guess in guesses]
        tokens = [inverter.tokens(text) for _, text in texts]
        own = [[at for at, token in enumerate(row) if token >= inverter.num_known] for row in tokens]
        others = [[at for at, token in enumerate(row) if token < inverter.num_known] for row in tokens]
        strange = [*read[1:], *read[:1]]  # the next prompt's states in the place of one's own
        figures: dict[str, Any] = {
            "prompts": len(texts),
            "right": fmean(share_right(g, t, at) for g, t, at in zip(read, tokens, others, strict=True)),
            "by chance": fmean(share_right(g, t, at) for g, t, at in zip(strange, tokens, others, strict=True)),
            "whole": fmean(share_right(g, t, at) == 1 for g, t, at in zip(read, tokens, others, strict=True)),
            "whole by chance": fmean(
                share_right(g, t, at) == 1 for g, t, at in zip(strange, tokens, others, strict=True)
            ),
            "style named": fmean(
                sides.word(client) in inverter.text(g).split() for (client, _), g in zip(texts, read, strict=True)
            ),
            "example": [texts[0][1], inverter.text(read[0])],
        }
        if sent != "own":
            figures["false alarms"] = fmean(any(t >= inverter.num_known for t in guess.tokens) for guess in guesses)
        else:
            figures |= _own_words(sides, [client for client, _ in texts], own, guesses, inverter.num_known)
        return figures

    def _known(self, sides: Sides, shadows: Mapping[str, Sequence[Path]]) -> dict[str, list[Tensor]]:
        """What each attacker compares with: of every style some descriptors, in the order of styles."""
        from personae.attack.styles import word_descriptors

        words = {style: pack().words[style] for style in sides.styles}
        by_word = word_descriptors(_public(sides.recipe), words, sides.method.descriptor_width)
        return {
            "word": [by_word[style][None] for style in sides.styles],
            **{things: [load_state(at).extras[DESCRIPTOR] for at in shadows[things]] for things in THINGS},
        }

    def _styles(self, sides: Sides, known: Mapping[str, list[Tensor]], seed: int) -> Mapping[str, Any]:
        from personae.attack.styles import known_vectors, naming, naming_by_chance, token_of, word_rank

        model = _public(sides.recipe)
        table, start = known_vectors(model), sides.start(model)
        tokens = {style: token_of(model, pack().words[style]) for style in sides.styles}
        clients, figures = [], dict[str, Any]()
        scores = {name: _scores(sides.descriptors, known[name]) for name in ATTACKERS}
        for name in ATTACKERS:
            chance, most = naming_by_chance(scores[name], sides.truth, stream(seed, "shuffled", name))
            figures[name] = {**asdict(naming(scores[name], sides.truth)), "chance": asdict(chance), "chance 95 %": most}
        for at, client in enumerate(sides.names):
            vectors, style = sides.vectors(client), sides.styles[sides.truth[at]]
            ranks = {s: word_rank(vectors, table, token) for s, token in tokens.items()}
            moved = {s: word_rank(vectors, table, token, start) for s, token in tokens.items()}
            noise = torch.randn(vectors.shape, generator=stream(seed, "random vector", client))
            clients.append(
                {
                    "client": client,
                    "style": style,
                    **{name: sides.styles[int(scores[name][at].argmax())] for name in ATTACKERS},
                    "rank": ranks[style],
                    "rank of others": fmean(rank for s, rank in ranks.items() if s != style),
                    "rank moved": moved[style],
                    "rank moved of others": fmean(rank for s, rank in moved.items() if s != style),
                    "rank by chance": word_rank(noise, table, tokens[style]),
                }
            )
        groups = [sides.groups[name] for name in sides.names]
        return {
            **figures,
            "clients": clients,
            "known tokens": len(table),
            "agreement": adjusted_rand(groups, sides.truth),
        }

    def _noise(self, sides: Sides, known: Mapping[str, list[Tensor]], noise: float, seed: int) -> Mapping[str, Any]:
        from personae.aggregate.cluster import clustered, similarities  # slow to import
        from personae.attack.styles import blurred, naming

        method, named_by, agreed = sides.method, {name: list[float]() for name in ATTACKERS}, []
        for draw in range(self.num_draws if noise else 1):
            seen = blurred(sides.descriptors, noise, stream(seed, "blurred", str(noise), draw))
            for name in ATTACKERS:
                named_by[name].append(naming(_scores(seen, known[name]), sides.truth).top_1)
            groups = clustered(similarities(seen), most=method.most_clusters, smallest=method.smallest_cluster)
            agreed.append(adjusted_rand(groups, sides.truth))
        length = noise * sides.descriptors.shape[1] ** 0.5
        return {
            **{name: fmean(found) for name, found in named_by.items()},
            "agreement": fmean(agreed),
            "length": length,
        }

    # --- the answer --------------------------------------------------------------------------------------------------

    def answer(self, found: Sequence[Row]) -> Answer:
        return answer_of(found)


# --- both sides of a finished run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sides:
    """Of a finished run: what the server holds of each client, in the order of `names`, and what clients know.

    `descriptors` [K, D] and `groups` are the server's; `truth` are places in `styles`, and `kept` what clients keep.
    """

    folder: Path
    recipe: Recipe
    method: ClusterLora
    styles: tuple[str, ...]
    names: tuple[str, ...]
    descriptors: Tensor
    groups: Mapping[str, int]
    truth: tuple[int, ...]
    kept: Mapping[str, Arrays]
    data: Mapping[str, ClientData]

    def vectors(self, client: str) -> Tensor:
        """Of the client's first own word, [N, D]."""
        assert self.recipe.backbone.words is not None, "the recipe was checked"
        return self.kept[client][TOKENS[0] + self.recipe.backbone.words.words[0]]

    def start(self, model: TextToImage) -> Tensor:
        """Where all words began, [D], which everybody knows."""
        assert self.recipe.backbone.words is not None, "the recipe was checked"
        return model.initial(stream(0))[TOKENS[0] + self.recipe.backbone.words.words[0]][0]

    def word(self, client: str) -> str:
        """The known word of the client's style."""
        return pack().words[self.styles[self.truth[self.names.index(client)]]]

    def captions(self, num: int, seed: int) -> list[tuple[str, str]]:
        """A client and one of its captions, clients in turn."""
        rng = stream(seed, "prompts")
        order = [self.names[at] for at in torch.randperm(len(self.names), generator=rng).tolist()]
        chosen = []
        for number in range(num):
            client = order[number % len(order)]
            texts = self.data[client].train.captions
            chosen.append((client, texts[int(torch.randint(len(texts), (), generator=rng))]))
        return chosen

    def worded(self, caption: str, sent: str, client: str) -> str:
        """The caption with the client's own word, with its style's known word in that place, or with neither."""
        words = self.recipe.backbone.words
        assert words is not None, "the recipe was checked"
        if sent == "neutral":
            return plain(caption, words)
        if sent == "own":
            return caption
        pieces = cut(caption, words.words)
        return " ".join(self.word(client) if piece.lower() in words.words else piece for piece in pieces)


@lru_cache(maxsize=1)
def _sides(folder: Path) -> Sides:
    run = open_run(folder)
    recipe, method = run.recipe, _check(run.recipe)
    server = server_of(folder)
    names = tuple(sorted(name.removeprefix(f"{SEEN}.") for name in server.extras if name.startswith(f"{SEEN}.")))
    styles, data = _styles_of(recipe), run.job.members.data  # type: ignore[attr-defined]  # they are all here
    return Sides(
        folder,
        recipe,
        method,
        styles,
        names,
        torch.stack([server.extras[f"{SEEN}.{name}"] for name in names]),
        {name: groups_in(server.facts)[name] for name in names},
        tuple(styles.index(style_of(name, data[name].train)) for name in names),
        {name: RunFolder(folder).last_kept(name).params for name in names},
        data,
    )


def _check(recipe: Recipe) -> ClusterLora:
    """Raises: ConfigError, for a run of which this study has nothing to ask."""
    method: Any = recipe.method
    while not isinstance(method, ClusterLora):
        if (method := getattr(method, "method", None)) is None:
            raise ConfigError(
                f"{recipe.name}: this study asks what a server learns in cluster_lora, set as method.name"
            )
    wanted = {
        'data.source = "emoji"': recipe.data.source == "emoji",
        "data.caption with the clients' own word": "{thing}" in (recipe.data.caption or ""),
        "backbone.words": recipe.backbone.words is not None,
        'engine = "in_process", which leaves both sides in one folder': recipe.engine == "in_process",
        "data.pooled = false": not recipe.data.pooled,
    }
    if lacking := [what for what, there in wanted.items() if not there]:
        raise ConfigError(f"{recipe.name}: this study needs {'; '.join(lacking)}")
    return method


def _public_pictures(things: str, style: str, recipe: Recipe) -> Images:
    """Of the same names that clients have; or of other ones, of pre-training."""
    if things == "same":
        return emoji([style], names=recipe.data.names or "seen", wording=recipe.data.caption).images
    every, known = list(pack().things), set(named(recipe.data.names or "seen"))
    images = emoji([style], names="seen", wording=recipe.data.caption).images
    labels = images.labels.tolist() if images.labels is not None else []
    return images[torch.tensor([at for at, label in enumerate(labels) if every[label] not in known], dtype=torch.long)]


def _styles_of(recipe: Recipe) -> tuple[str, ...]:
    return tuple(recipe.data.styles or SEEN_STYLES)


@lru_cache(maxsize=1)
def _public(recipe: Recipe) -> TextToImage:
    """What the attacker has: the pipeline that all have, with rows for the words that the recipe names."""
    from personae.backbone.pipeline import open_pipeline

    return open_pipeline(model_folder(str(recipe.backbone.folder)), words=recipe.backbone.words)


@lru_cache(maxsize=1)
def _inverter(recipe: Recipe) -> PromptInverter:
    """One for all prompts of a process, so that what it tried stays known."""
    from personae.attack.prompts import PromptInverter

    return PromptInverter(_public(recipe))


def _shadows(folder: Path, cell: Cell, things: str, style: str) -> Path:
    return folder / "shadows" / things / f"{style}-{cell['seed']}.safetensors"


def _scores(descriptors: Tensor, known: Sequence[Tensor]) -> Tensor:
    """[K, S]: of each style's known descriptors the nearest counts."""
    from personae.attack.styles import alike

    return torch.stack([alike(descriptors, each).max(1).values for each in known], dim=1)


def _own_words(
    sides: Sides, clients: Sequence[str], own: Sequence[Sequence[int]], guesses: Sequence[Guess], num_known: int
) -> dict[str, Any]:
    """Whether the places of own words were noticed, by which residuals, and how near the vectors came that were found
    for them."""
    start, noticed, there, elsewhere, ways = sides.start(_public(sides.recipe)), [], list[float](), list[float](), []
    for client, guess, places in zip(clients, guesses, own, strict=True):
        noticed.append([at for at, token in enumerate(guess.tokens) if token >= num_known] == list(places))
        there += [residual for at, residual in enumerate(guess.residuals) if at in places]
        elsewhere += [residual for at, residual in enumerate(guess.residuals) if at not in places]
        if noticed[-1] and places:
            way, theirs = guess.vectors[0] - start, sides.vectors(client)[0] - start
            ways.append(float(torch.cosine_similarity(way, theirs, dim=0)))
    return {
        "noticed": fmean(noticed),
        "residual": fmean(there) if there else None,
        "residual elsewhere": max(elsewhere, default=None),
        "vector": fmean(ways) if ways else None,
    }
