"""What every method keeps, from the shapes of layers: as measured on a small model, and of Stable Diffusion 1.5."""

import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from personae.continual import CONTINUAL, learn
from personae.core import State
from personae.personal.delta import target_layers
from personae.testing.check_continual import SEED, TASKS, TRAINING, client_for
from personae.testing.tiny_pipeline import tiny_networks

MIB = 2**20
RANK = {"small": 2, "stable diffusion 1.5": 16}
WIDTH = {"small": 16, "stable diffusion 1.5": 768}
"""Of text features, and so of a word's vector."""

OPTIONS = runpy.run_path(str(Path(__file__).with_name("small.py")))["OPTIONS"]


def test_every_method_is_here():
    assert FORMULAS.keys() == CONTINUAL.keys()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """(targets, which model) to the shapes of layers by name."""
    with torch.device("meta"):
        large = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )

    unets = {"small": tiny_networks(tmp_path_factory.mktemp("tokenizer")).unet, "stable diffusion 1.5": large}

    def told(name, which):
        targets = getattr(CONTINUAL[name](**OPTIONS.get(name, {"rank": 2})), "layers", "cross_kv")
        return {n: tuple(x.weight.shape) for n, x in target_layers({"unet.": unets[which]}, targets, "this").items()}

    return told


def dense(layers):
    return 4 * sum(m * n for m, n in layers.values())


def adapter(layers, rank):
    return 4 * rank * sum(m + n for m, n in layers.values())


def bitmap(layers):
    return sum(-(-m * n // 8) for m, n in layers.values())


def pairs(layers, width, tokens):
    return 4 * tokens * (width + sum(m for m, _ in layers.values()))


def sums(layers):
    """In float64: what is read, once where several layers read the same; and what each says to it."""
    read = {re.sub(r"attn1\.to_[qkv]|.*attn2\.to_[kv]", "the same", name): n for name, (_, n) in layers.items()}
    return 8 * (sum(n * n for n in read.values()) + sum(m * n for m, n in layers.values()))


# Bytes that do not grow, and bytes of each concept beside its word.
FORMULAS = {
    "textual_inversion": lambda layers, rank, width, tokens: (0, 0),
    "sequential_lora": lambda layers, rank, width, tokens: (adapter(layers, rank), 0),
    "merged_lora": lambda layers, rank, width, tokens: (dense(layers), 0),
    "dreambooth": lambda layers, rank, width, tokens: (adapter(layers, rank), 0),
    "ewc": lambda layers, rank, width, tokens: (2 * adapter(layers, rank), 0),
    "dsc": lambda layers, rank, width, tokens: (adapter(layers, rank), adapter(layers, rank)),
    "c_lora": lambda layers, rank, width, tokens: (dense(layers), 0),
    "orthogonal": lambda layers, rank, width, tokens: (dense(layers), 0),
    "cns": lambda layers, rank, width, tokens: (dense(layers) + 2 * bitmap(layers), 0),
    "custom_diffusion": lambda layers, rank, width, tokens: (dense(layers), pairs(layers, width, tokens)),
    "mix_of_show": lambda layers, rank, width, tokens: (dense(layers) + sums(layers), 0),
}
TOKENS = 6
"""Of "<rex> dog" and "a <rex> dog", with the end's."""


def kept(name, layers, which, tokens=TOKENS):
    constant, each = FORMULAS[name](layers, RANK[which], WIDTH[which], tokens)
    return constant, each + 4 * WIDTH[which]


@pytest.mark.parametrize("name", FORMULAS)
def test_a_small_model_keeps_what_the_shapes_say(name, shapes, build):
    method, state = CONTINUAL[name](**OPTIONS.get(name, {"rank": 2})), State()
    constant, each = kept(name, shapes(name, "small"), "small")
    for count in (1, 2, 3):
        client = client_for(method, build(method.parts, TASKS[:count]), count)
        state = learn(method, replace(TRAINING, steps=1), client, state, SEED)
        assert replace(state, facts={}).num_bytes() == constant + count * each


def test_stable_diffusion(shapes, capsys):
    """Against sizes counted from its configuration by hand: an adapter of rank 16 on keys and values 3.0 MiB, these
    themselves 73.1 MiB, a bit for each of them 2.29 MiB, a word 3 KiB."""
    told = {name: kept(name, shapes(name, "stable diffusion 1.5"), "stable diffusion 1.5", 8) for name in FORMULAS}
    with capsys.disabled():
        print(f"\n{'stable diffusion 1.5':25}{'constant, MiB':>15}{'a concept, MiB':>16}")
        for name, (constant, each) in told.items():
            print(f"{name:25}{constant / MIB:>15.1f}{each / MIB:>16.3f}")
    assert told["textual_inversion"] == (0, 3 * 2**10)
    expected = {
        "sequential_lora": 3.0, "dreambooth": 3.0, "ewc": 6.0, "dsc": 3.0, "c_lora": 73.1, "orthogonal": 73.1,
        "merged_lora": 73.1, "custom_diffusion": 73.1, "cns": 73.1 + 2 * 2.29, "mix_of_show": 1452.8,
    }  # fmt: skip
    assert {name: told[name][0] / MIB for name in expected} == pytest.approx(expected, abs=0.05)
    assert told["dsc"][1] / MIB == pytest.approx(3.0, abs=0.05)
    assert told["custom_diffusion"][1] / MIB == pytest.approx(0.8, abs=0.05)
