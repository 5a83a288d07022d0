"""Your own images, from folders, without code.

One folder per client:              One folder of images, plain or by label:
    root/alice/1.jpg                    root/1.jpg           root/cat/1.jpg
    root/alice/metadata.jsonl           root/metadata.jsonl  root/dog/2.jpg
    root/bob/2.png

`metadata.jsonl` is that of Hugging Face's ImageFolder: one JSON object a line, with `file_name` relative to the folder
of the file (it may name an image further down), `text` or else `caption`, and possibly `label`, a text or a whole
number. There may be one in any folder. Where there is none at all, the folders below the root, or below a client, are
the labels. Files of other kinds are passed over, and so is what starts with a dot, except a client.

An image is turned as its EXIF orientation says, put on white where it is transparent, cropped to the central square
and resized by Lanczos' filter; 16-bit grey is scaled to 8 bit. Of several frames the first is taken.
"""

from __future__ import annotations

import json
import mimetypes
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from personae.core import NAME_RULE, SAFE_NAME, Images
from personae.data.sources import Source
from personae.errors import ConfigError, DataError

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
METADATA = "metadata.jsonl"
MAX_NAMED = 10


@dataclass(frozen=True)
class _Note:
    """What is known of an image beside its pixels."""

    caption: str | None = None
    label: str | int | None = None


@dataclass(frozen=True)
class _Photo:
    """One image. `name` is its path below the root, with slashes; pixels are uint8 [C, H, W]."""

    name: str
    pixels: Tensor
    note: _Note


def client_folders(
    root: str | Path, size: int, channels: int, on_unreadable: Literal["error", "skip"] = "error"
) -> dict[str, Images]:
    """Every client's images in order of their paths, by the name of the client's folder, in order of these names.

    Labels are places in the sorted labels of all clients together. A client with a single image is accepted.
    With "skip" unreadable images are left out, and a warning names them.

    Shapes: pixels uint8 [N, channels, size, size].
    Raises: ConfigError, for a bad argument; DataError, with all that is wrong in the folders.
    """
    root = Path(root)
    problems: list[str] = []
    photos = _photos(root, size, channels, on_unreadable, 1, problems)
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    clients: dict[str, list[_Photo]] = {name: [] for name in names}
    for photo in photos:
        client = photo.name.partition("/")[0]
        if client in clients:
            clients[client].append(photo)
        else:
            problems.append(f"{photo.name}: lies beside the client folders; move it into one")
    problems += [
        f"client {name!r}: rename the folder, to {NAME_RULE}" for name in names if not SAFE_NAME.fullmatch(name)
    ]
    problems += [
        f"client {name!r}: has no image that can be read; add some or remove the folder"
        for name in names
        if not clients[name]
    ]
    if not names:
        problems.append("no folder; expected one folder of images per client")
    label_names = _label_names(photos, problems)
    _refuse(root, problems)
    return {name: _images(clients[name], label_names) for name in names}


def image_folder(
    root: str | Path, size: int, channels: int, on_unreadable: Literal["error", "skip"] = "error"
) -> Source:
    """The images of one folder and of those in it, in order of their paths.

    With "skip" unreadable images are left out, and a warning names them.

    Shapes: pixels uint8 [N, channels, size, size].
    Raises: ConfigError, for a bad argument; DataError, with all that is wrong in the folder.
    """
    root = Path(root)
    problems: list[str] = []
    photos = _photos(root, size, channels, on_unreadable, 0, problems)
    if not photos:
        problems.append(f"no image that can be read; expected {', '.join(FORMATS)}")
    label_names = _label_names(photos, problems)
    _refuse(root, problems)
    return Source(_images(photos, label_names), tuple(str(name) for name in label_names))


def _photos(
    root: Path, size: int, channels: int, on_unreadable: str, label_depth: int, problems: list[str]
) -> list[_Photo]:
    """All images that can be read, in order of their paths. Folders at `label_depth` below the root name labels."""
    if size < 1 or channels not in (1, 3) or on_unreadable not in ("error", "skip"):
        raise ConfigError(
            f"size is {size}, channels {channels}, on_unreadable {on_unreadable!r}; "
            'expected at least 1, 1 or 3, "error" or "skip"'
        )
    if not root.is_dir():
        raise DataError(f"{root} is no folder: give the one that holds the images")
    names, notes = _found(root, label_depth, problems)
    photos, unreadable = [], []
    for name in names:
        try:
            photos.append(_Photo(name, _pixels(root / name, size, channels), notes.get(name, _Note())))
        except Exception as error:  # Pillow's decoders raise almost anything on a damaged file
            unreadable.append(f"{name}: cannot be read ({error}); repair or remove it")
    if on_unreadable == "error":
        problems += unreadable
    elif unreadable:
        warnings.warn(f"{root}: left out {len(unreadable)} of {len(names)} images\n{_listed(unreadable)}", stacklevel=3)
    return photos


