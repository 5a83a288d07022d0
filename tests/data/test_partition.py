"""Partitions are disjoint, complete where they say so, and decided by the generator alone."""

import pytest
import torch

from personae.core import Images, stream
from personae.data import by_attribute, by_label, dirichlet, fixed_new, iid, split, unseen
from personae.data.partition import KINDS
from personae.errors import ConfigError, DataError

LABELS = torch.arange(200) % 5
ATTRIBUTES = torch.tensor([[0, 0]] * 120 + [[0, 1]] * 50 + [[1, 1]] * 27 + [[1, 0]] * 3)

PARTITIONS = {
    "iid": lambda rng: iid(200, 7, rng),
    "by_label": lambda rng: by_label(LABELS, 7, 2, rng),
    "dirichlet": lambda rng: dirichlet(LABELS, 7, 0.5, rng, min_images=2),
    "by_attribute": lambda rng: by_attribute(ATTRIBUTES, 7, rng),
}


@pytest.mark.parametrize("name", PARTITIONS)
def test_disjoint_and_decided_by_the_generator(name):
    results = []
    for seed in range(20):
        parts, again = (PARTITIONS[name](stream(seed, "partition")) for _ in range(2))
        assert len(parts) == 7 and all(len(part) for part in parts)
        assert all(part.dtype == torch.int64 and torch.equal(part, part.unique()) for part in parts)
        indices = torch.cat(parts)
        assert len(indices.unique()) == len(indices) and indices.min() >= 0 and indices.max() < 200
        assert all(torch.equal(part, same) for part, same in zip(parts, again, strict=True))
        results.append(tuple(tuple(part.tolist()) for part in parts))
    assert len(set(results)) == 20


@pytest.mark.parametrize("name", ["iid", "by_label", "dirichlet"])
def test_every_image_has_a_holder(name):
    for seed in range(20):
        assert torch.cat(PARTITIONS[name](stream(seed))).sort().values.tolist() == list(range(200))


def test_iid_is_even():
    assert sorted(len(part) for part in iid(23, 4, stream(0))) == [5, 6, 6, 6]


def test_by_label_gives_each_client_its_classes_in_equal_parts():
    for seed in range(20):
        parts = by_label(LABELS, 10, 2, stream(seed))  # 20 places for 5 classes of 40: four holders of 10 each
        assert [LABELS[part].bincount(minlength=5).sort().values.tolist() for part in parts] == [[0, 0, 0, 10, 10]] * 10


def test_by_label_leaves_out_classes_without_a_holder():
    parts = by_label(LABELS, 2, 1, stream(0))
    assert [len(part) for part in parts] == [40, 40]


def test_by_label_works_with_any_whole_numbers():
    parts = by_label(torch.tensor([7, -3, 7, -3]), 2, 1, stream(0))
    assert sorted(part.tolist() for part in parts) == [[0, 2], [1, 3]]


def test_by_attribute_gives_one_combination_each_and_leaves_out_the_rare():
    for seed in range(20):
        parts = by_attribute(ATTRIBUTES, 7, stream(seed))
        assert all(len(ATTRIBUTES[part].unique(dim=0)) == 1 for part in parts)
        assert sorted(len(part) for part in parts) == [25, 25, 27, 30, 30, 30, 30]


def test_by_attribute_hands_combinations_to_clients_at_random():
    firsts = {tuple(ATTRIBUTES[by_attribute(ATTRIBUTES, 7, stream(seed))[0][0]].tolist()) for seed in range(20)}
    assert firsts == {(0, 0), (0, 1), (1, 1)}


def test_dirichlet_is_skewed_by_a_small_alpha_only():
    largest = {}
    for alpha in (0.1, 1000.0):
        shares = [
            LABELS[part].bincount().max() / len(part)
            for seed in range(10)
            for part in dirichlet(LABELS, 4, alpha, stream(seed), min_images=1)
        ]
        largest[alpha] = torch.stack(shares).mean()
    assert largest[0.1] > 0.5 and largest[1000.0] < 0.25


