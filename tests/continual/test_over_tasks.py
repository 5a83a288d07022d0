"""Federated and continual at once: what is sent, what stays, what survives a concept, and which pairs are refused."""

import runpy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from personae.aggregate.mean import mean
from personae.continual import (
    CONTINUAL,
    Cns,
    CustomDiffusion,
    DreamBooth,
    Dsc,
    Ewc,
    MixOfShow,
    SequentialLora,
    TextualInversion,
    learn,
    learning,
)
from personae.continual.ewc import IMPORTANCE
from personae.continual.over_tasks import AVERAGED, BEGUN, REFUSED, OverTasks, past_of, refusal
from personae.core import Client, Job, State, Training, pick, stream
from personae.engine import InProcess
from personae.engine.rounds import Arriving, load_parts
from personae.errors import ConfigError, PrivacyError
from personae.evaluate.forgetting import forgetting
from personae.evaluate.over_tasks import scores_over_tasks
from personae.methods import (
    METHODS,
    ClusterLora,
    FedAvgFT,
    LocalOnly,
    Proximal,
    ServerAdam,
    ServerEma,
    SharedRep,
    Spire,
)
from personae.personal.lora import is_lora
from personae.personal.tokens import is_word
from personae.testing import check_method
from personae.testing.contract import differing, differing_states

fed = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("federation.py"))))

SEED = 3
TRAINING, ADAPT = Training(2, 0.02, 2, optimizer="adamw", weight_decay=0.1), Training(2, 0.02, 2)
NOT_AT_ALL = replace(ADAPT, steps=0)
SEQUENTIAL, EWC = SequentialLora(2), Ewc(2, draws=1)
AVERAGE = FedAvgFT(TRAINING, NOT_AT_ALL)
OWN_B = SharedRep(TRAINING, NOT_AT_ALL, ADAPT, ("*.lora_B",))
OWN_WORDS = SharedRep(TRAINING, NOT_AT_ALL, ADAPT, ("tokens.",))
ALONE = LocalOnly(TRAINING, ADAPT)
OPTIONS = {
    "textual_inversion": TextualInversion(),
    "cns": Cns(budget=0.01, draws=4, general_draws=1, drawing_steps=2),
    "custom_diffusion": CustomDiffusion(),
    "mix_of_show": MixOfShow(2, sampling_steps=2, word_rate=1.0),
    "ewc": EWC,
    "dsc": Dsc(Training(1, 0.01, 1), rank=2),
}
ELEVEN = {name: OPTIONS.get(name) or kind(rank=2) for name, kind in CONTINUAL.items()}


@pytest.fixture
def people(tmp_path):
    return lambda continual=SEQUENTIAL, **options: fed.population(continual, tmp_path / "tokenizer", **options)


def job(method, population, **options):
    return Job(method, population, population, population.rounds, SEED, mean, **options)


def played(method, population, rounds):
    """The server's state after so many rounds, everyone's, and all that was sent, by round and client."""
    server, kept, sent = method.init(population.initial(SEED)), {}, {}
    for number in range(1, rounds + 1):
        updates = []
        for name in population.cohort(number, SEED, population.train):
            client, got, own = population.client(name, number, SEED), method.broadcast(server, name), kept.get(name)
            own = own or State()
            load_parts(client, got.params, own.params, SEED)
            update, kept[name] = method.local(client, got, own)
            updates.append(update)
            sent[number, name] = update.sent
        server = method.aggregate(server, Arriving(iter(updates), mean))
    return server, kept, sent


# --- contracts ----------------------------------------------------------------------------------------------------

PAIRS = {
    "average, sequential": OverTasks(AVERAGE, SEQUENTIAL),
    "average and fine-tuning, ewc": OverTasks(FedAvgFT(TRAINING, ADAPT), EWC),
    "average, dreambooth": OverTasks(AVERAGE, DreamBooth(2)),
    "average, dsc": OverTasks(AVERAGE, OPTIONS["dsc"]),
    "average, textual inversion": OverTasks(AVERAGE, TextualInversion()),
    "own B, ewc": OverTasks(OWN_B, EWC),
    "own words, sequential": OverTasks(OWN_WORDS, SEQUENTIAL),
    "alone, ewc": OverTasks(ALONE, EWC),
    "alone, merged": OverTasks(ALONE, ELEVEN["merged_lora"]),
    "wrapped": ServerEma(ServerAdam(Proximal(OverTasks(AVERAGE, SEQUENTIAL), 0.1), 0.01), 0.9),
    "wrapped inside": OverTasks(ServerEma(ServerAdam(Proximal(AVERAGE, 0.1), 0.01), 0.9), SEQUENTIAL),
}


