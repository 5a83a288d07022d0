"""Numbers beside chosen weights: what is added where, what may be loaded, and that nothing else can move."""

import pytest
import torch
from torch import nn

from personae.artefact.save import load_state, save_state
from personae.backbone.pipeline import open_pipeline, save_pipeline
from personae.backbone.text2image import TextToImage
from personae.core import Batch, Client, ClientData, Images, State, Training, everything, nothing, stream
from personae.errors import ConfigError, ShapeError
from personae.local.fit import fit
from personae.personal.delta import DELTA, Delta, Deltas, without_parts
from personae.personal.lora import Adapters, Lora
from personae.personal.neurons import (
    AT,
    NEURONS,
    NeuronLists,
    Neurons,
    is_neuron,
    packed,
    placed,
    settled,
    unpacked,
)
from personae.personal.tokens import Words
from personae.testing.check_denoiser import (
    forward_keeps_shape_and_bits,
    initial_is_drawn_from_its_generator,
    load_refuses_what_does_not_fit,
    names_agree,
)
from personae.testing.contract import differing, same_bits
from personae.testing.tiny_pipeline import SCHEDULE, tiny_networks

KEY = "unet.attn2.to_k.weight"


class Block(nn.Module):
    """Named as the attention of diffusers is."""

    def __init__(self):
        super().__init__()
        self.attn1, self.attn2 = nn.Module(), nn.Module()
        for attention in (self.attn1, self.attn2):
            for name in ("to_q", "to_k", "to_v"):
                setattr(attention, name, nn.Linear(3, 2))
        with torch.no_grad():
            self.attn2.to_k.weight.copy_(torch.arange(6.0).view(2, 3))


@pytest.fixture
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.ModuleDict({"0": Block()})


def put(lists, name, at, values):
    """Into one weight's list."""
    params = {each: value.detach().clone() for each, value in lists.live().items()}
    params |= {AT + name: torch.tensor(at), NEURONS + name: torch.tensor(values)}
    lists.differ(params)
    lists.make_room(params)
    with torch.no_grad():
        for each, parameter in lists.live().items():
            parameter.copy_(params[each])


# --- one layer --------------------------------------------------------------------------------------------------------


def test_numbers_are_added_at_places_of_the_flattened_weight(network):
    lists = NeuronLists({"unet.": network}, Neurons())
    key = network["0"].attn2.to_k
    assert set(lists.live()) == {f"{front}unet.0.attn2.to_{k}.weight" for front in (NEURONS, AT) for k in "kv"}
    assert torch.equal(key.weight, torch.arange(6.0).view(2, 3)), "nothing is chosen at first"
    put(lists, "unet.0.attn2.to_k.weight", [1, 5], [10.0, -1.0])
    assert key.weight.tolist() == [[0.0, 11.0, 2.0], [3.0, 4.0, 4.0]]
    assert torch.equal(key(torch.eye(3)) - key.bias, key.weight.T)
    changes = lists.changes()
    assert changes["unet.0.attn2.to_k.weight"].tolist() == [[0.0, 10.0, 0.0], [0.0, 0.0, -1.0]]
    assert not changes["unet.0.attn2.to_v.weight"].any()


def test_gradients_reach_the_numbers_and_no_place(network):
    lists = NeuronLists({"unet.": network}, Neurons())
    put(lists, "unet.0.attn2.to_k.weight", [1, 5], [0.0, 0.0])
    live, wanted = lists.live(), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    (network["0"].attn2.to_k.weight * wanted).sum().backward()
    assert live[f"{NEURONS}unet.0.attn2.to_k.weight"].grad.tolist() == [2.0, 6.0]
    at = live[f"{AT}unet.0.attn2.to_k.weight"]
    assert at.dtype == torch.int64 and not at.requires_grad and at.grad is None
    assert is_neuron(f"{NEURONS}x") and not is_neuron(f"{AT}x") and not is_neuron(f"{DELTA}x")


def test_an_adapter_a_change_and_neurons_of_one_weight_add_up_and_hide_their_names(network):
    names = {name for name, _ in network.named_parameters()}
    adapters = Adapters({"unet.": network}, Lora(1, "cross_kv"))
    deltas, lists = Deltas({"unet.": network}, Delta()), NeuronLists({"unet.": network}, Neurons())
    assert {without_parts(name) for name, _ in network.named_parameters()} - {None} == names
    put(lists, "unet.0.attn2.to_k.weight", [0, 4], [100.0, 200.0])
    with torch.no_grad():
        deltas.live()[f"{DELTA}unet.0.attn2.to_k.weight"].fill_(0.5)
        adapters.live()["unet.0.attn2.to_k.lora_A"].fill_(1.0)
        adapters.live()["unet.0.attn2.to_k.lora_B"].fill_(1000.0)
    layer = network["0"].attn2.to_k
    weight = layer(torch.eye(3)).T - layer.base_layer.bias[:, None]
    expected = torch.tensor([[1100.5, 1001.5, 1002.5], [1003.5, 1204.5, 1005.5]])
    assert torch.allclose(weight, expected)


