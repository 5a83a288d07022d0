"""What a user does with a study: run it, take it up again, write its report anew.

    config.toml        the recipe with every value filled in
    environment.json   versions, platform, threads, commit
    cells.jsonl        one line per measurement: its settings, its figures, its seconds
    summary.json       the findings and numbers; charts/, report.html
    runs/              models that were trained on the way, where a study trains any

A measurement is done when its line is written; a stop at any moment loses the ones that were being made, no other.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from personae.artefact.folder import begun, held
from personae.artefact.save import explained, json_text, read_json, read_lines, read_toml, write_bytes, write_json
from personae.core import Round, Watch, ignore
from personae.errors import ArtefactError, PersonaeError
from personae.recipe.config import STUDY, read_table
from personae.recipe.environment import keep_environment
from personae.study.config import StudyRecipe, parse_study, study_toml
from personae.study.report import write_study_report
from personae.study.study import Answer, Cell, Row, Study


def run_study(
    recipe: str | Path, out: str | Path | None = None, *, overrides: Sequence[str] = (), watch: Watch = ignore
) -> SavedStudy:
    """Measure everything that a study's recipe asks for, in a folder of its own, `runs/<name>` by default.

    Raises: ConfigError, ArtefactError (the folder exists), and what a measurement raises.
    """
    plan, study = parse_study(*read_table(recipe, overrides))
    saved = SavedStudy(Path(out) if out is not None else Path("runs") / plan.name, plan, study)
    with begun(saved.folder):
        write_bytes(saved.folder / "config.toml", study_toml(plan, study).encode())
    return saved.finish(watch)


def resume_study(folder: str | Path, *, watch: Watch = ignore) -> SavedStudy:
    """Measure what is missing.

    Warns: UserWarning, when it goes on with other versions or another machine than it began with.
    Raises: ArtefactError, when the folder holds no study, and what a measurement raises.
    """
    return open_study(folder).finish(watch)


def is_study(folder: str | Path) -> bool:
    """Whether a folder that a recipe was run in holds a study, not a run."""
    config = Path(folder) / "config.toml"
    return config.is_file() and STUDY in read_toml(config)


def open_study(folder: str | Path) -> SavedStudy:
    """Raises: ArtefactError, when the folder holds no study."""
    path = Path(folder)
    if not is_study(path):
        raise ArtefactError(f"{path} holds no study; start one with: personae run RECIPE --out {path}")
    where = path / "config.toml"
    return SavedStudy(path, *parse_study(read_toml(where), str(where)))


@dataclass(frozen=True)
class SavedStudy:
    """A study on disk."""

    folder: Path
    recipe: StudyRecipe
    study: Study

    def finish(self, watch: Watch = ignore) -> SavedStudy:
        """Measure every cell that has no line yet, then write summary and report."""
        with held(self.folder):
            lines = self._lines()
            write_bytes(self.folder / "cells.jsonl", "".join(json_text(line) + "\n" for line in lines).encode())
            done = {_key(line["cell"]): line for line in lines}
            if self._missing(done):
                keep_environment(self.folder, self.recipe.machine.threads, "cpu")
            while missing := self._missing(done):
                total = len(self._cells(done))
                for number, (cell, line) in enumerate(self._measured(missing), total - len(missing) + 1):
                    self._append(line)
                    done[_key(cell)] = line
                    watch(_told(cell, number, total))
            self.report()
        return self

    def report(self) -> Path:
        """Write summary.json, charts/ and report.html from cells.jsonl; also while a study is not finished."""
        lines = {_key(line["cell"]): line for line in self._lines()}
        cells, answer = self._cells(lines), self.answer
        own = [lines[_key(cell)] for cell in cells if _key(cell) in lines]
        seconds = sum(line["seconds"] for line in own)
        summary = {
            "study": self.recipe.study,
            "name": self.recipe.name,
            "seed": self.recipe.seed,
            "cells": len(cells),
            "measured": len(own),
            "cpu_seconds": seconds,
            "findings": list(answer.findings),
            "numbers": dict(answer.numbers),
        }
        write_json(self.folder / "summary.json", summary)
        return write_study_report(self.folder, self.recipe, answer, len(own), len(cells), seconds)

    @property
    def rows(self) -> list[Row]:
        """What was measured so far, in the order of the study's cells."""
        return _rows({_key(line["cell"]): line for line in self._lines()}, self.study)

    @property
    def answer(self) -> Answer:
        return self.study.answer(self.rows)

    @property
    def summary(self) -> dict[str, Any]:
        return dict(read_json(self.folder / "summary.json"))

    # --- pieces ----------------------------------------------------------------------------------------------

    def _cells(self, done: Mapping[str, Any]) -> Sequence[Cell]:
        return self.study.cells(_rows(done, self.study))

    def _missing(self, done: Mapping[str, Any]) -> list[Cell]:
        return [cell for cell in self._cells(done) if _key(cell) not in done]

    def _lines(self) -> list[dict[str, Any]]:
        """A line that was cut short by a kill is left out: its cell is measured again."""
        return read_lines(self.folder / "cells.jsonl")

    def _append(self, line: Mapping[str, Any]) -> None:
        with explained(self.folder / "cells.jsonl", "writing"), open(self.folder / "cells.jsonl", "a") as file:
            file.write(json_text(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _measured(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """As they come, from as many processes as the recipe says."""
        machine = self.recipe.machine
        if machine.workers == 1:
            torch.set_num_threads(machine.threads)
            for cell in cells:
                yield cell, _measure(self.study, cell, self.recipe.seed, self.folder)
            return
        with _pool(machine.workers, machine.threads) as pool:
            waiting: dict[Future[dict[str, Any]], Cell] = {}
            left = list(reversed(cells))
            try:
                while left or waiting:
                    while left and len(waiting) < machine.workers:
                        cell = left.pop()
                        with _no_interrupt():
                            asked = pool.submit(_measure, self.study, cell, self.recipe.seed, self.folder)
                        waiting[asked] = cell
                    done = wait(waiting, return_when=FIRST_COMPLETED).done
                    for future in sorted(done, key=lambda future: future.exception() is not None):  # keep what there is
                        yield waiting.pop(future), future.result()
            except BrokenProcessPool as error:
                raise PersonaeError(
                    f"{self.folder}: a process that measured was ended from outside, perhaps for want of memory "
                    f"({machine.workers} measured side by side, machine.workers in config.toml). What was measured "
                    f"before is kept; continue with: personae resume {self.folder}"
                ) from error


def _measure(study: Study, cell: Cell, seed: int, folder: Path) -> dict[str, Any]:
    started = time.process_time()
    figures = study.measure(cell, seed, folder)
    return {"cell": dict(cell), "figures": dict(figures), "seconds": round(time.process_time() - started, 3)}


def _rows(done: Mapping[str, Any], study: Study) -> list[Row]:
    """In the order of the study's cells, which may need some of them to know the rest."""
    rows: list[Row] = []
    while True:
        cells = study.cells(rows)
        found = [done[_key(cell)] for cell in cells if _key(cell) in done]
        if len(found) <= len(rows):
            return rows
        rows = [{**line["cell"], **line["figures"]} for line in found]


def _key(cell: Cell) -> str:
    return json.dumps(dict(cell), sort_keys=True)


def _told(cell: Cell, done: int, total: int) -> Round:
    label = " ".join(f"{key} {value}" for key, value in cell.items())
    return Round("measure", 0, 0, label, done, total, float("nan"), 0, 0, 0.0, done >= total)


@contextmanager
def _pool(workers: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with the block, whatever they are doing when it is left by an error or Ctrl-C."""
    context, strangers = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(threads,))
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - strangers:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """A process that is started inside never hears Ctrl-C, not even while it imports; this one hears it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process says what a stop means
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_the_first() -> None:
    """When the first process is killed, nobody takes the figures; a model in training would stay locked."""
    first = multiprocessing.parent_process()
    if first is not None:
        first.join()
        os._exit(1)
