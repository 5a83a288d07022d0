"""All concepts at once: what could be learned if nothing had to be kept apart. No method; a reference from above."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from personae.continual.contract import Continual, load_kept, words_of
from personae.continual.sequential_lora import rate_of_words
from personae.core import Client, ClientData, Plan, State, joined, stream
from personae.local.fit import fit
from personae.personal.delta import is_delta
from personae.personal.lora import is_lora
from personae.sequence.concepts import read_concept
from personae.sequence.config import SequenceRecipe
from personae.sequence.model import model_for
from personae.sequence.scores import loss_of, saying, scores_of


def learn_jointly(recipe: SequenceRecipe, method: Continual) -> dict[str, Any]:
    """Train a method's parts, and all words, on all pictures mixed, as many steps as the sequence has in all.

    Returns a row of each concept's gain, and the share of its held-out pictures that are taken for it, in the recipe's
    order.
    """
    torch.set_num_threads(recipe.machine.threads)
    tasks = [recipe.task(concept) for concept in recipe.concepts]
    model, parts = model_for(recipe, method, tasks), method.parts
    data = [read_concept(concept, method, recipe, model.image_shape) for concept in recipe.concepts]
    load_kept(model, State(), stream(recipe.seed, "joint", "init"))
    said, nouns = {task.name: method.said(task) for task in tasks}, {task.name: task.noun for task in tasks}
    before = [
        loss_of(model, recipe, saying(each.heldout, said[task.name], task.noun))
        for task, each in zip(tasks, data, strict=True)
    ]
    everything = ClientData(joined([each.train for each in data]), joined([each.heldout for each in data]))
    own = frozenset().union(*(words_of(task) for task in tasks))
    plan = Plan(
        lambda name: name in own or is_lora(name) or (is_delta(name) and parts.lora is None),
        rate=rate_of_words(getattr(method, "word_rate", 1.0)),
    )
    how = replace(recipe.lesson.training, steps=recipe.lesson.training.steps * recipe.lesson.stretches * len(tasks))
    fit(Client("joint", everything, model, stream(recipe.seed, "joint"), plan, tasks=tuple(tasks)), plan.may_move, how)
    heldout = {task.name: each.heldout for task, each in zip(tasks, data, strict=True)}
    scores = scores_of(model, recipe, heldout, said, nouns)
    return {
        "concepts": [task.name for task in tasks],
        "gains": [[was - scores[task.name]["loss"] for was, task in zip(before, tasks, strict=True)]],
        "right_in_the_end": [scores[t.name]["taken"][t.name] / sum(scores[t.name]["taken"].values()) for t in tasks],
    }
