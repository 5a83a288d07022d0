"""How long a server waits for clients that it cannot see."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from personae.errors import ConfigError


@dataclass(frozen=True)
class Patience:
    """How long a server waits.

    A round ends for those who have not answered after `deadline_seconds`; or, once as many have answered as it needs,
    after `times_median` times the median of their own times, but not before `least_seconds`. `wait_seconds` is how long
    it waits for enough clients to appear, before a round and before the end.

    Raises: ConfigError, when a value is out of range.
    """

    deadline_seconds: float = 3600.0
    times_median: float = 3.0
    least_seconds: float = 10.0
    wait_seconds: float = 300.0

    def __post_init__(self) -> None:
        problems = [f"{n} is {getattr(self, n)}, expected above 0" for n in vars(self) if not getattr(self, n) > 0]
        if not self.times_median >= 1:
            problems.append(f"times_median is {self.times_median}, expected at least 1")
        if problems:
            raise ConfigError("federation: " + "; ".join(problems))

    def deadline(self, times: Sequence[float], minimum: int) -> float:
        """Seconds after which a round goes on without those who have not answered; `times` are of those who have."""
        if not times or len(times) < minimum:
            return self.deadline_seconds
        return min(self.deadline_seconds, max(self.least_seconds, self.times_median * statistics.median(times)))
