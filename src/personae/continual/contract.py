"""What every continual method is: what it puts beside a frozen model, and what it does around one concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch

from personae.core import CONCEPT, Client, Denoiser, Plan, Select, State, Task, stream
from personae.personal.delta import Delta
from personae.personal.lora import Lora
from personae.personal.neurons import Neurons
from personae.personal.tokens import TOKENS

Layers = Literal["cross_kv", "self+cross"]
"""Which of the U-Net's layers learn: keys and values of cross-attention, or all four of every attention."""

Need = Literal["prior_images", "calibration_prompts"]


@dataclass(frozen=True)
class Parts:
    """What a method's model has beside its frozen weights and a word for each concept."""

    lora: Lora | None = None
    delta: Delta | None = None
    neurons: Neurons | None = None


def adapters(rank: int, layers: Layers) -> Parts:
    """Adapters alone."""
    return Parts(lora=Lora(rank, layers))


def adapters_and_changes(rank: int, layers: Layers) -> Parts:
    """Adapters, and changes of the same weights, into which they go."""
    return Parts(lora=Lora(rank, layers), delta=Delta(layers))


class Continual(Protocol):
    """A continual method: a frozen dataclass of hyperparameters.

    What is known of earlier concepts is their tasks and what `end` returned after the last one: it is written, dropped
    and read again between two concepts. All of it stays with the client.
    """

    @property
    def parts(self) -> Parts: ...

    @property
    def needs(self) -> frozenset[Need]:
        """What `client.given` holds."""
        ...

    def said(self, task: Task) -> str:
        """How captions name the concept: the new word, and the noun behind it where the method wants it."""
        ...

    def begin(self, client: Client, kept: State) -> Plan:
        """Make ready to learn `client.task`. The model holds what was kept, and all else as it starts; what `begin`
        changes there, it changes to the same when it is called again.

        Raises: ConfigError, when there is no room for another concept.
        """
        ...

    def end(self, client: Client, kept: State) -> State:
        """After training: all that survives. `params` load into the model by name; a part that is left out starts anew
        with the next concept, and is not there when pictures are drawn."""
        ...

    def compose(self, model: Denoiser, kept: State, concepts: Sequence[str]) -> None:
        """Make ready to draw these concepts."""
        ...


@runtime_checkable
class Forgets(Protocol):
    """A method that can take one concept out of what all share, since it kept each by itself."""

    def forget(self, model: Denoiser, kept: State, prompts: Sequence[str]) -> State:
        """What would have survived without a concept, whose word and what was kept under its name are gone from `kept`.

        The model holds `kept`; `prompts` are captions of other things.
        """
        ...


def words_of(task: Task) -> frozenset[str]:
    """The names that a concept's word has among a model's parameters."""
    return frozenset(front + task.word for front in TOKENS)


def may_move(task: Task, *selects: Select) -> Select:
    """The concept's own word, and what these select. Words of earlier concepts stay."""
    own = words_of(task)
    return lambda name: name in own or any(select(name) for select in selects)


def caption(task: Task, said: str) -> str:
    """What the run says of a concept, or of its noun; one wording for all, since a wording alone can move a score."""
    return task.wording.replace(CONCEPT, f"{'an' if said[0] in 'aeiou' else 'a'} {said}")


def load_kept(model: Denoiser, kept: State, rng: torch.Generator) -> None:
    """What was kept, and all other parts as they start."""
    missing = model.live().keys() - kept.params.keys()
    model.load({**kept.params, **(model.initial(rng, missing.__contains__) if missing else {})})


def draw_with(model: Denoiser, kept: State) -> None:
    """The model as it was kept. Adapters that were not kept add nothing when they start."""
    load_kept(model, kept, stream(0, "drawing"))
