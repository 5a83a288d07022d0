"""The commands that draw: here, or begun on a server, and that server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from personae.cli.options import Json, RunArgument, model_or_run
from personae.cli.told import print_found


def sample(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run's folder, or a text-to-image pipeline's, or tiny-t2i.")
    ],
    client: Annotated[str | None, typer.Option(help="Of a run: whose personal model draws.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to draw, for models that read text.")] = None,
    regions: Annotated[
        list[str] | None,
        typer.Option("--region", metavar="BOX:CAPTION", help='After learn: "0,0,0.5,1: a <rex>", the left half.'),
    ] = None,
    num_images: Annotated[int, typer.Option("-n", "--num-images", help="How many images.")] = 16,
    out: Annotated[
        Path | None, typer.Option(help="A new folder for them; RUN/samples/<client>-<seed> when left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed draws other images.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Sampler steps; the run's, or 25.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How far to follow; the run's, or 3.")] = None,
    device: Annotated[str | None, typer.Option(help="Where; the run's, or cpu.")] = None,
    server: Annotated[str | None, typer.Option(help="Address to begin at; token in PERSONAE_TOKEN.")] = None,
    server_steps: Annotated[float | None, typer.Option(help="Its share of the steps; 0.3.")] = None,
    authority: Annotated[Path | None, typer.Option(help="Certificate to trust it by.")] = None,
    as_json: Json = False,
) -> None:
    """Draw images from a client's personal model, or from a pipeline, as PNG files and one grid."""
    from personae.artefact.save import explained
    from personae.errors import ArtefactError, ConfigError
    from personae.evaluate.grids import save_grid
    from personae.infer.regions import parsed
    from personae.recipe.models import draw_from_pipeline, is_text_to_image
    from personae.recipe.workflow import open_run
    from personae.sequence.workflow import is_sequence, open_sequence

    lies = model_or_run(run)
    plain, taught = is_text_to_image(lies), is_sequence(lies)
    wanted = {
        "say --prompt, what to draw": (plain or taught) and prompt is None,
        "say --out, where to": plain and out is None,
        "leave out --client": (plain or taught) and client is not None,
        "leave out --server, which begins what a run's client finishes": (plain or taught) and server is not None,
    }
    if any(wanted.values()):
        kind = "is a pipeline" if plain else "has learned concepts of one client"
        raise ConfigError(f"{run} {kind}; {', and '.join(what for what, is_so in wanted.items() if is_so)}")
    if not (plain or taught) and client is None:
        raise ConfigError(f"whose model is to draw? Say --client NAME; personae inspect {run} lists them")
    if regions and not taught:
        raise ConfigError(f"--region is for models that personae learn has taught, and {run} is none; leave it out")
    if num_images < 1:
        raise ConfigError(f"{num_images} images were asked for, expected at least 1")
    boxes = [parsed(region) for region in regions or ()]
    folder = out or run / "samples" / (f"drawn-{seed}" if taught else f"{client}-{seed}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtefactError(f"{folder} exists; nothing was overwritten. Choose another --out or --seed")
    if server is None and (server_steps is not None or authority is not None):
        raise ConfigError("--server-steps and --authority are for --server, which is missing")
    if server is not None:
        share = 0.3 if server_steps is None else server_steps
        images = _with_server(run, client, prompt, server, share, authority, num_images, seed, steps, guidance, device)
    elif taught:
        images = open_sequence(run, device).sample(
            str(prompt), num_images, seed=seed, steps=steps, guidance=guidance, regions=boxes
        )
    elif plain:
        images = draw_from_pipeline(lies, str(prompt), num_images, seed, steps, guidance, device or "cpu")
    else:
        images = open_run(run, device).sample(
            str(client), num_images, seed=seed, prompt=prompt, steps=steps, guidance=guidance
        )
    with explained(folder, "creating"):
        folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        save_grid(folder / f"{number:04d}.png", image[None], columns=1, scale=1)
    save_grid(folder / "grid.png", images, columns=8)
    print_found(
        as_json,
        {
            "client": client,
            **({"prompt": prompt} if prompt else {}),
            **({"regions": regions} if regions else {}),
            "num_images": num_images,
            "folder": str(folder),
        },
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


def serve(
    run: RunArgument,
    tokens: Annotated[Path, typer.Option(help="A file of lines NAME TOKEN: who may ask.")],
    host: Annotated[str, typer.Option(help="Where to listen; others reach it with a certificate only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="And on which port.")] = 8443,
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