def continual_of(method):
    return method.continual if isinstance(method, OverTasks) else continual_of(method.method)


@pytest.mark.parametrize("name", PAIRS)
def test_the_contracts_of_methods(name, people):
    check_method(PAIRS[name], people(continual_of(PAIRS[name])))


THREE = {"c0": (("rex", "dog", 2), ("tom", "cat", 1), ("pip", "dog", 2))}


def without(state, later):
    """Without the words of these tasks, which are as the model begins with them."""
    names = {f"tokens.{task.word}" for task in later}
    return replace(state, params={name: value for name, value in state.params.items() if name not in names})


@pytest.mark.parametrize("name", CONTINUAL)
def test_alone_it_is_learn_after_learn_to_the_bit(name, people, build, monkeypatch):
    """To the bit, once `learn` draws from the engine's streams of rounds in the place of its own of concepts: nothing
    is averaged, and moments go from round to round as from stretch to stretch."""
    continual, population = ELEVEN[name], people(ELEVEN[name], concepts=THREE)
    method, own = OverTasks(ALONE, continual), population.streams["c0"]
    population = replace(population, model=build(continual.parts, own.tasks))
    server, kept, reached = method.init(population.initial(SEED)), State(), []
    for number in range(1, 6):
        client = population.client("c0", number, SEED)
        load_parts(client, server.params, kept.params, SEED)
        update, kept = method.local(client, server, kept)
        assert update.sent == State()
        reached += [past_of(kept)] if client.ends_task else []
    taught, firsts = State(), (1, 3, 4)
    for place, first in enumerate(firsts):
        period, last = own.periods[place], own.last_rounds[place]

        def drawn(client, seed, *keys, first=first, last=last):
            rounds = {number: stream(SEED, "c0", number) for number in range(6)}
            if keys[0] == "stretch":
                return rounds[first + keys[1]]
            if keys[0] == "init":
                return stream(SEED, "c0", "init") if first == 1 else stream(rounds[first - 1].initial_seed(), "after")
            return stream(rounds[first if keys[0] == "begin" else last].initial_seed(), keys[0])

        monkeypatch.setattr(learning, "_draws", drawn)
        tasks = own.tasks[: place + 1]
        client = Client(
            "c0", period.data, build(continual.parts, own.tasks), stream(0), tasks=tasks, given=period.given
        )
        taught = learn(continual, TRAINING, client, taught, SEED, stretches=period.rounds)
        later = own.tasks[place + 1 :]
        assert differing_states(without(taught, later), without(reached[place], later)) == [], place
    words = pick(kept.params, is_word)
    assert len(words) == 3 and differing(words, pick(taught.params, is_word)) == []


# --- what leaves a client -----------------------------------------------------------------------------------------


def test_adapters_are_sent_and_words_importances_and_names_stay(people):
    population = people(EWC)
    method = OverTasks(AVERAGE, EWC)
    server, kept, sent = played(method, population, population.rounds)
    adapters = {name for name in population.model.live() if is_lora(name)}
    assert set(server.params) == adapters and not server.extras and not server.facts
    for state in sent.values():
        assert set(state.params) == adapters and not state.extras and not state.facts
    for name, state in kept.items():
        assert {"tokens.<concept-1>", "tokens.<concept-2>"} == set(state.params), name
        assert any(key.startswith(f"past.extras.{IMPORTANCE}") for key in state.extras)
        assert state.facts[BEGUN] == 2 and state.facts["past.facts.temperature"] > 0
    assert method.personal("tokens.<concept-1>") and not method.personal(min(adapters))


