"""Federated and continual at once: clients share an adapter, and each one's concepts arrive over rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from personae.continual.c_lora import CLora
from personae.continual.cns import Cns
from personae.continual.contract import Continual, Parts, load_kept, words_of
from personae.continual.custom_diffusion import CustomDiffusion
from personae.continual.dreambooth import DreamBooth
from personae.continual.dsc import Dsc
from personae.continual.ewc import Ewc
from personae.continual.merged_lora import MergedLora
from personae.continual.mix_of_show import MixOfShow
from personae.continual.orthogonal import Orthogonal
from personae.continual.sequential_lora import SequentialLora
from personae.continual.textual_inversion import TextualInversion
from personae.core import (
    Arrays,
    Client,
    Denoiser,
    Method,
    Select,
    State,
    Update,
    Updates,
    neither,
    pick,
    stream,
    under,
)
from personae.errors import ConfigError
from personae.personal.delta import is_delta
from personae.personal.lora import A, B, is_lora
from personae.personal.neurons import AT, is_neuron
from personae.personal.tokens import is_word

PAST_PARAMS, PAST_EXTRAS, PAST_FACTS = "past.params.", "past.extras.", "past.facts."
"""Before the names of what `end` returned after the last task that was ended."""

BEGUN = "tasks begun"


@dataclass(frozen=True)
class OverTasks:
    """In every round a client trains its present concept as `method` does, bent by the plan of `continual`. In the last
    round of a concept it consolidates before it sends, and the next concept starts from what the server sends then.

    Words, and all that `continual` keeps, stay with the client; of earlier concepts it knows no more than that. What is
    shared is the adapter: its factors are averaged as the rule says, each by its name. Anchors of earlier concepts are
    the client's own parameters as it sent them, since its importances were taken there.

    Words are named by their place among a client's tasks, so that all clients have one model and nobody learns from a
    name what they teach it. A concept's word starts as its noun.

    A client that misses the last round of a concept keeps what it learned, and has not consolidated it. Moments of an
    optimizer do not outlive a concept. After the rounds a client that owns a whole model draws with it; any other does
    what `method` says, with the pictures and the plan of its last concept.

    Source: ours; each side as its own file says. Raises: ConfigError, for a pair of which `refusal` says why.
    """

    method: Method
    continual: Continual

    def __post_init__(self) -> None:
        if (reason := refusal(self.method, self.continual)) is not None:
            raise ConfigError(reason)

    @property
    def personal(self) -> Select:
        return lambda name: is_word(name) or self.method.personal(name)

    # --- the server ---------------------------------------------------------------------------------------------------

    def init(self, initial: Arrays) -> State:
        _check_parts(initial, self.continual.parts)
        return _without_words(self.method.init(initial))

    def broadcast(self, server: State, client: str) -> State:
        return self.method.broadcast(server, client)

    def aggregate(self, server: State, updates: Updates) -> State:
        return self.method.aggregate(server, updates)

    def release(self, server: State) -> State:
        return self.method.release(server)

    # --- the client ---------------------------------------------------------------------------------------------------

    def local(self, client: Client, got: State, kept: State) -> tuple[Update, State]:
        draws, past = client.rng.initial_seed(), past_of(kept)
        update, own = self.method.local(self._begun(client, kept, draws), got, _without_past(kept))
        if client.ends_task:
            client.rng.set_state(stream(draws, "end").get_state())
            past = self.continual.end(client, past)
            load_kept(client.model, past, stream(draws, "after"))
            update = replace(update, sent=_reread(update.sent, client.model))
            own = replace(_reread(own, client.model), extras=pick(own.extras, neither(under("moments."))))
        own_params = {**own.params, **pick(client.model.params(), is_word)}
        own = State(own_params, own.extras, {**own.facts, BEGUN: len(client.tasks)})
        return replace(update, sent=_without_words(update.sent)), _with_past(own, past)

    def personalize(self, client: Client, got: State, kept: State) -> State:
        params, begun = client.model.params(), kept.facts.get(BEGUN, 0)
        if kept.params.keys() == params.keys() or 0 < int(begun) < len(client.tasks):
            return State(kept.params)
        bent = self._begun(client, kept, client.rng.initial_seed())
        personal = self.method.personalize(bent, got, _without_past(kept))
        words = pick(client.model.params(), is_word)
        return replace(personal, params={**words, **personal.params})

    def _begun(self, client: Client, kept: State, draws: int) -> Client:
        """The client with its plan, in front of a model as the task begins; of a task that was begun in an earlier
        round, as that round left it."""
        if not client.tasks:
            raise ConfigError(f"client {client.name!r} has no task; a TaskPopulation says who has which one")
        model, now, past = client.model, client.model.params(), past_of(kept)
        again = kept.facts.get(BEGUN) == len(client.tasks)
        if again:
            load_kept(model, replace(past, params={**past.params, **pick(now, is_word)}), stream(draws, "again"))
        model.load({**model.params(), **noun_vectors(client)})
        trains = client.rng.get_state()
        client.rng.set_state(stream(draws, "begin").get_state())
        plan = self.continual.begin(client, past)
        client.rng.set_state(trains)
        if again:
            model.load(now)
        return replace(client, plan=replace(plan, penalties=(*client.plan.penalties, *plan.penalties)))


def noun_vectors(client: Client) -> dict[str, Tensor]:
    """What the present concept's word starts as, by its names. Raises: ConfigError, for a noun of several tokens."""
    model: Any = client.model
    tables = {name: value for name, value in model.base().items() if name.endswith("token_embedding.weight")}
    live, noun, found = model.live(), client.task.noun, {}
    for name, table, tokenizer in zip(
        sorted(words_of(client.task)), sorted(tables), model.captions.tokenizers(), strict=False
    ):
        pieces = tokenizer(noun, add_special_tokens=False)["input_ids"]
        if len(pieces) != 1 or name not in live:
            raise ConfigError(
                f"concept {client.task.name!r}: {noun!r} is {len(pieces)} tokens, expected one, or the model has no "
                f"word {client.task.word}; choose a simpler noun, or give the model as many words as there are tasks"
            )
        found[name] = tables[table][pieces[0]].cpu().expand_as(live[name]).clone()
    return found


