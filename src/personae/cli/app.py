"""`personae`: verbs on things that a user has. Heavy imports wait until a command needs them.

Exit codes: 0 done; 1 an unexpected error; 2 recipe, option or argument; 3 images; 4 tensor shapes; 5 files and folders;
6 a round could not be completed; 7 too few clients; 8 an inference server; 130 stopped by Ctrl-C (resume it).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

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

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for another program.")]


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
    from personae.recipe.config import STUDY, parse, read_table
    from personae.recipe.workflow import run as train

    chosen = [f"engine={engine}"] if engine is not None else []
    table, where = read_table(recipe, [*(overrides or ()), *chosen])
    if STUDY in table:
        from personae.study.workflow import run_study

        folder = out if out is not None else Path("runs") / str(table.get("name"))
        with Progress(folder, f"personae resume {folder}", quiet=as_json) as watch:
            study = run_study(recipe, folder, overrides=[*(overrides or ()), *chosen], watch=watch)
        _measured(study, as_json)
        return
    loaded = parse(table, where)
    folder = out if out is not None else Path("runs") / loaded.name
    with Progress(folder, f"personae resume {folder}", quiet=as_json) as watch:
        saved = train(loaded, folder, watch=watch)
    _finished(saved, as_json)


@app.command()
def resume(run: RunArgument, as_json: Json = False) -> None:
    """Continue a run that was stopped; it ends in the same bits."""
    from personae.cli.progress import Progress
    from personae.recipe.workflow import resume as continue_run
    from personae.study.workflow import is_study, resume_study

    if is_study(run):
        with Progress(run, f"personae resume {run}", quiet=as_json) as watch:
            study = resume_study(run, watch=watch)
        _measured(study, as_json)
        return
    with Progress(run, f"personae resume {run}", quiet=as_json) as watch:
        saved = continue_run(run, watch=watch)
    _finished(saved, as_json)


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

    lies = _found(run)
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
        _personalized(saved, saved.personalize_many(_folders(data), at_once=at_once), as_json)
        return
    figures = saved.personalize(name, data)
    asked = '--prompt "..." ' if saved.denoiser.reads_captions else ""
    _print(
        as_json,
        {"client": name, "file": str(saved.folder / "clients" / f"{name}.safetensors"), **figures},
        [
            f"{name}: {figures['trained_parameters']:,} numbers trained, {figures['num_images']} images, nothing sent",
            f"held-out loss {figures['heldout_loss_before']:.4f} -> {figures['heldout_loss']:.4f}",
            f"wrote {saved.folder / 'clients' / (name + '.safetensors')}",
            f"next: personae sample {run} --client {name} {asked}-n 16",
        ],
    )


def _found(name: Path) -> Path:
    """Where a run or a pipeline lies. Raises: ArtefactError, when it is neither there nor shipped."""
    from personae.backbone.shipped import model_folder, shipped
    from personae.errors import ArtefactError

    folder = model_folder(name)
    if not folder.exists():
        raise ArtefactError(
            f"{name} does not exist; give the folder of a run or of a text-to-image pipeline, or a model that comes "
            f"with personae: {', '.join(shipped())}"
        )
    return folder


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
    _print(
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


def _personalized(saved: Any, many: dict[str, dict[str, Any]], as_json: bool) -> None:
    folder = saved.folder / "clients"
    lines = [
        f"{name}: {figures['trained_parameters']:,} numbers trained, {figures['num_images']} images, "
        f"held-out loss {figures['heldout_loss_before']:.4f} -> {figures['heldout_loss']:.4f}"
        for name, figures in many.items()
    ]
    wrote = f"wrote {len(many)} files to {folder}; nothing was sent"
    _print(as_json, {"clients": many, "folder": str(folder)}, [*lines, wrote])


@app.command()
def sample(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run's folder, or a text-to-image pipeline's, or tiny-t2i.")
    ],
    client: Annotated[str | None, typer.Option(help="Of a run: whose personal model draws.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to draw, for models that read text.")] = None,
    num_images: Annotated[int, typer.Option("-n", "--num-images", help="How many images.")] = 16,
    out: Annotated[
        Path | None, typer.Option(help="A new folder for them; RUN/samples/<client>-<seed> when left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed draws other images.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Sampler steps; the run's, or 25.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How far to follow; the run's, or 3.")] = None,
    device: Annotated[str | None, typer.Option(help="Where; the run's, or cpu.")] = None,
    server: Annotated[str | None, typer.Option(help="Address of one that begins; token in PERSONAE_TOKEN.")] = None,
    server_steps: Annotated[float | None, typer.Option(help="Its share of the steps; 0.3.")] = None,
    authority: Annotated[Path | None, typer.Option(help="Certificate to trust it by.")] = None,
    as_json: Json = False,
) -> None:
    """Draw images from a client's personal model, or from a pipeline, as PNG files and one grid."""
    from personae.errors import ArtefactError, ConfigError
    from personae.evaluate.grids import save_grid
    from personae.recipe.models import draw_from_pipeline, is_text_to_image
    from personae.recipe.workflow import open_run

    lies = _found(run)
    plain = is_text_to_image(lies)
    if plain and (prompt is None or client is not None or out is None):
        raise ConfigError(
            f"{run} is a pipeline; say --prompt, what to draw, and --out, where to, and leave out --client"
        )
    if not plain and client is None:
        raise ConfigError(f"whose model is to draw? Say --client NAME; personae inspect {run} lists them")
    folder = out or run / "samples" / f"{client}-{seed}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtefactError(f"{folder} exists; nothing was overwritten. Choose another --out or --seed")
    if server is None and (server_steps is not None or authority is not None):
        raise ConfigError("--server-steps and --authority are for --server, which is missing")
    if server is not None:
        share = 0.3 if server_steps is None else server_steps
        images = _with_server(run, client, prompt, server, share, authority, num_images, seed, steps, guidance, device)
    elif plain:
        images = draw_from_pipeline(lies, str(prompt), num_images, seed, steps, guidance, device or "cpu")
    else:
        images = open_run(run, device).sample(
            str(client), num_images, seed=seed, prompt=prompt, steps=steps, guidance=guidance
        )
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        save_grid(folder / f"{number:04d}.png", image[None], columns=1, scale=1)
    save_grid(folder / "grid.png", images, columns=8)
    _print(
        as_json,
        {"client": client, **({"prompt": prompt} if prompt else {}), "num_images": num_images, "folder": str(folder)},
        [f"wrote {num_images} images and grid.png to {folder}"],
    )


