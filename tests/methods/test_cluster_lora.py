"""Adapters by style: words stay at home, groups are found and keep their own adapters, newcomers find theirs."""

from dataclasses import replace

import pytest
import torch

from personae.aggregate.adapters import (
    corrected_mean,
    factor_geometric_median_weights,
    factor_mean,
    geometric_median_weights,
    multi_krum_weights,
    nearest,
    shares_of,
)
from personae.aggregate.low_rank import LowRank, read, stacked, written
from personae.aggregate.mean import mean
from personae.artefact.run_folder import RunFolder
from personae.backbone.text2image import TextToImage
from personae.core import ClientData, Images, State, Training, Update, nothing, pick, stream
from personae.engine import InProcess
from personae.engine.population import Population
from personae.engine.rounds import Arriving
from personae.errors import ConfigError, EmptyRound
from personae.methods import ClusterLora
from personae.personal.lora import Lora, is_lora
from personae.personal.tokens import Words, is_word
from personae.testing import check_method, tiny_job
from personae.testing.contract import differing_states
from personae.testing.tiny_pipeline import SCHEDULE, tiny_networks

TRAINING = Training(2, 0.01, 2)
METHOD = ClusterLora(TRAINING, Training(2, 0.05, 2), TRAINING, smallest_cluster=1, describing=2, descriptor_width=8)


@pytest.fixture
def make(tmp_path):
    def made(**parts):
        given = {"lora": Lora(2), "words": Words(("<own>",), "drawing"), **parts}
        return TextToImage(tiny_networks(tmp_path / "tokenizer"), SCHEDULE, nothing, **given)

    return made


@pytest.fixture
def population(make):
    def images(name, seed):
        pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=stream(seed, name))
        return Images(pixels, captions=("a <own> of a dog", "a <own> of a cat", "a dog", "a <own>"))

    names = ("c0", "c1", "c2", "n0")
    data = {name: ClientData(images(name, 0), images(name, 1)) for name in names}
    return Population(make(), data, names[:3], names[3:])


@pytest.mark.parametrize("inside", ["nearest", "common_A"])
def test_the_contracts(population, inside):
    check_method(replace(METHOD, inside=inside), population)


def drawn(seed, like, rank=2):
    return {
        layer: LowRank(
            torch.randn(change.B.shape[0], rank, generator=stream(seed, layer, "B")),
            torch.randn(rank, change.A.shape[1], generator=stream(seed, layer, "A")),
        )
        for layer, change in like.items()
    }


def updates_of(adapters, descriptors, examples=4):
    found = [
        Update(name, examples, State(written(adapter), {"descriptor": descriptors[name]}))
        for name, adapter in sorted(adapters.items())
    ]
    return Arriving(iter(found), mean)


AXES = torch.eye(8)
STYLES = {"a0": AXES[0], "a1": AXES[0], "b0": AXES[1], "b1": AXES[1], "b2": AXES[1]}


def close(one, other):
    return all(torch.allclose(one[layer].dense(), other[layer].dense(), atol=1e-4) for layer in other)


def test_groups_are_combined_inside_and_stacked_across(make):
    method = METHOD
    server = method.init(make().initial(stream(0)))
    start = read(server.params)
    assert method.release(server).params.keys() == server.params.keys()
    adapters = {name: drawn(k, start) for k, name in enumerate(STYLES)}
    after = method.aggregate(server, updates_of(adapters, STYLES))
    groups = {name: after.facts[f"cluster of {name}"] for name in STYLES}
    assert groups == {"a0": 0, "a1": 0, "b0": 1, "b1": 1, "b2": 1}
    sent = read(method.broadcast(after, "a1").params)
    exact = stacked([adapters["a0"], adapters["a1"]], shares_of([4, 4]))
    rest = read({n.removeprefix("rest.0."): v for n, v in after.extras.items() if n.startswith("rest.0.")})
    assert close(stacked([sent, rest], [1, 1]), exact), "what has no room is carried"
    released = method.release(after)
    shares = [after.facts["share 0"], after.facts["share 1"]]
    assert sum(shares) == pytest.approx(1)
    assert close(read(released.params), stacked([sent, read(method.broadcast(after, "b0").params)], shares))
    assert next(iter(read(released.params).values())).rank == 4
    assert not any(name.startswith("seen.") for name in released.extras)
    assert read(method.broadcast(after, "stranger").params).keys() == start.keys()