def _found(root: Path, label_depth: int, problems: list[str]) -> tuple[list[str], dict[str, _Note]]:
    """The names of all images, sorted, and what the metadata or else the folders say of them."""
    names: list[str] = []
    others: list[str] = []
    described: list[PurePosixPath] = []
    for folder, folders, files in os.walk(root, onerror=lambda error: problems.append(f"{error}"), followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") or (folder == str(root) and label_depth)]
        below = PurePosixPath(Path(folder).relative_to(root).as_posix())
        images = [name for name in files if Path(name).suffix.lower() in FORMATS and not name.startswith(".")]
        names += [str(below / name) for name in images]
        others += [str(below / name) for name in files if name not in images and _is_other_picture(name)]
        described += [below] * (METADATA in files)
    if others:
        warnings.warn(
            f"{root}: left out {len(others)} pictures that are not read; save them as one of {', '.join(FORMATS)}\n"
            + _listed(sorted(others)),
            stacklevel=4,
        )
    if described:
        return sorted(names), _metadata(root, sorted(described), set(names), problems)
    labels = {name: parts[label_depth] for name in names if len(parts := name.split("/")) > label_depth + 1}
    return sorted(names), {name: _Note(label=label) for name, label in labels.items()}


def _is_other_picture(name: str) -> bool:
    """A picture by its ending, of a kind that is not in FORMATS, such as .gif and .heic."""
    kind, _ = mimetypes.guess_type(name, strict=False)
    return kind is not None and kind.startswith("image/") and not name.startswith(".")


def _metadata(root: Path, folders: list[PurePosixPath], names: set[str], problems: list[str]) -> dict[str, _Note]:
    """What every metadata file says. Only images that the walk has found can be described: no path leads outside."""
    notes: dict[str, _Note] = {}
    for folder in folders:
        for number, line in enumerate((root / folder / METADATA).read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            try:
                file_name, note = _entry(line)
                name = str(folder / file_name)
                if name not in names:
                    raise ValueError(f"names {file_name!r}, which is no image here; correct or remove the line")
                if name in notes:
                    raise ValueError(f"describes {file_name!r} a second time; remove one of the lines")
                notes[name] = note
            except ValueError as error:
                problems.append(f"{folder / METADATA} line {number}: {error}")
    return notes


def _entry(line: bytes) -> tuple[str, _Note]:
    """Raises: ValueError, saying what is wrong with the line."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise ValueError('expected an object with a "file_name"')
    file_name, caption, label = entry["file_name"], entry.get("text", entry.get("caption")), entry.get("label")
    if file_name.startswith("/") or "\\" in file_name or ".." in file_name.split("/"):
        raise ValueError(f"names {file_name!r}; expected a path below this folder, with '/' and without '..'")
    if not isinstance(caption, str | None):
        raise ValueError(f"has the caption {caption!r}, expected a text")
    if not isinstance(label, str | int | None) or isinstance(label, bool):
        raise ValueError(f"has the label {label!r}, expected a text or a whole number")
    return file_name, _Note(caption, label)


def _pixels(path: Path, size: int, channels: int) -> Tensor:
    """uint8 [channels, size, size]."""
    from PIL import Image, ImageOps

    with Image.open(path, formats=sorted(set(FORMATS.values()))) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):  # 16 bit, which some releases of Pillow widen to 32; convert("L") would clip it
        deep = np.asarray(image)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError("more than 16 bit")
        image = Image.fromarray(np.rint(deep / 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).reshape(size, size, channels).permute(2, 0, 1)


def _label_names(photos: Sequence[_Photo], problems: list[str]) -> list[str | int]:
    """All labels, sorted. Captions and labels must be known of every image or of none, and labels be of one type."""
    for what in ("caption", "label"):
        without = [photo.name for photo in photos if getattr(photo.note, what) is None]
        if len(without) < len(photos):
            problems += [f"{name}: has no {what}, though other images have one; give it one" for name in without]
    labels = {photo.note.label for photo in photos if photo.note.label is not None}
    if len({type(label) for label in labels}) > 1:
        problems.append("labels are texts and numbers; make them all the one or the other")
        return []
    return sorted(labels)  # texts only, or numbers only


def _images(photos: Sequence[_Photo], label_names: list[str | int]) -> Images:
    number = {name: place for place, name in enumerate(label_names)}
    labels = [number[photo.note.label] for photo in photos if photo.note.label is not None]
    captions = tuple(photo.note.caption for photo in photos if photo.note.caption is not None)
    return Images(torch.stack([photo.pixels for photo in photos]), torch.tensor(labels) if labels else None, captions)


def _refuse(root: Path, problems: list[str]) -> None:
    if problems:
        raise DataError(f"{root} cannot be used as it is; problems found: {len(problems)}\n{_listed(problems)}")


def _listed(lines: list[str]) -> str:
    more = [f"and {len(lines) - MAX_NAMED} more"] if len(lines) > MAX_NAMED else []
    return "\n".join(f"- {line}" for line in lines[:MAX_NAMED] + more)
