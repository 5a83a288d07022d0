"""What the library relies on in any denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from personae.core import Arrays, Batch, Denoiser, Select, nothing, stream
from personae.errors import MismatchedNames, ShapeError
from personae.personal.embedding import EMBEDDING, NULL_EMBEDDING
from personae.testing.contract import differing, require, same_bits, some

Make = Callable[[], Denoiser]


def check_denoiser(make: Make, batch: Batch, *, idle: Select = nothing) -> None:
    """Ask of a denoiser everything that the library relies on:

    - `params`, `live`, `initial` and `load` speak of the same names, and `base` of none of them;
    - `initial` depends on its generator alone, changes nothing, and honours `only`;
    - `params` are copies, `live` are the parameters themselves, and `load` copies what it is given;
    - `load` is absolute: X, then Y, equals Y on a fresh model;
    - `load` refuses other names and shapes before anything has changed;
    - `forward` keeps the shape, and gives the same bits twice;
    - a gradient reaches every live parameter that `idle` does not name, and is not zero for the client's vector;
    - without condition, the client's vector does not matter, where there is a null vector; with it, it does;
    - with several clients loaded, every example gets what its own client's would get alone.

    `make` makes a fresh denoiser, the same one each time; `batch` has at least two examples that fit it.

    Raises: ContractBroken, at the first contract that does not hold.
    """
    for contract in CONTRACTS:
        contract(make, batch)
    gradients_reach_the_parameters(make, batch, idle)


def names_agree(make: Make, batch: Batch) -> None:
    model = make()
    names = {
        "params()": set(model.params()),
        "live()": set(model.live()),
        "initial()": set(model.initial(stream(1, "names"))),
    }
    for what, found in names.items():
        odd = sorted(found ^ names["params()"])
        require(not odd, "params(), live() and initial() speak of the same names", f"{what} differs in {some(odd)}")
    both = sorted(set(model.base()) & names["params()"])
    require(not both, "base() is the frozen rest", f"{some(both)} may move as well")


def initial_is_drawn_from_its_generator(make: Make, batch: Batch) -> None:
    fresh, used = make(), make()
    used.load(_values(used, "used"))
    before = used.params()
    first = fresh.initial(stream(1, "initial"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        second = used.initial(stream(1, "initial"))
    odd = differing(first, second)
    require(
        not odd,
        "initial() depends on its generator alone",
        f"{some(odd)} differ on a model that was used before, or under another global seed",
    )
    changed = differing(before, used.params())
    require(not changed, "initial() changes nothing", f"the model changed in {some(changed)}")
    for wanted in first:
        got = sorted(fresh.initial(stream(1, "initial"), wanted.__eq__))
        require(got == [wanted], "initial() honours `only`", f"asked for {wanted}, it gave {some(got) or 'nothing'}")


def parameters_are_copied(make: Make, batch: Batch) -> None:
    model = make()
    model.load(_values(model, "copies"))
    taken, before = model.params(), {name: value.clone() for name, value in model.params().items()}
    for value in taken.values():
        value.add_(1)
    changed = differing(before, model.params())
    require(not changed, "params() are copies", f"writing to them changed the model in {some(changed)}")
    given = _values(model, "given")
    model.load(given)
    loaded = {name: value.clone() for name, value in model.params().items()}
    for value in given.values():
        value.add_(1)
    changed = differing(loaded, model.params())
    require(
        not changed, "load() copies what it is given", f"writing to it afterwards changed the model in {some(changed)}"
    )
    with torch.no_grad():
        for parameter in model.live().values():
            parameter.add_(1)
    still = sorted(loaded.keys() - set(differing(loaded, model.params())))
    require(not still, "live() are the parameters themselves", f"writing to them did not change {some(still)}")


def load_is_absolute(make: Make, batch: Batch) -> None:
    fresh, used = make(), make()
    base = {name: value.clone() for name, value in used.base().items()}
    first, second = _values(fresh, "first"), _values(fresh, "second")
    used.load(first)
    _forward(used, batch)
    used.load(second)
    fresh.load(second)
    odd = differing(fresh.params(), used.params())
    require(
        not odd,
        "load() is absolute: X, then Y, equals Y on a fresh model",
        f"{some(odd)} {'is' if len(odd) == 1 else 'are'} not as on a fresh one: something of X was left",
    )
    odd = differing(second, used.params())
    require(not odd, "load() is absolute", f"after it, {some(odd)} is not what was loaded")
    require(
        same_bits(_forward(fresh, batch), _forward(used, batch)),
        "load() is absolute: X, then Y, equals Y on a fresh model",
        "the parameters agree, the predictions do not: something outside params() was left",
    )
    odd = differing(base, used.base())
    require(not odd, "load() leaves base() alone", f"{some(odd)} changed")


def load_refuses_what_does_not_fit(make: Make, batch: Batch) -> None:
    model = make()
    model.load(_values(model, "before"))
    before, given = model.params(), _values(model, "refused")
    *_, last = given
    wide = given[last].new_zeros((*given[last].shape, 2))
    cases: Sequence[tuple[str, Arrays, type[Exception]]] = (
        ("without " + last, {name: value for name, value in given.items() if name != last}, MismatchedNames),
        ("with an unknown name", {**given, "no.such.name": torch.zeros(1)}, MismatchedNames),
        (f"with {last} as {list(wide.shape)}", {**given, last: wide}, ShapeError),
    )
    for what, params, expected in cases:
        found = "it was accepted"
        try:
            model.load(params)
        except expected:
            found = ""
        except Exception as error:
            found = f"{type(error).__name__} was raised: {error}"
        require(not found, f"load() {what} raises {expected.__name__}", found)
        changed = differing(before, model.params())
        require(not changed, "load() refuses before anything has changed", f"{what}, {some(changed)} was overwritten")


def forward_keeps_shape_and_bits(make: Make, batch: Batch) -> None:
    model = make()
    model.load(_values(model, "forward"))
    x_t, prediction = model.encode(batch.images), _forward(model, batch)
    require(
        prediction.shape == x_t.shape,
        "forward() keeps the shape of x_t",
        f"from {list(x_t.shape)} it made {list(prediction.shape)}",
    )
    require(
        tuple(x_t.shape[1:]) == tuple(model.sample_shape),
        "sample_shape is the shape of one x_0",
        f"it says {list(model.sample_shape)}, encode() made {list(x_t.shape[1:])}",
    )
    require(
        same_bits(prediction, _forward(model, batch)), "forward() gives the same bits twice", "the second call differs"
    )


def the_null_vector_stands_in(make: Make, batch: Batch) -> None:
    model = make()
    values = _values(model, "null")
    if EMBEDDING not in values or NULL_EMBEDDING not in values:
        return
    own = values[EMBEDDING]
    other = {**values, EMBEDDING: own + 1 + torch.arange(own.numel()).view_as(own)}
    for unconditional, contract in (
        (True, "without condition, the client's vector does not matter"),
        (False, "with condition, the client's vector matters"),
    ):
        asked = replace(batch, unconditional=torch.full_like(batch.unconditional, unconditional))
        predictions = []
        for params in (values, other):
            model.load(params)
            predictions.append(_forward(model, asked))
        same = same_bits(*predictions)
        require(
            same == unconditional, contract, f"another {EMBEDDING} gives {'the same' if same else 'another'} prediction"
        )


def several_clients_stand_beside_each_other(make: Make, batch: Batch) -> None:
    model, num_clients = make(), 3
    values = _values(model, "several")
    if EMBEDDING not in values:
        return
    rows = values[EMBEDDING] + torch.arange(num_clients)[:, None]
    whose = torch.arange(len(batch), device=batch.unconditional.device) % num_clients
    asked = replace(batch, unconditional=torch.zeros_like(batch.unconditional))
    model.load({**values, EMBEDDING: rows}, num_clients)
    together = _forward(model, replace(asked, clients=whose))
    for client in range(num_clients):
        model.load({**values, EMBEDDING: rows[client : client + 1]})
        alone, own = _forward(model, asked), whose == client
        require(
            torch.allclose(together[own], alone[own], rtol=1e-3, atol=1e-4),
            "with several clients loaded, every example gets what its own client's would get alone",
            f"those of client {client + 1} of {num_clients} differ by {float((together - alone)[own].abs().max()):.1e}",
        )
    found = "it was accepted"
    try:
        model.load({**values, EMBEDDING: rows})
    except ShapeError:
        found = ""
    require(not found, f"load() takes several rows of {EMBEDDING} only when it is told their number", found)


def gradients_reach_the_parameters(make: Make, batch: Batch, idle: Select = nothing) -> None:
    """Every other example is without condition, so that both the client's vector and the null one take part."""
    model = make()
    model.load(_values(model, "gradients"))
    live = model.live()
    for parameter in live.values():
        parameter.requires_grad_(True)
    mixed = replace(batch, unconditional=torch.arange(len(batch), device=batch.unconditional.device) % 2 == 1)
    x_t = model.encode(mixed.images)
    model.forward(x_t, _times(model, len(x_t)), model.condition(mixed)).float().square().mean().backward()
    lost = sorted(name for name, parameter in live.items() if parameter.grad is None and not idle(name))
    require(not lost, "a gradient reaches every live parameter", f"none reached {some(lost)}")
    for name in (EMBEDDING, NULL_EMBEDDING):
        if name in live and not idle(name):
            gradient = live[name].grad
            require(
                gradient is not None and bool(gradient.any()),
                "the loss depends on the client's vector and the null one",
                f"the gradient of {name} is zero",
            )


CONTRACTS: Sequence[Callable[[Make, Batch], None]] = (
    names_agree,
    initial_is_drawn_from_its_generator,
    parameters_are_copied,
    load_refuses_what_does_not_fit,
    load_is_absolute,
    forward_keeps_shape_and_bits,
    the_null_vector_stands_in,
    several_clients_stand_beside_each_other,
)


def _values(model: Denoiser, key: str) -> dict[str, Tensor]:
    """Values like fresh ones, but different in every number for every key, zeros included."""
    rng = stream(2, key)
    fresh = model.initial(rng)
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=rng).to(value.dtype) for name, value in fresh.items()
    }


def _times(model: Denoiser, count: int) -> Tensor:
    return torch.linspace(0, model.schedule.num_timesteps - 1, count).long()


@torch.no_grad()
def _forward(model: Denoiser, batch: Batch) -> Tensor:
    model.train(False)
    x_t = model.encode(batch.images)
    return model.forward(x_t, _times(model, len(x_t)).to(x_t.device), model.condition(batch)).clone()
