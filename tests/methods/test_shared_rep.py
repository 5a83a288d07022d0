import pytest
import torch

from personae.backbone.text2image import TextToImage
from personae.core import ClientData, Images, Training, nothing, stream
from personae.engine import InProcess
from personae.engine.population import Population
from personae.errors import ConfigError
from personae.methods import SharedRep
from personae.personal.lora import Lora
from personae.personal.tokens import Words
from personae.testing import check_method, tiny_job, tiny_population
from personae.testing.tiny_pipeline import SCHEDULE, tiny_networks

TRAINING, TAIL = Training(3, 1e-2, 4), Training(2, 1e-2, 4)
TAIL_NAMES = {"output.weight", "output.bias"}


def method(*layers):
    return SharedRep(TRAINING, TAIL, TAIL, layers)


def test_a_wrong_prefix_says_which_layers_there_are(tmp_path):
    with pytest.raises(
        ConfigError, match=r"no parameter starts, or after a \* ends, with outptu\..* the model has .*output\."
    ):
        InProcess().run(tiny_job(method("output.", "outptu."), folder=tmp_path / "run"))
    assert not (tmp_path / "run").exists()  # so that the corrected recipe can be run


def test_no_prefix_at_all_is_refused():
    with pytest.raises(ConfigError, match="nothing given"):
        InProcess().run(tiny_job(method()))


def test_the_tail_stays_and_the_body_is_shared():
    run = InProcess().run(tiny_job(method("output.")))
    assert not TAIL_NAMES & run.server.params.keys()
    assert all(set(state.params) == TAIL_NAMES for state in run.personal.values())
    assert not torch.equal(run.personal["c0"].params["output.weight"], run.personal["c1"].params["output.weight"])


def test_fedsa_lora_averages_A_and_keeps_B_and_words_at_home(tmp_path):
    """Guo et al. 2024: of the adapters only A is sent."""
    given = {"lora": Lora(2), "words": Words(("<own>",), "drawing")}
    model = TextToImage(tiny_networks(tmp_path / "tokenizer"), SCHEDULE, nothing, **given)
    images = {
        name: Images(
            torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=stream(0, name)),
            captions=("a <own> of a dog",) * 4,
        )
        for name in ("c0", "c1", "n0")
    }
    population = Population(model, {n: ClientData(own, own) for n, own in images.items()}, ("c0", "c1"), ("n0",))
    method = SharedRep(TRAINING, Training(0, 1e-2, 1), TAIL, ("*.lora_B", "tokens."))
    run = InProcess().run(tiny_job(method, population, rounds=1))
    assert run.server.params and all(name.endswith(".lora_A") for name in run.server.params)
    for name in ("c0", "c1", "n0"):
        kept = run.personal[name].params
        assert "tokens.<own>" in kept and all(n.endswith(".lora_B") or n == "tokens.<own>" for n in kept)
        assert any(value.abs().max() > 0 for n, value in kept.items() if n.endswith(".lora_B"))
    check_method(method, population)


def test_a_new_client_trains_a_tail_from_fresh_values():
    untrained = SharedRep(TRAINING, TAIL, Training(0, 1e-2, 4), ("output.",))
    population = tiny_population()
    tail = InProcess().run(tiny_job(untrained, population, seed=3)).personal["n0"].params
    fresh = population.model.initial(stream(3, "n0", "init"), TAIL_NAMES.__contains__)
    assert torch.equal(tail["output.weight"], fresh["output.weight"])


def test_a_training_client_samples_with_the_tail_it_kept():
    methods = [SharedRep(TRAINING, TAIL, Training(steps, 1e-2, 4), ("output.",)) for steps in (1, 9)]
    short, long = (InProcess().run(tiny_job(method)).personal for method in methods)
    assert torch.equal(short["c0"].params["output.weight"], long["c0"].params["output.weight"])
    assert not torch.equal(short["n0"].params["output.weight"], long["n0"].params["output.weight"])