def test_a_group_of_which_nobody_came_stays_as_it_is_and_others_keep_their_place(make):
    server = METHOD.init(make().initial(stream(0)))
    start = read(server.params)
    first = METHOD.aggregate(server, updates_of({name: drawn(k, start) for k, name in enumerate(STYLES)}, STYLES))
    second = METHOD.aggregate(first, updates_of({"b1": drawn(9, start)}, STYLES))
    assert second.facts["round"] == 2
    untouched, moved = (METHOD.broadcast(second, name).params for name in ("a0", "b0"))
    assert all(torch.equal(untouched[n], v) for n, v in METHOD.broadcast(first, "a0").params.items())
    assert any(not torch.equal(moved[n], v) for n, v in METHOD.broadcast(first, "b0").params.items())
    late = METHOD.aggregate(second, updates_of({"0late": drawn(11, start)}, {"0late": AXES[1]}))
    assert late.facts["cluster of 0late"] == late.facts["cluster of b0"] and late.facts["clusters"] == 2
    again = METHOD.broadcast(late, "a0").params
    assert all(torch.equal(again[n], v) for n, v in untouched.items()), "members decide, not numbers"


def far(one, other):
    return max(
        float((one[layer].dense() - other[layer].dense()).norm() / other[layer].dense().norm()) for layer in other
    )


@pytest.mark.parametrize("inside", ["nearest", "factor_mean", "corrected_mean", "geometric_median", "common_A"])
@pytest.mark.parametrize("most", [1, 8])
def test_who_began_elsewhere_counts_by_how_far_it_went(make, inside, most):
    """A newcomer who does not train leaves its group where it is, whatever it started from."""
    method = replace(METHOD, inside=inside, most_clusters=most)
    server = method.init(make().initial(stream(0)))
    start = read(server.params)
    adapters = {name: drawn(k, start) for k, name in enumerate(STYLES)}
    if inside == "common_A":
        adapters = {n: {x: LowRank(c.B, start[x].A) for x, c in own.items()} for n, own in adapters.items()}
    first = method.aggregate(server, updates_of(adapters, STYLES))
    before = read(method.broadcast(first, "b0").params)
    got = read(method.broadcast(first, "late").params)
    second = replace(first, extras={n: v * 0 if n.startswith("rest.") else v for n, v in first.extras.items()})
    second = method.aggregate(second, updates_of({"late": got}, {"late": AXES[1]}))
    assert second.facts["cluster of late"] == second.facts["cluster of b0"]
    assert far(read(method.broadcast(second, "b0").params), before) < 1e-3


OTHER_RULES = {
    "factor_mean": lambda adapters, shares: factor_mean(adapters, shares),
    "corrected_mean": lambda adapters, shares: corrected_mean(adapters, shares),
    "geometric_median": lambda adapters, shares: nearest(adapters, geometric_median_weights(adapters), 2),
    "factor_geometric_median": lambda adapters, shares: factor_mean(
        adapters, factor_geometric_median_weights(adapters)
    ),
    "multi_krum": lambda adapters, shares: nearest(adapters, multi_krum_weights(adapters, 1), 2),
}


@pytest.mark.parametrize("inside", OTHER_RULES)
def test_other_rules_inside(make, inside):
    method = replace(METHOD, inside=inside, most_clusters=1, attackers=1)
    server = method.init(make().initial(stream(0)))
    adapters = {name: drawn(k, read(server.params)) for k, name in enumerate(STYLES)}
    after = method.aggregate(server, updates_of(adapters, STYLES))
    expected = OTHER_RULES[inside](list(adapters.values()), [0.2] * 5)
    assert after.facts["clusters"] == 1 and close(read(method.broadcast(after, "a0").params), expected)
    assert close(read(method.release(after).params), expected) and close(read(after.params), expected)
    others = [rule(list(adapters.values()), [0.2] * 5) for name, rule in OTHER_RULES.items() if name != inside]
    assert not any(close(expected, other) for other in others)


