import pytest
import torch

from personae.errors import DataError, ShapeError
from personae.evaluate import copying
from personae.evaluate.copying import copy_ratio, nearest_distance


def flat(*values):
    """Images of 2 x 2 pixels of one value each."""
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 2, 2)


def test_the_nearest_of_all():
    found = nearest_distance(flat(0, 10, 255, 100), flat(0, 204))
    assert found.tolist() == pytest.approx([0, 10 / 255, 51 / 255, 100 / 255])


def test_one_pixel_of_four():
    image = flat(0)
    image[0, 0, 0, 0] = 255
    assert nearest_distance(image, flat(0)).tolist() == [0.5]  # sqrt(1 / 4)


def test_a_copy_is_exactly_zero_and_blocks_change_nothing(monkeypatch):
    train = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    samples = torch.cat([train[:5], train[:5] // 2])
    whole = nearest_distance(samples, train)
    assert (whole[:5] == 0).all() and (whole[5:] > 0).all()
    monkeypatch.setattr(copying, "BLOCK", 3)
    assert torch.equal(nearest_distance(samples, train), whole)


def test_copy_ratio_is_a_ratio_of_medians():
    # distances of samples 10, 20, 30; of held-out images 40, 80, 120
    assert copy_ratio(flat(10, 20, 30), flat(0), flat(40, 80, 120)) == pytest.approx(0.25)


def test_copy_ratio_without_a_yardstick():
    assert copy_ratio(flat(10), flat(0, 7), flat(7)) is None


def test_refuses():
    with pytest.raises(ShapeError):
        nearest_distance(flat(1), torch.zeros(1, 1, 3, 3, dtype=torch.uint8))
    with pytest.raises(ShapeError):
        nearest_distance(flat(1).float(), flat(1))
    with pytest.raises(DataError):
        nearest_distance(flat(1), flat(1)[:0])
