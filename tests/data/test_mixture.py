"""The Gaussian mixture has the moments that it is asked for."""

import pytest
import torch

from personae.core import stream
from personae.data import gaussian_mixture
from personae.errors import ConfigError, ShapeError

WEIGHTS = torch.tensor([1.0, 3.0])
MEANS = torch.tensor([[4.0, 0.0], [0.0, -4.0]])


def test_moments_of_each_component():
    images = gaussian_mixture(WEIGHTS, MEANS, 8000, stream(0, "mixture"))
    assert images.pixels.shape == (8000, 2) and images.pixels.dtype == torch.float32
    assert abs((images.labels == 1).float().mean() - 0.75) < 0.02
    for label in (0, 1):
        draws = images.pixels[images.labels == label]
        torch.testing.assert_close(draws.mean(0), MEANS[label], atol=0.08, rtol=0)
        torch.testing.assert_close(draws.T.cov(), torch.eye(2), atol=0.1, rtol=0)


def test_equal_generators_give_equal_draws():
    first, second, other = (gaussian_mixture(WEIGHTS, MEANS, 5, stream(seed, "mixture")) for seed in (0, 0, 1))
    assert torch.equal(first.pixels, second.pixels) and torch.equal(first.labels, second.labels)
    assert not torch.equal(first.pixels, other.pixels)


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.0, 0.0], [1.0, float("nan")]])
def test_bad_weights(weights):
    with pytest.raises(ConfigError, match="weights"):
        gaussian_mixture(torch.tensor(weights), MEANS, 5, stream(0))


def test_bad_shapes_and_numbers():
    with pytest.raises(ShapeError, match=r"\[3\].*\[2, 2\]"):
        gaussian_mixture(torch.ones(3), MEANS, 5, stream(0))
    with pytest.raises(ConfigError, match="n is 0"):
        gaussian_mixture(WEIGHTS, MEANS, 0, stream(0))