def test_a_group_too_small_for_krum_takes_the_geometric_median(make):
    method = replace(METHOD, inside="multi_krum", attackers=1)
    server = method.init(make().initial(stream(0)))
    adapters = {name: drawn(k, read(server.params)) for k, name in enumerate(STYLES)}
    after = method.aggregate(server, updates_of(adapters, STYLES))
    own = [adapters["a0"], adapters["a1"]]
    assert close(read(method.broadcast(after, "a0").params), nearest(own, geometric_median_weights(own), 2))


@pytest.mark.parametrize("odd", [None, torch.ones(3), torch.zeros(8), torch.full((8,), float("nan")), torch.ones(1, 8)])
def test_who_does_not_say_what_it_is_like_is_left_out_and_counted(make, odd):
    server = METHOD.init(make().initial(stream(0)))
    adapters = {name: drawn(k, read(server.params)) for k, name in enumerate((*STYLES, "odd"))}
    arrived = list(updates_of(adapters, {**STYLES, "odd": odd}))
    if odd is None:
        arrived = [replace(u, sent=State(u.sent.params)) if u.client == "odd" else u for u in arrived]
    after = METHOD.aggregate(server, Arriving(iter(arrived), mean))
    del adapters["odd"]
    expected = METHOD.aggregate(server, updates_of(adapters, STYLES))
    assert after.facts["left out"] == 1 and expected.facts["left out"] == 0
    assert all(torch.equal(after.extras[name], value) for name, value in expected.extras.items())
    with pytest.raises(EmptyRound, match="check the clients' captions"):
        METHOD.aggregate(server, Arriving(iter([]), mean))


def test_a_long_description_pulls_no_centre_towards_itself(make):
    server = METHOD.init(make().initial(stream(0)))
    adapters = {name: drawn(k, read(server.params)) for k, name in enumerate(STYLES)}
    plain, loud = (
        METHOD.aggregate(server, updates_of(adapters, {**STYLES, "b2": scale * AXES[1]})) for scale in (1, 1e10)
    )
    assert all(torch.equal(loud.extras[name], value) for name, value in plain.extras.items())


def test_a_newcomer_takes_the_group_that_it_is_like(population, make, monkeypatch):
    server = METHOD.init(population.initial(0))
    start = read(server.params)
    after = METHOD.aggregate(server, updates_of({name: drawn(k, start) for k, name in enumerate(STYLES)}, STYLES))
    released = METHOD.release(after)
    for axis, member in ((0, "a0"), (1, "b0")):
        monkeypatch.setattr(ClusterLora, "_introduced", lambda self, client, adapter, axis=axis: AXES[axis])
        client = population.client("n0", "personalize", 0)
        client.model.load({**pick(client.model.params(), is_word), **released.params})
        still = replace(METHOD, adapt=Training(0, 0.01, 2))
        params = still.personalize(client, released, State()).params
        expected = METHOD.broadcast(after, member).params
        assert all(torch.equal(params[name], value) for name, value in expected.items())


def test_words_are_learned_once_beside_the_bare_base(population):
    """Whatever adapter the client is given, its words and its description are the same."""
    server, found = METHOD.init(population.initial(0)), []
    for seed in (1, 2):
        client = population.client("c0", 1, 0)
        got = State(written(drawn(seed, read(server.params))))
        client.model.load({**got.params, **client.model.captions.initial()})
        update, kept = METHOD.local(client, got, State())
        assert set(kept.params) == {"tokens.<own>"} and all(map(is_lora, update.sent.params))
        assert kept.extras["descriptor"].norm() == pytest.approx(1) and len(kept.extras["descriptor"]) == 8
        assert any(not torch.equal(update.sent.params[name], value) for name, value in got.params.items())
        found.append(kept)
    one, other = found
    assert torch.equal(one.params["tokens.<own>"], other.params["tokens.<own>"])
    assert torch.equal(one.extras["descriptor"], other.extras["descriptor"])
    client = population.client("c0", 2, 0)
    client.model.load({**server.params, **one.params})
    _, later = METHOD.local(client, server, one)
    assert torch.equal(later.params["tokens.<own>"], one.params["tokens.<own>"])