def test_dirichlet_keeps_to_min_images():
    for seed in range(20):
        assert min(len(part) for part in dirichlet(LABELS, 4, 0.3, stream(seed), min_images=15)) >= 15


def test_dirichlet_gives_up_and_says_what_to_change():
    with pytest.raises(ConfigError, match="raise alpha, lower min_images, or take fewer than 20 clients"):
        dirichlet(LABELS, 20, 0.01, stream(0), min_images=10)


@pytest.mark.parametrize("alpha", [1e-320, 1e-12, 1e12, 1e308])
def test_dirichlet_survives_extreme_alphas(alpha):
    parts = dirichlet(LABELS, 3, alpha, stream(0), min_images=0)
    assert torch.cat(parts).sort().values.tolist() == list(range(200))


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (lambda rng: iid(5, 0, rng), "num_clients is 0, expected 1 to 5"),
        (lambda rng: iid(5, 6, rng), "num_clients is 6, expected 1 to 5"),
        (lambda rng: by_label(LABELS, 0, 2, rng), "num_clients is 0"),
        (lambda rng: by_label(LABELS, 4, 0, rng), "classes_per_client is 0, expected 1 to 5"),
        (lambda rng: by_label(LABELS, 4, 6, rng), "classes_per_client is 6, expected 1 to 5"),
        (lambda rng: by_label(torch.tensor([0, 1, 1, 1]), 4, 1, rng), "class 0 has 1 images for 2 clients"),
        (lambda rng: by_attribute(ATTRIBUTES, 201, rng), "num_clients is 201"),
        (lambda rng: dirichlet(LABELS, 201, 1.0, rng, 0), "num_clients is 201"),
        (lambda rng: dirichlet(LABELS, 4, 0.0, rng, 0), "alpha is 0.0"),
        (lambda rng: dirichlet(LABELS, 4, float("nan"), rng, 0), "alpha is nan"),
        (lambda rng: dirichlet(LABELS, 4, 1.0, rng, 51), "min_images is 51, expected 0 to 50"),
        (lambda rng: dirichlet(LABELS, 4, 1.0, rng, -1), "min_images is -1"),
    ],
)
def test_bad_arguments(partition, message):
    with pytest.raises(ConfigError, match=message):
        partition(stream(0))


def numbered(n: int) -> Images:
    pixels = torch.arange(n, dtype=torch.uint8)[:, None, None, None]
    return Images(pixels, torch.arange(n), tuple(f"image {i}" for i in range(n)))


@pytest.mark.parametrize(("n", "share", "expected"), [(10, 0.2, 2), (2, 0.01, 1), (2, 0.99, 1), (9, 0.5, 4)])
def test_split_keeps_both_sides(n, share, expected):
    for seed in range(20):
        data = split(numbered(n), share, stream(seed))
        assert (len(data.train), len(data.heldout)) == (n - expected, expected)
        assert sorted(data.train.labels.tolist() + data.heldout.labels.tolist()) == list(range(n))
        assert data.heldout.captions == tuple(f"image {i}" for i in data.heldout.labels)


def test_split_is_decided_by_the_generator():
    heldout = {tuple(split(numbered(10), 0.3, stream(seed)).heldout.labels.tolist()) for seed in (0, 0, 1, 2)}
    assert len(heldout) == 3


@pytest.mark.parametrize("n", [0, 1])
def test_split_of_too_few(n):
    with pytest.raises(DataError, match=f"{n} images, expected at least 2.*add images or leave the client out"):
        split(numbered(n), 0.5, stream(0))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_split_of_a_bad_share(share):
    with pytest.raises(ConfigError, match="heldout is"):
        split(numbered(5), share, stream(0))


MANY = torch.arange(2000) % 10


