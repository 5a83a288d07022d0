"""Live progress: how far it is, loss, bytes and time left, on one line of a terminal or as plain lines in a log."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType

from personae.core import Round

LOG_EVERY_SECONDS = 10.0
STAGES = {
    "train": "training",
    "personalize": "personalizing",
    "evaluate": "measuring",
    "measure": "measuring",
    "learn": "learning",
}
IN_ROUNDS = ("train", "learn")


class Progress:
    """A watcher. When the run in `folder` is stopped, it says that `command` continues it."""

    def __init__(self, folder: Path, command: str, *, quiet: bool = False) -> None:
        self._folder, self._command, self._quiet = folder, command, quiet
        self._live = sys.stderr.isatty()
        self._started: dict[str, tuple[float, float]] = {}
        self._bytes_up = self._bytes_down = 0
        self._written = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live and not self._quiet:
            print(file=sys.stderr)
        if kind in (KeyboardInterrupt, SystemExit):
            if (self._folder / "config.toml").is_file():
                print(f"stopped; nothing that was committed is lost. Continue with: {self._command}", file=sys.stderr)
            else:
                print("stopped before anything was saved; start again", file=sys.stderr)

    def __call__(self, now: Round) -> None:
        if self._quiet:
            return
        position, total = self._position(now)
        began, first = self._started.setdefault(now.stage, (time.monotonic(), max(0.0, position - 1 / now.clients)))
        if now.stage == "train" and now.done:
            self._bytes_up += now.bytes_up
            self._bytes_down += now.bytes_down
        moved, spent = position - first, time.monotonic() - began
        left = spent / moved * (total - position) if moved > 0 and spent > 1 else None
        finished = position >= total
        taught = now.stage == "learn" and now.clients_done >= now.clients - 1
        if not self._live and not finished and not taught and time.monotonic() - self._written < LOG_EVERY_SECONDS:
            return
        self._written = time.monotonic()
        line = self._line(now, left)
        print(
            f"\r\x1b[K{line}" if self._live else line,
            end="\n" if not self._live or finished else "",
            file=sys.stderr,
            flush=True,
        )

    def _position(self, now: Round) -> tuple[float, float]:
        """How far, out of how much: rounds while training, concepts while learning, clients afterwards."""
        if now.stage not in IN_ROUNDS:
            return now.clients_done, now.clients
        return now.round - 1 + now.clients_done / now.clients, now.rounds

    def _line(self, now: Round, left: float | None) -> str:
        time_left = f"  {_clock(left)} left" if left is not None else ""
        if now.stage == "learn":
            front = f"{STAGES[now.stage]:13} concept {now.round}/{now.rounds} ({now.client})  "
            if now.done:
                return f"{front}kept, measured and drawn"
            trained = f"stretch {now.clients_done}/{now.clients - 1}  loss {now.loss:.4f}"
            if now.clients_done < now.clients - 1:
                return f"{front}{trained}{time_left}"
            return f"{front}{trained}  keeping, measuring and drawing it"
        if now.stage != "train":
            noun = "cell" if now.stage == "measure" else "client"
            return f"{STAGES[now.stage]:13} {noun} {now.clients_done}/{now.clients} ({now.client}){time_left}"
        refused = f" ({now.refused} left out)" if now.refused else ""
        return (
            f"{STAGES[now.stage]:13} round {now.round}/{now.rounds}  clients {now.clients_done}/{now.clients}{refused}"
            f"  loss {now.loss:.4f}  up {_mib(self._bytes_up)}  down {_mib(self._bytes_down)}{time_left}"
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