def test_sums_are_in_float32_and_then_in_the_weights_own_type(network):
    key = network["0"].attn2.to_k
    key.weight.data = torch.ones(2, 3, dtype=torch.bfloat16)
    lists = NeuronLists({"unet.": network}, Neurons())
    # Half a step of bfloat16 above 1, and a little: in bfloat16 it would be the half, and 1 the nearest even number.
    put(lists, "unet.0.attn2.to_k.weight", [2], [2.0**-8 + 2.0**-20])
    assert key.weight.dtype == torch.bfloat16
    assert key.weight.tolist() == [[1.0, 1.0, 1.0 + 2.0**-7], [1.0, 1.0, 1.0]]


def test_layers_that_are_not_there_are_refused(network):
    with pytest.raises(ConfigError, match=r"neurons: unet has no layer that targets 'cross_kv' names"):
        NeuronLists({"unet.": nn.Linear(2, 2)}, Neurons())
    with pytest.raises(ConfigError, match=r"expected one of cross_kv, cross, self\+cross"):
        Neurons("everything")


# --- parameters alone -------------------------------------------------------------------------------------------------


def test_neurons_begin_where_a_mask_says_in_ascending_order():
    found = placed({KEY: torch.tensor([[False, True, False], [True, False, True]])})
    assert found[AT + KEY].tolist() == [1, 3, 5] and found[NEURONS + KEY].tolist() == [0.0, 0.0, 0.0]


def test_what_they_add_settles_in_the_changes_of_weights():
    params = {
        DELTA + KEY: torch.tensor([[1.0, 1.0, -0.0], [0.1, 1.0, 1.0]]),
        NEURONS + KEY: torch.tensor([0.5, -3.0]),
        AT + KEY: torch.tensor([1, 5]),
        "tokens.<rex>": torch.zeros(1, 2),
    }
    before = {name: value.clone() for name, value in params.items()}
    found = settled(params)
    assert set(found) == {DELTA + KEY, "tokens.<rex>"}
    assert same_bits(found[DELTA + KEY], torch.tensor([[1.0, 1.5, -0.0], [0.1, 1.0, -2.0]]))
    assert not differing(before, params)


def test_bitmaps_have_eight_to_a_byte():
    mask = torch.tensor([[True, False, False, False, False], [False, False, True, True, False]])
    assert packed(mask).tolist() == [0b10000001, 0b10000000]
    assert torch.equal(unpacked(packed(mask), mask.shape), mask)


# --- in a text-to-image model -----------------------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return lambda opened=nothing, **parts: TextToImage(tiny_networks(folder), SCHEDULE, opened, **parts)


PARTS = {"delta": Delta(), "neurons": Neurons()}
LATENTS = Batch(torch.randn(2, 4, 4, 4, generator=stream(0)), torch.tensor([False, True]), ("a dog", "a cat"))


def some_params(model, seed, share=0.1):
    """Noise everywhere, and as many neurons as fall by lot in every weight."""
    params = {name: torch.randn(value.shape, generator=stream(seed, name)) for name, value in model.params().items()}
    for name in [name for name in params if name.startswith(DELTA)]:
        bare, shape = name.removeprefix(DELTA), params[name].shape
        params |= placed({bare: torch.rand(shape, generator=stream(seed, "mask", bare)) < share})
        params[NEURONS + bare] = torch.randn(params[AT + bare].shape, generator=stream(seed, "values", bare))
    return params


@torch.no_grad()
def predicted(model):
    return model.forward(LATENTS.images, torch.tensor([5, 500]), model.condition(LATENTS))


@pytest.mark.parametrize(
    "contract",
    [
        names_agree,
        initial_is_drawn_from_its_generator,
        load_refuses_what_does_not_fit,
        forward_keeps_shape_and_bits,
    ],
    ids=lambda contract: contract.__name__,
)
def test_what_the_library_relies_on_in_any_denoiser(make, contract):
    """The other contracts add fractions to all that is loaded, or ask a gradient of it; their twins are below."""
    contract(lambda: make(**PARTS), LATENTS)


def test_nothing_is_chosen_at_first_and_the_base_keeps_names_and_bits(make):
    model, bare = make(**PARTS), make()
    model.load(model.initial(stream(1)))
    assert not differing(model.base(), bare.base())
    assert torch.equal(predicted(model), predicted(bare))
    model.load(some_params(model, 2))
    assert not differing(model.base(), bare.base()) and not torch.equal(predicted(model), predicted(bare))


