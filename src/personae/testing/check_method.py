"""What the library relies on in any federated method."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from personae.aggregate.mean import mean
from personae.artefact.save import load_state, save_state
from personae.core import Arrays, Method, Round, Run, State, Update, divide, pick, stream
from personae.engine.in_process import InProcess
from personae.engine.population import Population
from personae.engine.rounds import Arriving, load_parts
from personae.engine.together import personalize_many
from personae.errors import ConfigError
from personae.personal.embedding import is_per_client
from personae.testing.contract import (
    ContractBroken,
    cloned,
    differing,
    differing_states,
    differing_updates,
    holds_no_picture,
    require,
    some,
)
from personae.testing.tiny import tiny_job, tiny_population

SEED = 11


def check_method(method: Method, population: Population | None = None, *, alone: bool = False) -> None:
    """Ask of a method, on a tiny federation, everything that the library relies on:

    - nothing personal is sent: neither by name, nor its values under another name, nor a picture;
    - a client gets the same bits whoever worked in the model before it;
    - `aggregate` leaves its arguments alone, remembers nothing, and ignores the order of the updates;
    - `local` leaves its arguments alone and remembers nothing;
    - every state survives being written and read;
    - `personalize` sends nothing, changes nothing, and returns what a model can be loaded with;
    - newcomers who personalize in one batch get what each would get alone, where the personal part is per client; of
      other methods this is refused;
    - the same seed gives the same bits;
    - a run that is stopped and resumed ends in the bits of one that was not;
    - with `alone`: one client alone trains as if there were no server. Ask it of methods that say so.

    `population` is `tiny_population()` unless given; it needs two training clients and a new one.

    Raises: ContractBroken, at the first contract that does not hold.
    """
    population = population or tiny_population()
    for contract in CONTRACTS:
        contract(method, population)
    if alone:
        alone_is_local_training(method, population)


# --- the contracts. Each works on copies of the method, so that what one copy remembers cannot hide in the next ------


def nothing_personal_is_sent(method: Method, population: Population) -> None:
    """Looks at the first round, and at the second with every personal number replaced by one unlike any other."""
    method = deepcopy(method)
    server, kept = method.init(population.initial(SEED)), dict[str, State]()
    for number in (1, 2):
        updates = []
        for name in sorted(population.train):
            before = _poisoned(kept.get(name, State()), method, name)
            got, client = method.broadcast(server, name), population.client(name, number, SEED)
            load_parts(client, got.params, before.params, SEED)
            owned: list[Arrays] = [pick(client.model.params(), method.personal)]
            update, kept[name] = method.local(client, got, before)
            owned += [pick(client.model.params(), method.personal), _personal_tensors(kept[name], method)]
            _refuse_leaks(method, update, owned)
            holds_no_picture(update.sent, client.data.train, client.model, f"what {name!r} sends")
            updates.append(update)
        server = method.aggregate(server, Arriving(iter(updates), mean))


def others_leave_nothing_behind(method: Method, population: Population) -> None:
    first, second = sorted(population.train)[:2]
    server, kept = _after_one_round(deepcopy(method), population)
    for number, states in ((1, dict[str, State]()), (2, kept)):
        lonely, later = deepcopy(method), deepcopy(method)
        alone = _local(lonely, population, server, states, second, number)
        _local(later, population, server, states, first, number)
        after = _local(later, population, server, states, second, number)
        names = differing_updates(alone[0], after[0]) + differing_states(alone[1], after[1])
        require(
            not names,
            "a client gets the same bits whoever worked before it",
            f"after client {first!r}, {second!r} differs in {some(names)}: something of {first!r} was left over",
        )
    for newcomer in population.new:
        lonely, later = deepcopy(method), deepcopy(method)
        by_itself = _personalize(lonely, population, server, State(), newcomer)
        _personalize(later, population, server, kept[first], first)
        names = differing_states(by_itself, _personalize(later, population, server, State(), newcomer))
        require(
            not names,
            "a client gets the same bits whoever worked before it",
            f"after client {first!r} personalized, {newcomer!r} differs in {some(names)}",
        )


def aggregate_leaves_its_arguments_alone(method: Method, population: Population) -> None:
    method = deepcopy(method)
    server, updates = _a_round(method, population)
    server_before, sent_before = cloned(server), [cloned(update.sent) for update in updates]
    method.aggregate(server, Arriving(iter(updates), mean))
    names = differing_states(server_before, server)
    require(not names, "`aggregate` leaves its arguments alone", f"the server's state changed in {some(names)}")
    for before, update in zip(sent_before, updates, strict=True):
        names = differing_states(before, update.sent)
        require(
            not names,
            "`aggregate` leaves its arguments alone",
            f"the update of {update.client!r} changed in {some(names)}",
        )


def aggregate_remembers_nothing(method: Method, population: Population) -> None:
    method = deepcopy(method)
    server, updates = _a_round(method, population)
    first = method.aggregate(server, Arriving(iter(updates), mean))
    names = differing_states(first, method.aggregate(server, Arriving(iter(updates), mean)))
    require(
        not names,
        "`aggregate` remembers nothing: the same arguments give the same bits",
        f"the second call differs in {some(names)}; what must outlive a round belongs in the server's State",
    )


def aggregate_ignores_arrival_order(method: Method, population: Population) -> None:
    server, updates = _a_round(deepcopy(method), population)
    orders = (updates, updates[::-1])
    sorted_, reversed_ = (deepcopy(method).aggregate(server, Arriving(iter(order), mean)) for order in orders)
    require(
        _near(sorted_.params, reversed_.params)
        and _near(sorted_.extras, reversed_.extras)
        and dict(sorted_.facts) == dict(reversed_.facts),
        "`aggregate` ignores the order in which updates arrive",
        f"reversed, the server differs in {some(differing_states(sorted_, reversed_))} by more than rounding",
    )


def local_is_a_function(method: Method, population: Population) -> None:
    method = deepcopy(method)
    server, kept = _after_one_round(method, population)
    name = min(population.train)
    got_before, kept_before = cloned(method.broadcast(server, name)), cloned(kept[name])
    first = _local(method, population, server, kept, name, 2)
    names = differing_states(got_before, method.broadcast(server, name)) + differing_states(kept_before, kept[name])
    require(
        not names, "`local` leaves its arguments alone", f"what client {name!r} got or kept changed in {some(names)}"
    )
    second = _local(method, population, server, kept, name, 2)
    names = differing_updates(first[0], second[0]) + differing_states(first[1], second[1])
    require(
        not names,
        "`local` remembers nothing: the same client in the same state gives the same bits",
        f"the second call differs in {some(names)}; what must outlive a round belongs in the State that it returns",
    )


def states_survive_files(method: Method, population: Population) -> None:
    method = deepcopy(method)
    server, kept = _after_one_round(method, population)
    name = min(population.train)
    states = {
        "the server's state": server,
        "what is broadcast": method.broadcast(server, name),
        "what a client keeps": kept[name],
        "what is released": method.release(server),
        "what a client samples with": _personalize(method, population, server, kept[name], name),
    }
    with tempfile.TemporaryDirectory() as folder:
        for what, state in states.items():
            save_state(Path(folder) / "state.safetensors", state)
            names = differing_states(state, load_state(Path(folder) / "state.safetensors"))
            require(not names, "every state survives being written and read", f"{what} changed in {some(names)}")


def personalize_only_returns(method: Method, population: Population) -> None:
    method = deepcopy(method)
    server, kept = _after_one_round(method, population)
    names = population.initial(SEED).keys()
    for name in (*sorted(population.train), *population.new):
        released, own = method.release(server), kept.get(name, State())
        released_before, own_before = cloned(released), cloned(own)
        client = population.client(name, "personalize", SEED)
        load_parts(client, released.params, own.params, SEED)
        personal = method.personalize(client, released, own)
        require(
            isinstance(personal, State),
            "`personalize` sends nothing: it returns one State",
            f"for {name!r} it returned a {type(personal).__name__}",
        )
        changed = differing_states(released_before, released) + differing_states(own_before, own)
        require(not changed, "`personalize` leaves its arguments alone", f"for {name!r} it changed {some(changed)}")
        lost = sorted(names - personal.params.keys() - released.params.keys())
        require(
            not lost,
            "what was released and what is personal make a whole model",
            f"for {name!r}, neither has {some(lost)}",
        )
        try:
            client.model.load({**released.params, **personal.params})
        except Exception as error:
            raise ContractBroken(
                f"what `personalize` returns can be loaded; for {name!r} it cannot: {error}"
            ) from error


def newcomers_together_are_each_as_alone(method: Method, population: Population) -> None:
    method = deepcopy(method)
    server, _ = _after_one_round(method, population)
    names = sorted((*population.train, *population.new))
    contract = "newcomers who personalize in one batch get what each would get alone"
    try:
        together = personalize_many(tiny_job(method, population, seed=SEED), method.release(server), names)
    except ConfigError:
        own = sorted(pick(population.model.live(), method.personal))
        require(not own or not all(map(is_per_client, own)), contract, f"{some(own)} is per client, and it was refused")
        return
    for name in names:
        alone = _personalize(method, population, server, State(), name)
        near = _near(together[name].params, alone.params, 1e-3) and together[name].facts == alone.facts
        require(near, contract, f"{name!r} differs in {some(differing_states(alone, together[name]))}")


def same_seed_same_bits(method: Method, population: Population) -> None:
    runs = [InProcess().run(tiny_job(deepcopy(method), population, seed=SEED)) for _ in range(2)]
    names = _differing_runs(*runs)
    require(not names, "the same seed gives the same bits", f"a second run differs in {some(names)}")


def stop_and_resume_changes_nothing(method: Method, population: Population) -> None:
    """Stopped when one client of the second round has finished, so that a part of that round lies in the folder."""

    class Stop(Exception): ...

    def stop(round: Round) -> None:
        if round.round == 2:
            raise Stop

    whole = InProcess().run(tiny_job(deepcopy(method), population, rounds=3, seed=SEED))
    with tempfile.TemporaryDirectory() as folder:
        job = tiny_job(deepcopy(method), population, rounds=3, seed=SEED, folder=Path(folder) / "run")
        try:
            InProcess().run(job, watch=stop)
        except Stop:
            resumed = InProcess().run(replace(job, method=deepcopy(method)), resume=True)
        names = _differing_runs(whole, resumed)
    require(
        not names,
        "stopping and resuming changes nothing",
        f"the resumed run differs in {some(names)}; "
        "what outlives a round belongs in a State, and every draw comes from the client's generator",
    )


def alone_is_local_training(method: Method, population: Population) -> None:
    method, name = deepcopy(method), min(population.train)
    server, kept = method.init(population.initial(SEED)), dict[str, State]()
    for number in (1, 2):
        update, kept[name] = _local(method, population, server, kept, name, number)
        trained = population.model.params()
        server = method.aggregate(server, Arriving(iter([update]), mean))
        names = differing({**method.broadcast(server, name).params, **kept[name].params}, trained)
        require(
            not names,
            "one client alone trains as if there were no server",
            f"round {number + 1} would not start where round {number} ended, in {some(names)}",
        )


CONTRACTS: Sequence[Callable[[Method, Population], None]] = (
    nothing_personal_is_sent,
    others_leave_nothing_behind,
    aggregate_leaves_its_arguments_alone,
    aggregate_remembers_nothing,
    aggregate_ignores_arrival_order,
    local_is_a_function,
    states_survive_files,
    personalize_only_returns,
    newcomers_together_are_each_as_alone,
    same_seed_same_bits,
    stop_and_resume_changes_nothing,
)
"""From the narrow to the wide, so that a fault is met where it can be named."""


# --- one step at a time, as an engine does it ------------------------------------------------------------------------


def _local(
    method: Method, population: Population, server: State, kept: dict[str, State], name: str, number: int
) -> tuple[Update, State]:
    got, own, client = method.broadcast(server, name), kept.get(name, State()), population.client(name, number, SEED)
    load_parts(client, got.params, own.params, SEED)
    return method.local(client, got, own)


def _personalize(method: Method, population: Population, server: State, own: State, name: str) -> State:
    released, client = method.release(server), population.client(name, "personalize", SEED)
    load_parts(client, released.params, own.params, SEED)
    return method.personalize(client, released, own)


def _after_one_round(method: Method, population: Population) -> tuple[State, dict[str, State]]:
    """The server's state, and every client's."""
    server, kept, updates = method.init(population.initial(SEED)), dict[str, State](), []
    for name in sorted(population.train):
        update, kept[name] = _local(method, population, server, {}, name, 1)
        updates.append(update)
    return method.aggregate(server, Arriving(iter(updates), mean)), kept


def _a_round(method: Method, population: Population) -> tuple[State, list[Update]]:
    """What `aggregate` is given in the second round."""
    server, kept = _after_one_round(method, population)
    return server, [_local(method, population, server, kept, name, 2)[0] for name in sorted(population.train)]


# --- looking at what was sent ----------------------------------------------------------------------------------------


def _poisoned(kept: State, method: Method, name: str) -> State:
    """What is kept, with fresh numbers in every personal tensor."""
    rng = stream(SEED, "poison", name)
    shared, own = divide(kept.params, method.personal)
    poison = {n: torch.randn(v.shape, generator=rng).to(v.dtype) for n, v in own.items()}
    return replace(kept, params={**shared, **poison})


def _personal_tensors(kept: State, method: Method) -> Arrays:
    """Personal parameters, and extras about them, as "moments.exp_avg.embedding.weight" is about "embedding.weight"."""
    own = pick(kept.params, method.personal)
    return {**own, **pick(kept.extras, lambda name: name.endswith(tuple(own)))}


def _refuse_leaks(method: Method, update: Update, owned: Sequence[Arrays]) -> None:
    tensors = {**update.sent.params, **{f"extras/{name}": value for name, value in update.sent.extras.items()}}
    by_name = sorted(name for name in tensors if method.personal(name.removeprefix("extras/")))
    require(
        not by_name,
        "nothing personal is sent",
        f"client {update.client!r} sent {some(by_name)}, which `personal` claims",
    )
    scalars = [float(v) for v in (*update.sent.facts.values(), *update.metrics.values()) if isinstance(v, int | float)]
    told = torch.tensor(scalars, dtype=torch.float64)
    for arrays in owned:
        for name, value in arrays.items():
            numbers = _telling(value)
            # A single number, or the same one throughout, may coincide by chance.
            if len(numbers) < 2:
                continue
            for carrier, sent in tensors.items():
                require(
                    not torch.isin(numbers, sent.detach().double()).all(),
                    "nothing personal is sent",
                    f"client {update.client!r} sent the values of {name} under the name {carrier}",
                )
            require(
                not torch.isin(numbers, told).any(),
                "nothing personal is sent",
                f"client {update.client!r} sent values of {name} among its facts or metrics",
            )


def _telling(value: Tensor) -> Tensor:
    """The different numbers in a tensor, without those that stand in any tensor."""
    numbers = value.detach().double().unique()
    return numbers[(numbers != 0) & (numbers != 1)]


def _near(left: Arrays, right: Arrays, within: float = 1e-6) -> bool:
    return left.keys() == right.keys() and all(
        torch.allclose(left[name].double(), right[name].double(), rtol=within, atol=within) for name in left
    )


def _differing_runs(left: Run, right: Run) -> list[str]:
    names = [f"the server's {name}" for name in differing_states(left.server, right.server)]
    for client in left.personal:
        names += [f"{client}'s {name}" for name in differing_states(left.personal[client], right.personal[client])]
    return names
