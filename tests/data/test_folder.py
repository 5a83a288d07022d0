"""Own images: every mode and size, captions and labels, and every way in which a folder can be wrong."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from personae.data import client_folders, image_folder
from personae.errors import ConfigError, DataError


def save(path, colour=(200, 100, 50), size=(12, 12), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def write_metadata(folder, *entries):
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def pixel(folder, channels=3):
    """The colour of the middle of the only image, at size 4."""
    pixels = image_folder(folder, 4, channels).images.pixels
    assert pixels.shape == (1, channels, 4, 4) and pixels.dtype == torch.uint8
    return pixels[0, :, 1, 1].tolist()


# --- kinds of image ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.jpeg", "a.webp", "a.bmp", "a.tif"])
def test_formats(tmp_path, name):
    save(tmp_path / name)
    assert pixel(tmp_path) == pytest.approx([200, 100, 50], abs=4)


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("L", 77, "png", [77, 77, 77]),
        ("1", 1, "png", [255, 255, 255]),
        ("LA", (0, 0), "png", [255, 255, 255]),
        ("RGBA", (255, 0, 0, 0), "png", [255, 255, 255]),
        ("RGBA", (0, 0, 0, 102), "png", [153, 153, 153]),
        ("CMYK", (0, 255, 255, 0), "jpg", [254, 0, 0]),
        ("I;16", 65535, "png", [255, 255, 255]),
        ("I;16", 257 * 100, "png", [100, 100, 100]),
        ("I;16", 257 * 100, "tif", [100, 100, 100]),
        ("I", 257 * 100, "tif", [100, 100, 100]),
    ],
)
def test_modes(tmp_path, mode, colour, suffix, expected):
    save(tmp_path / f"a.{suffix}", colour, mode=mode)
    assert pixel(tmp_path) == pytest.approx(expected, abs=4 if mode == "CMYK" else 0)


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (12, 12), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "a.png")
    assert pixel(tmp_path) == [10, 20, 30]
    image.save(tmp_path / "a.png", transparency=1)
    assert pixel(tmp_path) == [255, 255, 255]


def test_one_channel(tmp_path):
    save(tmp_path / "a.png", (255, 0, 0, 0), mode="RGBA")
    assert pixel(tmp_path, channels=1) == [255]


def test_exif_orientation_is_obeyed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255  # white on the left: on top once turned
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    turned = image_folder(tmp_path, 8, 1).images.pixels[0, 0]
    assert turned[0].tolist() == [255] * 8 and turned[7].tolist() == [0] * 8


def test_centre_is_cropped_to_a_square(tmp_path):
    pixels = np.zeros((4, 10), np.uint8)
    pixels[:, 3:7] = 90
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert image_folder(tmp_path, 4, 1).images.pixels.unique().tolist() == [90]


def test_pixels_of_the_wanted_size_are_left_alone(tmp_path):
    original = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(original).save(tmp_path / "a.png")
    pixels = image_folder(tmp_path, 6, 3).images.pixels[0]
    assert torch.equal(pixels.permute(1, 2, 0), torch.from_numpy(original))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (300, 7)])
def test_any_size(tmp_path, size):
    save(tmp_path / "a.png", size=size)
    assert pixel(tmp_path) == [200, 100, 50]


# --- clients -----------------------------------------------------------------------------------------------------


def test_clients_are_sorted_by_name(tmp_path):
    for name in ("bob/2.png", "bob/1.png", "al-1.x/a.png"):
        save(tmp_path / name, (len(name), 0, 0))
    (tmp_path / "readme.txt").write_text("not an image")
    (tmp_path / "bob" / "._1.png").write_text("what another system left behind")
    clients = client_folders(tmp_path, 8, 3)
    assert list(clients) == ["al-1.x", "bob"] and [len(images) for images in clients.values()] == [1, 2]
    assert clients["bob"].pixels.shape == (2, 3, 8, 8) and clients["bob"].labels is None and not clients["bob"].captions


def test_clients_share_their_labels(tmp_path):
    for name in ("ann/dog/1.png", "bob/cat/1.png", "bob/dog/2.png"):
        save(tmp_path / name)
    clients = client_folders(tmp_path, 8, 3)
    assert clients["ann"].labels.tolist() == [1] and clients["bob"].labels.tolist() == [0, 1]


def test_a_client_has_its_own_metadata_or_shares_one(tmp_path):
    save(tmp_path / "ann/1.png")
    save(tmp_path / "bob/1.png")
    write_metadata(tmp_path / "ann", {"file_name": "1.png", "text": "a lighthouse"})
    write_metadata(tmp_path, {"file_name": "bob/1.png", "caption": "a boat"})
    clients = client_folders(tmp_path, 8, 3)
    assert clients["ann"].captions == ("a lighthouse",) and clients["bob"].captions == ("a boat",)


@pytest.mark.parametrize("name", ["a b", ".hidden", "Zoë", "a;rm"])
def test_unsafe_client_names(tmp_path, name):
    save(tmp_path / "good/1.png")
    save(tmp_path / name / "1.png")
    with pytest.raises(DataError, match=f"client '{name}': rename the folder") as caught:
        client_folders(tmp_path, 8, 3)
    assert "problems found: 1\n" in str(caught.value)


def test_an_empty_client_and_a_stray_image(tmp_path):
    save(tmp_path / "ann/1.png")
    save(tmp_path / "stray.png")
    (tmp_path / "bob").mkdir()
    with pytest.raises(DataError) as caught:
        client_folders(tmp_path, 8, 3)
    assert "client 'bob': has no image" in str(caught.value) and "stray.png: lies beside" in str(caught.value)


def test_no_folder_and_no_clients(tmp_path):
    for load in (client_folders, image_folder):
        with pytest.raises(DataError, match="nowhere is no folder"):
            load(tmp_path / "nowhere", 8, 3)
    with pytest.raises(DataError, match="one folder of images per client"):
        client_folders(tmp_path, 8, 3)
    with pytest.raises(DataError, match="no image that can be read"):
        image_folder(tmp_path, 8, 3)


@pytest.mark.parametrize("arguments", [(0, 3, "error"), (8, 2, "error"), (8, 3, "ignore")])
def test_bad_arguments(tmp_path, arguments):
    save(tmp_path / "ann/1.png")
    with pytest.raises(ConfigError, match="size is"):
        client_folders(tmp_path, *arguments)


# --- unreadable images -------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """One good image, one cut short, one that is no image, one in a mode that has no 8-bit meaning."""
    save(tmp_path / "ann/good.png")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "ann/short.png")
    (tmp_path / "ann/short.png").write_bytes((tmp_path / "ann/short.png").read_bytes()[:3000])
    (tmp_path / "ann/text.jpg").write_text("hello")
    save(tmp_path / "ann/float.tif", 0.5, mode="F")
    return tmp_path


def test_unreadable_images_are_named(damaged):
    with pytest.raises(DataError) as caught:
        client_folders(damaged, 8, 3)
    assert "problems found: 3\n" in str(caught.value) and "good.png" not in str(caught.value)
    assert all(f"ann/{name}: cannot be read" in str(caught.value) for name in ("short.png", "text.jpg", "float.tif"))


def test_skipping_uses_the_rest_and_warns(damaged):
    with pytest.warns(UserWarning, match="left out 3 of 4 images") as caught:
        clients = client_folders(damaged, 8, 3, on_unreadable="skip")
    assert len(clients["ann"]) == 1 and "ann/short.png" in str(caught[0].message) and caught[0].filename == __file__


def test_skipping_does_not_warn_without_reason(tmp_path):
    save(tmp_path / "1.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_folder(tmp_path, 8, 3, on_unreadable="skip")


def test_pictures_of_other_kinds_are_named(tmp_path):
    save(tmp_path / "a.png")
    for name in ("dance.GIF", "phone.heic", "notes.txt", ".hidden.gif"):
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"left out 2 pictures that are not read; .*\n- dance\.GIF\n- phone\.heic$"):
        assert len(image_folder(tmp_path, 4, 3).images) == 1


def test_skipping_everything_is_an_empty_client(tmp_path):
    save(tmp_path / "ann/1.png")
    save(tmp_path / "bob/1.png").write_text("hello")
    with pytest.warns(UserWarning, match="left out 1"), pytest.raises(DataError, match="client 'bob': has no image"):
        client_folders(tmp_path, 8, 3, on_unreadable="skip")


def test_ten_are_named_and_the_rest_counted(tmp_path):
    for number in range(13):
        (tmp_path / f"{number:02}.png").write_text("hello")
    with pytest.raises(DataError) as caught:
        image_folder(tmp_path, 8, 3)
    message = str(caught.value)
    assert "09.png" in message and "10.png" not in message and "- and 4 more" in message  # 13, and that none is left


# --- captions and labels -----------------------------------------------------------------------------------------


def test_folders_are_labels(tmp_path):
    for name in ("dog/1.png", "cat/1.png", "cat/deep/2.png"):
        save(tmp_path / name)
    source = image_folder(tmp_path, 8, 3)
    assert source.label_names == ("cat", "dog") and source.images.labels.tolist() == [0, 0, 1]


def test_metadata_gives_captions_and_labels(tmp_path):
    save(tmp_path / "1.png", (1, 1, 1))
    save(tmp_path / "train/2.png", (2, 2, 2))
    write_metadata(
        tmp_path,
        {"file_name": "train/2.png", "text": "Straße\u2028bei Nacht", "label": "street", "id": 7},
        "",
        {"file_name": "./1.png", "text": "", "label": "beach"},
    )
    source = image_folder(tmp_path, 8, 3)
    assert source.images.captions == ("", "Straße\u2028bei Nacht") and source.label_names == ("beach", "street")
    assert source.images.labels.tolist() == [0, 1] and source.images.pixels[:, 0, 0, 0].tolist() == [1, 2]


def test_whole_numbers_are_sorted_as_numbers(tmp_path):
    save(tmp_path / "1.png")
    save(tmp_path / "2.png")
    write_metadata(tmp_path, {"file_name": "1.png", "label": 10}, {"file_name": "2.png", "label": 9})
    source = image_folder(tmp_path, 8, 3)
    assert source.label_names == ("9", "10") and source.images.labels.tolist() == [1, 0]


def test_with_metadata_folders_are_no_labels(tmp_path):
    save(tmp_path / "train/1.png")
    write_metadata(tmp_path, {"file_name": "train/1.png", "text": "a boat"})
    assert image_folder(tmp_path, 8, 3).images.labels is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2: is not JSON"),
        ('"1.png"', "line 2: expected an object"),
        ('{"text": "a boat"}', 'line 2: expected an object with a "file_name"'),
        ('{"file_name": "gone.png"}', "line 2: names 'gone.png', which is no image here"),
        ('{"file_name": "1.png"}', "line 2: describes '1.png' a second time"),
        ('{"file_name": "../secret.png"}', "line 2: .* without '..'"),
        ('{"file_name": "/etc/passwd"}', "line 2: .* a path below this folder"),
        ('{"file_name": "a\\\\2.png"}', "line 2: .* a path below this folder"),
        ('{"file_name": "2.png", "text": 3}', "line 2: has the caption 3"),
        ('{"file_name": "2.png", "label": 1.5}', "line 2: has the label 1.5"),
        ('{"file_name": "2.png", "label": true}', "line 2: has the label True"),
    ],
)
def test_bad_lines(tmp_path, line, message):
    save(tmp_path / "in/1.png")
    save(tmp_path / "in/2.png")
    save(tmp_path / "secret.png")
    write_metadata(tmp_path / "in", {"file_name": "1.png"}, line)
    with pytest.raises(DataError, match=f"metadata.jsonl {message}"):
        image_folder(tmp_path / "in", 8, 3)


def test_metadata_in_another_encoding(tmp_path):
    save(tmp_path / "1.png")
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "1.png", "text": "Stra\xdfe"}\n')
    with pytest.raises(DataError, match=r"line 1: is not JSON .*utf-8"):
        image_folder(tmp_path, 8, 3)


def test_captions_and_labels_are_for_all_or_none(tmp_path):
    save(tmp_path / "1.png")
    save(tmp_path / "2.png")
    write_metadata(tmp_path, {"file_name": "1.png", "text": "a boat", "label": 1})
    with pytest.raises(DataError) as caught:
        image_folder(tmp_path, 8, 3)
    assert "2.png: has no caption" in str(caught.value) and "2.png: has no label" in str(caught.value)


def test_labels_of_two_types(tmp_path):
    save(tmp_path / "1.png")
    save(tmp_path / "2.png")
    write_metadata(tmp_path, {"file_name": "1.png", "label": 1}, {"file_name": "2.png", "label": "one"})
    with pytest.raises(DataError, match="labels are texts and numbers"):
        image_folder(tmp_path, 8, 3)
