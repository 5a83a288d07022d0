"""Clients of one kind find each other, whatever their order and their factors; shares add up and keep their limits."""

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from personae.aggregate.cluster import (
    clustered,
    domain_distances,
    domain_weights,
    normalized_traces,
    similarities,
)
from personae.aggregate.low_rank import LowRank, stacked
from personae.core import stream
from personae.errors import ConfigError


def kinds(sizes, spread=0.3, seed=0, width=16):
    """Descriptors around one direction for each kind, and which kind each is."""
    rng = stream(seed, "kinds")
    centres = torch.linalg.qr(torch.randn(width, len(sizes), generator=rng))[0].T
    truth = [kind for kind, size in enumerate(sizes) for _ in range(size)]
    return centres[truth] + spread / width**0.5 * torch.randn(len(truth), width, generator=rng), truth


def adapter(seed, rank=3, of=None):
    rng = stream(seed, "adapter")
    left = torch.randn(12, rank, generator=rng) if of is None else of + 0.05 * torch.randn(12, rank, generator=rng)
    return {"x": LowRank(left, torch.randn(rank, 9, generator=rng))}


def regauged(change, seed):
    turn = torch.randn(change["x"].rank, change["x"].rank, generator=stream(seed)) + 3 * torch.eye(change["x"].rank)
    return {"x": LowRank(change["x"].B @ turn.inverse(), turn @ change["x"].A)}


