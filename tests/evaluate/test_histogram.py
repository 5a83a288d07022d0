import pytest
import torch

from personae.errors import ConfigError, DataError, ShapeError
from personae.evaluate.features import Features
from personae.evaluate.histogram import class_histogram, histogram_distance


def test_shares_not_counts_are_compared():
    assert histogram_distance(torch.tensor([1, 1, 2]), torch.tensor([10, 10, 20])) == 0.0
    assert histogram_distance(torch.tensor([3, 0]), torch.tensor([0, 7])) == 1.0
    assert histogram_distance(torch.tensor([3, 1]), torch.tensor([1.0, 1.0])) == pytest.approx(0.25)


def test_class_histogram_counts_classes_that_do_not_occur():
    by_pixel = Features(
        "pixel", lambda images: images.flatten(1).float(), lambda images: images.flatten().long(), tuple("abcd")
    )
    images = torch.tensor([1, 1, 2], dtype=torch.uint8).view(-1, 1, 1, 1)
    assert class_histogram(by_pixel, images).tolist() == [0, 2, 1, 0]


def test_refuses():
    with pytest.raises(ConfigError, match="'raw' has no classes"):
        class_histogram(
            Features("raw", lambda images: images.flatten(1).float()), torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
        )
    with pytest.raises(ShapeError):
        histogram_distance(torch.ones(2), torch.ones(3))
    with pytest.raises(DataError):
        histogram_distance(torch.zeros(2), torch.ones(2))