def test_no_message_says_what_anybody_teaches(people, tmp_path):
    pytest.importorskip("flwr")
    from personae.testing.loopback import Loopback

    engine = Loopback()
    engine.run(job(OverTasks(AVERAGE, OPTIONS["dsc"]), people(OPTIONS["dsc"]), folder=tmp_path / "run"))
    (grid,) = engine.grids
    said = [repr(message.content["about"]) for message in (*grid.pushed, *grid.replied)]
    for message in grid.replied:
        if "state" in message.content:
            data = message.content["state"]["state"].data
            said.append(data[8 : 8 + int.from_bytes(data[:8], "little")].decode())  # names, shapes and facts
    assert any("lora_A" in text for text in said) and not any(concept in text for text in said for concept in fed.NAMES)
    assert any("rex" in path.read_bytes().decode("latin") for path in tmp_path.rglob("*.safetensors")), "it was there"


@dataclass(frozen=True)
class SendsItsWord(OverTasks):
    def local(self, client, got, kept):
        update, kept = super().local(client, got, kept)
        word = kept.params["tokens.<concept-1>"]
        return replace(update, sent=replace(update.sent, extras={"about.tokens.<concept-1>": word})), kept


def test_a_word_that_is_sent_is_refused(people):
    with pytest.raises(PrivacyError, match="about to send 1 personal tensors"):
        InProcess().run(job(SendsItsWord(AVERAGE, SEQUENTIAL), people()))


# --- engines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["average and fine-tuning, ewc", "own B, ewc", "average, dsc", "alone, merged"])
@pytest.mark.parametrize("cohort_size", [None, 1])
def test_the_same_bits_over_messages_as_in_one_process(name, cohort_size, people, tmp_path):
    pytest.importorskip("flwr")
    from personae.testing.loopback import Loopback

    method = PAIRS[name]
    here, there = (
        engine.run(job(method, people(method.continual, cohort_size=cohort_size), folder=tmp_path / where))
        for engine, where in ((InProcess(), "here"), (Loopback(), "there"))
    )
    assert differing_states(here.server, there.server) == [] and here.traffic == there.traffic
    for client in ("c0", "c1", "c2", "n0"):
        assert differing_states(here.personal[client], there.personal[client]) == [], client


@pytest.mark.parametrize(("number", "clients"), [(1, 1), (1, 3), (2, 1), (2, 3), (3, 2)])
def test_a_run_that_is_stopped_in_a_task_or_between_two_ends_in_the_same_bits(number, clients, people, tmp_path):
    class Stop(Exception): ...

    def stop(now):
        if (now.stage, now.round, now.clients_done) == ("train", number, clients):
            raise Stop

    method = OverTasks(OWN_B, EWC)
    whole = InProcess().run(job(method, people(EWC), folder=tmp_path / "whole"))
    part = job(method, people(EWC), folder=tmp_path / "part")
    with pytest.raises(Stop):
        InProcess().run(part, watch=stop)
    resumed = InProcess().run(replace(part, site=people(EWC)), resume=True)
    assert differing_states(whole.server, resumed.server) == []
    for client in whole.personal:
        assert differing_states(whole.personal[client], resumed.personal[client]) == [], client


# --- around a concept ---------------------------------------------------------------------------------------------


def test_a_word_starts_as_its_noun_and_rests_when_its_concept_is_over(people):
    population, method = people(), OverTasks(FedAvgFT(replace(TRAINING, steps=0), NOT_AT_ALL), SEQUENTIAL)
    (table,) = (v for n, v in population.model.base().items() if n.endswith("token_embedding.weight"))
    (tokenizer,) = population.model.captions.tokenizers()
    _, kept, _ = played(method, population, 1)
    for name, noun in (("c0", "dog"), ("c1", "tree"), ("c2", "cat")):
        (number,) = tokenizer(noun, add_special_tokens=False)["input_ids"]
        assert torch.equal(kept[name].params["tokens.<concept-1>"][0], table[number])
    trained = OverTasks(AVERAGE, SEQUENTIAL)
    words = [played(trained, people(), rounds)[1] for rounds in (1, 2, 3)]
    (number,) = tokenizer("dog", add_special_tokens=False)["input_ids"]
    moved = [state["c0"].params["tokens.<concept-1>"] for state in words]
    assert not torch.equal(moved[0][0], table[number]) and torch.equal(moved[0], moved[1])
    second = [state["c0"].params["tokens.<concept-2>"] for state in words]
    assert not torch.equal(second[0], second[1]) and not torch.equal(second[1], second[2])


