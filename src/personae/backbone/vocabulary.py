"""A small tokenizer of CLIP's kind, for a text encoder that is trained from nothing.

Source: byte-pair encoding as in CLIP (Radford et al. 2021): bytes as letters, "</w>" after a word's last one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from personae.errors import ArtefactError, ConfigError

WORD_END = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
NUM_BYTES = 2 * 256
"""Every byte, inside a word and at its end: no text is unknown."""


def write_tokenizer(folder: Path, words: Sequence[str], *, max_tokens: int, length: int) -> CLIPTokenizer:
    """Merge letters until every word is one token, or there are `max_tokens`; write it as files that all versions read.

    Equal words in any order give equal files. `length` is the most tokens that a text may have, with its two ends.

    Raises: ConfigError, when there is no word, a word has white space or capitals, or `max_tokens` or `length` is too
    small; ArtefactError, when the folder cannot be written.
    """
    unfit = [word for word in words if not word or word != word.lower() or word.split() != [word]]
    if not words or unfit:
        raise ConfigError(f"words are {unfit or 'missing'}; expected words in lower case without white space")
    if max_tokens < NUM_BYTES + 2 or length < 3:
        raise ConfigError(f"max_tokens is {max_tokens} and length {length}, expected at least {NUM_BYTES + 2} and 3")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(sorted(set(words)), max_tokens - NUM_BYTES - 2)
    tokens = [*letters, *(letter + WORD_END for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    ends = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **ends}
    written = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": _lines(merges),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in written.items():
            (folder / name).write_text(text, "utf-8")
    except OSError as error:
        raise ArtefactError(f"writing a tokenizer to {folder} failed: {error.strerror or error}") from error
    return read_tokenizer(folder)


def _merges(words: Sequence[str], limit: int) -> list[tuple[str, str]]:
    """The most frequent neighbours first, of equally frequent ones the first by text, until every word is whole.

    The library's own trainer breaks such ties otherwise in every process.
    """
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = ["".join(piece for piece, _ in cut.pre_tokenize_str(word)) for word in words]
    pieces = [[*word[:-1], word[-1] + WORD_END] for word in spelled]
    counts = Counter(pair for word in pieces for pair in pairwise(word))
    merges: list[tuple[str, str]] = []
    while counts and len(merges) < limit:
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for word in pieces:
            if best in pairwise(word):
                counts.subtract(pairwise(word))
                _merge(word, best)
                counts.update(pairwise(word))
        counts = +counts
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> None:
    at = 0
    while at < len(word) - 1:
        if (word[at], word[at + 1]) == pair:
            word[at : at + 2] = ["".join(pair)]
        at += 1


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """Raises: ArtefactError, when the folder holds none, or a damaged one."""
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise ArtefactError(f"{folder} holds no tokenizer: neither vocab.json nor tokenizer.json")
    try:
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # each of the libraries below has kinds of its own for a damaged file
        raise ArtefactError(f"the tokenizer in {folder} cannot be read: {error}") from error
    return tokenizer


def write_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """vocab.json and merges.txt beside what newer versions of transformers save, which older ones cannot read."""
    if not (folder / "vocab.json").is_file():
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), "utf-8")
        (folder / "merges.txt").write_text(_lines(model["merges"]), "utf-8")


def _lines(merges: Sequence[Sequence[str]]) -> str:
    return "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""])
