"""The commands that teach a model concept after concept."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from personae.cli.options import Json, RunArgument
from personae.cli.told import print_found


def learn(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The model's folder; a new one with --model and --method.")
    ],
    concept: Annotated[str, typer.Option(help="What to call it; prompts say <NAME>.")],
    data: Annotated[Path, typer.Option(help="A folder of its pictures.")],
    noun: Annotated[str, typer.Option(help='What it is one of, such as "dog".')],
    model: Annotated[str | None, typer.Option(help="Of a new one: a pipeline's folder, or tiny-t2i.")] = None,
    method: Annotated[str | None, typer.Option(help="Of a new one: ewc, dsc, c_lora, ...")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Of a new one: change one value.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Teach one more concept, without looking at earlier ones' pictures again."""
    from personae.cli.progress import Progress
    from personae.errors import ConfigError
    from personae.recipe.schema import Data
    from personae.sequence.config import Concept, own_recipe
    from personae.sequence.workflow import begin_sequence, is_sequence, open_sequence

    taught, begun = Concept(concept, noun, Data("folder", path=str(data))), is_sequence(run)
    if begun:
        saved = open_sequence(run)
        asked = own_recipe(model, method, run.name, overrides or ()) if model and method else None
        if (model or method or overrides) and not (asked and saved.began_as(*asked)):
            raise ConfigError(
                f"{run} has its model and method, and they are not those of this command (see its config.toml); "
                "leave out --model, --method and --set, or name another folder"
            )
    elif (run / "config.toml").is_file():
        raise ConfigError(f"{run} is a run of another kind, which is not taught; name another folder")
    elif model is None or method is None:
        raise ConfigError(f"{run} is new; say --model, such as tiny-t2i, and --method, such as ewc")
    else:
        saved = begin_sequence(*own_recipe(model, method, run.name, overrides or ()), run, [taught])
    again = shlex.join(["personae", "learn", *map(str, (run, "--concept", concept, "--data", data, "--noun", noun))])
    with Progress(run, again, quiet=as_json) as watch, nullcontext() if begun else saved.dropped_if_refused():
        event = saved.learn(taught, watch=watch)
    scores = event["scores"][concept]
    lines = [
        f"{concept}: {event['num_images']} pictures, held-out loss {scores['loss']:.4f}, "
        f"{event['seconds']:.0f} seconds; {event['bytes']:,} bytes are kept of all {len(saved.concepts)} concepts",
        *([f"room for {event['facts']['room']} more"] if "room" in event["facts"] else []),
        f"report: {run / 'report.html'}",
        f'next: personae sample {shlex.quote(str(run))} --prompt "a {taught.word}" -n 8',
    ]
    print_found(as_json, {**event, "report": str(run / "report.html")}, lines)


def forget(
    run: RunArgument,
    concept: Annotated[str, typer.Option(help="Which one.")],
    as_json: Json = False,
) -> None:
    """Remove what can be removed of a concept, and say what cannot."""
    from personae.sequence.workflow import open_sequence

    saved = open_sequence(run)
    remains = saved.forget(concept)
    print_found(
        as_json,
        {"concept": concept, "remains": remains, "concepts": saved.concepts},
        [f"{concept} is removed. {remains}", f"concepts now: {', '.join(saved.concepts) or 'none'}"],
    )