# --- one State for both sides -----------------------------------------------------------------------------------------


def past_of(kept: State) -> State:
    """What `end` returned after the last task that was ended; nothing before."""
    facts = {key.removeprefix(PAST_FACTS): fact for key, fact in kept.facts.items() if key.startswith(PAST_FACTS)}
    return State(_under(kept.extras, PAST_PARAMS), _under(kept.extras, PAST_EXTRAS), facts)


def _without_past(kept: State) -> State:
    """What the method itself kept, and the words."""
    extras = pick(kept.extras, lambda name: not name.startswith((PAST_PARAMS, PAST_EXTRAS)))
    return State(kept.params, extras, {k: v for k, v in kept.facts.items() if k != BEGUN and not k.startswith("past.")})


def _with_past(own: State, past: State) -> State:
    extras = {**own.extras, **_front(PAST_PARAMS, past.params), **_front(PAST_EXTRAS, past.extras)}
    return State(own.params, extras, {**own.facts, **{PAST_FACTS + key: fact for key, fact in past.facts.items()}})


def _reread(state: State, model: Denoiser) -> State:
    """With what the model has now under the same names."""
    params = model.params()
    return replace(state, params={name: params[name] for name in state.params})


def _without_words(state: State) -> State:
    return replace(state, params=pick(state.params, neither(is_word)))


def _under(arrays: Arrays, front: str) -> dict[str, Tensor]:
    return {name.removeprefix(front): value for name, value in arrays.items() if name.startswith(front)}


def _front(front: str, arrays: Arrays) -> dict[str, Tensor]:
    return {front + name: value for name, value in arrays.items()}


# --- which pairs make sense -------------------------------------------------------------------------------------------

AVERAGED: Mapping[type, str] = {
    TextualInversion: "nothing: a client's words are all that moves",
    SequentialLora: "the adapter, by name",
    DreamBooth: "the adapter, by name; pictures of the noun stay",
    Ewc: "the adapter, by name; importances and anchors stay, and are the client's own",
    Dsc: "the adapter, by name, after it was distilled; earlier adapters stay",
}
"""What a server combines."""

REFUSED: Mapping[type, str] = {
    MergedLora: "its adapter becomes a change of the client's own weights when a concept ends, while others are in the "
    "middle of theirs: what they put into the average would be taken along, and counted twice",
    CLora: "its adapter becomes a change of the client's own weights when a concept ends, and its penalty looks at "
    "that sum alone: an averaged adapter would be held off this client's past, and off nobody else's",
    Orthogonal: "its B belongs to rows of A that go by how many concepts the client has had: an average of B would "
    "stand beside rows that it was not trained on",
    Cns: "every client trains other weights, and other numbers of them: there is nothing to average one by one",
    CustomDiffusion: "its change of weights is solved for the client's own constraints when a concept ends: an average "
    "of two solutions meets neither's",
    MixOfShow: "its change of weights is solved for the client's own concepts when one ends, and the adapter is "
    "dropped: an average would be solved for no one's",
}
"""Why no part of these may be averaged."""

UNFIT: Mapping[str, str] = {
    "Spire": "its vector is no part that a continual method knows, whose plans would never let it move",
    "ClusterLora": "it trains words once, before a client's first round: later concepts' words would never move",
}
"""Why these methods go with no continual one, by the names of their classes: this room does not see theirs."""


def refusal(method: Method, continual: Continual) -> str | None:
    """Why the two do not go together; None when they do. A method that sends nothing goes with everything."""
    inner: Any = method
    while inner is not None:
        if (name := type(inner).__name__) in UNFIT:
            return f"{name} is not for concepts that arrive over rounds: {UNFIT[name]}"
        inner = getattr(inner, "method", None)
    kind = type(continual)
    if kind in AVERAGED or all(map(method.personal, _examples(continual.parts))):
        return None
    why = REFUSED.get(kind, "how its parts may be averaged is not known")
    return f"{kind.__name__} is not for a method that averages its parts: {why}. Use local_only, which sends nothing"


def _examples(parts: Parts) -> list[str]:
    """Names as such parts have them."""
    layer = "unet.layer"
    lora = [layer + A, layer + B] if parts.lora is not None else []
    delta = [f"delta.{layer}.weight"] if parts.delta is not None else []
    return [*lora, *delta, *([f"neurons.{layer}.weight", f"{AT}{layer}.weight"] if parts.neurons is not None else [])]


def _check_parts(initial: Arrays, parts: Parts) -> None:
    """Raises: ConfigError, unless the model has words and exactly these parts."""
    wanted = {
        "adapters": (is_lora, parts.lora),
        "changes of weights": (is_delta, parts.delta),
        "neurons": (lambda name: is_neuron(name) or name.startswith(AT), parts.neurons),
        "words": (is_word, True),
    }
    problems = []
    for what, (is_one, options) in wanted.items():
        if any(map(is_one, initial)) != (options is not None):
            problems.append(f"the model has {'no ' if options is not None else ''}{what}")
    if odd := sorted(pick(initial, neither(*(is_one for is_one, _ in wanted.values())))):
        problems.append(f"{odd[0]} may move, which no plan lets move; freeze the base")
    if problems:
        raise ConfigError(f"this is not a model for concepts that arrive over rounds: {'; '.join(problems)}")
