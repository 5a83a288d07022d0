"""What a folder says has happened to a model that learns concept after concept, and what of it survived.

    events.jsonl         one line per concept learned or forgotten: what, from where, figures, seconds
    kept-NNN.safetensors all that survived event number NNN, and all that is there for the next one
    lesson.safetensors   the lesson that is going on, after its last stretch

An event has happened when its line is written; whatever stops a run before loses the stretch that was going on.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personae.artefact.save import json_text, load_state, read_lines, read_metadata, save_state, write_bytes
from personae.core import State
from personae.errors import ArtefactError, PersonaeError
from personae.recipe.config import check_fields, plain
from personae.recipe.schema import Data
from personae.sequence.config import Concept


@dataclass(frozen=True)
class History:
    """Of the model in `folder`."""

    folder: Path

    @property
    def events(self) -> list[dict[str, Any]]:
        """A line that was cut short by a kill is left out: it has not happened."""
        return read_lines(self.folder / "events.jsonl")

    @property
    def learned(self) -> list[dict[str, Any]]:
        """The events of concepts that were learned and not forgotten, in the order of learning."""
        events = self.events  # read once: another process may be teaching
        gone = {event["concept"] for event in events if event["event"] == "forget"}
        return [event for event in events if event["event"] == "learn" and event["concept"] not in gone]

    @property
    def kept(self) -> State:
        """All that survived. Raises: ArtefactError."""
        return load_state(self._kept(len(self.events))) if self.events else State()

    def append(self, event: Mapping[str, Any], kept: State) -> None:
        """What was kept first: an event that has its line can be gone on from."""
        number = len(self.events) + 1
        save_state(self._kept(number), kept, kind="kept")
        lines = "".join(json_text(line) + "\n" for line in [*self.events, event])
        write_bytes(self.folder / "events.jsonl", lines.encode())
        for stale in (self._kept(number - 1), self._lesson):
            stale.unlink(missing_ok=True)

    def refuse_lost_events(self) -> None:
        """A kill may leave what comes next already kept, beside its lesson; more than that was told of once.

        Raises: ArtefactError.
        """
        number = len(self.events)
        begun = number + (1 if number or self.has_lesson else 0)
        kept = sorted(path.name for path in self.folder.glob("kept-*.safetensors"))
        if kept and kept[-1] > self._kept(begun).name:
            raise ArtefactError(
                f"{self.folder} holds {kept[-1]}, and events.jsonl there tells of {number} events; earlier "
                "concepts would be lost. Put events.jsonl back as it was, or begin another run"
            )

    # --- the lesson that is going on ---------------------------------------------------------------------------------

    @property
    def has_lesson(self) -> bool:
        return self._lesson.is_file()

    @property
    def waiting(self) -> Concept | None:
        """What was being taught when the run was stopped; a kill may leave the lesson of what has been taught."""
        if not self.has_lesson:
            return None
        try:
            about = read_metadata(self._lesson)
        except PersonaeError:  # damaged: it is begun anew
            return None
        if about["concept"] in {event["concept"] for event in self.events}:
            return None
        return Concept(about["concept"], about["noun"], data_of(json.loads(about["data"])))

    def reached(self, concept: Concept, images: str) -> tuple[int, State | None]:
        """How many stretches of a lesson on these pictures are done, and what it had come to; `images` is their digest.

        A lesson of another concept, noun or pictures counts for nothing: nothing of it was kept.
        """
        if not self.has_lesson:
            return 0, None
        try:
            about, state = read_metadata(self._lesson), load_state(self._lesson)
        except PersonaeError:
            return 0, None
        own = {"concept": concept.name, "noun": concept.noun, "images": images}
        if any(about.get(key) != value for key, value in own.items()):
            return 0, None
        return int(about["done"]), state

    def reach(self, concept: Concept, images: str, done: int, state: State) -> None:
        """So many stretches of a lesson are done."""
        about = {"concept": concept.name, "noun": concept.noun, "data": json_text(plain(concept.data))}
        save_state(self._lesson, state, sync=True, **about, images=images, done=str(done))

    def drop_lesson(self) -> None:
        self._lesson.unlink(missing_ok=True)

    @property
    def _lesson(self) -> Path:
        return self.folder / "lesson.safetensors"

    def _kept(self, number: int) -> Path:
        return self.folder / f"kept-{number:03d}.safetensors"


def data_of(table: Mapping[str, Any]) -> Data:
    """Where a concept's pictures lie, as an event holds it. Raises: ArtefactError."""
    problems: list[str] = []
    data = check_fields(Data, table, "data.", problems)
    if problems:
        raise ArtefactError(f"where a concept's pictures lie cannot be read: {'; '.join(problems)}")
    return typing.cast("Data", data)