def test_unseen_has_three_kinds_of_new_clients():
    for seed in range(10):
        parts = unseen(MANY, 26, 8, stream(seed), images_per_client=40, images_per_new=60, classes_per_client=1)
        counts = torch.stack([MANY[part].bincount(minlength=10) for part in parts])
        train, new = counts[:18], counts[18:]
        assert (train[:, 9] == 0).all() and (train.sum(1) == 40).all() and ((train > 0).sum(1) == 1).all()
        assert (train[:, :9] > 0).sum(0).tolist() == [2] * 9
        trained = {tuple((row > 0).tolist()) for row in train}
        for number, row in enumerate(new):
            assert row.sum() == 60
            kind = KINDS[number % 3]
            if kind == "seen":
                assert tuple((row > 0).tolist()) in trained
            elif kind == "mixed":
                assert row.sort().values.tolist() == [0] * 8 + [30, 30] and row[9] == 0
            else:
                assert row[9] == 60
        assert len(torch.cat(parts).unique()) == 18 * 40 + 8 * 60


def test_unseen_by_shares_from_a_dirichlet_distribution():
    parts = unseen(MANY, 26, 8, stream(0), images_per_client=40, images_per_new=60, alpha=0.3)
    counts = torch.stack([MANY[part].bincount(minlength=10) for part in parts]).double()
    assert counts.sum(1).tolist() == [40] * 18 + [60] * 8 and (counts[:18, 9] == 0).all()
    seen = counts[18] / 60
    assert (counts[:18] / 40 - seen).abs().sum(1).min() < 0.2, "the first new client has the mix of one that trains"
    assert (counts[:18] / 40 - counts[19] / 60).abs().sum(1).min() > 0.2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"classes_per_client": 1, "alpha": 0.3}, "exactly one"),
        ({}, "exactly one"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"classes_per_client": 10}, "expected 1 to 9"),
        ({"classes_per_client": 1, "images_per_new": 300}, "class .* has 200 images"),
        ({"classes_per_client": 1, "images_per_client": 1}, "at least 2 images"),
    ],
)
def test_unseen_says_what_is_wrong(changes, told):
    with pytest.raises(ConfigError, match=told):
        unseen(MANY, 26, 8, stream(0), **{"images_per_client": 40, "images_per_new": 60, **changes})


# --- the same new clients whoever trains ------------------------------------------------------------------------------

FIXED = {"images_per_new": 40, "alpha": 0.3}


def test_neither_number_nor_classes_of_training_clients_change_new_ones_and_what_is_trained_on():
    first = fixed_new(MANY, 28, 8, stream(0), classes_per_client=2, **FIXED)
    for num_clients, classes in ((13, 2), (48, 2), (28, 1), (28, 10)):
        parts = fixed_new(MANY, num_clients, 8, stream(0), classes_per_client=classes, **FIXED)
        assert len(parts) == num_clients and len(torch.cat(parts).unique()) == len(MANY)
        assert all(torch.equal(a, b) for a, b in zip(first[-8:], parts[-8:], strict=True))
        assert {len(MANY[part].unique()) for part in parts[:-8]} == {classes}
    assert {len(part) for part in first[-8:]} == {40}
    assert not torch.equal(first[-1], fixed_new(MANY, 28, 8, stream(1), classes_per_client=2, **FIXED)[-1])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"alpha": 0.0}, "alpha 0.0"),
        ({"images_per_new": 1}, "images_per_new 1"),
        ({"classes_per_client": 11}, "expected 1 to 10"),
        ({"images_per_new": 2000}, "are asked for"),
        ({"images_per_new": 250, "alpha": 1e6}, "leave no image of some class"),
    ],
)
def test_fixed_new_says_what_is_wrong(changes, told):
    with pytest.raises(ConfigError, match=told):
        fixed_new(MANY, 28, 8, stream(0), **{**FIXED, "classes_per_client": 2, **changes})
