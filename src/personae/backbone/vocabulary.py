"""A small tokenizer of CLIP's kind, for a text encoder that is trained from nothing.

Source: byte-pair encoding as in CLIP (Radford et al. 2021): bytes as letters, "</w>" after a word's last one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
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
    bpe = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=max_tokens - 2 - len(letters),  # the letters at a word's end, which training does not count in
        end_of_word_suffix=WORD_END,
        initial_alphabet=letters,
        show_progress=False,
    )
    bpe.train_from_iterator(sorted(set(words)), trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    tokens = [*letters, *(letter + WORD_END for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    ends = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **ends}
    written = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in written.items():
            (folder / name).write_text(text, "utf-8")
    except OSError as error:
        raise ArtefactError(f"writing a tokenizer to {folder} failed: {error.strerror or error}") from error
    return read_tokenizer(folder)


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """Raises: ArtefactError, when the folder holds none."""
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise ArtefactError(f"{folder} holds no tokenizer: neither vocab.json nor tokenizer.json")
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    return tokenizer