def _with_server(
    run: Path,
    client: str | None,
    prompt: str | None,
    url: str,
    share: float,
    authority: Path | None,
    num_images: int,
    seed: int,
    steps: int | None,
    guidance: float | None,
    device: str | None,
) -> Any:
    from personae.errors import ConfigError
    from personae.recipe.workflow import open_run

    if client is None or prompt is None:
        raise ConfigError("--server begins what a client of a run finishes; say --client and --prompt")
    if not (token := os.environ.get("PERSONAE_TOKEN")):
        raise ConfigError(f"{url} wants a token; put it into the environment variable PERSONAE_TOKEN")
    _needs_serve("cryptography")
    from personae.serve.client import Server, sample_with

    return sample_with(
        open_run(run, device),
        client,
        prompt,
        Server(url, token, authority, os.environ.get("PERSONAE_SERVER_KEY")),
        share,
        num_images,
        seed=seed,
        steps=steps,
        guidance=guidance,
    )


def _needs_serve(*packages: str) -> None:
    from importlib.util import find_spec

    from personae.errors import ConfigError

    if lacking := [name for name in packages if find_spec(name) is None]:
        raise ConfigError(f"this needs {', '.join(lacking)}: pip install 'personae[serve]'")


@app.command()
def serve(
    run: RunArgument,
    tokens: Annotated[Path, typer.Option(help="A file of lines NAME TOKEN: who may ask.")],
    host: Annotated[str, typer.Option(help="Where to listen; others reach it with a certificate only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="And on which port.")] = 8443,
    certificate: Annotated[Path | None, typer.Option(help="For HTTPS, a PEM file.")] = None,
    certificate_key: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    signing_key: Annotated[
        Path | None, typer.Option(help="To sign what is sent; made if missing. Without it a new one at each start.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where; the run's when left out.")] = None,
) -> None:
    """Begin drawings for clients, with the run's shared model, until Ctrl-C. They finish them at home."""
    from personae.recipe.workflow import open_run

    _needs_serve("cryptography", "fastapi", "uvicorn")
    from personae.serve.edge import serve as listen

    saved = open_run(run, device)
    listen(
        saved,
        tokens,
        host=host,
        port=port,
        certificate=certificate,
        certificate_key=certificate_key,
        signing_key=signing_key,
    )


@app.command()
def evaluate(run: RunArgument, as_json: Json = False) -> None:
    """Measure every client again and rewrite summary.json."""
    from personae.cli.progress import Progress
    from personae.recipe.workflow import open_run

    saved = open_run(run)
    with Progress(run, f"personae evaluate {run}", quiet=as_json) as watch:
        summary = saved.evaluate(watch=watch)
    _print(as_json, summary, [*_table(summary), f"wrote {saved.folder / 'summary.json'}"])


@app.command()
def report(run: RunArgument) -> None:
    """Write report.html again from what the folder holds."""
    from personae.recipe.workflow import open_run
    from personae.study.workflow import is_study, open_study

    print(f"wrote {open_study(run).report() if is_study(run) else open_run(run).report()}")


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
    as_json: Json = False,
) -> None:
    """Add a client whose adapters or words another tool has made."""
    from personae.recipe.exchange import import_client
    from personae.recipe.workflow import open_run

    matched = import_client(open_run(run), name, file)
    found = {
        "client": name,
        "type": matched.kind,
        "taken": list(matched.taken),
        "unmatched": dict(matched.unmatched),
        "missing": list(matched.missing),
    }
    lines = [f"{name}: {matched.kind}, {len(matched.taken)} tensors taken"]
    lines += [f"not taken: {key}: {why}" for key, why in list(matched.unmatched.items())[:10]]
    lines += [
        f"{len(matched.missing)} parts are not in it and stay as at the start: {', '.join(matched.missing[:3])}"
    ] * bool(matched.missing)
    _print(as_json, found, lines)


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
    _print(as_json, found, lines)


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
    _print(as_json, {"claims": rows(lines)}, told)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check that this machine has what a run needs."""
    from personae.recipe.environment import doctor as check

    rows = check()
    _print(
        as_json,
        {name: {"fine": fine, "found": found} for fine, name, found in rows},
        [f"{'ok ' if fine else 'BAD'}  {name:28} {found}" for fine, name, found in rows],
    )
    if not all(fine for fine, _, _ in rows):
        raise typer.Exit(1)


def _finished(saved: Any, as_json: bool) -> None:
    summary = saved.summary
    _print(
        as_json,
        {"run": str(saved.folder), "report": str(saved.folder / "report.html"), "summary": summary},
        [*_table(summary), f"report: {saved.folder / 'report.html'}"],
    )


def _measured(study: Any, as_json: bool) -> None:
    summary = study.summary
    report = study.folder / "report.html"
    found = {"study": str(study.folder), "report": str(report), "summary": summary}
    _print(as_json, found, [*summary["findings"], f"report: {report}"])


def _table(summary: dict[str, Any]) -> list[str]:
    """A screenful of figures: one line per role, and one per new client."""
    lines = []
    for role, title in (("train", "training clients"), ("new", "new clients")):
        chosen = {name: c for name, c in summary["clients"].items() if c["role"] == role}
        if chosen:
            losses = [c["heldout_loss"] for c in chosen.values() if c["heldout_loss"] is not None]
            loss = f"{sum(losses) / len(losses):.4f}" if losses else "unknown"
            lines.append(f"{len(chosen)} {title}: held-out loss {loss}{_distances(list(chosen.values()))}")
    for name, c in list(summary["clients"].items()):
        if c["role"] == "new":
            lines.append(
                f"  {name}: {c['num_images']} images, {c['trained_parameters']:,} numbers trained, "
                f"{c['bytes_up']} bytes sent, file {c['personal_file_bytes']:,} bytes{_distances([c])}"
            )
    return lines


def _distances(chosen: list[dict[str, Any]]) -> str:
    after = [c["histogram_distance"] for c in chosen if c["histogram_distance"] is not None]
    before = [c["histogram_distance_before"] for c in chosen if c["histogram_distance_before"] is not None]
    if not after:
        return ""
    start = f"{sum(before) / len(before):.3f} -> " if before else ""
    return f", class-histogram distance {start}{sum(after) / len(after):.3f}"


def _print(as_json: bool, value: dict[str, Any], lines: list[str]) -> None:
    from personae.artefact.save import json_text

    print(json_text(value, indent=2) if as_json else "\n".join(lines))


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
