"""Who holds which images: partitions of a data set into clients, and a client's split into train and held-out.

Every partition is a list with one sorted tensor of indices per client; no index is in two of them, and equal
states of `rng` give equal partitions.

Letters in shapes: `N` images, `A` attributes; `_` differs from client to client.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from personae.core import ClientData, Images
from personae.errors import ConfigError, DataError

MAX_TRIES = 100


def iid(n: int, num_clients: int, rng: torch.Generator) -> list[Int64[Tensor, " _"]]:
    """Deal `n` images evenly and at random; every image has a holder.

    Raises: ConfigError, when `num_clients` is not 1 to n.
    """
    _check_num_clients(num_clients, n)
    return _sorted(torch.randperm(n, generator=rng).tensor_split(num_clients))


def by_label(
    labels: Int64[Tensor, " N"], num_clients: int, classes_per_client: int, rng: torch.Generator
) -> list[Int64[Tensor, " _"]]:
    """Give every client `classes_per_client` classes, and each class in equal parts to the clients that hold it.

    Classes have equally many holders, give or take one. Classes without a holder are left out: there are some only
    when num_clients * classes_per_client is below the number of classes. Every other image has a holder.

    Raises: ConfigError, when a count is out of range, or a class has fewer images than holders.
    Source: McMahan et al. 2017 (arXiv:1602.05629). Departure: classes are dealt, not shards of the sorted images.
    """
    _check_num_clients(num_clients, len(labels))
    classes = labels.unique().tolist()
    if not 1 <= classes_per_client <= len(classes):
        raise ConfigError(
            f"classes_per_client is {classes_per_client}, expected 1 to {len(classes)}, the number of classes"
        )
    holders: dict[int, list[int]] = {label: [] for label in classes}
    for client in range(num_clients):  # the classes with the fewest holders, ties at random
        order = [classes[i] for i in torch.randperm(len(classes), generator=rng).tolist()]
        for label in sorted(order, key=lambda label: len(holders[label]))[:classes_per_client]:
            holders[label].append(client)
    return _dealt(labels, holders, num_clients, rng)


def by_attribute(attributes: Int64[Tensor, "N A"], num_clients: int, rng: torch.Generator) -> list[Int64[Tensor, " _"]]:
    """Give every client images of one combination of attributes, in about equal numbers.

    The clients go to the combinations like seats to parties (D'Hondt's rule), so a frequent combination is divided
    among several clients, and one that is too rare for a client of its own is left out. All images of a combination
    that has a holder have a holder. Select columns first to part the clients by some attributes only.

    Raises: ConfigError, when `num_clients` is not 1 to N.
    """
    _check_num_clients(num_clients, len(attributes))
    combination = attributes.unique(dim=0, return_inverse=True)[1]
    sizes = combination.bincount().tolist()
    holders: dict[int, list[int]] = {number: [] for number in range(len(sizes))}
    for client in torch.randperm(num_clients, generator=rng).tolist():
        max(holders.items(), key=lambda item: sizes[item[0]] / (len(item[1]) + 1))[1].append(client)
    return _dealt(combination, holders, num_clients, rng)


def dirichlet(
    labels: Int64[Tensor, " N"], num_clients: int, alpha: float, rng: torch.Generator, min_images: int
) -> list[Int64[Tensor, " _"]]:
    """Divide every class among all clients in proportions drawn from a symmetric Dirichlet distribution.

    Small `alpha` gives each client few classes and unequal numbers of images, large `alpha` equal clients. All
    proportions are drawn again, up to MAX_TRIES times, until every client has `min_images`. Every image has a holder.

    Raises: ConfigError, when an argument is out of range, or no draw was good enough.
    Source: Yurochkin et al. 2019 (arXiv:1905.12022).
    """
    _check_num_clients(num_clients, len(labels))
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ConfigError(f"alpha is {alpha}, expected above 0 and finite")
    if not 0 <= min_images * num_clients <= len(labels):
        raise ConfigError(
            f"min_images is {min_images}, expected 0 to {len(labels) // num_clients}: "
            f"{num_clients} clients share {len(labels)} images"
        )
    draw = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=rng)))  # torch's gamma takes no generator
    classes = [_shuffled(labels, label, rng) for label in labels.unique().tolist()]
    for _ in range(MAX_TRIES):
        shares = draw.dirichlet([alpha] * num_clients, len(classes))
        cuts = [np.rint(np.cumsum(share)[:-1] * len(index)) for share, index in zip(shares, classes, strict=True)]
        parts = [index.tensor_split(cut.astype(int).tolist()) for index, cut in zip(classes, cuts, strict=True)]
        clients = [torch.cat(client) for client in zip(*parts, strict=True)]
        if min(len(client) for client in clients) >= min_images:
            return _sorted(clients)
    raise ConfigError(
        f"alpha {alpha} left a client with fewer than {min_images} images in each of {MAX_TRIES} draws: "
        f"raise alpha, lower min_images, or take fewer than {num_clients} clients"
    )


def unseen(
    labels: Int64[Tensor, " N"],
    num_clients: int,
    num_new: int,
    rng: torch.Generator,
    *,
    images_per_client: int,
    images_per_new: int,
    classes_per_client: int | None = None,
    alpha: float | None = None,
) -> list[Int64[Tensor, " _"]]:
    """Training clients, then `num_new` of three kinds in turn, by what their mix of classes is to those that train.

    A training client has `classes_per_client` classes in equal parts, or shares from a symmetric Dirichlet distribution
    with concentration `alpha`, never of the last class. New clients: the mix of a training client ("seen"), half and
    half the mixes of two ("mixed"), the last class alone ("absent"). New clients of the first two kinds take turns
    with different training clients, in random order. Images that are left over have no holder.

    Raises: ConfigError, when arguments are out of range, or a class has too few images.
    """
    num_train = num_clients - num_new
    classes = labels.unique().tolist()
    present = len(classes) - 1
    if not (num_train >= 1 and num_new >= 0 and min(images_per_client, images_per_new) >= 2):
        raise ConfigError(
            f"{num_clients} clients of which {num_new} are new, with {images_per_client} and {images_per_new} images: "
            "expected at least one that trains, and at least 2 images each"
        )
    if (classes_per_client is None) == (alpha is None):
        raise ConfigError("partition 'unseen' needs exactly one of classes_per_client and alpha")
    if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
        raise ConfigError(f"alpha is {alpha}, expected above 0 and finite")
    draw = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=rng)))  # torch's gamma takes no generator
    for left in range(1 if alpha is None else MAX_TRIES, 0, -1):
        if alpha is None:
            shares = _few_classes(present, num_train, int(classes_per_client or 0), rng)
        else:
            shares = torch.from_numpy(draw.dirichlet([alpha] * present, num_train))
        nobody = torch.zeros(num_train, 1, dtype=torch.float64)
        train = [whole_counts(mix, images_per_client) for mix in torch.cat([shares, nobody], 1)]
        new = [whole_counts(mix, images_per_new) for mix in _new_mixes(shares, num_new, rng)]
        try:
            return _dealt_counts(labels, classes, [*train, *new], rng)
        except ConfigError:
            if left == 1:
                raise
    raise AssertionError("the last try returns or raises")


KINDS = ("seen", "mixed", "absent")
"""Of new clients, by what their mix of classes is to those that train."""


def _new_mixes(shares: Tensor, num_new: int, rng: torch.Generator) -> list[Tensor]:
    """Shares of all classes for new clients, whose kinds take turns.

    So do their parents, in random order; one with the mix of an earlier parent has its turn after all other mixes.
    """
    order, times = torch.randperm(len(shares), generator=rng).tolist(), dict[tuple[float, ...], int]()
    ranked = []
    for parent in order:
        mix_of = tuple(shares[parent].tolist())
        ranked.append((times.setdefault(mix_of, 0), parent))
        times[mix_of] += 1
    turn = iter([parent for _, parent in sorted(ranked, key=lambda pair: pair[0])] * 2 * (num_new + 1))
    mixes = []
    for number in range(num_new):
        mix = torch.zeros(shares.shape[1] + 1, dtype=torch.float64)
        kind = KINDS[number % len(KINDS)]
        if kind == "absent":
            mix[-1] = 1.0
        else:
            mix[:-1] = shares[[next(turn) for _ in range(1 if kind == "seen" else 2)]].mean(0)
        mixes.append(mix)
    return mixes


def _few_classes(present: int, num_train: int, per_client: int, rng: torch.Generator) -> Tensor:
    """Shares [num_train, present]: the classes with the fewest holders first, ties at random."""
    if not 1 <= per_client <= present:
        raise ConfigError(f"classes_per_client is {per_client}, expected 1 to {present}, the classes but the last")
    shares = torch.zeros(num_train, present, dtype=torch.float64)
    for client in range(num_train):
        order = torch.randperm(present, generator=rng).tolist()
        fewest = sorted(order, key=lambda label: int((shares[:, label] > 0).sum()))[:per_client]
        shares[client, fewest] = 1 / per_client
    return shares


def fixed_new(
    labels: Int64[Tensor, " N"],
    num_clients: int,
    num_new: int,
    rng: torch.Generator,
    *,
    images_per_new: int,
    alpha: float,
    classes_per_client: int,
) -> list[Int64[Tensor, " _"]]:
    """Training clients, then `num_new` that are the same whoever trains: they are dealt first.

    A new client's classes have shares from a symmetric Dirichlet distribution with concentration `alpha`. All that is
    left goes to the training clients as `by_label` deals it, so that neither their number nor their classes change how
    many images of each class are trained on.

    Raises: ConfigError, when arguments are out of range, or a class has too few images.
    """
    if num_new < 0 or images_per_new < 2 or not (alpha > 0 and math.isfinite(alpha)):
        raise ConfigError(
            f"num_new is {num_new}, images_per_new {images_per_new}, alpha {alpha}: expected at least 0, at least 2, "
            "and above 0"
        )
    classes = labels.unique().tolist()
    draw = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=rng)))  # torch's gamma takes no generator
    shares = torch.from_numpy(draw.dirichlet([alpha] * len(classes), num_new))
    new = _dealt_counts(labels, classes, [whole_counts(mix, images_per_new) for mix in shares], rng)
    left = torch.ones(len(labels), dtype=torch.bool)
    for part in new:
        left[part] = False
    rest = left.nonzero()[:, 0]
    if len(labels[rest].unique()) < len(classes):
        raise ConfigError(f"the {num_new} new clients leave no image of some class: give them fewer images")
    return [*(rest[part] for part in by_label(labels[rest], num_clients - num_new, classes_per_client, rng)), *new]


def whole_counts(shares: Tensor, total: int) -> Tensor:
    """Whole numbers that add up to `total`, nearest to the shares: the largest remainders are rounded up."""
    exact = shares * total
    counts = exact.floor().long()
    counts[(exact - counts).argsort(descending=True, stable=True)[: total - int(counts.sum())]] += 1
    return counts


def _dealt_counts(labels: Tensor, classes: list[int], wanted: list[Tensor], rng: torch.Generator) -> list[Tensor]:
    clients: list[list[Tensor]] = [[] for _ in wanted]
    for column, label in enumerate(classes):
        index, sizes = _shuffled(labels, label, rng), [int(counts[column]) for counts in wanted]
        if sum(sizes) > len(index):
            raise ConfigError(
                f"class {label} has {len(index)} images, and {sum(sizes)} are asked for: take fewer clients or fewer "
                "images for each, or a larger alpha"
            )
        for client, part in zip(clients, index[: sum(sizes)].split(sizes), strict=True):
            client.append(part)
    return _sorted([torch.cat(parts) for parts in clients])


def split(images: Images, heldout: float, rng: torch.Generator) -> ClientData:
    """Set a random share of one client's images aside, at least one, and leave at least one to train on.

    Units: `heldout` a share between 0 and 1; the number is rounded.
    Raises: ConfigError, when `heldout` is not between 0 and 1; DataError, when there are fewer than two images.
    """
    if not 0 < heldout < 1:
        raise ConfigError(f"heldout is {heldout}, expected a share between 0 and 1, such as 0.2")
    if len(images) < 2:
        raise DataError(
            f"a client has {len(images)} images, expected at least 2, one to train on and one held out: "
            "add images or leave the client out"
        )
    num_heldout = min(max(round(len(images) * heldout), 1), len(images) - 1)
    chosen, rest = torch.randperm(len(images), generator=rng).tensor_split([num_heldout])
    return ClientData(images[rest.sort().values], images[chosen.sort().values])


def _dealt(labels: Tensor, holders: dict[int, list[int]], num_clients: int, rng: torch.Generator) -> list[Tensor]:
    """Each class in equal parts, at random, to its holders."""
    clients: list[list[Tensor]] = [[] for _ in range(num_clients)]
    for label, names in holders.items():
        index = _shuffled(labels, label, rng)
        if len(index) < len(names):
            raise ConfigError(
                f"class {label} has {len(index)} images for {len(names)} clients that hold it: "
                "take fewer clients or fewer classes per client"
            )
        for client, part in zip(names, index.tensor_split(max(len(names), 1)), strict=False):
            clients[client].append(part)
    return _sorted([torch.cat(parts) for parts in clients])


def _shuffled(labels: Tensor, label: int, rng: torch.Generator) -> Tensor:
    index = (labels == label).nonzero()[:, 0]
    return index[torch.randperm(len(index), generator=rng)]


def _sorted(parts: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    return [part.sort().values for part in parts]


def _check_num_clients(num_clients: int, num_images: int) -> None:
    if not 1 <= num_clients <= num_images:
        raise ConfigError(f"num_clients is {num_clients}, expected 1 to {num_images}, the number of images")
