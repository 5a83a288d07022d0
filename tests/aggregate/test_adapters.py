"""Rules for adapters: which are exact, what the others leave out, and whom they withstand."""

import pytest
import torch

from personae.aggregate.adapters import (
    clipped_weights,
    common_A,
    common_B,
    corrected_mean,
    factor_geometric_median_weights,
    factor_mean,
    first_ranks,
    geometric_median_weights,
    mean_and_rest,
    multi_krum_weights,
    nearest,
    nearest_with_rest,
    shares_of,
    squared_distances,
    trusted_weights,
    zero_padded,
)
from personae.aggregate.low_rank import LowRank, gram, read, stacked, written
from personae.aggregate.robust import geometric_median, multi_krum
from personae.backbone.text2image import TextToImage
from personae.core import State, Training, Update, nothing, stream
from personae.errors import ConfigError, ShapeError, TooFewClients
from personae.methods import ClusterLora
from personae.personal.lora import Lora
from personae.personal.tokens import Words
from personae.testing.tiny_pipeline import SCHEDULE, tiny_networks

SHARES = [0.5, 0.3, 0.2]
TRAINING, WORDS = Training(2, 0.01, 2), Words(("<own>",), "drawing")


def drawn(seed, rank=3, shape=(10, 8)):
    rng = stream(seed, "adapter")
    return {"x": LowRank(torch.randn(shape[0], rank, generator=rng), torch.randn(rank, shape[1], generator=rng))}


def exact(adapters, shares=SHARES):
    return sum(share * adapter["x"].dense().double() for share, adapter in zip(shares, adapters, strict=True))


def off(found, expected):
    """Relative distance in Frobenius norm."""
    dense = found["x"].dense().double() if isinstance(found, dict) else found
    return float(torch.linalg.matrix_norm(dense - expected) / torch.linalg.matrix_norm(expected))


def regauged(adapter, seed):
    """The same change by other factors."""
    rank = adapter["x"].rank
    turn = torch.randn(rank, rank, dtype=torch.float64, generator=stream(seed, "turn")) + 3 * torch.eye(rank)
    return {"x": LowRank(adapter["x"].B.double() @ turn.inverse() / 3, 3 * turn @ adapter["x"].A.double())}


DRAWN = [drawn(k) for k in range(3)]


def test_nobody_counts_for_more_than_twice_the_median():
    assert shares_of([10, 10, 10]) == pytest.approx([1 / 3] * 3)
    assert shares_of([10, 20, 10**9]) == pytest.approx([1 / 7, 2 / 7, 4 / 7])


def test_the_mean_of_factors_leaves_out_how_they_vary_together():
    mean = factor_mean(DRAWN, SHARES)["x"]
    left_out = sum(
        share * (adapter["x"].B - mean.B) @ (adapter["x"].A - mean.A)
        for share, adapter in zip(SHARES, DRAWN, strict=True)
    )
    assert torch.allclose(mean.dense() + left_out, exact(DRAWN).float(), atol=1e-5)
    assert off(factor_mean(DRAWN, SHARES), exact(DRAWN)) > 0.3
    with pytest.raises(ShapeError, match="ranks 2, 3"):
        factor_mean([drawn(0), drawn(1, 2)], [0.5, 0.5])


@pytest.mark.parametrize("rule", [common_A, common_B])
def test_with_one_factor_for_all_the_mean_is_exact(rule):
    factor = rule.__name__[-1]
    common = getattr(DRAWN[0]["x"], factor)
    adapters = [{"x": LowRank(**{"A": a["x"].A, "B": a["x"].B, factor: common})} for a in DRAWN]
    assert off(rule(adapters, SHARES), exact(adapters)) < 1e-6
    with pytest.raises(ConfigError, match=f"adapter 1 has another {factor} than the first at x"):
        rule(DRAWN, SHARES)


def test_with_the_rows_of_common_A_factors_are_as_far_apart_as_changes(tmp_path):
    model = TextToImage(tiny_networks(tmp_path / "tokenizer"), SCHEDULE, nothing, lora=Lora(2), words=WORDS)
    method = ClusterLora(TRAINING, TRAINING, TRAINING, inside="common_A")
    adapter = read(method.init(model.initial(stream(0))).params)
    for layer, change in adapter.items():
        rows = change.A.double()
        assert torch.allclose(rows @ rows.T, torch.eye(2).double(), atol=1e-6)
        shape = change.B.shape
        one, other = (torch.randn(shape, dtype=torch.float64, generator=stream(k, layer)) for k in (1, 2))
        assert float((one - other).norm()) == pytest.approx(float((one @ rows - other @ rows).norm()), rel=1e-6)


