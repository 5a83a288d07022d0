"""Sheets of small images, enlarged without blur, for people to look at.

Letters in shapes: `N` images, `C H W` image.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from personae.artefact.save import write_bytes
from personae.errors import ShapeError

GUTTER = 2
"""Width of the lines between images, in pixels of the enlarged sheet."""

SHADE = 226
"""Grey of the lines, and of the places in the last row that stay empty."""

TARGET_WIDTH = 480
"""Without a scale, images are enlarged by the largest whole number that keeps a sheet within this many pixels."""


def grid(images: Tensor, columns: int, scale: int | None = None) -> Image.Image:
    """One picture of all images, row by row, every pixel enlarged to a square of `scale` x `scale`.

    Shapes: images uint8 [N, C, H, W] with C of 1 (grey) or 3 (RGB).
    Raises: ShapeError.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        raise ShapeError(
            f"a grid was given {images.dtype} of shape {list(images.shape)}, expected at least one image as uint8 "
            "[N, 1, H, W] or [N, 3, H, W]; map floats from [-1, 1] to 0..255 first"
        )
    if columns < 1 or (scale is not None and scale < 1):
        raise ShapeError(f"a grid was asked for {columns} columns at scale {scale}, expected both to be at least 1")
    count, channels, height, width = images.shape
    scale = scale or max(1, TARGET_WIDTH // (columns * width))
    rows = -(-count // columns)
    sheet = torch.full(
        (channels, rows * (height * scale + GUTTER) - GUTTER, columns * (width * scale + GUTTER) - GUTTER),
        SHADE,
        dtype=torch.uint8,
    )
    enlarged = images.detach().cpu().repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    for index, image in enumerate(enlarged):
        top, left = index // columns * (height * scale + GUTTER), index % columns * (width * scale + GUTTER)
        sheet[:, top : top + height * scale, left : left + width * scale] = image
    return Image.fromarray(sheet[0].numpy() if channels == 1 else sheet.permute(1, 2, 0).contiguous().numpy())


def save_grid(path: Path, images: Tensor, columns: int, scale: int | None = None) -> None:
    """Write a grid as PNG. Raises: ShapeError; ArtefactError, when it cannot be written."""
    buffer = BytesIO()
    grid(images, columns, scale).save(buffer, format="PNG", optimize=True)
    write_bytes(path, buffer.getvalue())