def test_load_is_absolute_whatever_was_chosen_before(make):
    used, fresh = make(**PARTS), make(**PARTS)
    first, second = some_params(used, 1, share=0.3), some_params(used, 2, share=0.05)
    used.load(first)
    assert not differing(used.params(), first) and not torch.equal(predicted(used), predicted(fresh))
    used.load(second)
    fresh.load(second)
    assert not differing(used.params(), second) and torch.equal(predicted(used), predicted(fresh))
    assert used.live().keys() == second.keys()
    used.load(used.initial(stream(3)))
    assert torch.equal(predicted(used), predicted(make())), "and nothing of them is left"


@pytest.mark.parametrize(
    "at",
    [
        torch.tensor([3, 1]),
        torch.tensor([1, 1]),
        torch.tensor([-1, 1]),
        torch.tensor([1, 128]),
        torch.tensor([1.0, 2.0]),
        torch.tensor([1, 2, 3]),
        torch.tensor([[1, 2]]),
    ],
)
def test_places_that_are_none_are_refused_before_anything_has_changed(make, at):
    model = make(lora=Lora(2, "cross_kv"), **PARTS)
    model.load(some_params(model, 1))
    before = model.params()
    bare = next(name.removeprefix(AT) for name in before if name.startswith(AT))
    refused = {**some_params(model, 2), AT + bare: at, NEURONS + bare: torch.zeros(2)}
    with pytest.raises(ShapeError, match=r"1 lists of neurons name no weights: .*expected int64 \[N\], ascending"):
        model.load(refused)
    assert not differing(model.params(), before)


def test_what_else_does_not_fit_leaves_the_neurons_as_they_were(make):
    model = make(words=Words(("<rex>",), "dog"), **PARTS)
    model.load(some_params(model, 1))
    before, drawn = model.params(), predicted(model)
    with pytest.raises(ShapeError, match=r"tokens\.<rex> is \[3, 16\]"):
        model.load({**some_params(model, 2), "tokens.<rex>": torch.zeros(3, 16)})
    assert not differing(model.params(), before) and torch.equal(predicted(model), drawn)


def test_training_moves_the_chosen_numbers_and_nothing_else(make):
    model = make(**PARTS)
    model.load(some_params(model, 1))
    before, weights = model.params(), effective(model)
    images = Images(torch.randn(4, 4, 4, 4, generator=stream(5)), captions=("a dog",) * 4)
    client = Client("a", ClientData(images, images), model, stream(6))
    fit(client, is_neuron, Training(3, 0.1, 2, optimizer="adamw", weight_decay=0.5, precision="bfloat16"))
    assert differing(model.params(), before) == sorted(filter(is_neuron, before))
    for name, weight in effective(model).items():
        at = before[AT + name]
        chosen = torch.zeros(weight.numel(), dtype=torch.bool)
        chosen[at] = True
        moved = (weight != weights[name]).flatten()
        assert len(at) and torch.equal(moved, chosen), name
    assert all(value.requires_grad == is_neuron(name) for name, value in model.live().items())


def effective(model):
    """What layers with neurons compute with, by the weight's name."""
    modules = dict(model.named_modules())
    names = [name.removeprefix(AT) for name in model.live() if name.startswith(AT)]
    return {name: modules[name.removesuffix(".weight")].weight.detach().clone() for name in names}


def test_a_state_with_neurons_is_written_and_read(make, tmp_path):
    model = make(**PARTS)
    for share in (0.1, 0.0):
        params = some_params(model, 1, share)
        save_state(tmp_path / "state.safetensors", State(params))
        assert not differing(load_state(tmp_path / "state.safetensors").params, params)


def test_a_pipeline_with_neurons_in_its_weights_draws_the_same(make, tmp_path):
    model = make(**PARTS)
    model.load(some_params(model, 1))
    save_pipeline(model, tmp_path / "pipeline")
    opened, with_parts = open_pipeline(tmp_path / "pipeline"), open_pipeline(tmp_path / "pipeline", neurons=Neurons())
    assert torch.allclose(predicted(model), predicted(opened), atol=1e-4)
    assert torch.equal(predicted(opened), predicted(with_parts)) and any(map(is_neuron, with_parts.params()))
    assert not torch.allclose(predicted(model), predicted(make()), atol=1e-2)


def test_they_are_for_weights_that_do_not_train_themselves_and_are_whole(make):
    with pytest.raises(ConfigError, match=r"neurons: .* trains itself; freeze the base"):
        make(everything, neurons=Neurons())
    with pytest.raises(ConfigError, match="half and neurons do not go together"):
        make(neurons=Neurons(), half=True)
