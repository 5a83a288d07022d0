"""What a server accepts, and from whom: tokens, sizes, rates."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from personae.errors import ConfigError

SHORTEST = 16
"""Characters of a token."""


@dataclass(frozen=True)
class Limits:
    """Of a request: bytes, pictures, sampler steps, characters of a caption, seconds to send it. `batch` pictures go
    through the model together, which waits `batch_seconds` for them; `waiting` requests may wait, `waiting_each`
    of one token, which has `per_minute`."""

    bytes: int = 16_384
    pictures: int = 8
    steps: int = 100
    characters: int = 500
    batch: int = 16
    batch_seconds: float = 0.05
    waiting: int = 256
    waiting_each: int = 128
    per_minute: int = 120
    seconds: float = 10.0


@dataclass(frozen=True)
class Tokens:
    """Who may ask, by the hashes of their tokens; the tokens themselves are not kept."""

    hashes: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """From a file of lines "NAME TOKEN"; a word that begins with # begins a comment.

        Raises: ConfigError, which never quotes a token.
        """
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}, which holds the tokens, cannot be read: {type(error).__name__}") from error
        hashes: dict[str, str] = {}
        taken: set[str] = set()
        for number, line in enumerate(text.splitlines(), 1):
            words = line.split()
            words = words[: next((at for at, word in enumerate(words) if word.startswith("#")), None)]
            if not words:
                continue
            if len(words) != 2 or len(words[1]) < SHORTEST or words[0] in hashes or _hash(words[1]) in taken:
                raise ConfigError(
                    f"{path}, line {number}: expected a name and a token of at least {SHORTEST} characters that no "
                    "other line has, with white space between them"
                )
            hashes[words[0]] = _hash(words[1])
            taken.add(hashes[words[0]])
        if not hashes:
            raise ConfigError(f"{path} holds no token; write a line NAME TOKEN for everyone who may ask")
        return cls(hashes)

    def owner(self, token: str) -> str | None:
        """Whose token it is. Every hash is compared, so that the time says nothing."""
        own, found = _hash(token), None
        for name, known in self.hashes.items():
            if hmac.compare_digest(own, known):
                found = name
        return found


@dataclass
class Rate:
    """A bucket for everyone that fills again at `per_minute` and holds as many."""

    per_minute: int
    now: Callable[[], float] = time.monotonic
    _left: dict[str, tuple[float, float]] = field(default_factory=dict)

    def allows(self, who: str) -> bool:
        now = self.now()
        left, since = self._left.get(who, (float(self.per_minute), now))
        left = min(float(self.per_minute), left + (now - since) * self.per_minute / 60)
        self._left[who] = (max(0.0, left - 1), now) if left >= 1 else (left, now)
        return left >= 1


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