def test_some_of_the_clients_in_each_round(population):
    few = replace(population, cohort_size=2)
    run = InProcess().run(tiny_job(METHOD, few, rounds=3))
    assert run.server.facts["clusters"] >= 1 and set(run.personal) == {"c0", "c1", "c2", "n0"}


@pytest.mark.parametrize("parts", [{"words": None}, {"lora": None}])
def test_a_model_without_adapters_or_words_is_refused(make, parts):
    with pytest.raises(ConfigError, match="cluster_lora trains adapters and words"):
        METHOD.init(make(**parts).initial(stream(0)))


def test_captions_without_the_word_say_nothing_of_the_client(population):
    server = METHOD.init(population.initial(0))
    client = population.client("c0", 1, 0)
    said = tuple(text.replace("<own>", "blue") for text in client.data.train.captions)
    mute = replace(client, data=ClientData(replace(client.data.train, captions=said), client.data.heldout))
    mute.model.load({**server.params, **mute.model.captions.initial()})
    with pytest.raises(ConfigError, match="'c0': none of its captions says a word of its own"):
        METHOD.local(mute, server, State())


@pytest.mark.parametrize(
    "values",
    [
        {"inside": "best"},
        {"most_clusters": 0},
        {"attackers": -1},
        {"trace_power": -1.0},
    ],
)
def test_bad_options_are_refused(values):
    with pytest.raises(ConfigError, match="expected"):
        replace(METHOD, **values)
    with pytest.raises(ConfigError, match="never trained"):
        replace(METHOD, words=Training(0, 0.1, 2))


# --- newcomers -----------------------------------------------------------------------------------------------------

SETTLED = replace(METHOD, grouping_rounds=1, smallest_cluster=2, probation=2)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], value) for name, value in other.items())


def settled(make, method=SETTLED):
    """A server after its first round, with groups of two and three, and a start for adapters."""
    server = method.init(make().initial(stream(0)))
    start = read(server.params)
    adapters = {name: drawn(k, start) for k, name in enumerate(STYLES)}
    if method.inside == "common_A":
        adapters = {name: {x: LowRank(c.B, start[x].A) for x, c in own.items()} for name, own in adapters.items()}
    return method.aggregate(server, updates_of(adapters, STYLES)), start


def test_a_newcomer_joins_its_group_and_counts_more_from_round_to_round(make):
    method = replace(SETTLED, inside="factor_mean")
    first, start = settled(make, method)
    late = updates_of({"late": drawn(20, start)}, {"late": AXES[1]})
    second = method.aggregate(first, late)
    assert second.facts["cluster of late"] == first.facts["cluster of b0"] and second.facts["clusters"] == 2
    assert same(method.broadcast(second, "b0").params, method.broadcast(first, "b0").params), "nothing yet"
    assert same(method.broadcast(second, "late").params, method.broadcast(first, "b0").params)
    assert same(second.params, first.params) and same(method.release(second).extras, method.release(first).extras)
    assert second.facts["newcomer: round of late"] == 2
    assert second.facts["newcomer: likeness of late"] == pytest.approx(1, abs=1e-5)
    assert 0 < second.facts["newcomer: redundancy of late"] <= 1
    before = read(method.broadcast(second, "b0").params)
    both = {"b0": drawn(21, start), "late": drawn(22, start)}
    third = method.aggregate(second, updates_of(both, {"b0": AXES[1], "late": AXES[1]}))
    half = factor_mean([both["b0"], both["late"], before], [0.5, 0.25, 0.25])
    assert close(read(method.broadcast(third, "b0").params), half), "half of what it will count for"
    fourth = method.aggregate(third, updates_of(both, {"b0": AXES[1], "late": AXES[1]}))
    assert close(read(method.broadcast(fourth, "b0").params), factor_mean([both["b0"], both["late"]], [0.5, 0.5]))
    assert not close(before, half)