def test_the_mean_and_what_it_leaves_out_are_exact_together():
    mean, rest = mean_and_rest(DRAWN, SHARES)
    assert off(mean["x"].dense().double() + rest["x"].dense().double(), exact(DRAWN)) < 1e-6


def test_the_corrected_mean_is_the_nearest_within_the_rows_of_the_mean():
    rows = factor_mean(DRAWN, SHARES)["x"].A.double()
    within = exact(DRAWN) @ rows.T @ (rows @ rows.T).inverse() @ rows
    found = corrected_mean(DRAWN, SHARES)
    assert torch.allclose(found["x"].dense().double(), within, atol=1e-4)
    assert off(found, exact(DRAWN)) < off(factor_mean(DRAWN, SHARES), exact(DRAWN))


@pytest.mark.parametrize("rank", [1, 3, 6, 8])
def test_the_nearest_of_a_rank(rank):
    adapters = [drawn(0, 2), drawn(1, 4), drawn(2, 1)]
    values = torch.linalg.svdvals(exact(adapters))
    assert off(nearest(adapters, SHARES, rank), exact(adapters)) == pytest.approx(
        float(values[rank:].norm() / values.norm()), abs=1e-5
    )


def test_ranks_are_filled_up_and_cut_off():
    small, large = drawn(0, 1), drawn(1, 3)
    found = zero_padded([small, large])
    norms = [float(torch.linalg.matrix_norm(a["x"].dense())) for a in (small, large)]
    weight = norms[0] / sum(norms)
    assert found["x"].rank == 3
    first = weight * small["x"].B[:, 0] + (1 - weight) * large["x"].B[:, 0]
    assert torch.allclose(found["x"].B[:, 0], first, atol=1e-6)
    assert torch.allclose(found["x"].A[1:], (1 - weight) * large["x"].A[1:], atol=1e-6)
    assert first_ranks(found, 1)["x"].rank == 1


def test_what_a_round_leaves_out_is_carried_to_the_next():
    applied, carried, whole = torch.zeros(10, 8).double(), None, torch.zeros(10, 8).double()
    for number in range(4):
        adapters = [drawn(10 * number + k) for k in range(3)]
        kept, carried = nearest_with_rest(adapters, SHARES, 3, carried, 8)
        applied += kept["x"].dense().double()
        whole += exact(adapters)
        assert kept["x"].rank == 3
    assert off(applied + carried["x"].dense().double(), whole) < 1e-5
    assert off(applied, whole) > 0.05


# --- whom they withstand -------------------------------------------------------------------------------------------


def test_decisions_do_not_depend_on_the_factors():
    adapters = [drawn(k) for k in range(7)]
    others = [regauged(adapter, k) for k, adapter in enumerate(adapters)]
    assert torch.allclose(gram(adapters), gram(others), rtol=1e-5, atol=1e-5)
    assert torch.allclose(squared_distances(adapters), squared_distances(others), rtol=1e-4, atol=1e-4)
    uniform = [1 / 7] * 7
    for weigh in (
        geometric_median_weights,
        lambda a: multi_krum_weights(a, 2),
        lambda a: clipped_weights(a, uniform),
        lambda a: trusted_weights(a, adapters[0]),
    ):
        assert weigh(adapters) == pytest.approx(weigh(others), abs=1e-5)


def test_weights_are_those_of_the_rules_on_full_matrices():
    adapters = [drawn(k) for k in range(7)]
    dense = [Update(f"c{k}", 1, State({"x": a["x"].dense().double()})) for k, a in enumerate(adapters)]
    for weights, rule in (
        (geometric_median_weights(adapters), geometric_median(dense, attackers=2)),
        (multi_krum_weights(adapters, 2), multi_krum(dense, attackers=2)),
    ):
        assert sum(weights) == pytest.approx(1)
        assert off(stacked(adapters, weights), rule["x"]) < 1e-5
    with pytest.raises(TooFewClients, match="against 3 attackers it needs at least 9"):
        multi_krum_weights(adapters, 3)


def test_long_ones_are_shortened():
    adapters = [drawn(0), drawn(1), {"x": LowRank(100 * drawn(2)["x"].B, drawn(2)["x"].A)}]
    lengths = gram(adapters).diagonal().sqrt()
    weights = clipped_weights(adapters, SHARES)
    assert weights[2] == pytest.approx(0.2 * float(lengths.median() / lengths[2])) and max(weights) <= 0.5


