"""Who joins which group, who opens one, and what groups already know of a change."""

import pytest
import torch
from torch.nn.functional import normalize

from personae.aggregate.low_rank import LowRank, stacked
from personae.aggregate.newcomers import Mixtures, familiar, trust
from personae.core import stream
from personae.errors import ConfigError, MismatchedNames

WIDTH = 32


def around(centre, spread, count, name):
    noise = torch.randn(count, WIDTH, generator=stream(0, name)) * spread
    return normalize(centre + noise, dim=1)


AXES = torch.eye(WIDTH)


@pytest.fixture
def known():
    rows = torch.cat([around(AXES[c], 0.05, 4, f"members {c}") for c in range(3)])
    return familiar(rows, [0] * 4 + [1] * 4 + [2] * 4)


def test_members_of_known_groups_find_them_and_strangers_find_none(known):
    for number in range(3):
        came = around(AXES[number], 0.05, 20, f"late {number}")
        assert sum(known.group(row) == number for row in came) >= 18
    assert all(known.group(row) is None for row in around(AXES[9], 0.05, 20, "strangers"))


def test_chances_sum_to_one_and_follow_sizes_where_likeness_says_nothing():
    rows = torch.cat([around(AXES[0], 0.3, 6, "many"), around(AXES[1], 0.3, 2, "few")])
    found = familiar(rows, [0] * 6 + [1] * 2)
    between = (found.centres[0] + found.centres[1]).float()
    chances = found.chances(between)
    assert float(chances.sum()) == pytest.approx(1)
    assert float(chances[0] / chances[1]) == pytest.approx(3, rel=1e-5)
    assert float(found.chances(between, new=1e12)[-1]) > 0.99


def test_the_concentration_is_that_of_the_distribution():
    """Around a centre with concentration kappa, the mean cosine of many is I_{D/2}(kappa) / I_{D/2-1}(kappa)."""
    from scipy.special import ive

    kappa = 60.0
    mean = ive(WIDTH / 2, kappa) / ive(WIDTH / 2 - 1, kappa)
    across = (1 - mean**2) ** 0.5
    rows = torch.stack([mean * AXES[0] + sign * across * AXES[k] for k in range(1, WIDTH) for sign in (1, -1)])
    assert familiar(rows, [0] * len(rows)).concentration == pytest.approx(kappa, rel=0.05)


def test_the_threshold_is_measured_without_the_member_itself():
    rows = torch.stack([AXES[0], AXES[0], normalize(AXES[0] + AXES[1], dim=0)])
    found = familiar(rows, [0, 0, 0], quantile=0.0)
    assert found.threshold == pytest.approx(2**-0.5), "the third, from the centre of the other two"
    assert familiar(rows[:1], [0], alone=0.3).threshold == 0.3


@pytest.mark.parametrize(("rows", "groups"), [(0, []), (2, [0]), (2, [0, 2])])
def test_groups_that_do_not_fit_are_refused(rows, groups):
    with pytest.raises(ConfigError, match="expected a number from 0 for each"):
        familiar(torch.ones(rows, WIDTH), groups)


def drawn(name, rank=2):
    return {
        layer: LowRank(
            torch.randn(12, rank, generator=stream(1, name, layer, "B")),
            torch.randn(rank, 10, generator=stream(1, name, layer, "A")),
        )
        for layer in ("one", "two")
    }


def turned(adapter):
    """The same change by other factors."""
    turn = torch.tensor([[2.0, 1.0], [0.5, 3.0]])
    return {layer: LowRank(c.B @ turn.inverse(), turn @ c.A) for layer, c in adapter.items()}


def test_redundancy_is_what_least_squares_on_whole_weights_says():
    adapters, change = [drawn("a"), drawn("b")], drawn("c")
    scale = [sum(float((x[layer].dense() ** 2).sum()) for x in adapters) / 2 for layer in ("one", "two")]
    dense = [
        torch.cat([x[layer].dense().flatten() / s**0.5 for layer, s in zip(("one", "two"), scale, strict=True)])
        for x in [*adapters, change]
    ]
    columns = torch.stack(dense[:2], dim=1).double()
    best = torch.linalg.lstsq(columns, dense[2].double()).solution
    rest = (columns @ best - dense[2]).norm() / dense[2].norm()
    mixture, left = Mixtures(adapters).nearest(change)
    assert mixture == pytest.approx(best.tolist(), rel=1e-3)
    assert left == pytest.approx(float(rest), rel=1e-4)


def test_a_mixture_of_known_adapters_is_found_whatever_the_factors():
    adapters = [drawn("a"), drawn("b")]
    change = stacked(adapters, [0.7, -0.2])
    mixture, left = Mixtures([turned(adapters[0]), adapters[1]]).nearest(change)
    assert mixture == pytest.approx([0.7, -0.2], abs=1e-4) and left < 2e-3
    nothing = {layer: LowRank(c.B * 0, c.A) for layer, c in adapters[0].items()}
    assert Mixtures(adapters).nearest(nothing) == ([0.0, 0.0], 0.0)
    assert Mixtures([nothing, nothing]).nearest(change)[1] == 1.0
    with pytest.raises(MismatchedNames, match="differ in 1 layers: two"):
        Mixtures(adapters).nearest({"one": change["one"]})


def test_adapters_of_different_ranks_are_told_apart():
    adapters = [drawn("a", 1), drawn("b", 3), drawn("c", 2)]
    mixture, left = Mixtures(adapters).nearest(stacked(adapters, [0.5, 0.0, -1.0]))
    assert mixture == pytest.approx([0.5, 0.0, -1.0], abs=1e-4) and left < 2e-3
    assert Mixtures(adapters).nearest(drawn("d"))[1] > 0.8


def test_trust_grows_over_probation():
    assert [trust(rounds, 4) for rounds in (0, 1, 2, 4, 20)] == [0, 0.25, 0.5, 1, 1]
    assert trust(None, 4) == 1 and trust(0, 0) == 1
