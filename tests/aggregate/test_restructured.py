"""Groups that are there are split and merged, one change at a time, until nothing is left to change."""

from itertools import pairwise

import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch.nn.functional import normalize

from personae.aggregate.adapters import nearest
from personae.aggregate.cluster import _joined, clustered, kept_up, moved, restructured, similarities
from personae.aggregate.low_rank import LowRank
from personae.aggregate.newcomers import familiar
from personae.core import stream
from personae.errors import ConfigError

WIDTH = 16


def kinds(sizes, spread=0.3, seed=0):
    """Descriptors around one direction for each kind, and which kind each is."""
    rng = stream(seed, "kinds")
    centres = torch.linalg.qr(torch.randn(WIDTH, len(sizes), generator=rng))[0].T
    truth = [kind for kind, size in enumerate(sizes) for _ in range(size)]
    return centres[truth] + spread / WIDTH**0.5 * torch.randn(len(truth), WIDTH, generator=rng), truth


BASES = torch.linalg.qr(torch.randn(24, 24, generator=stream(0, "bases")))[0]


def adapter(kind, seed=0):
    """Of rank 3, in a space of the kind's own, with factors that depend on the seed."""
    turn = torch.randn(3, 3, generator=stream(seed, "turn")) + 3 * torch.eye(3)
    rows = torch.randn(3, 9, generator=stream(kind, "rows"))
    return {"x": LowRank(BASES[:, 3 * kind : 3 * kind + 3] @ turn.inverse(), turn @ rows)}


def adapters_of(groups, truth, seed=0):
    """Each group's, in the space of the kind that most of its members are of."""
    found = []
    for number in range(max(groups) + 1):
        own = [kind for kind, group in zip(truth, groups, strict=True) if group == number]
        found.append(adapter(max(sorted(set(own)), key=own.count), seed + number))
    return found


def noisy(truth, noise=0.2):
    """One for each client, in the space of its kind up to noise, by factors of its own."""
    found = []
    for number, kind in enumerate(truth):
        own, rng = adapter(kind, number)["x"], stream(number, "noise")
        factors = (own.B, own.A)
        found.append({"x": LowRank(*(f + noise * f.std() * torch.randn(f.shape, generator=rng) for f in factors))})
    return found


def means(groups, members):
    """Each group's adapter, the mean of its members'."""
    owns = [[m for m, group in zip(members, groups, strict=True) if group == n] for n in range(max(groups) + 1)]
    return [nearest(own, [1 / len(own)] * len(own), 3) for own in owns]


def a_round_later(descriptors, groups, members, won):
    threshold = familiar(descriptors, groups).threshold
    return kept_up(descriptors, groups, means(groups, members), won, threshold)


def step(descriptors, groups, truth, adapters=None, **options):
    threshold = familiar(descriptors, groups).threshold
    return restructured(descriptors, groups, adapters or adapters_of(groups, truth), threshold, **options)


def settled(descriptors, groups, truth, most=100):
    """All states until nothing changes any more."""
    states = [list(groups)]
    for _ in range(most):
        after = step(descriptors, states[-1], truth)
        if after == states[-1]:
            return states
        states.append(after)
    raise AssertionError(f"still changing after {most} rounds")


@pytest.mark.parametrize("seed", range(5))
def test_a_group_of_two_kinds_is_split_into_them_and_others_stay(seed):
    descriptors, truth = kinds([4, 5, 3], seed=seed)
    before = [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    assert step(descriptors, before, truth) == [0] * 4 + [1] * 5 + [2] * 3


def test_halves_that_are_too_small_or_too_alike_are_not_split():
    descriptors, truth = kinds([5, 2], seed=1)
    assert step(descriptors, [0] * 7, truth) == [0] * 7
    assert step(descriptors, [0] * 7, truth, smallest=2) == [0] * 5 + [1] * 2
    alike, one = kinds([8], spread=1.0)
    assert step(alike, [0] * 8, one) == [0] * 8
    assert step(descriptors[:1], [0], truth[:1]) == [0]


def test_two_groups_of_one_kind_are_merged_and_numbers_close_up():
    descriptors, truth = kinds([4, 6, 3], spread=0.5)
    before = [3, 3, 3, 3, 0, 0, 0, 2, 2, 2, 1, 1, 1]
    assert step(descriptors, before, truth) == [2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 1, 1, 1]


def test_groups_whose_adapters_or_centres_differ_are_not_merged():
    descriptors, truth = kinds([10, 3], spread=0.5)
    before = [0] * 5 + [1] * 5 + [2] * 3
    assert step(descriptors, before, truth, adapters=[adapter(0), adapter(0, 5), adapter(1)]) == [0] * 10 + [1] * 3
    assert step(descriptors, before, truth, adapters=[adapter(0), adapter(2), adapter(1)]) == before
    far, two = kinds([4, 4])
    assert step(far, two, two, adapters=[adapter(0), adapter(0, 5)]) == two


def test_of_three_kinds_in_one_group_one_is_split_off_in_a_round():
    descriptors, truth = kinds([3, 4, 5], seed=2)
    states = settled(descriptors, [0] * 12, truth)
    assert [len(set(state)) for state in states] == [1, 2, 3]
    assert adjusted_rand_score(states[-1], truth) == 1


@pytest.mark.parametrize("seed", range(12))
def test_from_any_groups_at_most_one_change_a_round_until_nothing_moves(seed):
    """Splits come first and merges never make what would be split: nobody moves to and fro."""
    rng = stream(seed, "start")
    descriptors, truth = kinds([4, 6, 5], spread=(0.2, 0.5, 1.0)[seed % 3], seed=seed)
    start = torch.randint(4, (15,), generator=rng).tolist()
    start = [sorted(set(start)).index(group) for group in start]
    states = settled(descriptors, start, truth)
    for before, after in pairwise(states):
        numbers = len(set(after)) - len(set(before))
        assert numbers in (1, -1) and set(after) == set(range(len(set(after))))
        coarse, fine = (before, after) if numbers == 1 else (after, before)
        assert len({(a, b) for a, b in zip(coarse, fine, strict=True)}) == len(set(fine)), "whole groups, nothing else"
    counts = [len(set(state)) for state in states]
    assert counts == [*range(counts[0], max(counts)), *range(max(counts), counts[-1] - 1, -1)], "splits before merges"


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.9])
def test_what_was_split_is_not_merged_again_though_both_halves_have_one_adapter(threshold):
    descriptors, truth = kinds([4, 4], seed=3)
    descriptors[4:] += 1.5 * descriptors[:4]
    once = restructured(descriptors, [0] * 8, [adapter(0)], threshold)
    assert once == truth
    assert restructured(descriptors, once, [adapter(0), adapter(0)], threshold) == once


