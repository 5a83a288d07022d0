"""Adapters by style: averaged among clients of one kind, stacked across kinds, and words that never leave a client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from personae.aggregate import adapters as rules
from personae.aggregate.low_rank import A, Adapter, B, LowRank, read, recompressed, stacked, written
from personae.core import Arrays, Client, Facts, Select, State, Training, Update, Updates, pick, stream
from personae.errors import ConfigError
from personae.local.fit import Fitted, fit
from personae.personal.lora import is_lora
from personae.personal.tokens import is_word

Inside = Literal["nearest", "factor_mean", "common_A", "corrected_mean", "geometric_median", "multi_krum"]

DESCRIPTOR = "descriptor"
CLUSTER, CENTRE, REST, SEEN = "cluster", "centre", "rest", "seen"
"""Fronts of what the server keeps: "cluster.0.<layer>.lora_A", "centre.0", "rest.0.<layer>.lora_A", "seen.<client>"."""


@dataclass(frozen=True)
class ClusterLora:
    """Clients fine-tune adapters; the server groups clients of one style, combines inside a group, stacks the groups.

    Before its first round a client learns its own words by textual inversion, beside the bare base, and describes its
    captions by what these words bring into them. Words never leave it; adapters and the description do. A round then
    trains the adapters from the client's group's. In the end everyone trains the group's adapter for `adapt` more
    steps on its own images; who comes later learns words first, and takes the group that its description is nearest to.

    `inside` combines a group's adapters: "nearest", exact but for what a group's rank has no room for, which is carried
    to the next round; "factor_mean" (FedIT); "common_A" (FFA-LoRA: A of orthonormal rows, the same for all, never
    trains); "corrected_mean" (LoRA-FAIR); "geometric_median" and "multi_krum", against `attackers` of a group. With one
    group at most they are the federated baselines of those names.

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
    descriptor_width: int = 64
    weigh_sign: Literal["distinct", "conservative"] = "distinct"
    weigh_trace: Literal["a", "b", "c"] = "a"
    size_power: float = 0.5
    distance_power: float = 1.0
    trace_power: float = 1.0

    def __post_init__(self) -> None:
        if self.inside not in INSIDE:
            raise ConfigError(f"inside is {self.inside!r}; expected one of {', '.join(INSIDE)}")
        low = [
            f"{name} is {getattr(self, name)}"
            for name in ("most_clusters", "smallest_cluster", "descriptor_width")
            if getattr(self, name) < 1
        ]
        if low:
            raise ConfigError(f"{'; '.join(low)}, expected at least 1")

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
        number = server.facts.get(_of(client))
        return State(server.params if number is None else _under(server.extras, f"{CLUSTER}.{number}."))

    def aggregate(self, server: State, updates: Updates) -> State:
        arrived = list(updates)
        seen = {
            **_under(server.extras, f"{SEEN}."),
            **{update.client: update.sent.extras[DESCRIPTOR] for update in arrived},
        }
        before = {name: int(server.facts[_of(name)]) for name in seen if _of(name) in server.facts}
        groups = before if len(before) == len(seen) else self._grouped(seen)
        count = max(groups.values()) + 1
        inherits = _heirs(before, groups, count)
        clusters: list[Adapter] = []
        extras: dict[str, Tensor] = {f"{SEEN}.{name}": value for name, value in seen.items()}
        for number in range(count):
            members = [name for name in sorted(seen) if groups[name] == number]
            extras[f"{CENTRE}.{number}"] = torch.stack([seen[name] for name in members]).mean(0)
            own = [update for update in arrived if update.client in members]
            ancestor = inherits[number]
            start = server.params if ancestor is None else _under(server.extras, f"{CLUSTER}.{ancestor}.")
            carried = _under(server.extras, f"{REST}.{ancestor}.")
            combined, rest = self._inside(own, start, carried)
            clusters.append(combined)
            extras |= _front(f"{CLUSTER}.{number}.", written(combined)) | _front(f"{REST}.{number}.", rest)
        shares = self._shares([list(groups.values()).count(c) for c in range(count)], clusters, extras)
        ranks = {name: value.shape[0] for name, value in server.params.items() if name.endswith(A)}
        everyone = stacked(clusters, shares)
        shared = {layer: recompressed(change, ranks[layer + A]) for layer, change in everyone.items()}
        if self.inside == "common_A":  # their weighted mean, beside the same A
            shared = rules.common_A(clusters, shares)
        facts: Facts = {
            "round": int(server.facts["round"]) + 1,
            "clusters": count,
            **{_of(name): number for name, number in groups.items()},
            **{f"share {number}": share for number, share in enumerate(shares)},
        }
        return State(written(shared), extras, facts)

    def release(self, server: State) -> State:
        """All clusters' adapters and centres, and stacked, in their shares, the one for everybody."""
        count = int(server.facts["clusters"])
        if not count:
            return State(server.params)
        clusters = [read(_under(server.extras, f"{CLUSTER}.{number}.")) for number in range(count)]
        everyone = stacked(clusters, [float(server.facts[f"share {number}"]) for number in range(count)])
        extras = pick(server.extras, lambda name: name.startswith((f"{CLUSTER}.", f"{CENTRE}.")))
        return State(written(everyone), extras, {"clusters": count})

    def _grouped(self, seen: Arrays) -> dict[str, int]:
        from personae.aggregate.cluster import clustered, similarities  # slow to import

        names = sorted(seen)
        similar = similarities(torch.stack([seen[name] for name in names]))
        labels = clustered(similar, most=self.most_clusters, smallest=self.smallest_cluster)
        return dict(zip(names, labels, strict=True))

    def _inside(self, own: Sequence[Update], start: Arrays, carried: Arrays) -> tuple[Adapter, Arrays]:
        """A cluster's new adapter, and what its rank had no room for. Without updates it stays as it is."""
        if not own:
            return read(start), carried
        adapters = [read(update.sent.params) for update in own]
        shares = rules.shares_of([update.num_examples for update in own])
        rank = max(change.rank for change in read(start).values())
        if self.inside == "nearest":
            kept, rest = rules.nearest_with_rest(adapters, shares, rank, read(carried) if carried else None, rank)
            return kept, written(rest)
        return INSIDE[self.inside](adapters, shares, rank, self.attackers), {}

    def _shares(self, sizes: Sequence[int], clusters: Sequence[Adapter], extras: Arrays) -> list[float]:
        from personae.aggregate.cluster import domain_distances, domain_weights, normalized_traces

        centres = torch.stack([extras[f"{CENTRE}.{number}"] for number in range(len(clusters))])
        powers: Mapping[Literal["size", "distance", "trace"], float] = {
            "size": self.size_power,
            "distance": self.distance_power,
            "trace": self.trace_power,
        }
        traces = normalized_traces(clusters, self.weigh_trace)
        return domain_weights(sizes, domain_distances(centres), traces, powers=powers, sign=self.weigh_sign)

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
        """Learn the client's words beside the bare base, and describe its captions by them.

        Shapes: the descriptor is [descriptor_width], or as wide as a token's vector where that is less.
        """
        model: Any = client.model
        nothing_yet = {name: torch.zeros_like(value) if name.endswith(B) else value for name, value in adapter.items()}
        model.load({**pick(model.params(), is_word), **nothing_yet})
        fit(client, is_word, self.words)
        whole = model.describe(client.data.train.captions)
        model.load({**pick(model.params(), is_word), **adapter})
        if len(whole) <= self.descriptor_width:
            return torch.as_tensor(whole)
        rows = torch.randn(len(whole), self.descriptor_width, generator=stream(0, "projection of descriptors"))
        return torch.nn.functional.normalize(torch.linalg.qr(rows)[0].T @ whole, dim=0)

    def _fit_adapter(self, client: Client, how: Training) -> Fitted:
        trains = is_lora if self.inside != "common_A" else (lambda name: name.endswith(B))
        return fit(replace(client), trains, how)