ATTACKS = {
    "sign": lambda change: -change,
    "times -8": lambda change: -8 * change,
    "times -1e10": lambda change: -1e10 * change,
}


def federation(seed, attack, rotated):
    """Nine honest adapters, one signal and 15 % noise, and three that answer with the opposite."""
    rng = stream(seed, "federation")
    signal = LowRank(torch.randn(64, 4, generator=rng), torch.randn(4, 48, generator=rng))
    clients = []
    for k in range(12):
        own = LowRank(
            signal.B + 0.15 * torch.randn(64, 4, generator=rng), signal.A + 0.15 * torch.randn(4, 48, generator=rng)
        )
        turn = torch.linalg.qr(torch.randn(4, 4, generator=rng))[0] if rotated and k < 9 else torch.eye(4)
        own = LowRank(own.B @ turn.T, turn @ own.A)
        clients.append({"x": own if k < 9 else LowRank(ATTACKS[attack](own.B), own.A)})
    return clients, exact(clients[:9], [1 / 9] * 9)


@pytest.mark.parametrize("attack", ATTACKS)
def test_robust_rules_need_products_unless_everybody_has_the_same_factors(attack):
    """On factors they fail as soon as each client's are turned its own way, though what it adds is the same."""
    on_products, on_factors, plain = [], {False: [], True: []}, []
    for seed in range(3):
        for rotated in (False, True):
            clients, honest = federation(seed, attack, rotated)
            on_products += [
                off(stacked(clients, weigh(clients)), honest)
                for weigh in (geometric_median_weights, lambda a: multi_krum_weights(a, 3))
            ]
            plain.append(off(stacked(clients, [1 / 12] * 12), honest))
            updates = [Update(f"c{k:02d}", 1, State(written(client))) for k, client in enumerate(clients)]
            on_factors[rotated].append(off(read(geometric_median(updates, attackers=3)), honest))
    assert max(on_products) < 0.12 and min(plain) > 0.4
    assert max(on_factors[False]) < 0.15 and min(on_factors[True]) > 0.6


def test_trust_in_a_root_leaves_the_opposite_out():
    clients, honest = federation(0, "sign", rotated=True)
    root = {"x": LowRank(clients[0]["x"].B, clients[0]["x"].A)}
    weights = trusted_weights(clients, root)
    assert weights[9:] == [0, 0, 0] and sum(weights) == pytest.approx(1, abs=0.05)
    assert off(stacked(clients, weights), honest) < 0.1
    nobody = trusted_weights([{"x": LowRank(-root["x"].B, root["x"].A)}], root)
    assert nobody == [0]


def test_a_larger_gauge_buys_nothing():
    """The same change by factors of other lengths has the same weight."""
    clients, _ = federation(0, "sign", rotated=False)
    weights = geometric_median_weights(clients)
    clients[10] = {"x": LowRank(clients[10]["x"].B / 1000, clients[10]["x"].A * 1000)}
    assert geometric_median_weights(clients) == pytest.approx(weights, abs=1e-6)


def test_the_geometric_median_of_factors_is_that_of_their_entries_and_minds_the_gauge():
    clients = [{"unet.a": LowRank(torch.randn(6, 2, generator=stream(k)), torch.randn(2, 5, generator=stream(9, k)))}
               for k in range(5)]  # fmt: skip
    weights = factor_geometric_median_weights(clients)
    rows = torch.stack([torch.cat([c["unet.a"].B.flatten(), c["unet.a"].A.flatten()]).double() for c in clients])
    found = torch.tensor(weights, dtype=torch.float64) @ rows
    whole = float((rows - found).norm(dim=1).sum())
    nearby = [found + 1e-2 * torch.randn(found.shape, generator=stream(7, k)).double() for k in range(20)]
    assert sum(weights) == pytest.approx(1) and all(float((rows - at).norm(dim=1).sum()) > whole for at in nearby)
    other = LowRank(3 * clients[0]["unet.a"].B, clients[0]["unet.a"].A / 3)
    assert factor_geometric_median_weights([{"unet.a": other}, *clients[1:]]) != pytest.approx(weights, rel=0.01)
    with pytest.raises(ShapeError, match="ranks 1, 2"):
        factor_geometric_median_weights([*clients, {"unet.a": LowRank(torch.ones(6, 1), torch.ones(1, 5))}])
