"""Closed forms beside descent, pseudo-inverses and a system of linear equations written out."""

import pytest
import torch

from personae.continual.closed_form import constrained, fused, gram

GIVES, READS = 3, 6


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def concepts(num_samples, count=2):
    """What each reads [N, D], and its own change [M, D]."""
    return [(drawn(num_samples, READS, seed=k), drawn(GIVES, READS, seed=10 + k)) for k in range(count)]


def sums(found):
    total = sum(gram(read) for read, _ in found)
    return sum(change @ gram(read) for read, change in found), total


def pair(count, seed):
    """Features [P, D], and what they are to give [P, M]."""
    return drawn(count, READS, seed=seed), drawn(count, GIVES, seed=100 + seed)


# --- fused: what each concept's own change does on what it reads ---------------------------------------------------


@pytest.mark.parametrize("num_samples", [2, 20])  # of two concepts: fewer than the width, and more
def test_fused_is_what_descent_finds(num_samples):
    found = concepts(num_samples)
    change = torch.zeros(GIVES, READS, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS(
        [change], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def missed():
        descent.zero_grad()
        loss = sum((read @ (own - change).T).square().sum() / num_samples for read, own in found)
        loss.backward()
        return loss

    descent.step(missed)
    assert (fused(*sums(found), ridge=0.0) - change).norm() < 1e-6 * change.norm()


@pytest.mark.parametrize("num_samples", [2, 20])
def test_fused_is_what_the_pseudo_inverse_of_all_samples_gives(num_samples):
    found = concepts(num_samples)
    read = torch.cat([each for each, _ in found])
    wanted = torch.cat([each @ own.T for each, own in found])
    assert torch.allclose(fused(*sums(found), ridge=0.0), (torch.linalg.pinv(read) @ wanted).T, rtol=0, atol=1e-9)


def test_the_ridge_is_a_price_for_large_changes():
    pull, total = sums(concepts(20))
    price = 0.1 * total.trace() / READS
    change = fused(pull, total, ridge=0.1)
    # where the gradient of sum |(dW_i - dW) X_i|^2 / N + price |dW|^2 is zero
    assert torch.allclose(change @ total - pull + price * change, torch.zeros(GIVES, READS).double(), atol=1e-12)
    assert fused(pull, total, ridge=10.0).norm() < change.norm() < fused(pull, total, ridge=0.0).norm()


def test_one_concept_fused_is_its_own():
    (alone,) = concepts(20, count=1)
    read, own = alone
    assert torch.allclose(fused(*sums([alone]), ridge=0.0), own, rtol=0, atol=1e-12)  # samples span the width
    even = torch.linalg.qr(read)[0]  # read as much in one direction as in any other: all of it shrinks by the ridge
    near = fused(*sums([(even, own)]))
    assert torch.allclose(near @ even.T, own @ even.T / (1 + 1e-4), rtol=0, atol=1e-12)
    few = concepts(2, count=1)
    assert torch.allclose(fused(*sums(few), ridge=0.0) @ few[0][0].T, few[0][1] @ few[0][0].T, rtol=0, atol=1e-12)


def test_a_concept_that_asks_for_no_change_keeps_what_it_reads():
    (read, own), (general, _) = concepts(2)
    pull, total = sums([(read, own)])
    change = fused(pull, total + gram(general), ridge=0.0)
    assert (change @ general.T).abs().max() < 1e-10  # four samples in six dimensions: both can be had
    assert torch.allclose(change @ read.T, own @ read.T, rtol=0, atol=1e-10)
    assert (fused(pull, total, ridge=0.0) @ general.T).abs().max() > 0.1


def test_many_samples_count_as_much_as_few():
    read = drawn(4, READS)
    assert torch.allclose(gram(read), gram(read.repeat(3, 1)))
    assert torch.allclose(gram(read)[1, 2], (read[:, 1] * read[:, 2]).mean())


# --- constrained: pairs are met, and all else changes least --------------------------------------------------------


def kkt(pairs, general, ridge):
    """The same change, from the equations that its minimum and its constraints obey."""
    features, values = (torch.cat(each) for each in zip(*pairs, strict=True))
    count = len(features)
    system = torch.zeros(READS + count, READS + count, dtype=torch.float64)
    system[:READS, :READS] = general + ridge * general.trace() / READS * torch.eye(READS)
    system[:READS, READS:], system[READS:, :READS] = features.T, features
    right = torch.cat([torch.zeros(READS, GIVES, dtype=torch.float64), values])
    return torch.linalg.solve(system, right)[:READS].T


@pytest.mark.parametrize("num_captions", [3, 40])  # fewer tokens than the width, and more
def test_constrained_is_what_its_equations_say(num_captions):
    pairs, general = [pair(2, seed=1), pair(1, seed=2)], gram(drawn(num_captions, READS, seed=5))
    assert torch.allclose(constrained(pairs, general), kkt(pairs, general, 1e-4), rtol=0, atol=1e-6)


def test_constraints_are_met_and_nothing_feasible_changes_less():
    pairs, other = [pair(2, seed=1), pair(1, seed=2)], drawn(40, READS, seed=5)
    change = constrained(pairs, gram(other), ridge=0.0)
    for features, values in pairs:
        assert (features @ change.T - values).abs().max() < 1e-6
    features = torch.cat([each for each, _ in pairs])
    free = torch.eye(READS) - torch.linalg.pinv(features) @ features  # directions that no constraint sees
    for seed in range(5):
        moved = change + 0.01 * drawn(GIVES, READS, seed=seed) @ free
        assert (moved @ other.T).norm() > (change @ other.T).norm()


def test_one_after_the_other_with_all_pairs_is_all_at_once_and_without_them_is_not():
    first, second, general = pair(2, seed=1), pair(2, seed=2), gram(drawn(40, READS, seed=5))
    kept = [first]
    alone = constrained(kept, general)
    kept.append(second)
    after = constrained(kept, general)
    assert torch.allclose(after, kkt([second, first], general, 1e-4), rtol=0, atol=1e-9)

    features, values = second
    on_top = alone + constrained([(features, values - features @ alone.T)], general)
    assert (features @ on_top.T - values).abs().max() < 1e-6  # the last concept is met,
    error = (first[0] @ on_top.T - first[1]).norm() / first[1].norm()
    assert error > 0.1  # and the one before is not any more
    assert (first[0] @ after.T - first[1]).abs().max() < 1e-6


def test_the_same_constraint_twice_is_one_and_two_that_contradict_meet_in_the_middle():
    features, values = pair(1, seed=1)
    general = gram(drawn(40, READS, seed=5))
    once = constrained([(features, values)], general)
    rounded = features * (1 + 1e-6 * drawn(1, READS, seed=3))  # as a text encoder in float32 may give it again
    for again in (features, rounded):
        assert torch.allclose(constrained([(features, values), (again, values)], general), once, rtol=0, atol=1e-5)
        halfway = constrained([(features, values), (again, -values)], general)
        assert halfway.abs().max() < 1e-5


def test_more_constraints_than_the_width_are_met_in_the_sense_of_least_squares():
    pairs, general = [pair(8, seed=1)], gram(drawn(40, READS, seed=5))
    wanted = torch.linalg.lstsq(*pairs[0]).solution.T
    assert torch.allclose(constrained(pairs, general), wanted, rtol=0, atol=1e-8)


def test_what_is_read_as_float32_is_solved_in_float64():
    (read, own), (features, values) = concepts(20, count=1)[0], pair(2, seed=1)
    assert fused((own @ gram(read)).float(), gram(read).float()).dtype == torch.float64
    assert constrained([(features.float(), values.float())], gram(read.float())).dtype == torch.float64
