import math

import pytest
import torch

from personae.attack import Poisoned
from personae.attack.poison import ATTACKS
from personae.core import State, Training
from personae.engine import InProcess
from personae.errors import ClientFailed, ConfigError, RefusedUpdate
from personae.methods import ServerAdam, Spire
from personae.recipe.config import load_recipe, method_name, parse, to_table
from personae.testing import check_method, tiny_job, tiny_population
from personae.testing.contract import differing, differing_states, differing_updates

SPIRE = Spire(Training(3, 1e-2, 4, condition_dropout=0.2), Training(2, 1e-2, 4))
STRENGTH = {"sign_flip": 2.0, "scale": 100.0, "noise": 3.0, "shift": 1.5, "nan": None}

each_attack = pytest.mark.parametrize("attack", ATTACKS)


def poisoned(attack, *clients, method=SPIRE):
    return Poisoned(method, attack, clients, STRENGTH[attack])


def after_one_round(method, name):
    """(what it was sent, its update, what it keeps) of one client."""
    population = tiny_population()
    got = method.broadcast(method.init(population.initial(0)), name)
    client = population.client(name, 1, 0)
    client.model.load({**client.model.initial(client.rng), **got.params})
    update, kept = method.local(client, got, State())
    return got, update, kept


@each_attack
def test_without_attackers_it_is_the_plain_method(attack):
    plain, wrapped = (after_one_round(method, "c1") for method in (SPIRE, poisoned(attack, "c0", "c2")))
    assert differing_updates(plain[1], wrapped[1]) == [] and differing_states(plain[2], wrapped[2]) == []


def test_the_contracts_hold_without_attackers():
    check_method(poisoned("scale"))


@pytest.mark.parametrize("attack", ["noise", "shift"])
def test_the_contracts_hold_with_an_attacker_too(attack):
    check_method(poisoned(attack, "c1"))


@each_attack
def test_an_attacker_changes_nothing_but_the_params_that_it_sends(attack):
    (_, honest, kept), (_, sent, kept_too) = (
        after_one_round(method, "c1") for method in (SPIRE, poisoned(attack, "c1"))
    )
    assert differing(honest.sent.params, sent.sent.params) == sorted(honest.sent.params)
    assert (sent.client, sent.num_examples, sent.metrics) == (honest.client, honest.num_examples, honest.metrics)
    assert sent.sent.facts == honest.sent.facts and differing_states(kept, kept_too) == []


def test_what_each_attack_sends():
    got, honest, _ = after_one_round(SPIRE, "c1")
    sent = {attack: after_one_round(poisoned(attack, "c1"), "c1")[1].sent.params for attack in ATTACKS}
    for name, start in got.params.items():
        d = honest.sent.params[name] - start
        torch.testing.assert_close(sent["sign_flip"][name], start - 2 * d)
        torch.testing.assert_close(sent["scale"][name], start + 100 * d)
        shift = (sent["shift"][name] - honest.sent.params[name]).abs()
        torch.testing.assert_close(shift, (1.5 * d.std(correction=0)).expand_as(d), rtol=1e-3, atol=1e-6)
        assert sent["nan"][name].isnan().all()
    d, noise = (
        torch.cat([(v[n] - got.params[n]).flatten() for n in got.params]) for v in (honest.sent.params, sent["noise"])
    )
    assert 1.0 < (noise.norm() / d.norm()).item() < 6.0
    assert abs(torch.nn.functional.cosine_similarity(noise, d, dim=0).item()) < 0.2


def test_attackers_shift_in_one_direction_and_draw_noise_of_their_own():
    def moved(attack, name):
        honest, sent = (after_one_round(m, name)[1].sent.params for m in (SPIRE, poisoned(attack, name)))
        return torch.cat([(sent[n] - honest[n]).flatten() for n in sorted(sent)])

    assert torch.equal(moved("shift", "c0").sign(), moved("shift", "c2").sign())
    alike = torch.nn.functional.cosine_similarity(moved("noise", "c0"), moved("noise", "c2"), dim=0)
    assert alike.item() < 0.5


def test_no_numbers_never_reach_the_server():
    with pytest.raises((RefusedUpdate, ClientFailed), match=r"'c1' sent values in .* that are not finite"):
        InProcess().run(tiny_job(poisoned("nan", "c1")))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("scale", ("c0",)), "strength is None, expected a number above 0 for 'scale'"),
        (("shift", ("c0",), -1.0), "strength is -1.0"),
        (("noise", ("c0",), math.inf), "strength is inf"),
        (("nan", ("c0",), 1.0), "strength: 'nan' has none"),
        (("nan", ("c0", "c0")), "clients names some twice"),
    ],
)
def test_what_is_no_attack_is_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Poisoned(SPIRE, *settings)


def test_in_a_recipe_it_is_the_innermost_wrapper():
    recipe = load_recipe(
        "quickstart", ["wrap.poisoned={attack = 'scale', clients = ['c00'], strength = 100}", "wrap.proximal.mu=0.1"]
    )
    assert method_name(recipe.method) == "server_ema(server_adam(proximal(poisoned(spire))))"
    assert parse(to_table(recipe), "again") == recipe


def test_server_wrappers_go_around_it():
    check_method(ServerAdam(poisoned("sign_flip", "c1"), 0.01))


def test_a_whole_run_reports_what_it_was(tiny, tmp_path):
    import personae

    attack = "wrap.poisoned={attack = 'scale', clients = ['c0'], strength = 10}"
    run = personae.run("quickstart", tmp_path / "run", overrides=[*tiny, attack, "evaluation.features=none"])
    assert run.summary["method"] == "server_ema(server_adam(poisoned(spire)))"
    assert (tmp_path / "run" / "report.html").is_file()


def test_an_attacker_who_does_not_train_is_a_mistake(tiny, tmp_path):
    import personae

    attack = "wrap.poisoned={attack = 'nan', clients = ['c00', 'c1']}"
    with pytest.raises(ConfigError, match=r"wrap\.poisoned\.clients: c00 do not train; who does: c0, c1, c2, c3"):
        personae.run("quickstart", tmp_path / "run", overrides=[*tiny, attack])