@pytest.mark.parametrize("inside", ["nearest", "factor_mean", "common_A", "geometric_median", "multi_krum"])
def test_a_newcomer_that_is_alone_in_its_groups_round_does_not_become_the_group(make, inside):
    method = replace(SETTLED, inside=inside, probation=4)
    first, start = settled(make, method)
    own = {x: LowRank(change.B, start[x].A) for x, change in drawn(20, start).items()}
    second = method.aggregate(first, updates_of({"late": own}, {"late": AXES[1]}))
    before = read(method.broadcast(second, "b0").params)
    second = replace(second, extras={n: v * 0 if n.startswith("rest.") else v for n, v in second.extras.items()})
    moved = {x: LowRank(change.B + own[x].B, change.A) for x, change in before.items()}
    third = method.aggregate(second, updates_of({"late": moved}, {"late": AXES[1]}))
    after = read(method.broadcast(third, "b0").params)
    gone = [
        float((after[x].dense() - before[x].dense()).norm() / (moved[x].dense() - before[x].dense()).norm())
        for x in own
    ]
    assert {change.rank for change in after.values()} == {2}
    assert max(gone) <= 0.26, "a quarter of its way, after one of four rounds"


@pytest.mark.parametrize("inside", ["nearest", "factor_mean", "geometric_median"])
@pytest.mark.parametrize("probation", [0, 2])
def test_the_rank_stays_whoever_comes_first_in_the_order_of_names(make, inside, probation):
    method = replace(SETTLED, inside=inside, probation=probation)
    server, start = settled(make, method)
    for number, (name, axis) in enumerate((("0late", 1), ("x1", 5), ("x0", 5), ("x1", 5), ("x0", 5))):
        server = method.aggregate(server, updates_of({name: drawn(40 + number, start)}, {name: AXES[axis]}))
        for who in ("b0", name):
            assert {change.rank for change in read(method.broadcast(server, who).params).values()} == {2}


def test_of_groups_that_are_all_too_small_only_the_largest_is_shown_and_never_a_lone_newcomers(make):
    method = replace(METHOD, smallest_cluster=3, grouping_rounds=1, probation=2)
    server = method.init(make().initial(stream(0)))
    start = read(server.params)
    server = method.aggregate(server, updates_of({n: drawn(k, start) for k, n in enumerate(("a0", "a1"))}, STYLES))
    for _ in range(4):
        server = method.aggregate(server, updates_of({"lone": drawn(9, start)}, {"lone": AXES[7]}))
        released = method.release(server)
        assert server.facts["clusters"] == 2 and released.facts["clusters"] == 1
        assert same(read_group(released, 0), read_group(server, server.facts["cluster of a0"]))


def read_group(state, number):
    front = f"cluster.{number}."
    return {name.removeprefix(front): value for name, value in state.extras.items() if name.startswith(front)}


def test_a_newcomer_of_a_new_kind_opens_a_group_that_is_shown_when_it_is_large_and_old_enough(make):
    first, start = settled(make)
    assert method_shown(first) == 2
    strangers = {"x0": AXES[5], "x1": AXES[5]}
    sent = {"x0": drawn(30, start), "x1": drawn(31, start)}
    second = SETTLED.aggregate(first, updates_of(sent, strangers))
    assert second.facts["cluster of x0"] == second.facts["cluster of x1"] == 2
    assert second.facts["newcomer: likeness of x0"] == pytest.approx(0, abs=1e-5)
    assert method_shown(second) == 2 and same(second.params, first.params), "nobody else gets any of it"
    assert far(read(SETTLED.broadcast(second, "x0").params), read(first.params)) > 0.1, "they have it for themselves"
    third = SETTLED.aggregate(second, updates_of(sent, strangers))
    assert method_shown(third) == 2
    fourth = SETTLED.aggregate(third, updates_of(sent, strangers))
    assert method_shown(fourth) == 3 and not same(fourth.params, first.params)
    released = SETTLED.release(fourth)
    assert sum(fourth.facts[f"share {n}"] for n in range(3)) == pytest.approx(1)
    assert torch.equal(released.extras["centre.2"], fourth.extras["centre.2"])


