"""`personae`: verbs on things that a user has. Heavy imports wait until a command needs them.

Exit codes: 0 done; 1 an unexpected error; 2 recipe, option or argument; 3 images; 4 tensor shapes; 5 files and folders;
6 a round could not be completed; 7 too few clients; 8 an inference server; 130 stopped by Ctrl-C (resume it).
"""

from __future__ import annotations

import json
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from personae.cli.drawing import sample, serve
from personae.cli.options import Json, RunArgument, model_or_run
from personae.cli.teaching import forget, learn
from personae.cli.told import figures_of, print_finished, print_found, print_measured, print_personalized, print_taught

app = typer.Typer(
    name="personae",
    help="Personalize diffusion models where the data may not leave its owner.",
    epilog="Exit codes: 0 done, 2 recipe or argument, 3 images, 4 shapes, 5 files, 6 failed round, 7 too few clients, "
    "8 inference server, 130 Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

STOPPED = 130


@app.callback(invoke_without_command=True)
def entry(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from personae import __version__

        print(__version__)
        raise typer.Exit


@app.command()
def run(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A TOML file, or a shipped recipe such as 'quickstart'.")
    ],
    out: Annotated[Path | None, typer.Option(help="The run's new folder; runs/<name> when left out.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="'in_process' or 'flower', Flower's simulation; the recipe's when left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a recipe, personalize every client, measure, and write a report; or measure all that a study asks for."""
    from personae.cli.progress import Progress
    from personae.recipe.config import SEQUENCE, STUDY, parse, read_table
    from personae.recipe.workflow import run as train

    chosen = [f"engine={engine}"] if engine is not None else []
    table, where = read_table(recipe, [*(overrides or ()), *chosen])
    if STUDY in table:
        from personae.study.workflow import run_study

        folder = out if out is not None else Path("runs") / str(table.get("name"))
        with Progress(folder, f"personae resume {folder}", quiet=as_json) as watch:
            study = run_study(recipe, folder, overrides=[*(overrides or ()), *chosen], watch=watch)
        print_measured(study, as_json)
        return
    if SEQUENCE in table:
        from personae.sequence.workflow import run_sequence

        folder = out if out is not None else Path("runs") / str(table.get("name"))
        with Progress(folder, f"personae resume {folder}", quiet=as_json) as watch:
            taught = run_sequence(recipe, folder, overrides=[*(overrides or ()), *chosen], watch=watch)
        print_taught(taught, as_json)
        return
    loaded = parse(table, where)
    folder = out if out is not None else Path("runs") / loaded.name
    with Progress(folder, f"personae resume {folder}", quiet=as_json) as watch:
        saved = train(loaded, folder, watch=watch)
    print_finished(saved, as_json)


@app.command()
def resume(run: RunArgument, as_json: Json = False) -> None:
    """Continue a run that was stopped; it ends in the same bits."""
    from personae.cli.progress import Progress
    from personae.recipe.workflow import resume as continue_run
    from personae.sequence.workflow import is_sequence, open_sequence
    from personae.study.workflow import is_study, resume_study

    if is_study(run):
        with Progress(run, f"personae resume {run}", quiet=as_json) as watch:
            study = resume_study(run, watch=watch)
        print_measured(study, as_json)
        return
    if is_sequence(run):
        with Progress(run, f"personae resume {run}", quiet=as_json) as watch:
            taught = open_sequence(run).finish(watch)
        print_taught(taught, as_json)
        return
    with Progress(run, f"personae resume {run}", quiet=as_json) as watch:
        saved = continue_run(run, watch=watch)
    print_finished(saved, as_json)


@app.command()
def personalize(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run's folder, or a text-to-image pipeline's, or tiny-t2i.")
    ],
    data: Annotated[Path, typer.Option(help="The images; with --each, a folder of them per client.")],
    name: Annotated[str | None, typer.Option(help="What to call the new client.")] = None,
    each: Annotated[bool, typer.Option("--each", help="Every sub-folder is a client; they train together.")] = False,
    at_once: Annotated[int, typer.Option(help="With --each: clients in one batch.")] = 16,
    method: Annotated[str | None, typer.Option(help="Of a pipeline: lora, tokens, lora+tokens or embedding.")] = None,
    noun: Annotated[str | None, typer.Option(help='Of a pipeline: what is shown, such as "dog".')] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Of a pipeline: change one value.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Of a pipeline: the run's new folder.")] = None,
    as_json: Json = False,
) -> None:
    """Add a client that nobody has seen: trains only its own part, sends nothing."""
    from personae.errors import ConfigError
    from personae.recipe.models import is_text_to_image
    from personae.recipe.workflow import open_run

    lies = model_or_run(run)
    if is_text_to_image(lies):
        if each or method is None or noun is None:
            raise ConfigError(
                f"{run} is a pipeline; say --method lora, tokens, lora+tokens or embedding, and --noun, what the "
                "images show, and leave out --each"
            )
        _personal_run(run, data, method, noun, name or "own", overrides or (), out, as_json)
        return
    if method or noun or overrides or out:
        raise ConfigError(
            f"--method, --noun, --set and --out are for a pipeline's folder, and {run} is none: it has no text_encoder"
        )
    if (name is None) != each:
        raise ConfigError(
            "--each takes the names from the sub-folders; leave out --name"
            if each
            else "whose images are these? Say --name NAME, or --each for a folder with one sub-folder per client"
        )
    saved = open_run(run)
    if name is None:
        print_personalized(saved, saved.personalize_many(_folders(data), at_once=at_once), as_json)
        return
    figures = saved.personalize(name, data)
    asked = '--prompt "..." ' if saved.denoiser.reads_captions else ""
    print_found(
        as_json,
        {"client": name, "file": str(saved.folder / "clients" / f"{name}.safetensors"), **figures},
        [
            f"{name}: {figures['trained_parameters']:,} numbers trained, {figures['num_images']} images, nothing sent",
            f"held-out loss {figures['heldout_loss_before']:.4f} -> {figures['heldout_loss']:.4f}",
            f"wrote {saved.folder / 'clients' / (name + '.safetensors')}",
            f"next: personae sample {run} --client {name} {asked}-n 16",
        ],
    )


def _personal_run(
    model: Path,
    data: Path,
    method: Any,
    noun: str,
    name: str,
    overrides: Sequence[str],
    out: Path | None,
    as_json: bool,
) -> None:
    """A run of one client on a pipeline."""
    from personae.cli.progress import Progress
    from personae.recipe.personal import personal_recipe
    from personae.recipe.workflow import run as train

    recipe = personal_recipe(model, data, method, noun, name=name, overrides=overrides)
    folder = out if out is not None else Path("runs") / recipe.name
    with Progress(folder, f"personae resume {folder}", quiet=as_json) as watch:
        saved = train(recipe, folder, watch=watch)
    figures = saved.summary["clients"][name]
    file, report = folder / "clients" / f"{name}.safetensors", folder / "report.html"
    said = str(recipe.data.caption)
    print_found(
        as_json,
        {"client": name, "file": str(file), "report": str(report), **figures},
        [
            f"{name}: {figures['trained_parameters']:,} numbers trained, {figures['num_images']} images, nothing sent",
            f"held-out loss {figures['heldout_loss_before']:.4f} -> {figures['heldout_loss']:.4f}",
            f"wrote {file}; report: {report}",
            f'next: personae sample {folder} --client {name} --prompt "{said}" -n 8',
        ],
    )


def _folders(data: Path) -> dict[str, Path]:
    """The sub-folders, by name."""
    from personae.errors import DataError

    found = {path.name: path for path in sorted(data.iterdir()) if path.is_dir()} if data.is_dir() else {}
    if not found:
        raise DataError(f"{data} holds no folder; --each expects one folder of images per new client")
    return found


app.command()(learn)
app.command()(forget)
app.command()(sample)
app.command()(serve)


@app.command()
def evaluate(run: RunArgument, as_json: Json = False) -> None:
    """Measure every client again and rewrite summary.json."""
    from personae.cli.progress import Progress
    from personae.recipe.workflow import open_run

    saved = open_run(run)
    with Progress(run, f"personae evaluate {run}", quiet=as_json) as watch:
        summary = saved.evaluate(watch=watch)
    print_found(as_json, summary, [*figures_of(summary), f"wrote {saved.folder / 'summary.json'}"])


@app.command()
def report(run: RunArgument) -> None:
    """Write report.html again from what the folder holds."""
    from personae.recipe.workflow import open_run
    from personae.sequence.workflow import is_sequence, open_sequence
    from personae.study.workflow import is_study, open_study

    kind = open_study if is_study(run) else open_sequence if is_sequence(run) else open_run
    print(f"wrote {kind(run).report()}")


@app.command()
def export(
    run: RunArgument,
    client: Annotated[str, typer.Option(help="Whose personal model to export.")],
    to: Annotated[Path, typer.Option(help="The new folder.")],
    form: Annotated[
        str,
        typer.Option(
            "--as",
            help="pipeline; of a text-to-image model also its adapters: diffusers, peft, kohya; or its words: "
            "textual_inversion, textual_inversion_a1111.",
        ),
    ] = "pipeline",
) -> None:
    """Write one client's model, or its parts, as tools without personae read them."""
    from personae.recipe.exchange import export_parts
    from personae.recipe.workflow import open_run

    saved = open_run(run)
    if form != "pipeline":
        print("\n".join(f"wrote {path}" for path in export_parts(saved, client, to, form)))  # type: ignore[arg-type]
        return
    path = saved.export(client, to)
    kind = json.loads((path / "model_index.json").read_text("utf-8"))["_class_name"]
    print(f'wrote {path}; load it with: diffusers.{kind}.from_pretrained("{path}")')
    if saved.denoiser.reads_captions and saved.recipe.backbone.embedding is not None:
        print("the vector is in its weights, and so in both halves of guidance: it draws as here at guidance 1 only")


@app.command("import")
def import_file(
    run: RunArgument,
    file: Annotated[Path, typer.Option(help="A LoRA or a textual inversion, in safetensors; peft's is a folder.")],
    name: Annotated[str, typer.Option(help="What to call the new client.")],
    other_base: Annotated[
        bool, typer.Option("--other-base", help="Take it also when it was trained on other weights than the run's.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Add a client whose adapters or words another tool has made."""
    from personae.recipe.exchange import import_client
    from personae.recipe.workflow import open_run

    matched = import_client(open_run(run), name, file, other_base=other_base)
    found = {
        "client": name,
        "type": matched.kind,
        "base_model": matched.base or "not told",
        "taken": list(matched.taken),
        "unmatched": dict(matched.unmatched),
        "missing": list(matched.missing),
    }
    lines = [f"{name}: {matched.kind}, for {matched.base or 'a base not told'}, {len(matched.taken)} tensors taken"]
    lines += [f"not taken: {key}: {why}" for key, why in list(matched.unmatched.items())[:10]]
    lines += [
        f"{len(matched.missing)} parts are not in it and stay as at the start: {', '.join(matched.missing[:3])}"
    ] * bool(matched.missing)
    print_found(as_json, found, lines)


@app.command()
def deploy(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file, or a shipped recipe.")],
    to: Annotated[Path, typer.Option(help="The new folder.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value.")] = None,
) -> None:
    """Write a Flower app of a recipe, with scripts that start a server and its clients on their own machines."""
    from personae.recipe.deploy import deploy as write

    folder = write(recipe, to, overrides or ())
    print(f"wrote {folder}; {folder / 'README.md'} says how to start it")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A safetensors file or a run's folder.")], as_json: Json = False
) -> None:
    """Say what a file or a run folder holds."""
    from personae.artefact.inspect import inspect_file

    found = inspect_file(file)
    lines = [f"{key}: {value}" for key, value in found.items() if not isinstance(value, dict)]
    lines += [f"  {name}  {t['dtype']} {t['shape']}" for name, t in list(found.get("tensors", {}).items())[:40]]
    print_found(as_json, found, lines)


bench = typer.Typer(help="What was measured, and what papers claim.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.callback()
def _benches() -> None:
    """A group of its own, so that more tables can stand beside the first."""


@bench.command()
def papers(as_json: Json = False) -> None:
    """Every claim of a paper beside the recipe that tests it, and what it measured here."""
    from personae.study.papers import as_json as rows
    from personae.study.papers import table

    lines = table()
    told = [
        f"{line.verdict.upper():12} {line.claim}\n             {line.measured}{' - ' * bool(line.measured)}{line.why}\n"
        f"             personae run {line.recipe}{line.cells}; {line.paper}"
        for line in lines
    ]
    print_found(as_json, {"claims": rows(lines)}, told)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check that this machine has what a run needs."""
    from personae.recipe.environment import doctor as check

    rows = check()
    print_found(
        as_json,
        {name: {"fine": fine, "found": found} for fine, name, found in rows},
        [f"{'ok ' if fine else 'BAD'}  {name:28} {found}" for fine, name, found in rows],
    )
    if not all(fine for fine, _, _ in rows):
        raise typer.Exit(1)


def main() -> None:
    """The console script: an error of ours is its own sentence, and the exit code says its kind."""
    from personae.errors import PersonaeError

    signal.signal(signal.SIGINT, _stop)
    warnings.formatwarning = _note
    try:
        app()
    except PersonaeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _note(message: Warning | str, *_: object, **__: object) -> str:
    """A warning as one sentence, instead of Python's two lines, whose second is our source."""
    return f"note: {message}\n"


def _stop(*_: object) -> None:
    """Ctrl-C ends the process where it is; what was committed stays, and what was being written is ignored later."""
    raise SystemExit(STOPPED)


if __name__ == "__main__":
    main()
