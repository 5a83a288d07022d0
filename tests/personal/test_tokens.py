"""New words are rows of their own: they stand where the word stands, and the table keeps its bits."""

import pytest
import torch
from torch import nn

from personae.backbone.vocabulary import write_tokenizer
from personae.errors import ConfigError
from personae.personal.tokens import NewWords, Words, plain


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = ["a", "drawing", "of", "dog", "cat"]
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), words, max_tokens=600, length=12)


@pytest.fixture
def table(tokenizer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Embedding(len(tokenizer), 3)


def test_a_word_begins_as_another_and_is_then_its_own(tokenizer, table):
    before = table.weight.detach().clone()
    new = NewWords(Words(("<rex>", "<tom>"), "dog", 2), tokenizer, table)
    first = table.num_embeddings
    assert new.pieces("a <tom> drawing of <rex>") == ["a", first + 2, first + 3, "drawing of", first, first + 1]
    assert new.pieces("a dog") == ["a dog"]
    assert new.pieces("a <REX>.") == ["a", first, first + 1, "."]
    dog = tokenizer("dog", add_special_tokens=False)["input_ids"][0]
    assert torch.equal(table(torch.tensor([[first, first + 3]])), table(torch.tensor([[dog, dog]])))
    with torch.no_grad():
        new.live()["tokens.<tom>"].copy_(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    found = table(torch.tensor([[dog, first + 2, first + 3, first]]))
    assert torch.equal(
        found[0], torch.stack([before[dog], torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 5, 6]), before[dog]])
    )
    assert torch.equal(table.weight, before)
    assert all(torch.equal(value, before[dog].expand(2, 3)) for value in new.initial().values())


def test_each_word_may_begin_as_a_known_one_of_its_own(tokenizer, table):
    options = Words(("<rex>", "<tom>", "<pip>"), ("dog", "cat", "dog"), 2)
    new = NewWords(options, tokenizer, table)
    dog, cat = (table.weight[tokenizer(known, add_special_tokens=False)["input_ids"][0]] for known in ("dog", "cat"))
    begin = {name: value[0] for name, value in new.initial().items()}
    assert list(begin) == ["tokens.<rex>", "tokens.<tom>", "tokens.<pip>"] and not torch.equal(dog, cat)
    assert all(torch.equal(begin[f"tokens.{word}"], known) for word, known in (("<rex>", dog), ("<tom>", cat)))
    assert torch.equal(begin["tokens.<pip>"], dog)
    first = table.num_embeddings
    found = table(torch.tensor([[first + 1, first + 2, first + 4]]))[0]
    assert torch.equal(found, torch.stack([dog, cat, dog]))
    assert plain("a <tom> and a <rex>", options) == "a cat and a dog"


@pytest.mark.parametrize("start", [("dog",), ("dog", "cat", "dog"), ()])
def test_another_number_of_known_words_than_of_new_ones_is_refused(start):
    with pytest.raises(ConfigError, match=f"start is {len(start)} words for 2 new ones; expected one for each"):
        Words(("<rex>", "<tom>"), start)


def test_gradients_reach_the_rows_and_not_the_table(tokenizer, table):
    table.requires_grad_(False)
    new = NewWords(Words(("<rex>",), "dog"), tokenizer, table)
    table(torch.tensor([[0, table.num_embeddings]])).sum().backward()
    assert torch.equal(new.live()["tokens.<rex>"].grad, torch.ones(1, 3)) and table.weight.grad is None


@pytest.mark.parametrize(
    ("words", "start", "told"),
    [
        (("dog",), "cat", "already knows 'dog'; choose a word that it does not, such as <dog>"),
        (("<rex>",), "zebra", r"from 'zebra', its noun, which is 5 tokens \(z, e, b, r, a</w>\), expected one"),
    ],
)
def test_a_word_must_be_new_and_begin_as_a_known_one(tokenizer, table, words, start, told):
    with pytest.raises(ConfigError, match=told):
        NewWords(Words(words, start), tokenizer, table)


@pytest.mark.parametrize("options", [{"words": ()}, {"words": ("a b",)}, {"words": ("<a>", "<a>")}, {"words": ("<A>",)},
                                     {"words": ("<a>",), "num_vectors": 0}])  # fmt: skip
def test_problems_are_named(options):
    with pytest.raises(ConfigError, match="expected different words"):
        Words(**{"start": "dog", **options})