def test_springs_are_tied_to_what_the_client_itself_sent_last(people):
    population, method = people(EWC), OverTasks(AVERAGE, EWC)
    server, kept, sent = played(method, population, 1)
    anchors = pick(past_of(kept["c0"]).params, is_lora)
    assert differing(anchors, sent[1, "c0"].params) == [] and differing(anchors, server.params) != []
    assert past_of(kept["c1"]) == State(), "its first concept goes on"
    client = population.client("c0", 2, SEED)
    load_parts(client, server.params, kept["c0"].params, SEED)
    bent = method._begun(client, kept["c0"], 0)
    assert differing(pick(client.model.params(), is_lora), server.params) == [], "it starts from what was sent to it"
    (spring,) = bent.plan.penalties
    pulled = spring(client.model, SimpleNamespace(prediction=torch.zeros(1))).detach()
    importance = past_of(kept["c0"]).extras
    by_hand = sum(
        (importance[IMPORTANCE + name] * (value - anchors[name]) ** 2).sum() for name, value in server.params.items()
    )
    assert float(by_hand) > 0 and float(pulled) == pytest.approx(10.0 / 2 * float(by_hand), rel=1e-5)


def test_what_the_consolidation_moves_is_sent(people):
    """DSC trains the adapter once more, with the second concept."""
    dsc = OPTIONS["dsc"]
    sent = [played(OverTasks(AVERAGE, each), people(each), 3)[2][3, "c0"] for each in (dsc, longer(dsc))]
    assert differing(sent[0].params, sent[1].params) != []
    kept = played(OverTasks(AVERAGE, dsc), people(dsc), 3)[1]["c0"]
    assert differing(pick(past_of(kept).params, is_lora), sent[0].params) == []


def longer(dsc):
    return replace(dsc, consolidation=replace(dsc.consolidation, steps=5))


def test_a_client_that_misses_the_end_of_a_concept_goes_on_with_its_word(people):
    population, method = people(EWC), OverTasks(AVERAGE, EWC)
    client, got = population.client("c0", 1, SEED), method.init(population.initial(SEED))
    load_parts(client, got.params, {}, SEED)
    _, kept = method.local(replace(client, ends_task=False), got, State())
    assert past_of(kept) == State() and kept.facts == {BEGUN: 1}
    client = population.client("c0", 3, SEED)
    load_parts(client, got.params, kept.params, SEED)
    _, after = method.local(client, got, kept)
    assert torch.equal(after.params["tokens.<concept-1>"], kept.params["tokens.<concept-1>"])
    assert after.facts[BEGUN] == 2 and past_of(after).extras


def test_who_owns_a_whole_model_draws_with_it_and_who_is_new_learns_its_concept(people):
    population = people(EWC)
    run = InProcess().run(job(OverTasks(AVERAGE, EWC), population))
    assert all(set(map(is_word, run.personal[name].params)) == {True} for name in population.train)
    tuned = InProcess().run(job(OverTasks(FedAvgFT(TRAINING, ADAPT), EWC), people(EWC)))
    for name in ("c0", "n0"):
        moved = differing(tuned.personal[name].params, {**run.personal[name].params, **tuned.server.params})
        assert "tokens.<concept-1>" not in moved or name == "n0", "only the last concept's word trains"
        assert any(map(is_lora, moved)) and ("tokens.<concept-2>" in moved) == (name == "c0")
    alone = InProcess().run(job(OverTasks(ALONE, ELEVEN["merged_lora"]), people(ELEVEN["merged_lora"])))
    assert set(alone.personal["c0"].params) == set(people(ELEVEN["merged_lora"]).model.live())


