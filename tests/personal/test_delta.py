"""Changes of weights beside them, and adapters that are absorbed by them."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from personae.core import stream
from personae.errors import ConfigError
from personae.personal.delta import DELTA, PATTERNS, Delta, Deltas, absorbed, is_delta, without_parts
from personae.personal.lora import A, Adapters, B, Lora

X = torch.randn(5, 4, generator=stream(0))

KEY, VALUE = "unet.block.attn2.to_k", "unet.block.attn2.to_v"

PARAMS = {
    f"{KEY}{A}": torch.tensor([[1.0, 2.0]]),
    f"{KEY}{B}": torch.tensor([[1.0], [0.0], [-3.0]]),
    f"{DELTA}{KEY}.weight": torch.ones(3, 2),
    f"{DELTA}{VALUE}.weight": torch.full((3, 2), 5.0),
    "tokens.<rex>": torch.zeros(1, 2),
}


@pytest.fixture
def network():
    """Named as a transformer block of diffusers is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = nn.Module()
        block.attn1, block.attn2 = nn.Module(), nn.Module()
        for attention in (block.attn1, block.attn2):
            for name in ("to_q", "to_k", "to_v"):
                setattr(attention, name, nn.Linear(4, 4))
            attention.to_out = nn.ModuleList([nn.Linear(4, 4), nn.Dropout(0.0)])
        return nn.ModuleDict({"block": block})


def put(part, spread=1.0):
    """Other values into all of a part. Returns them."""
    values = {name: spread * torch.randn(p.shape, generator=stream(1, name)) for name, p in part.live().items()}
    with torch.no_grad():
        for name, parameter in part.live().items():
            parameter.copy_(values[name])
    return values


# --- absorbed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "factor"), [({}, 1.0), ({"factor": 0.5}, 0.5)])
def test_a_product_goes_into_its_weights_change_and_the_adapter_is_gone(options, factor):
    found = absorbed(PARAMS, **options)
    product = torch.tensor([[1.0, 2.0], [0.0, 0.0], [-3.0, -6.0]])
    assert set(found) == {f"{DELTA}{KEY}.weight", f"{DELTA}{VALUE}.weight", "tokens.<rex>"}
    assert torch.equal(found[f"{DELTA}{KEY}.weight"], 1 + factor * product)
    for name in (f"{DELTA}{VALUE}.weight", "tokens.<rex>"):
        assert torch.equal(found[name], PARAMS[name]), "what has no adapter stays"


def test_what_is_absorbed_is_left_as_it_was():
    before = {name: value.clone() for name, value in PARAMS.items()}
    absorbed(PARAMS)
    assert before.keys() == PARAMS.keys() and all(torch.equal(before[name], value) for name, value in PARAMS.items())


def test_without_adapters_nothing_changes():
    plain = {f"{DELTA}{KEY}.weight": PARAMS[f"{DELTA}{KEY}.weight"]}
    assert torch.equal(absorbed(plain)[f"{DELTA}{KEY}.weight"], torch.ones(3, 2))


def test_an_adapter_without_a_change_to_go_into_is_refused():
    homeless = {name: value for name, value in PARAMS.items() if name != f"{DELTA}{KEY}.weight"}
    with pytest.raises(ConfigError, match=rf"1 adapters have no change of weights to go into \({KEY}\.weight"):
        absorbed(homeless)


@pytest.mark.parametrize("targets", ["cross_kv", "self+cross"])
def test_a_network_says_the_same_when_its_adapters_are_absorbed(network, targets):
    adapters = Adapters({"unet.": network}, Lora(2, targets))
    deltas = Deltas({"unet.": network}, Delta(targets))
    values = {**put(adapters), **put(deltas)}
    layers = [network.get_submodule(f"block.{name}") for name in ("attn1.to_q", "attn2.to_k", "attn2.to_v")]
    before = [layer(X) for layer in layers]
    after = absorbed(values)
    with torch.no_grad():
        for name, parameter in deltas.live().items():
            parameter.copy_(after[name])
        for parameter in adapters.live().values():
            parameter.zero_()
    assert all(torch.allclose(layer(X), said, atol=1e-5) for layer, said in zip(layers, before, strict=True))
    assert any(not torch.equal(after[name], values[name]) for name in after)


# --- changes -------------------------------------------------------------------------------------------------------


def test_which_layers(network):
    found = {targets: set(Deltas({"unet.": deepcopy(network)}, Delta(targets)).live()) for targets in PATTERNS}
    cross = {f"{DELTA}unet.block.attn2.{layer}.weight" for layer in ("to_q", "to_k", "to_v", "to_out.0")}
    assert found["cross_kv"] == {f"{DELTA}{KEY}.weight", f"{DELTA}{VALUE}.weight"}
    assert found["cross"] == cross
    assert found["self+cross"] == cross | {name.replace("attn2", "attn1") for name in cross}
    assert all(is_delta(name) for name in cross) and not is_delta(f"{KEY}.weight")
    with pytest.raises(ConfigError, match="unet has no layer that targets 'cross_kv' names"):
        Deltas({"unet.": nn.Linear(2, 2)}, Delta())


def test_a_layer_computes_with_its_weight_and_the_change_and_the_weight_keeps_its_bits(network):
    key = network["block"].attn2.to_k
    weight, bias, plain = key.weight.detach().clone(), key.bias.detach().clone(), key(X)
    names = {name for name, _ in network.named_parameters()}
    deltas = Deltas({"unet.": network}, Delta())
    assert torch.equal(key(X), plain) and not any(value.any() for value in deltas.initial().values())
    changed = put(deltas)[f"{DELTA}{KEY}.weight"]
    assert torch.allclose(key(X), X @ (weight + changed).T + bias, atol=1e-6)
    assert torch.equal(key.parametrizations.weight.original, weight)
    assert {without_parts(name) for name, _ in network.named_parameters()} - {None} == names
    assert torch.equal(deltas.changes()[f"{KEY}.weight"], changed)


def test_a_change_is_float32_beside_a_weight_that_is_not(network):
    network.bfloat16()
    key = network["block"].attn2.to_k
    weight = key.weight.detach().clone()
    deltas = Deltas({"unet.": network}, Delta())
    (change,) = (value for name, value in deltas.live().items() if name.startswith(DELTA + KEY))
    with torch.no_grad():
        change.fill_(1e-6)  # lost, if it were added in bfloat16 again and again
        for _ in range(1000):
            change.add_(1e-6)
    assert change.dtype == torch.float32 and float(change.detach().mean()) == pytest.approx(1.001e-3, rel=1e-3)
    assert key.weight.dtype == torch.bfloat16
    assert torch.equal(key.weight, (weight.float() + change.detach()).bfloat16())