def method_shown(server):
    return SETTLED.release(server).facts["clusters"]


def test_one_newcomer_alone_is_never_shown(make):
    server, start = settled(make)
    for _ in range(4):
        server = SETTLED.aggregate(server, updates_of({"x0": drawn(30, start)}, {"x0": AXES[5]}))
    assert server.facts["clusters"] == 3 and method_shown(server) == 2


def test_with_as_many_groups_as_may_be_a_stranger_joins_the_likest(make):
    method = replace(SETTLED, most_clusters=2)
    first, start = settled(make, method)
    likest = torch.nn.functional.normalize(AXES[5] + 0.1 * AXES[1], dim=0)
    second = method.aggregate(first, updates_of({"x0": drawn(30, start)}, {"x0": likest}))
    assert second.facts["cluster of x0"] == second.facts["cluster of b0"]


# --- groups that have been there for a while -------------------------------------------------------------------------

NOISY = {
    name: AXES[axis] + 0.1 * torch.randn(8, generator=stream(seed, "noise"))
    for seed, (name, axis) in enumerate(
        (n, k) for k, kind in enumerate("abc") for n in (f"{kind}{i}" for i in range(4))
    )
}


def misgrouped(make, groups, adapters=None):
    """A server after its first round, which has put these clients into these groups."""
    method = replace(METHOD, grouping_rounds=1, smallest_cluster=2, inside="factor_mean")
    server = method.init(make().initial(stream(0)))
    start = read(server.params)
    descriptors = {name: NOISY[name] for name in groups}
    sent = adapters or {name: drawn(k, start) for k, name in enumerate(groups)}
    server = method.aggregate(server, updates_of(sent, descriptors))
    extras = {n: v for n, v in server.extras.items() if not n.startswith(("cluster.", "centre.", "rest."))}
    for number in set(groups.values()):
        own = [name for name in groups if groups[name] == number]
        whole = factor_mean([sent[name] for name in own], shares_of([1] * len(own)))
        extras |= {f"cluster.{number}.{n}": v for n, v in written(whole).items()}
        extras[f"centre.{number}"] = torch.stack([descriptors[name] for name in own]).mean(0)
    count = max(groups.values()) + 1
    facts = {**server.facts, "clusters": count, **{f"cluster of {name}": number for name, number in groups.items()}}
    return method, replace(server, extras=extras, facts=facts), start


def groups_in(server, names):
    return [server.facts[f"cluster of {name}"] for name in names]


def test_a_group_of_two_kinds_is_split_and_both_go_on_from_what_it_was(make):
    names = [name for name in NOISY if name[1] != "3"]
    method, server, start = misgrouped(make, {name: int(name[0] != "a") for name in names})
    whole = method.broadcast(server, "b0").params
    after = method.aggregate(server, updates_of({"a0": drawn(50, start)}, NOISY))
    assert groups_in(after, names) == [0, 0, 0, 1, 1, 1, 2, 2, 2] and after.facts["clusters"] == 3
    assert same(method.broadcast(after, "b0").params, whole) and same(method.broadcast(after, "c2").params, whole)
    again = method.aggregate(after, updates_of({"c0": drawn(51, start)}, NOISY))
    assert groups_in(again, names) == groups_in(after, names)
    assert same(method.broadcast(again, "b0").params, whole) and not same(method.broadcast(again, "c2").params, whole)


