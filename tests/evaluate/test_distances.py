import numpy as np
import pytest
import torch

from personae.errors import ConfigError, DataError, ShapeError
from personae.evaluate import distances
from personae.evaluate.distances import frechet, kid, precision_recall


def normal(seed, count, width, mean=0.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + mean


def literal_mmd(a, b):
    """The unbiased estimate, term by term."""

    def kernel(u, v):
        return (np.dot(u, v) / len(u) + 1) ** 3

    n, m = len(a), len(b)
    within_a = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_b = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_a + within_b - 2 * sum(kernel(u, v) for u in a for v in b) / (n * m)


def test_kid_is_the_literal_sum():
    # ten real images that are two vectors five times each: a subset of two is one pair of three, and all are drawn
    generated, two = normal(0, 2, 3, mean=0.5), normal(1, 2, 3)
    found = kid(generated, two.repeat(5, 1), subset_size=2, subsets=2000, features="test")
    pairs = {(0, 0): 20, (0, 1): 50, (1, 1): 20}  # of 90 ordered pairs of different images
    values = {pair: literal_mmd(generated.double().numpy(), two[list(pair)].double().numpy()) for pair in pairs}
    mean = sum(values[pair] * times for pair, times in pairs.items()) / 90
    std = (sum((values[pair] - mean) ** 2 * times for pair, times in pairs.items()) / 90) ** 0.5
    assert found.mean == pytest.approx(mean, abs=4 * std / 2000**0.5)
    assert found.std == pytest.approx(std, rel=0.05)


def test_one_subset_is_the_literal_sum():
    a, b = normal(0, 7, 3, mean=0.5), normal(1, 7, 3)
    mean, std = distances._over_subsets(a.double(), b.double(), size=7, subsets=3, seed=0)
    assert mean == pytest.approx(literal_mmd(a.double().numpy(), b.double().numpy()))
    assert std == pytest.approx(0, abs=1e-12)


def test_kid_of_two_points_by_hand():
    # F = 1, k(u, v) = (uv + 1)^3: 1 among zeros, 8 among ones, 1 between them
    zeros, ones = torch.zeros(4, 1), torch.ones(4, 1)
    found = kid(ones, zeros, subset_size=2, subsets=5, features="digits-cnn")
    assert (found.mean, found.std, found.floor) == (1 + 8 - 2, 0.0, 0.0) and found.features == "digits-cnn"


def test_kid_is_unbiased():
    pairs = [(normal(2 * s, 40, 4), normal(2 * s + 1, 40, 4)) for s in range(40)]
    values = [kid(a, b, features="test", subset_size=20, subsets=5).mean for a, b in pairs]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_kid_sees_a_shift_far_above_its_floor():
    found = kid(normal(0, 200, 4, mean=1.0), normal(1, 200, 4), features="test")
    assert found.mean > 10 * abs(found.floor) and found.std > 0 and found.subset_size == 100


def test_kid_depends_on_its_seed_alone():
    generated, real, before = normal(0, 30, 4), normal(1, 30, 4), torch.get_rng_state()
    how = {"features": "test", "subset_size": 8, "subsets": 4}
    first, again, other = (kid(generated, real, **how, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("num_generated", "num_real", "size"), [(8, 14, 8), (7, 16, 8), (8, 16, 1), (2, 3, None)])
def test_kid_refuses_subsets_that_cannot_be_drawn(num_generated, num_real, size):
    with pytest.raises(DataError, match="subsets"):
        kid(normal(0, num_generated, 2), normal(1, num_real, 2), subset_size=size, features="test")


def test_kid_refuses_no_subsets_and_other_maps():
    with pytest.raises(ConfigError):
        kid(normal(0, 8, 2), normal(1, 8, 2), subsets=0, features="test")
    with pytest.raises(ShapeError):
        kid(normal(0, 8, 2), normal(1, 8, 3), features="test")


def test_frechet_of_two_gaussians():
    # four points each whose means and covariances are exact: S_a = diag(4/3, 4/3), S_b = 9 S_a, means (0, 0) and (3, 4)
    square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    far = 3 * square + torch.tensor([3.0, 4.0])
    by_hand = 25 + 2 * (4 / 3 + 12 - 2 * 4)
    assert frechet(far, square) == pytest.approx(by_hand) == pytest.approx(frechet(square, far))
    assert frechet(square, square) == pytest.approx(0, abs=1e-6)


def test_frechet_with_covariances_that_do_not_commute():
    a, b = normal(0, 50, 3), normal(1, 60, 3) @ torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    centred_a, centred_b = (x.double() - x.double().mean(0) for x in (a, b))
    # tr (S_a S_b)^(1/2) is the nuclear norm of A B^T / sqrt((n - 1)(m - 1)), A and B the centred features
    cross = torch.linalg.svdvals(centred_a @ centred_b.T).sum() / (49 * 59) ** 0.5
    traces = centred_a.square().sum() / 49 + centred_b.square().sum() / 59
    means = (a.double().mean(0) - b.double().mean(0)).square().sum()
    assert frechet(a, b) == pytest.approx(float(means + traces - 2 * cross))


def test_frechet_refuses_a_single_image():
    with pytest.raises(DataError, match="at least 2"):
        frechet(normal(0, 1, 2), normal(1, 8, 2))


def test_precision_and_recall_on_a_line():
    # with k = 1 every ball around 0, 1, 2, 3 has radius 1: it covers [-1, 4]
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    # 3.5 and 4 are inside, 4.5 and 9 outside; their balls, of radii 0.5, 0.5, 0.5 and 4.5, reach 3 but not 2
    generated = torch.tensor([[3.5], [4.0], [4.5], [9.0]])
    assert precision_recall(real, generated, k=1) == (0.5, 0.25)
    assert precision_recall(generated, real, k=1) == (0.25, 0.5)


def test_precision_and_recall_of_a_lost_mode():
    real = torch.cat([normal(0, 50, 2), normal(1, 50, 2, mean=20.0)])
    precision, recall = precision_recall(real, normal(2, 100, 2))
    assert precision > 0.8 and 0.3 < recall <= 0.5


def test_precision_and_recall_refuse():
    with pytest.raises(DataError, match="at least 4"):
        precision_recall(normal(0, 3, 2), normal(1, 8, 2))
    with pytest.raises(ConfigError):
        precision_recall(normal(0, 8, 2), normal(1, 8, 2), k=0)
