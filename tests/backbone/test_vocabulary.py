"""A tokenizer made from words: each of them one token while there is room, nothing unknown, the same files again."""

import hashlib
import json

import pytest

from personae.backbone.vocabulary import NUM_BYTES, read_tokenizer, write_tokenizer
from personae.data.emoji import vocabulary
from personae.errors import ArtefactError, ConfigError

WORDS = ["a", "cartoon", "drawing", "of", "dog", "cat", "left", "above", "airplane", "telephone"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, WORDS, max_tokens=1000, length=24)
    return folder


def test_every_word_is_one_token(folder):
    tokenizer = read_tokenizer(folder)
    assert tokenizer.tokenize(" ".join(WORDS)) == [word + "</w>" for word in WORDS]
    ids = tokenizer("a dog")["input_ids"]
    assert len(ids) == 4 and ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.model_max_length == 24 and len(tokenizer) <= 1000


def test_nothing_is_unknown(folder):
    tokenizer = read_tokenizer(folder)
    for text in ("zebra", "<rex>", "été!", "犬"):
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"][1:-1]
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).replace(" ", "") == text


def test_many_words_give_the_same_tokens_again(tmp_path):
    for name in ("one", "two"):
        tokenizer = write_tokenizer(tmp_path / name, vocabulary(), max_tokens=4000, length=24)
    assert (tmp_path / "one" / "vocab.json").read_bytes() == (tmp_path / "two" / "vocab.json").read_bytes()
    assert all(tokenizer.tokenize(word) == [word + "</w>"] for word in vocabulary()) and len(tokenizer) <= 4000
    told = json.loads((tmp_path / "one" / "vocab.json").read_text("utf-8"))
    assert hashlib.sha256(json.dumps(sorted(told.items())).encode()).hexdigest()[:8] == "617ad86f"


def test_with_little_room_words_are_split(tmp_path):
    tokenizer = write_tokenizer(tmp_path, WORDS, max_tokens=NUM_BYTES + 12, length=24)
    assert len(tokenizer) <= NUM_BYTES + 12
    assert len(tokenizer.tokenize("telephone")) > 1


def test_the_order_of_words_does_not_matter(folder, tmp_path):
    write_tokenizer(tmp_path, [*reversed(WORDS), "dog"], max_tokens=1000, length=24)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
    ("words", "options", "told"),
    [
        ([], {}, "words are missing"),
        (["a b"], {}, "without white space"),
        (["Dog"], {}, r"\['Dog'\]"),
        (WORDS, {"max_tokens": 100}, "max_tokens is 100"),
        (WORDS, {"length": 2}, "length 2"),
    ],
)
def test_problems_are_named(tmp_path, words, options, told):
    with pytest.raises(ConfigError, match=told):
        write_tokenizer(tmp_path, words, **{"max_tokens": 1000, "length": 24, **options})
    with pytest.raises(ArtefactError, match="holds no tokenizer"):
        read_tokenizer(tmp_path)
