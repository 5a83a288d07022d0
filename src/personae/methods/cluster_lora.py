"""Adapters by style: averaged among clients of one kind, stacked across kinds, and words that never leave a client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from personae.aggregate import adapters as rules
from personae.aggregate import fewest
from personae.aggregate.low_rank import Adapter, LowRank, read, stacked, written
from personae.aggregate.membership import OF, Grouping, groups_in
from personae.core import Arrays, Client, Select, State, Training, Update, Updates, pick, stream
from personae.errors import ConfigError, EmptyRound
from personae.local.fit import Fitted, fit, gradients
from personae.personal.lora import A, B, is_lora
from personae.personal.tokens import is_word

Inside = Literal[
    "nearest",
    "factor_mean",
    "common_A",
    "corrected_mean",
    "geometric_median",
    "factor_geometric_median",
    "multi_krum",
]

DESCRIPTOR = "descriptor"
CLUSTER, CENTRE, REST, SEEN = "cluster", "centre", "rest", "seen"
"""Fronts of what the server keeps: "cluster.0.<layer>.lora_A", "centre.0", "rest.0.<layer>.lora_A", "seen.<client>"."""

LEVELS = 4
"""Parts of the noise schedule whose gradients stand one after the other in a description: what sets styles apart is at
other levels for one style than for another. Our choice."""

WITHHELD = "withheld"
"""Front of facts: groups whose adapter is not given to all yet. Those of members are in `aggregate/membership.py`."""


@dataclass(frozen=True)
class ClusterLora:
    """Clients fine-tune adapters; the server groups clients of one style, combines inside a group, stacks the groups.

    Before its first round a client describes itself, by where its pictures pull its own words from where all clients'
    words start, and learns these by textual inversion, beside the bare base. Words never leave it; adapters and the
    description do. A round then trains the adapters from the client's group's. In the end everyone takes the adapter of
    the group whose centre its description is nearest to, and trains it for `adapt` more steps on its own images; who
    comes later learns words first. A group of one is that client: `smallest_cluster` says how many stand behind what
    all are given, once as many have come. A client that began elsewhere, in its first round or after its group has
    changed, counts by how far it went. Updates without a usable description are left out and counted.

    Groups are formed anew for whoever comes in the first `grouping_rounds`. Afterwards a newcomer joins the group that
    its description is likeliest from, or opens one of its own; in a round without one, a group may be split, two may be
    merged, or members move (`aggregate/cluster.py`). In its first round a newcomer changes nothing of what others get;
    it counts more from one of its rounds to the next, wholly after `probation` of them, and only then in the centre,
    the size and the weight of its group. Rules that look at distances see it whole, and it counts for as much less. A
    group with fewer than `smallest_cluster` such members keeps its adapter to itself, as long as there are larger ones;
    at the end its members take another one's. How many members a group has does not say how many of them sent
    something in a round. Facts say of each newcomer how like its group it is, and how much of its first update the
    groups had no part in (`aggregate/newcomers.py`).

    `inside` combines a group's adapters: "nearest", exact but for what a group's rank has no room for, of which as much
    again is carried to the next round; "factor_mean" (FedIT); "common_A" (FFA-LoRA: A of orthonormal rows, the same for
    all, never trains); "corrected_mean" (LoRA-FAIR); "geometric_median" (FedGeoMed), on products, or
    "factor_geometric_median", on factors; "multi_krum" against `attackers` of a group, the geometric median where a
    group is too small for that. With `most_clusters` 1 they are the federated baselines of
    those names.

    Source: Li et al. 2025, arXiv:2508.04745. Its formulas were not available to us: the description, how clients are
    grouped, and how groups are weighed (`aggregate/cluster.py`) are our reconstruction.
    """

    training: Training
    words: Training
    adapt: Training
    inside: Inside = "nearest"
    attackers: int = 0
    most_clusters: int = 8
    smallest_cluster: int = 3
    grouping_rounds: int = 3
    probation: int = 3
    describing: int = 32
    descriptor_width: int = 64
    weigh_sign: Literal["distinct", "conservative"] = "distinct"
    weigh_trace: Literal["a", "b", "c"] = "a"
    size_power: float = 0.5
    distance_power: float = 1.0
    trace_power: float = 1.0

    def __post_init__(self) -> None:
        if self.inside not in get_args(Inside):
            raise ConfigError(f"inside is {self.inside!r}; expected one of {', '.join(get_args(Inside))}")
        least = {"most_clusters": 1, "smallest_cluster": 1, "descriptor_width": 1, "attackers": 0}
        least |= {"grouping_rounds": 1, "probation": 0, "describing": 1}
        least |= {"size_power": 0, "distance_power": 0, "trace_power": 0}
        if low := [
            f"{n} is {getattr(self, n)}, expected at least {m}" for n, m in least.items() if getattr(self, n) < m
        ]:
            raise ConfigError("; ".join(low))
        if self.words.steps < 1:
            raise ConfigError("words.steps is 0: a word that was never trained says nothing of its client")

    @property
    def personal(self) -> Select:
        return is_word

    # --- the server ----------------------------------------------------------------------------------------------

    def init(self, initial: Arrays) -> State:
        shared = pick(initial, is_lora)
        if not shared or not any(is_word(name) for name in initial) or len(shared) != len(pick(initial, _ours)):
            raise ConfigError(
                "cluster_lora trains adapters and words on a frozen text-to-image pipeline, and nothing else; set "
                "backbone.frozen, and add [backbone.lora] and [backbone.words]"
            )
        if self.inside == "common_A":
            shared = {name: _orthonormal(value) if name.endswith(A) else value for name, value in shared.items()}
        return State(shared, facts={"round": 0, "clusters": 0})

    def broadcast(self, server: State, client: str) -> State:
        """The adapter of the client's cluster; of someone new, the one that all have in common."""
        number = server.facts.get(f"{OF}{client}")
        return State(server.params if number is None else _under(server.extras, f"{CLUSTER}.{number}."))

    def aggregate(self, server: State, updates: Updates) -> State:
        arrived, strange = self._usable(server, list(updates))
        if not arrived:
            raise EmptyRound("no update in this round says what its client is like; check the clients' captions")
        new = {update.client: normalize(update.sent.extras[DESCRIPTOR], dim=0) for update in arrived}
        seen = {**_under(server.extras, f"{SEEN}."), **new}
        start, before = read(server.params), _clusters(server)
        went = {update.client: update.sent.params for update in arrived}
        members = self._grouping.after(
            server.facts,
            round_number := int(server.facts["round"]) + 1,
            seen,
            [update.client for update in arrived],
            before,
            lambda name: stacked([read(went[name]), start], [1.0, -1.0]),
        )
        groups, settled = members.groups, members.settled
        clusters: list[Adapter] = []
        extras: dict[str, Tensor] = {f"{SEEN}.{name}": value for name, value in seen.items()}
        for number in range(members.count):
            begin, carried = self._start(server, before, groups, number)
            counts = [(update, members.counts(update.client)) for update in arrived if groups[update.client] == number]
            own = [(update, counted) for update, counted in counts if counted]
            combined, rest = self._inside(begin, server, own, carried) if own else (begin, carried)
            clusters.append(combined)
            around = [seen[name] for name in sorted(settled) if settled[name] == number]
            extras[f"{CENTRE}.{number}"] = torch.stack(around).mean(0)
            extras |= _front(f"{CLUSTER}.{number}.", written(combined)) | _front(f"{REST}.{number}.", rest)
        shown = members.shown(self.smallest_cluster)
        weights = self.weights(settled, [clusters[number] for number in shown], shown, extras)
        facts: dict[str, Any] = {
            "round": round_number,
            "clusters": members.count,
            "left out": len(strange),
            **members.facts,
            **{f"share {number}": weights[number] for number in shown},
            **{f"{WITHHELD} {number}": True for number in range(members.count) if number not in shown},
        }
        common = self._common([clusters[number] for number in shown], [weights[number] for number in shown])
        return State(written(common), extras, facts)

    def release(self, server: State) -> State:
        """All clusters' adapters and centres, and stacked, in their shares, the one for everybody."""
        shown = [n for n in range(int(server.facts["clusters"])) if f"{WITHHELD} {n}" not in server.facts]
        if not shown:
            return State(server.params)
        whole = _clusters(server)
        clusters = [whole[number] for number in shown]
        everyone = stacked(clusters, [float(server.facts[f"share {number}"]) for number in shown])
        extras: dict[str, Tensor] = {}
        for place, number in enumerate(shown):
            extras |= _front(f"{CLUSTER}.{place}.", written(clusters[place]))
            extras[f"{CENTRE}.{place}"] = server.extras[f"{CENTRE}.{number}"]
        return State(written(everyone), extras, {"clusters": len(shown)})

    @property
    def _grouping(self) -> Grouping:
        return Grouping(self.most_clusters, self.smallest_cluster, self.grouping_rounds, self.probation)

    def _start(
        self, server: State, clusters: Sequence[Adapter], groups: Mapping[str, int], number: int
    ) -> tuple[Adapter, Arrays]:
        """What a group goes on from, and what is carried: of the group that most of its members come from; those that
        went into it whole come in by their members. What all have in common where all are new."""
        before = groups_in(server.facts)
        came = Counter(before[name] for name in sorted(groups) if groups[name] == number and name in before)
        if not came:
            return read(server.params), {}
        first, were = max(sorted(came), key=lambda old: came[old]), Counter(before.values())
        whole = [first, *(old for old in sorted(came) if old != first and came[old] == were[old])]
        start = self._common([clusters[old] for old in whole], rules.shares_of([came[old] for old in whole]))
        return start, _under(server.extras, f"{REST}.{first}.")

    def _usable(self, server: State, arrived: Sequence[Update]) -> tuple[list[Update], list[str]]:
        """The updates that can be taken, and whose cannot: without a usable description, or with an A of their own."""
        known = [len(value) for value in _under(server.extras, f"{SEEN}.").values()]
        sent = [update.sent.extras.get(DESCRIPTOR) for update in arrived]
        lengths = known or [len(value) for value in sent if value is not None and value.dim() == 1]
        width = max(sorted(set(lengths)), key=lengths.count, default=0)
        taken, strange = [], []
        for update, value in zip(arrived, sent, strict=True):
            fits = value is not None and value.shape == (width,) and 0 < float(value.norm()) < float("inf")
            if self.inside == "common_A":
                fits = fits and all(
                    torch.equal(v, server.params[n]) for n, v in update.sent.params.items() if n.endswith(A)
                )
            if fits:
                taken.append(update)
            else:
                strange.append(update.client)
        return taken, strange

    def _from(self, start: Adapter, server: State, update: Update) -> Adapter:
        """What the client would have sent from this start: somebody new, or from another group, began elsewhere."""
        own, began = read(update.sent.params), read(self.broadcast(server, update.client).params)
        if all(torch.equal(v, written(start)[name]) for name, v in written(began).items()):
            return own
        if self.inside not in FACTORS:
            return stacked([start, own, began], [1.0, 1.0, -1.0])
        return {
            layer: LowRank(
                start[layer].B + own[layer].B - began[layer].B, start[layer].A + own[layer].A - began[layer].A
            )
            for layer in own
        }

    def _inside(
        self, start: Adapter, server: State, own: Sequence[tuple[Update, float]], carried: Arrays
    ) -> tuple[Adapter, Arrays]:
        """A cluster's new adapter from updates and how much each counts, and what its rank had no room for. What
        newcomers do not count for yet, the cluster's former adapter does."""
        adapters, counts = [self._from(start, server, update) for update, _ in own], [counted for _, counted in own]
        weights = self._weights_inside(adapters, [update.num_examples for update, _ in own])
        shares = [weight * counted for weight, counted in zip(weights, counts, strict=True)]
        rank = min(change.rank for change in start.values())
        if min(counts) < 1:
            adapters, shares = [*adapters, start], [*shares, 1 - sum(shares)]
        if self.inside == "nearest":
            kept, rest = rules.nearest_with_rest(adapters, shares, rank, read(carried) if carried else None, rank)
            return kept, written(rest)
        if self.inside in FACTORS:
            return FACTORS[self.inside](adapters, shares), {}
        return rules.nearest(adapters, shares, rank), {}

    def _weights_inside(self, adapters: Sequence[Adapter], num_examples: Sequence[int]) -> list[float]:
        """What each update counts for by the rule, before newcomers count less."""
        if self.inside == "factor_geometric_median":
            return rules.factor_geometric_median_weights(adapters)
        if self.inside in ("nearest", *FACTORS):
            return rules.shares_of(num_examples)
        if self.inside == "multi_krum" and len(adapters) >= fewest("multi_krum", self.attackers):
            return rules.multi_krum_weights(adapters, self.attackers)
        return rules.geometric_median_weights(adapters)

    def _common(self, clusters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
        """What somebody new starts from: all clusters together, at the rank of one."""
        if len(clusters) == 1:
            return clusters[0]
        if self.inside in FACTORS:
            return rules.factor_mean(clusters, weights)
        return rules.nearest(clusters, weights, min(change.rank for change in clusters[0].values()))

    def weights(
        self, groups: Mapping[str, int], clusters: Sequence[Adapter], shown: Sequence[int], extras: Arrays
    ) -> dict[int, float]:
        """The share of each of these groups in what all are given; `extras` are those of the server."""
        from personae.aggregate.cluster import domain_distances, domain_weights, normalized_traces

        sizes = [list(groups.values()).count(number) for number in shown]
        centres = torch.stack([extras[f"{CENTRE}.{number}"] for number in shown])
        powers: Mapping[Literal["size", "distance", "trace"], float] = {
            "size": self.size_power,
            "distance": self.distance_power,
            "trace": self.trace_power,
        }
        traces = normalized_traces(clusters, self.weigh_trace)
        weights = domain_weights(sizes, domain_distances(centres), traces, powers=powers, sign=self.weigh_sign)
        return dict(zip(shown, weights, strict=True))

    # --- the client ----------------------------------------------------------------------------------------------

    def local(self, client: Client, got: State, kept: State) -> tuple[Update, State]:
        descriptor = kept.extras.get(DESCRIPTOR)
        if descriptor is None:
            descriptor = self._introduced(client, got.params)
        fitted = self._fit_adapter(client, self.training)
        params = client.model.params()
        sent = State(pick(params, is_lora), {DESCRIPTOR: descriptor})
        return client.update(sent, loss=fitted.loss), State(pick(params, is_word), {DESCRIPTOR: descriptor})

    def personalize(self, client: Client, got: State, kept: State) -> State:
        descriptor = kept.extras.get(DESCRIPTOR)
        if descriptor is None:
            descriptor = self._introduced(client, got.params)
        adapter = got.params
        if count := int(got.facts.get("clusters", 0)):
            near = [_cosine(descriptor, got.extras[f"{CENTRE}.{number}"]) for number in range(count)]
            adapter = _under(got.extras, f"{CLUSTER}.{near.index(max(near))}.")
        client.model.load({**pick(client.model.params(), is_word), **adapter})
        self._fit_adapter(client, self.adapt)
        return State(client.model.params())

    def _introduced(self, client: Client, adapter: Arrays) -> Tensor:
        """Describe the client by where its pictures pull its words, then learn these, both beside the bare base.

        Shapes: the descriptor is [descriptor_width], or as long as the gradients are where that is less.
        Raises: ConfigError, when no caption says a word.
        """
        model: Any = client.model
        nothing_yet = {name: torch.zeros_like(value) if name.endswith(B) else value for name, value in adapter.items()}
        model.load({**pick(model.params(), is_word), **nothing_yet})
        how = self.words
        apart = replace(client, rng=stream(client.rng.initial_seed(), "description"))  # words learn by the same draws
        pull = gradients(apart, is_word, batches=self.describing, batch_size=how.batch_size, levels=LEVELS)
        if not pull.norm() > 0:
            raise ConfigError(
                f"client {client.name!r}: none of its captions says a word of its own, so nothing describes it; put "
                "the recipe's new word into data.caption, or into the captions"
            )
        fit(client, is_word, how)
        model.load({**pick(model.params(), is_word), **adapter})
        return projected(pull.flatten(), self.descriptor_width)

    def _fit_adapter(self, client: Client, how: Training) -> Fitted:
        return fit(client, is_lora if self.inside != "common_A" else _is_B, how)


FACTORS: Mapping[str, Callable[[Sequence[Adapter], Sequence[float]], dict[str, LowRank]]] = {
    "factor_mean": rules.factor_mean,
    "common_A": rules.common_A,
    "corrected_mean": rules.corrected_mean,
    "factor_geometric_median": rules.factor_mean,
}
"""Rules that work on factors. The others do on products, and do not mind which factors stand for one."""


def projected(whole: Tensor, width: int) -> Tensor:
    """Where pictures pull words, in fewer numbers: along directions that everybody knows, of unit length.

    Shapes: `whole` is [D]; the result [width], or `whole` itself where D is not more.
    """
    if len(whole) <= width:
        return torch.as_tensor(whole)
    rows = torch.randn(len(whole), width, generator=stream(0, "projection of descriptors"))
    return normalize(torch.linalg.qr(rows)[0].T @ whole, dim=0)


def _ours(name: str) -> bool:
    return not is_word(name)


def _is_B(name: str) -> bool:
    return name.endswith(B)


def _clusters(server: State) -> list[Adapter]:
    return [read(_under(server.extras, f"{CLUSTER}.{number}.")) for number in range(int(server.facts["clusters"]))]


def _under(arrays: Arrays, front: str) -> dict[str, Tensor]:
    return {name.removeprefix(front): value for name, value in arrays.items() if name.startswith(front)}


def _front(front: str, arrays: Arrays) -> dict[str, Tensor]:
    return {front + name: value for name, value in arrays.items()}


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(cosine_similarity(one, other, dim=0))


def _orthonormal(rows: Tensor) -> Tensor:
    columns: Tensor = torch.linalg.qr(rows.T)[0]
    return columns.T.contiguous()
