"""Textual Inversion forgets nothing, to the bit."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import torch

from personae.continual import SequentialLora, TextualInversion
from personae.continual.contract import load_kept
from personae.core import State, stream
from personae.testing.contract import differing, same_bits

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("small.py"))))

METHOD = TextualInversion()
FIRST = ("a <rex>", "a drawing of a <rex>", "a dog", "")


def drawn_with(method, build, kept, count, captions):
    model = build(method.parts, small.TASKS[:count])
    load_kept(model, kept, stream(7))
    method.compose(model, kept, [task.name for task in small.TASKS[:count]])
    return small.predicted(model, captions)


def test_later_concepts_change_no_bit_of_what_is_said_of_the_first(build):
    states = small.taught(METHOD, build, 3)
    first, second, third = (drawn_with(METHOD, build, kept, n, FIRST) for n, kept in enumerate(states, start=1))
    assert same_bits(first, second) and same_bits(first, third)


def test_that_would_not_be_so_if_more_than_words_moved(build):
    method = SequentialLora(2, "cross_kv")
    states = small.taught(method, build, 2)
    first, second = (drawn_with(method, build, kept, n, FIRST) for n, kept in enumerate(states, start=1))
    assert not torch.allclose(first, second, atol=1e-3)


def test_a_concept_moves_its_own_word_and_nothing_else(build):
    (before,) = small.taught(METHOD, build, 1)
    client = small.begun(METHOD, build, 2, before)
    start, base = client.model.params(), {name: value.clone() for name, value in client.model.base().items()}
    client = small.trained(METHOD, build, 2, before)
    after = METHOD.end(client, before)
    assert differing(start, after.params) == ["tokens.<tom>"]
    assert differing(base, client.model.base()) == [], "the rows of known words too"
    assert after.extras == {} and after.facts == {} and set(after.params) == {"tokens.<rex>", "tokens.<tom>"}


def test_what_was_learned_is_seen(build):
    (kept,) = small.taught(METHOD, build, 1)
    untaught = drawn_with(METHOD, build, State(), 1, FIRST)
    taught = drawn_with(METHOD, build, kept, 1, FIRST)
    assert not torch.allclose(untaught[:2], taught[:2], atol=1e-4)
    assert torch.equal(untaught[2:], taught[2:])