INSIDE: Mapping[str, Callable[[Sequence[Adapter], Sequence[float], int, int], dict[str, LowRank]]] = {
    "nearest": lambda adapters, shares, rank, attackers: rules.nearest(adapters, shares, rank),
    "factor_mean": lambda adapters, shares, rank, attackers: rules.factor_mean(adapters, shares),
    "common_A": lambda adapters, shares, rank, attackers: rules.common_A(adapters, shares),
    "corrected_mean": lambda adapters, shares, rank, attackers: rules.corrected_mean(adapters, shares),
    "geometric_median": lambda adapters, shares, rank, attackers: rules.nearest(
        adapters, rules.geometric_median_weights(adapters), rank
    ),
    "multi_krum": lambda adapters, shares, rank, attackers: rules.nearest(
        adapters, rules.multi_krum_weights(adapters, attackers), rank
    ),
}
"""How a cluster's adapters become one, by the name that a recipe uses."""


def _ours(name: str) -> bool:
    return not is_word(name)


def _of(client: str) -> str:
    return f"cluster of {client}"


def _under(arrays: Arrays, front: str) -> dict[str, Tensor]:
    return {name.removeprefix(front): value for name, value in arrays.items() if name.startswith(front)}


def _front(front: str, arrays: Arrays) -> dict[str, Tensor]:
    return {front + name: value for name, value in arrays.items()}


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def _orthonormal(rows: Tensor) -> Tensor:
    columns: Tensor = torch.linalg.qr(rows.T)[0]
    return columns.T.contiguous()


def _heirs(before: Mapping[str, int], groups: Mapping[str, int], count: int) -> list[int | None]:
    """Of each cluster the one that most of its members come from; None where all of them are new."""
    found: list[int | None] = []
    for number in range(count):
        came = [before[name] for name in sorted(groups) if groups[name] == number and name in before]
        found.append(max(sorted(set(came)), key=came.count) if came else None)
    return found