@pytest.mark.parametrize("before", [[0] * 12, [0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3]])
def test_order_scale_and_factors_do_not_matter(before):
    descriptors, truth = kinds([4, 5, 3], seed=4)
    adapters = adapters_of(before, truth)
    plain = restructured(descriptors, before, adapters, 0.5, smallest=2)
    assert plain != before
    order = torch.randperm(12, generator=stream(5)).tolist()
    shuffled = restructured(
        descriptors[order] * torch.linspace(0.1, 10, 12)[:, None],
        [before[k] for k in order],
        adapters_of(before, truth, seed=50),
        0.5,
        smallest=2,
    )
    assert adjusted_rand_score(shuffled, [plain[k] for k in order]) == 1


@pytest.mark.parametrize(("sizes", "spread"), [([8, 8, 8], 0.2), ([5, 6, 4], 0.4)])
def test_in_whatever_order_clients_come_they_end_in_the_groups_of_all_at_once(sizes, spread):
    """20 orders: five clients are grouped, the others come one by one, a round each, and six more rounds. Groups that
    are too small in the end join the nearest, as they do when all are grouped at once."""
    descriptors, truth = kinds(sizes, spread, seed=6)
    together, members = clustered(similarities(descriptors)), noisy(truth)
    assert adjusted_rand_score(together, truth) == 1
    for seed in range(20):
        order = torch.randperm(len(truth), generator=stream(seed, "order")).tolist()
        groups = clustered(similarities(descriptors[order[:5]]))
        won = [0] * 5
        for count in range(6, len(truth) + 7):
            there = order[:count]
            if count <= len(truth):
                found = familiar(descriptors[there[:-1]], groups).group(descriptors[there[-1]])
                groups, won = [*groups, max(groups) + 1 if found is None else found], [*won, 0]
            groups, won = a_round_later(descriptors[there], groups, [members[k] for k in there], won)
        ended = _joined(groups, 1 - similarities(descriptors[order]), 3)
        assert adjusted_rand_score(ended, [together[k] for k in order]) >= 0.9, seed


def test_who_is_likelier_of_another_group_moves_after_three_rounds_and_not_before():
    descriptors, truth = kinds([5, 5])
    groups, won, seen = [1, *truth[1:]], [0] * 10, []
    for _ in range(5):
        groups, won = moved(descriptors, groups, won, 0.5)
        seen.append(groups)
    wrong = [1, *truth[1:]]
    assert seen == [wrong, wrong, truth, truth, truth] and won == [0] * 10
    groups, won = moved(descriptors, wrong, [2] + [0] * 9, 0.5)
    assert groups == truth
    _, won = moved(descriptors, truth, [2] + [0] * 9, 0.5)
    assert won == [0] * 10, "a round in which it was not likelier, and it begins anew"


def test_who_is_alone_moves_to_a_group_that_it_is_like_enough_and_its_own_goes():
    descriptors, truth = kinds([4, 1, 4])
    alone = [0, 0, 0, 1, 2, 3, 3, 3, 3]
    groups, _ = moved(descriptors, alone, [9] * 9, 0.5)
    assert groups == truth, "the fourth goes to those of its kind, the stranger stays"
    assert moved(descriptors, alone, [9] * 9, 0.999)[0] == alone


def test_at_rest_hardly_anybody_moves():
    """Kinds that overlap: over 10 rounds at most one member in twenty, once groups have settled."""
    for seed in range(5):
        descriptors, truth = kinds([10, 10, 10], spread=1.5, seed=seed)
        groups, won, states = clustered(similarities(descriptors)), [0] * 30, []
        members = noisy(truth)
        for _ in range(30):
            groups, won = a_round_later(descriptors, groups, members, won)
            states.append(groups)
        moves = [sum(a != b for a, b in zip(*pair, strict=True)) for pair in pairwise(states[19:])]
        assert len(moves) == 10 and sum(moves) <= 1, (seed, moves)


def test_without_changes_groups_of_known_styles_do_not_move():
    descriptors, truth = kinds([4, 5, 6], seed=7)
    assert settled(normalize(descriptors, dim=1), truth, truth) == [truth]


@pytest.mark.parametrize(("groups", "count"), [([0, 2, 2], 3), ([0, 0], 1), ([0, 0, 1], 1)])
def test_groups_that_do_not_fit_are_refused(groups, count):
    with pytest.raises(ConfigError, match="one adapter for each group"):
        restructured(torch.ones(3, WIDTH), groups, [adapter(0)] * count, 0.5)
