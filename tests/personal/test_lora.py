"""Adapters have the bare model's names, add nothing at first, and take the rank of what is loaded."""

import pytest
import torch
from torch import nn

from personae.core import stream
from personae.errors import ConfigError, ShapeError
from personae.personal.lora import PATTERNS, A, Adapters, B, Lora, is_lora, products, without_lora


class Block(nn.Module):
    """Named as a transformer block of diffusers is."""

    def __init__(self):
        super().__init__()
        self.attn1, self.attn2 = nn.Module(), nn.Module()
        for attention in (self.attn1, self.attn2):
            for name in ("to_q", "to_k", "to_v"):
                setattr(attention, name, nn.Linear(4, 6))
            attention.to_out = nn.ModuleList([nn.Linear(6, 4), nn.Dropout(0.0)])
        self.ff = nn.Linear(4, 4)

    def forward(self, x):
        for attention in (self.attn1, self.attn2):
            x = x + attention.to_out[0](attention.to_q(x) * attention.to_k(x) + attention.to_v(x))
        return self.ff(x)


@pytest.fixture
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.ModuleDict({"block": Block()})


X = torch.randn(2, 4, generator=stream(0))


def put(adapters, values):
    with torch.no_grad():
        for name, parameter in adapters.live().items():
            parameter.copy_(values[name])


def test_which_layers(network):
    with pytest.raises(ConfigError, match=r"text_encoder has no layer that targets 'self\+cross\+text' names"):
        Adapters({"unet.": network, "text_encoder.": nn.Linear(2, 2)}, Lora(2, "self+cross+text"))
    names = set(Adapters({"unet.": network}, Lora(2, "self")).live())
    layers = ("to_q", "to_k", "to_v", "to_out.0")
    assert names == {f"unet.block.attn1.{layer}{end}" for layer in layers for end in (A, B)}
    assert all(is_lora(name) for name in names) and not is_lora("unet.block.attn1.to_q.weight")


def test_keys_and_values_of_cross_attention_alone(network):
    names = set(Adapters({"unet.": network}, Lora(2, "cross_kv")).live())
    assert names == {f"unet.block.attn2.{layer}{end}" for layer in ("to_k", "to_v") for end in (A, B)}


def test_at_first_they_add_nothing_and_the_base_keeps_names_and_bits(network):
    block = network["block"]
    names, before = {name for name, _ in network.named_parameters()}, block(X)
    adapters = Adapters({"unet.": network}, Lora(2))
    put(adapters, adapters.initial(stream(1)))
    assert torch.equal(block(X), before)
    assert {without_lora(name) for name, _ in network.named_parameters()} - {None} == names
    one, two, other = (adapters.initial(stream(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["unet.block.attn1.to_q.lora_A"], other["unet.block.attn1.to_q.lora_A"])


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (8.0, 2.0)])
def test_what_they_add_is_scale_times_b_a(network, alpha, scale):
    plain = {name: network["block"].get_submodule(name) for name in ("attn1.to_q", "attn2.to_k")}
    expected = {name: layer.weight.detach().clone() for name, layer in plain.items()}
    bias = {name: layer.bias.detach().clone() for name, layer in plain.items()}
    adapters = Adapters({"unet.": network}, Lora(4, alpha=alpha))
    values = {name: torch.randn(value.shape, generator=stream(3, name)) for name, value in adapters.live().items()}
    put(adapters, values)
    for name in plain:
        changed = expected[name] + scale * values[f"unet.block.{name}{B}"] @ values[f"unet.block.{name}{A}"]
        got = network["block"].get_submodule(name)(X)
        assert torch.allclose(got, X @ changed.T + bias[name], atol=1e-5)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (8.0, 2.0)])
def test_products_are_b_a_by_the_name_of_the_weight_and_without_the_factor(network, alpha, scale):
    adapters = Adapters({"unet.": network}, Lora(4, "cross_kv", alpha))
    values = {name: torch.randn(value.shape, generator=stream(3, name)) for name, value in adapters.live().items()}
    put(adapters, values)
    found = products({**values, "tokens.<rex>": torch.ones(1, 4)})
    assert set(found) == {f"unet.block.attn2.{layer}.weight" for layer in ("to_k", "to_v")}
    for name, change in adapters.changes().items():
        assert torch.allclose(scale * found[name], change, atol=1e-5)
    own = products({f"x{A}": torch.tensor([[1.0, 2.0]]), f"x{B}": torch.tensor([[3.0], [0.0], [-1.0]])})
    assert own["x.weight"].tolist() == [[3.0, 6.0], [0.0, 0.0], [-1.0, -2.0]]
    assert products({"tokens.<rex>": torch.ones(1, 4)}) == {}


def test_ranks_come_with_what_is_loaded(network):
    adapters = Adapters({"unet.": network}, Lora(2))
    wide = {
        n: torch.zeros(5, v.shape[1]) if n.endswith(A) else torch.zeros(v.shape[0], 5)
        for n, v in adapters.live().items()
    }
    assert not adapters.differ(adapters.live()) and adapters.differ(wide)
    adapters.make_room(wide)
    assert {tuple(v.shape) for v in adapters.live().values()} == {(5, 4), (6, 5), (5, 6), (4, 5)}
    put(adapters, wide)
    assert network["block"](X).isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4), ()])
def test_what_has_no_rank_is_refused(network, shape):
    adapters = Adapters({"unet.": network}, Lora(2, alpha=4.0))
    with pytest.raises(ShapeError, match="8 adapters have no rank"):
        adapters.make_room({n: torch.zeros(shape) if n.endswith(A) else v for n, v in adapters.live().items()})


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 2, "targets": "all"}, {"rank": 2, "alpha": 0.0}])
def test_problems_are_named(options):
    with pytest.raises(ConfigError, match=f"one of {', '.join(PATTERNS)}".replace("+", r"\+")):
        Lora(**options)