def test_as_long_as_somebody_is_new_and_with_as_many_groups_as_may_be_none_is_split(make):
    names = [name for name in NOISY if name[1] != "3"]
    method, server, start = misgrouped(make, {name: int(name[0] != "a") for name in names})
    new = method.aggregate(server, updates_of({"c3": drawn(50, start)}, NOISY))
    assert groups_in(new, names) == groups_in(server, names)
    one = replace(method, most_clusters=2).aggregate(server, updates_of({"a0": drawn(50, start)}, NOISY))
    assert groups_in(one, names) == groups_in(server, names)
    early = replace(method, grouping_rounds=2).aggregate(server, updates_of({"a0": drawn(50, start)}, NOISY))
    assert groups_in(early, names) == groups_in(server, names)


def test_who_is_on_probation_goes_with_the_most_alike_of_its_group(make):
    names = [name for name in NOISY if name[1] != "3"]
    method, server, start = misgrouped(make, {name: int(name[0] != "a") for name in names})
    new = method.aggregate(server, updates_of({"c3": drawn(50, start)}, NOISY))
    after = method.aggregate(new, updates_of({"c3": drawn(50, start)}, NOISY))
    assert after.facts["cluster of c3"] == after.facts["cluster of c0"] != after.facts["cluster of b0"]


def test_two_groups_of_one_kind_are_merged_and_both_come_in_by_their_members(make):
    groups = {**{f"a{k}": 0 for k in range(4)}, "b0": 1, "b1": 1, "b2": 2, "b3": 1}
    start = read(METHOD.init(make().initial(stream(0))).params)
    one = drawn(3, start)
    sent = {
        name: {x: LowRank(one[x].B, (1 + k) * c.A) for x, c in drawn(k, start).items()} for k, name in enumerate(groups)
    }
    method, server, _ = misgrouped(make, groups, sent)
    before = [read(method.broadcast(server, name).params) for name in ("b0", "b2")]
    after = replace(method, smallest_cluster=3).aggregate(server, updates_of({"a0": drawn(50, start)}, NOISY))
    assert groups_in(after, groups) == [0, 0, 0, 0, 1, 1, 1, 1] and after.facts["clusters"] == 2
    assert close(read(method.broadcast(after, "b2").params), factor_mean(before, [0.75, 0.25]))
    assert not close(before[0], before[1])


def test_who_is_in_the_wrong_group_moves_after_three_rounds(make):
    names = ["a0", "a1", "a2", "b0", "b1", "b2", "b3"]
    method, server, start = misgrouped(make, {name: int(name in ("b0", "b1", "b2")) for name in names})
    for number in (1, 2):
        server = method.aggregate(server, updates_of({"a0": drawn(50, start)}, NOISY))
        assert groups_in(server, names) == [0, 0, 0, 1, 1, 1, 0] and server.facts["likelier elsewhere: b3"] == number
    server = method.aggregate(server, updates_of({"a0": drawn(50, start)}, NOISY))
    assert groups_in(server, names) == [0, 0, 0, 1, 1, 1, 1] and "likelier elsewhere: b3" not in server.facts


def test_flower_carries_groups_and_late_clients_to_the_same_bits(population, tmp_path):
    from personae.testing.loopback import Loopback

    method = replace(METHOD, grouping_rounds=1, probation=1)
    population = replace(population, late=("c2",), late_from=2)
    here = InProcess().run(tiny_job(method, population, rounds=3, folder=tmp_path / "here"))
    engine = Loopback()
    there = engine.run(tiny_job(method, population, rounds=3, folder=tmp_path / "there"))
    assert differing_states(here.server, there.server) == []
    for name in ("c0", "c1", "c2", "n0"):
        assert differing_states(here.personal[name], there.personal[name]) == [], name
    records = [message.content.array_records for grid in engine.grids for message in (*grid.pushed, *grid.replied)]
    sent = b"".join(array.data for own in records for record in own.values() for array in record.values())
    assert b"lora_B" in sent and b"descriptor" in sent and b"<own>" not in sent, "words stay at home"
    assert "newcomer: likeness of c2" in RunFolder(tmp_path / "here").server().facts