def test_forgetting_is_measured_for_each_client_on_its_own_concepts(people):
    """Its model after each of its concepts, on what it held out of all so far."""
    long = Training(20, 0.04, 4, optimizer="adamw")
    population, method = people(), OverTasks(FedAvgFT(long, NOT_AT_ALL), SEQUENTIAL)
    runs = {last: InProcess().run(replace(job(method, population), rounds=last)) for last in (1, 2, 3)}
    found = {}
    for name in ("c0", "c1"):
        own = population.streams[name]
        after = [{**runs[last].server.params, **runs[last].personal[name].params} for last in own.last_rounds]
        heldout = [period.data.heldout for period in own.periods]
        untaught = population.initial(SEED)
        before = scores_over_tasks(population.model, [untaught], heldout[:1])[0][0]
        scores = scores_over_tasks(population.model, after, heldout)
        assert scores[0][1] is None and scores[0][0] > before, "it was learned"
        found[name] = forgetting(scores)
        by_hand = scores[0][0] - scores[1][0]
        assert found[name].forgetting == pytest.approx(by_hand) and found[name].forgetting != 0
    assert found["c0"] != found["c1"]
    with pytest.raises(ConfigError, match="1 models and pictures of 2 concepts"):
        scores_over_tasks(population.model, after[:1], heldout)


# --- which pairs ---------------------------------------------------------------------------------------------------

SENDING = {"fedavg_ft": AVERAGE, "shared_rep": OWN_B, "local_only": ALONE}
UNFIT = {"spire": Spire(TRAINING, ADAPT), "cluster_lora": ClusterLora(TRAINING, TRAINING, ADAPT)}
AVERAGES = {"textual_inversion", "sequential_lora", "dreambooth", "ewc", "dsc"}


def test_the_tables_know_every_method():
    assert SENDING.keys() | UNFIT.keys() == METHODS.keys()
    assert AVERAGED.keys() | REFUSED.keys() == set(CONTINUAL.values()) and not AVERAGED.keys() & REFUSED.keys()
    assert {name for name, kind in CONTINUAL.items() if kind in AVERAGED} == AVERAGES


@pytest.mark.parametrize("continual", CONTINUAL)
@pytest.mark.parametrize("method", METHODS)
def test_every_pair_is_made_or_refused_with_its_reason(method, continual):
    bent = ELEVEN[continual]
    if method in UNFIT:
        with pytest.raises(ConfigError, match=f"{type(UNFIT[method]).__name__} is not for concepts that arrive"):
            OverTasks(ServerEma(UNFIT[method], 0.9), bent)
    elif continual in AVERAGES or method == "local_only":
        assert refusal(SENDING[method], bent) is None and OverTasks(SENDING[method], bent).continual is bent
    else:
        with pytest.raises(ConfigError) as refused:
            OverTasks(Proximal(SENDING[method], 0.1), bent)
        assert REFUSED[type(bent)] in str(refused.value) and str(refused.value).startswith(type(bent).__name__)


def test_what_is_kept_by_the_method_needs_no_average():
    assert refusal(SharedRep(TRAINING, ADAPT, ADAPT, ("unet.", "delta.")), ELEVEN["merged_lora"]) is None
    assert refusal(SharedRep(TRAINING, ADAPT, ADAPT, ("delta.",)), ELEVEN["merged_lora"]) is not None

    @dataclass(frozen=True)
    class Unknown(SequentialLora): ...

    assert "not known" in refusal(AVERAGE, Unknown(2)) and refusal(ALONE, Unknown(2)) is None


def test_a_model_with_other_parts_is_refused(people, build):
    initial = people().initial(SEED)
    method = OverTasks(AVERAGE, SEQUENTIAL)
    with pytest.raises(ConfigError, match="the model has no words"):
        method.init(pick(initial, is_lora))
    with pytest.raises(ConfigError, match="the model has no adapters"):
        method.init(pick(initial, is_word))
    with pytest.raises(ConfigError, match="the model has changes of weights"):
        method.init(people(ELEVEN["merged_lora"]).initial(SEED))
    with pytest.raises(ConfigError, match="weight may move, which no plan lets move"):
        method.init({**initial, "unet.conv_in.weight": torch.zeros(1)})


def test_a_noun_of_several_tokens_is_refused(people):
    population = people(concepts={"c0": (("rex", "doggy dog", 1),)})
    client = population.client("c0", 1, SEED)
    with pytest.raises(ConfigError, match="tokens, expected one"):
        OverTasks(AVERAGE, SEQUENTIAL).local(client, State(), State())
    with pytest.raises(ConfigError, match="client 'c0' has no task"):
        OverTasks(AVERAGE, SEQUENTIAL).local(replace(client, tasks=()), State(), State())
