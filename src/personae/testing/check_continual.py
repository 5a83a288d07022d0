"""What the library relies on in any continual method."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

from personae.artefact.save import load_state, save_state
from personae.continual.contract import Continual, Parts, caption, load_kept, words_of
from personae.continual.learning import learn
from personae.core import Client, ClientData, Denoiser, Given, Images, State, Task, Training, pick, stream
from personae.testing.contract import (
    cloned,
    depends_on_what_was_kept,
    differing,
    differing_states,
    holds_no_picture,
    require,
    some,
)

SEED = 7
TASKS = (Task("rex", "<rex>", "dog"), Task("tom", "<tom>", "cat"), Task("pip", "<pip>", "dog"))
TRAINING = Training(steps=3, lr=0.01, batch_size=2, optimizer="adamw", weight_decay=0.01)

Build = Callable[[Parts, Sequence[Task]], Denoiser]
"""A new model with these parts and a word for each of these concepts."""


def check_continual(method: Continual, build: Build) -> None:
    """Ask of a continual method, with three tiny concepts, everything that the library relies on:

    - what `end` returns is all that survives: with every model new, and every state written and read in between, the
      same bits come out as when one method object teaches one model;
    - `begin` may be called again, and leaves the same;
    - earlier concepts' words, the frozen weights and the arguments keep their bits;
    - a concept taught after others depends on these by what was kept alone, and not on their images;
    - what was kept can be drawn with, whatever the model held before;
    - no tensor of what was kept holds a picture of the concept, and none is held where no state shows it.

    Raises: ContractBroken, at the first contract that does not hold.
    """
    for contract in CONTRACTS:
        contract(method, build)


def nothing_else_survives(method: Continual, build: Build) -> None:
    one, kept = deepcopy(method), State()
    lasting = build(method.parts, TASKS)
    for count in range(1, len(TASKS) + 1):
        kept = learn(one, TRAINING, client_for(method, lasting, count), kept, SEED)
        kept = replace(kept, params=_without_words_to_come(kept, count))
    names = differing_states(kept, _taught(method, build, len(TASKS)))
    require(
        not names,
        "what `end` returns is all that survives between two concepts",
        f"with new objects and everything written and read, {some(names)} come out otherwise",
    )


def begin_may_be_called_again(method: Continual, build: Build) -> None:
    kept, model = _taught(method, build, 1), build(method.parts, TASKS[:2])
    found = []
    for _ in range(2):
        load_kept(model, kept, stream(SEED, "again"))
        method.begin(client_for(method, model, 2), kept)
        found.append(model.params())
    method.begin(client_for(method, model, 2), kept)
    names = differing(found[0], found[1]) + differing(found[0], model.params())
    require(not names, "`begin` leaves the same when it is called again", f"{some(names)} differ")


def what_is_not_taught_stays(method: Continual, build: Build) -> None:
    kept = State()
    for count in range(1, len(TASKS) + 1):
        model, before = build(method.parts, TASKS[:count]), cloned(kept)
        base = {name: value.clone() for name, value in model.base().items()}
        after = learn(deepcopy(method), TRAINING, client_for(method, model, count), kept, SEED)
        require(
            not (names := differing(base, model.base())), "the frozen weights keep their bits", f"{some(names)} changed"
        )
        require(
            not (names := differing_states(before, kept)),
            "`begin` and `end` leave what was kept alone",
            f"{some(names)} changed",
        )
        old = frozenset().union(*(words_of(task) for task in TASKS[: count - 1]))
        names = differing(pick(kept.params, old.__contains__), pick(after.params, old.__contains__))
        require(not names, "earlier concepts' words keep their bits", f"{some(names)} changed")
        own = words_of(TASKS[count - 1]) & after.params.keys()
        require(bool(own), "the concept's word is kept", f"only {some(sorted(after.params))}")
        kept = after


def it_can_be_drawn_with(method: Continual, build: Build) -> None:
    kept, first, second = _taught(method, build, 2), build(method.parts, TASKS[:2]), build(method.parts, TASKS[:2])
    noise = {name: torch.randn(value.shape, generator=stream(3, name)) for name, value in second.params().items()}
    second.load(noise)
    for model in (first, second):
        method.compose(model, kept, [task.name for task in TASKS[:2]])
    names = differing(first.params(), second.params())
    require(not names, "`compose` depends on what was kept alone", f"{some(names)} differ")


def no_picture_is_kept(method: Continual, build: Build) -> None:
    client = _in_front_of_bytes(method, build, 1, "rex")
    kept = learn(deepcopy(method), TRAINING, client, State(), SEED)
    holds_no_picture(kept, client.data.train, client.model, "what was kept")


def no_picture_is_used_again(method: Continual, build: Build) -> None:
    def lesson(count: int, name: str, kept: State) -> State:
        return learn(method, TRAINING, _in_front_of_bytes(method, build, count, name), kept, SEED)

    kept = lesson(1, "rex", State())
    depends_on_what_was_kept(lambda: lesson(2, "tom", kept), lambda: lesson(1, "another rex", State()))


CONTRACTS = (
    nothing_else_survives,
    begin_may_be_called_again,
    what_is_not_taught_stays,
    it_can_be_drawn_with,
    no_picture_is_kept,
    no_picture_is_used_again,
)


def _taught(method: Continual, build: Build, count: int) -> State:
    """After so many concepts, with every model new and every state written and read."""
    kept = State()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, count + 1):
            client = client_for(method, build(method.parts, TASKS[:number]), number)
            save_state(Path(folder) / "kept.safetensors", learn(deepcopy(method), TRAINING, client, kept, SEED))
            kept = load_state(Path(folder) / "kept.safetensors")
    return kept


def client_for(method: Continual, model: Denoiser, count: int) -> Client:
    """In front of the concept of this number, from 1 on; with no other's images."""
    task = TASKS[count - 1]
    images = _images(model, task.name, caption(task, method.said(task)))
    given = Given(_images(model, f"prior {task.noun}", caption(task, task.noun)), ("a tree", "a cat", "a house"))
    rng = stream(SEED, "own", task.name)
    return Client("own", ClientData(images, images), model, rng, tasks=TASKS[:count], given=given)


def _in_front_of_bytes(method: Continual, build: Build, count: int, name: str) -> Client:
    """The same with pictures of bytes, that this name draws, where the model knows the size of pictures."""
    client = client_for(method, build(method.parts, TASKS[:count]), count)
    shape = getattr(client.model, "image_shape", client.model.sample_shape)
    pixels = torch.randint(256, (4, *shape), generator=stream(SEED, "images", name)).byte()
    images = Images(pixels, captions=client.data.train.captions)
    return replace(client, data=ClientData(images, images))


def _images(model: Denoiser, name: str, said: str) -> Images:
    pixels = torch.randn(4, *model.sample_shape, generator=stream(SEED, "images", name))
    return Images(pixels, captions=(said,) * len(pixels))


def _without_words_to_come(kept: State, count: int) -> dict[str, torch.Tensor]:
    later = frozenset().union(*(words_of(task) for task in TASKS[count:]))
    return pick(kept.params, lambda name: name not in later)
