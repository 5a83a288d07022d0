import numpy as np
import pytest
import torch
from PIL import Image

from personae.errors import ArtefactError, ShapeError
from personae.evaluate.grids import GUTTER, SHADE, TARGET_WIDTH, grid, save_grid


def test_every_pixel_becomes_a_square():
    images = torch.tensor([[[[0, 50], [100, 150]]], [[[200, 210], [220, 230]]]], dtype=torch.uint8)
    sheet = np.array(grid(images, columns=2, scale=3))
    assert sheet.shape == (6, 12 + GUTTER)
    assert (sheet[:3, :3] == 0).all() and (sheet[:3, 3:6] == 50).all() and (sheet[3:, 3:6] == 150).all()
    assert (sheet[:, 6 : 6 + GUTTER] == SHADE).all()
    assert (sheet[:3, 6 + GUTTER : 9 + GUTTER] == 200).all()


def test_images_run_row_by_row_and_the_rest_of_the_last_row_is_empty():
    images = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1)
    sheet = np.array(grid(images, columns=2, scale=1))
    step = 1 + GUTTER
    assert [sheet[0, 0], sheet[0, step], sheet[step, 0], sheet[step, step]] == [0, 1, 2, SHADE]


def test_colour_keeps_its_channels():
    images = torch.tensor([10, 20, 30], dtype=torch.uint8).reshape(1, 3, 1, 1)
    picture = grid(images, columns=1, scale=4)
    assert picture.mode == "RGB" and picture.size == (4, 4) and picture.getpixel((3, 3)) == (10, 20, 30)


@pytest.mark.parametrize(("side", "scale"), [(8, 10), (28, 2), (64, 1), (512, 1)])
def test_without_a_scale_the_sheet_fills_its_width_in_whole_pixels(side, scale):
    picture = grid(torch.zeros(6, 1, side, side, dtype=torch.uint8), columns=6)
    assert picture.width == 6 * side * scale + 5 * GUTTER
    assert scale == 1 or 6 * side * scale <= TARGET_WIDTH < 6 * side * (scale + 1)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 4, 4),
        torch.zeros(4, 4, dtype=torch.uint8),
        torch.zeros(2, 4, 4, 4, dtype=torch.uint8),
        torch.zeros(0, 1, 4, 4, dtype=torch.uint8),
    ],
    ids=["floats", "one image", "four channels", "none"],
)
def test_what_is_not_a_batch_of_images_is_refused(images):
    with pytest.raises(ShapeError, match="expected at least one image as uint8"):
        grid(images, columns=2)


@pytest.mark.parametrize(("columns", "scale"), [(0, None), (2, 0)])
def test_sizes_below_one_are_refused(columns, scale):
    with pytest.raises(ShapeError, match="at least 1"):
        grid(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), columns, scale)


def test_a_saved_grid_reads_back_and_is_the_same_file_every_time(tmp_path):
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_grid(tmp_path / "a.png", images, columns=3, scale=2)
    save_grid(tmp_path / "b.png", images, columns=3, scale=2)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert (np.array(picture) == np.array(grid(images, columns=3, scale=2))).all()


def test_a_folder_that_does_not_exist_is_explained(tmp_path):
    with pytest.raises(ArtefactError, match="nowhere"):
        save_grid(tmp_path / "nowhere" / "a.png", torch.zeros(1, 1, 2, 2, dtype=torch.uint8), columns=1)
