"""What summary.json says of one client of a run, and what its models draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from personae.artefact.run_folder import RunFolder
from personae.artefact.save import load_state
from personae.core import ClientData, stream
from personae.engine.rounds import load_parts
from personae.evaluate.grids import save_grid
from personae.evaluate.histogram import class_histogram
from personae.evaluate.loss import denoising_loss
from personae.evaluate.measure import Reference, histogram_figure, label_counts, measure
from personae.infer.sample import sample_together, to_bytes
from personae.personal.embedding import EMBEDDING, NULL_EMBEDDING
from personae.recipe.models import Model, rows_at_once
from personae.recipe.schema import Recipe

if TYPE_CHECKING:
    from personae.recipe.saved import SavedRun

SHOWN = 32
"""Images in a grid."""


def drawn(
    recipe: Recipe,
    model: Model,
    names: Sequence[str],
    count: int,
    seed: int | None = None,
    *,
    unconditional: bool = False,
    captions: Sequence[str] = (),
) -> Tensor:
    """What the model draws for everyone that it holds, with the recipe's sampler, and its seed unless another is given.

    Shapes: uint8 [clients, count, C, H, W].
    """
    options = recipe.sampling
    images = sample_together(
        model,
        count,
        [stream(recipe.seed if seed is None else seed, "sample", name) for name in names],
        sampler=options.sampler,
        steps=options.steps,
        guidance=options.guidance,
        unconditional=unconditional,
        captions=captions,
        batch_size=rows_at_once(model),
    )
    return to_bytes(images)


def cycled(captions: Sequence[str], count: int) -> tuple[str, ...]:
    """So many captions, all different ones in turn; none stand for the empty text."""
    different = sorted(set(captions)) or [""]
    return tuple(different[at % len(different)] for at in range(count))


def measure_client(run: SavedRun, name: str, role: str, data: ClientData) -> dict[str, Any]:
    """Everything that summary.json says of one client. Its grids are written to samples/."""
    evaluation, features, seed = run.recipe.evaluation, run.features, run.recipe.seed
    reference = Reference(data, features, evaluation.kid_subset_size, evaluation.kid_subsets, seed)
    folder = run.folder / "samples"
    folder.mkdir(exist_ok=True)
    known = [part.labels for part in (data.train, data.heldout) if part.labels is not None]
    labels = torch.cat(known) if known else None
    # A classifier counts only what it was made to tell apart.
    classify = features is not None and features.label_names == tuple(run.label_names)
    real = label_counts(labels, len(run.label_names))

    captions = cycled(data.train.captions, evaluation.num_images) if run.denoiser.reads_captions else ()

    def look(model: Model, suffix: str, unconditional: bool) -> dict[str, Any]:
        count = evaluation.num_images
        (pictures,) = drawn(run.recipe, model, [name], count, unconditional=unconditional, captions=captions)
        save_grid(folder / f"{name}{suffix}.png", pictures[:SHOWN], columns=8)
        counts = class_histogram(features, pictures).tolist() if features is not None and classify else None
        loss = denoising_loss(
            model,
            data.heldout,
            grid=evaluation.loss_grid,
            draws=evaluation.loss_draws,
            seed=seed,
            unconditional=unconditional,
            batch_size=rows_at_once(model),
        )
        return {"drawn": pictures, "counts": counts, "loss": loss, "distance": histogram_figure(counts, real)}

    save_grid(folder / f"{name}-real.png", reference.real[:SHOWN], columns=8)
    before: dict[str, Any] = {"counts": None, "loss": None, "distance": None}
    if role == "new" or run.denoiser.reads_captions:
        client = run.job_of({name: data}).site.client(name, "before", seed)
        load_parts(client, run.released.params, {}, seed)
        if EMBEDDING in (params := run.denoiser.params()):
            run.denoiser.load({**params, EMBEDDING: params[NULL_EMBEDDING]})
        before = look(run.denoiser, "-before", unconditional=not run.denoiser.reads_captions)
    path = RunFolder(run.folder).personal_path(name)
    after = look(run.model(name), "", unconditional=False)
    return {
        "role": role,
        "num_images": len(data.train),
        "num_heldout": len(data.heldout),
        "labels": real,
        "sampled_labels": after["counts"],
        "sampled_labels_before": before["counts"],
        "heldout_loss": after["loss"],
        "heldout_loss_before": before["loss"],
        "histogram_distance": after["distance"],
        "histogram_distance_before": before["distance"],
        "kid": None,
        "kid_std": None,
        "kid_floor": None,
        "kid_features": None,
        "frechet": None,
        "precision": None,
        "recall": None,
        **measure(reference, after["drawn"]),
        "trained_parameters": load_state(path).num_values(),
        "bytes_up": 0,
        "bytes_down": run.released.num_bytes(),
        "personal_file_bytes": path.stat().st_size,
    }