@pytest.mark.parametrize("sizes", [(4, 4, 4), (3, 9, 5), (6, 6), (3, 3, 3, 3, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_kinds_are_found(sizes, seed):
    descriptors, truth = kinds(sizes, seed=seed)
    assert adjusted_rand_score(truth, clustered(similarities(descriptors))) == 1


def test_one_kind_is_not_cut():
    descriptors, _ = kinds([9], spread=3.0, width=64)
    assert clustered(similarities(descriptors + 3)) == [0] * 9
    assert clustered(similarities(descriptors[:2])) == [0, 0] and clustered(similarities(descriptors[:1])) == [0]


def test_kinds_that_are_alike_in_pairs_are_kept_apart():
    """Two pairs of kinds have a better silhouette as two clusters than as four."""
    descriptors, _ = kinds([3, 3, 3, 3], spread=0.1)
    descriptors[3:6] += 2.5 * descriptors[0]
    descriptors[9:] += 2.5 * descriptors[6]
    similar = similarities(descriptors)
    assert clustered(similar) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert clustered(similar, slack=0) == [0] * 6 + [1] * 6, "the best silhouette is that of two"


def test_the_order_of_clients_does_not_matter():
    descriptors, _ = kinds([4, 5, 3])
    order = torch.randperm(12, generator=stream(3))
    found, shuffled = clustered(similarities(descriptors)), clustered(similarities(descriptors[order]))
    assert adjusted_rand_score([found[k] for k in order.tolist()], shuffled) == 1
    assert found[0] == 0 and sorted(set(found), key=found.index) == [0, 1, 2]


def test_a_cluster_that_is_too_small_joins_the_nearest():
    descriptors, truth = kinds([5, 5, 2], spread=0.1)
    assert len(set(clustered(similarities(descriptors), smallest=2))) == 3
    descriptors[10:] += 0.5 * descriptors[:1]
    joined = clustered(similarities(descriptors), smallest=3)
    assert joined == [0] * 5 + [1] * 5 + [0] * 2 and truth[-1] == 2


def test_adapters_tell_apart_what_descriptors_do_not():
    bases = torch.linalg.qr(torch.randn(12, 12, generator=stream(0)))[0]
    adapters = [adapter(k, of=bases[:, :3] if k < 4 else bases[:, 3:6]) for k in range(8)]
    same = torch.ones(8, 5)
    assert clustered(similarities(same)) == [0] * 8
    assert clustered(similarities(same, adapters)) == [0] * 4 + [1] * 4
    other = [regauged(each, k) for k, each in enumerate(adapters)]
    assert torch.allclose(similarities(same, adapters), similarities(same, other), atol=1e-5)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_descriptor_that_says_nothing_is_refused(value):
    with pytest.raises(ConfigError, match="client number 1"):
        similarities(torch.tensor([[1.0, 0.0], [value, 0.0]]))
    with pytest.raises(ConfigError, match="expected one of distinct, conservative"):
        domain_weights([1], [1], [1], sign="other")
    with pytest.raises(ConfigError, match="expected one of a, b, c"):
        normalized_traces([adapter(0)], "d")
    with pytest.raises(ConfigError, match="symmetric"):
        clustered(torch.tensor([[1.0, 0.5, 0.0], [0.1, 1.0, 0.0], [0.0, 0.0, 1.0]]))


def test_distances_between_domains():
    centres = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    assert domain_distances(centres) == pytest.approx([1.5, 1.0, 1.5])
    assert domain_distances(centres[:1]) == [1.0]


def test_traces():
    even = {"x": LowRank(torch.eye(6)[:, :4], torch.eye(5)[:4])}
    one = {"x": LowRank(torch.ones(6, 4), torch.ones(4, 5))}
    assert normalized_traces([even, one], "a")[0] == pytest.approx(1)
    assert normalized_traces([even, one], "a")[1] == pytest.approx(0.5, abs=1e-6)
    assert normalized_traces([even, one], "c") == pytest.approx([1, 0.25], abs=1e-6)
    assert sum(normalized_traces([even, one], "b")) == pytest.approx(1)
    tenfold = {"x": LowRank(10 * one["x"].B, one["x"].A)}
    for kind, tolerance in (("a", 1e-6), ("c", 1e-6)):
        assert normalized_traces([tenfold], kind) == pytest.approx(normalized_traces([one], kind), abs=tolerance)
        assert normalized_traces([regauged(even, 1)], kind) == pytest.approx(normalized_traces([even], kind), abs=1e-5)
    assert normalized_traces([even, tenfold], "b")[1] > normalized_traces([even, one], "b")[1]


@pytest.mark.parametrize("kind", ["a", "b", "c"])
def test_traces_do_not_depend_on_the_factors(kind):
    clusters = [adapter(0), adapter(1, rank=2)]
    others = [regauged(each, k) for k, each in enumerate(clusters)]
    found = normalized_traces(clusters, kind)
    assert normalized_traces(others, kind) == pytest.approx(found, abs=1e-5)
    assert found[0] != pytest.approx(found[1], abs=1e-2)


@pytest.mark.parametrize("sign", ["distinct", "conservative"])
@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_shares_add_up_and_none_is_above_the_most(sign, count):
    rng = stream(count)
    sizes = torch.randint(1, 40, (count,), generator=rng).tolist()
    sizes[0] = 10_000
    distances, traces = (2 * torch.rand(count, generator=rng)).tolist(), torch.rand(count, generator=rng).tolist()
    found = domain_weights(sizes, distances, traces, sign=sign)
    assert sum(found) == pytest.approx(1) and max(found) <= max(1 / count, min(0.5, 3 / count)) + 1e-9
    order = torch.randperm(count, generator=rng).tolist()
    shuffled = domain_weights(*([v[k] for k in order] for v in (sizes, distances, traces)), sign=sign)
    assert shuffled == pytest.approx([found[k] for k in order])


@pytest.mark.parametrize("sign", ["distinct", "conservative"])
@pytest.mark.parametrize("kind", ["a", "b", "c"])
def test_the_order_of_clusters_does_not_matter(sign, kind):
    clusters, sizes, order = [adapter(k) for k in range(5)], [3, 4, 5, 6, 12], [3, 0, 4, 2, 1]
    centres = torch.rand(5, 8, generator=stream(1))

    def shares_and_stack(order):
        own = [clusters[c] for c in order]
        traces = normalized_traces(own, kind)
        shares = domain_weights([sizes[c] for c in order], domain_distances(centres[order]), traces, sign=sign)
        return shares, stacked(own, shares)["x"].dense()

    shares, stack = shares_and_stack(list(range(5)))
    shuffled, other = shares_and_stack(order)
    assert len({round(share, 4) for share in shares}) == 5
    assert shuffled == pytest.approx([shares[c] for c in order], abs=1e-6)
    assert torch.allclose(other, stack, atol=1e-6)


def test_an_ingredient_can_be_left_out():
    off = {"size": 0.0, "distance": 0.0, "trace": 0.0}
    assert domain_weights([1, 50, 9], [1, 0, 2], [1, 1, 0.2], powers=off) == pytest.approx([1 / 3] * 3)
    near, far = domain_weights([1, 1], [0.5, 1.0], [1, 1], powers=off | {"distance": 1.0})
    assert (near, far) == pytest.approx((0.5, 0.5))  # nobody has more than half
    shares = domain_weights([1] * 4, [0.5, 1, 1, 1], [1] * 4, powers=off | {"distance": 1.0})
    assert shares[0] == pytest.approx(1 / 7)
    assert (
        domain_weights([1] * 4, [0.5, 1, 1, 1], [1] * 4, powers=off | {"distance": 1.0}, sign="conservative")[0] > 0.25
    )
    assert domain_weights([3, 3], [0, 0], [0, 0]) == [0.5, 0.5]


def test_a_cluster_that_stands_there_twice_changes_less_where_likeness_is_shared():
    """Under "distinct" a duplicate takes from its twin; without distances it takes from everybody."""
    centres = torch.linalg.qr(torch.randn(8, 4, generator=stream(1)))[0].T
    adapters = [adapter(k) for k in range(4)]
    changes = {}
    for name, powers in (
        ("distinct", {"size": 0.0, "trace": 0.0}),
        ("uniform", dict.fromkeys(("size", "distance", "trace"), 0.0)),
    ):
        results = []
        for which in (range(4), [0, 1, 2, 3, 3]):
            own = [adapters[c] for c in which]
            weights = domain_weights(
                [1] * len(own), domain_distances(centres[list(which)]), normalized_traces(own), powers=powers
            )
            results.append(stacked(own, weights)["x"].dense())
        changes[name] = float(torch.linalg.matrix_norm(results[1] - results[0]))
    assert changes["distinct"] < changes["uniform"]


def test_a_single_cluster_is_shared_as_it_is():
    own = [adapter(0)]
    weights = domain_weights([5], domain_distances(torch.ones(1, 3)), normalized_traces(own))
    assert weights == [1.0] and torch.equal(stacked(own, weights)["x"].dense(), own[0]["x"].dense())
