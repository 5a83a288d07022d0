import json
import math
import typing
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from personae.backbone import unet
from personae.backbone.places import GATE_RANK, PLACES, Token
from personae.backbone.schedule import schedule
from personae.backbone.unet import PRESETS, UNetDenoiser, open_folder, preset, save_pipeline
from personae.core import Batch, Client, ClientData, Images, Training, everything, pick, stream, under
from personae.errors import ArtefactError, ConfigError, MismatchedNames, ShapeError
from personae.local.fit import fit
from personae.personal.embedding import EMBEDDING, NULL_EMBEDDING
from personae.recipe import schema
from personae.testing import check_denoiser

FOLDABLE = [place for place in PLACES if place != "token"]
TIME_WIDTH = 64  # 4 x the 16 channels of LAYERS
LAYERS = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def drawn(**changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(**(LAYERS | changes))


@pytest.fixture
def folder(tmp_path):
    DDPMPipeline(drawn(), DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def inputs():
    return torch.randn(3, 1, 8, 8, generator=stream(1)), torch.tensor([0, 500, 999])


def own(model, count):
    """The client's vector for every one of `count` images."""
    return model.condition(Batch(torch.zeros(count), torch.zeros(count, dtype=torch.bool)))


def tiny(place="time", width=8, scale_shift=False):
    """The smallest preset; for "token", which needs attention, a U-Net as small that has some."""
    if place == "token":
        layers = drawn(resnet_time_scale_shift="scale_shift" if scale_shift else "default")
        model = UNetDenoiser(layers, schedule(), embedding_width=width, place=place)
    else:
        options = {"embedding_width": width, "place": place, "scale_shift": scale_shift}
        model = preset("tiny", schedule(), size=8, channels=1, **options)
    model.load(model.initial(stream(0)))
    return model


# --- opening a folder --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("width", [5, TIME_WIDTH])
@pytest.mark.parametrize("place", PLACES)
def test_with_a_zero_vector_an_opened_folder_gives_the_same_bits(folder, inputs, place, width):
    stock = UNet2DModel.from_pretrained(folder / "unet")(*inputs).sample
    model = open_folder(folder, embedding_width=width, place=place)
    values = model.initial(stream(0))
    model.load({**values, EMBEDDING: torch.zeros(1, width)})
    assert torch.equal(model.forward(*inputs, own(model, 3)), stock)
    model.load(values)
    assert not torch.allclose(model.forward(*inputs, own(model, 3)), stock, atol=1e-3)


@torch.no_grad()
def test_without_an_embedding_an_opened_folder_is_the_plain_model(folder, inputs):
    model = open_folder(folder)
    assert torch.equal(model.forward(*inputs, None), UNet2DModel.from_pretrained(folder / "unet")(*inputs).sample)
    assert model.params().keys() == dict(model.unet.named_parameters()).keys()


def test_a_folder_brings_its_own_schedule_and_names(folder):
    model = open_folder(folder, embedding_width=4)
    assert torch.equal(model.schedule.alpha_bar, DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod)
    bare = dict(UNet2DModel.from_pretrained(folder / "unet").named_parameters())
    assert model.params().keys() - bare.keys() == {EMBEDDING, NULL_EMBEDDING, "embedding_projection.weight"}
    assert bare.keys() <= model.params().keys() and model.sample_shape == (1, 8, 8)


def test_model_and_scheduler_may_lie_side_by_side(tmp_path, inputs):
    drawn().save_pretrained(tmp_path)
    DDIMScheduler(num_train_timesteps=50).save_pretrained(tmp_path)
    assert open_folder(tmp_path).schedule.num_timesteps == 50


def test_an_opened_folder_starts_from_its_own_weights_whatever_was_loaded(folder):
    model = open_folder(folder, embedding_width=4)
    model.load({name: torch.ones_like(value) for name, value in model.params().items()})
    saved, values = load_file(folder / WEIGHTS), model.initial(stream(0))
    assert all(torch.equal(values[name], value) for name, value in saved.items())


@pytest.mark.parametrize("classes", [{"num_class_embeds": 10}, {"class_embed_type": "timestep"}])
def test_a_class_conditional_model_is_refused(tmp_path, classes):
    drawn(**classes).save_pretrained(tmp_path)
    DDPMScheduler().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="already takes class labels"):
        open_folder(tmp_path, embedding_width=4)


def test_a_model_with_dropout_is_refused(tmp_path):
    drawn(dropout=0.1).save_pretrained(tmp_path)
    DDPMScheduler().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"has dropout 0\.1.*set dropout to 0 in .*config\.json"):
        open_folder(tmp_path)


def test_a_folder_without_a_scheduler_is_refused(tmp_path):
    drawn().save_pretrained(tmp_path)
    with pytest.raises(ArtefactError, match=r"no scheduler_config\.json"):
        open_folder(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    DDPMScheduler().save_pretrained(tmp_path)
    with pytest.raises(ArtefactError, match=r"no config\.json"):
        open_folder(tmp_path)


def test_another_kind_of_model_is_refused(folder):
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ArtefactError, match="holds a UNet2DConditionModel"):
        open_folder(folder)


def test_a_broken_config_is_refused(folder):
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(ArtefactError, match=r"config\.json in .* cannot be read"):
        open_folder(folder)


def test_missing_or_foreign_weights_are_refused(folder):
    weights = load_file(folder / WEIGHTS)
    save_file({name: value for name, value in weights.items() if name != "conv_in.bias"}, folder / WEIGHTS)
    with pytest.raises(ArtefactError, match=r"lack conv_in\.bias"):
        open_folder(folder)
    save_file(weights | {"stranger": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(ArtefactError, match="unknown stranger"):
        open_folder(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ArtefactError, match=r"weights in .* cannot be read"):
        open_folder(folder)


# --- one vector per image ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_vectors_of_another_shape_are_refused_where_diffusers_would_broadcast_them(inputs, place):
    model = tiny(place)
    width = own(model, 1).shape[1]
    for wrong in (torch.zeros(1, width), torch.zeros(3, 1), torch.zeros(3, width + 1), torch.zeros(3), None):
        with pytest.raises(ShapeError, match=rf"expected \[3, {width}\]"):
            model.forward(*inputs, wrong)


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES)
def test_every_image_is_bent_by_its_own_vector(inputs, place):
    model, (x_t, t) = tiny(place), inputs
    mixed = model.condition(Batch(x_t, torch.tensor([False, True, False])))
    both = model.forward(x_t, t, mixed)
    for i in range(3):
        alone = model.forward(x_t[i : i + 1], t[i : i + 1], mixed[i : i + 1])
        assert torch.allclose(alone[0], both[i], atol=1e-5)
    assert not torch.allclose(both[1], model.forward(x_t, t, own(model, 3))[1], atol=1e-3)


def test_an_unknown_place_is_refused():
    with pytest.raises(ConfigError, match="expected one of time, blocks, input, token, gate"):
        tiny("output")


def test_a_recipe_may_name_every_place():
    assert typing.get_args(typing.get_type_hints(schema.Embedding)["place"]) == PLACES == typing.get_args(unet.Place)


def test_a_token_is_refused_where_there_is_no_attention():
    """The message names the presets that have some, and no other."""
    having = ("tiny_attention", "small", "cifar")
    told = '"tiny_attention", "small" and "cifar"'
    refused = rf"no attention layers \(the presets {told} have some\).* place: time, blocks, input, gate$"
    options = {"size": 8, "channels": 1, "embedding_width": 4, "place": "token"}
    with torch.device("meta"):
        for name in PRESETS:
            with nullcontext() if name in having else pytest.raises(ConfigError, match=refused):
                preset(name, schedule(), **options)


@pytest.mark.parametrize("place", PLACES)
def test_every_place_keeps_the_contract_of_denoisers(inputs, place):
    one_level = {"block_out_channels": (16,), "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    layers = drawn(**one_level, class_embed_type="identity" if place == "time" else None)  # with attention midway
    check_denoiser(
        lambda: UNetDenoiser(deepcopy(layers), schedule(), embedding_width=8, place=place),
        Batch(inputs[0], torch.tensor([False, True, False])),
    )


@torch.no_grad()
def test_a_token_adds_its_value_by_its_share_of_the_attention():
    """Against one head and one pixel after another, with the softmax written out."""
    attention = drawn().mid_block.attentions[0]
    head = Token(attention, 3)
    head.weight.copy_(torch.randn(head.weight.shape, generator=stream(0)))
    x, vectors = torch.randn(2, 16, 4, 4, generator=stream(1)), torch.randn(2, 3, generator=stream(2))
    got = head(vectors, attention, x, torch.zeros_like(x))
    pixels = attention.group_norm(x.flatten(2)).transpose(1, 2)
    query, keys = attention.to_q(pixels), attention.to_k(pixels)
    key, value = (vectors @ head.weight.T).chunk(2, dim=1)
    width = 16 // attention.heads
    for image in range(2):
        for pixel in range(16):
            seen = torch.zeros(16)
            for part in (slice(h * width, (h + 1) * width) for h in range(attention.heads)):
                all_keys = torch.cat([keys[image, :, part], key[image : image + 1, part]])
                share = (all_keys @ query[image, pixel, part] / width**0.5).softmax(0)[-1]
                seen[part] = share * value[image, part]
            expected = attention.to_out[0].weight @ seen
            assert torch.allclose(got[image].flatten(1)[:, pixel], expected, atol=1e-5)


# --- folding -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("width", [5, 128], ids=["narrow", "as wide as time"])
@pytest.mark.parametrize("place", FOLDABLE)
def test_folded_equals_unfolded_and_survives_stock_diffusers(tmp_path, inputs, place, width, scale_shift):
    model = tiny(place, width, scale_shift=scale_shift)
    folded = model.folded()
    assert type(folded) is UNet2DModel and folded.config.class_embed_type is None
    difference = (folded(*inputs).sample - model.forward(*inputs, own(model, 3))).abs().max()
    assert difference <= 2e-6  # 0.7e-6 where it was measured; outputs are near 1
    folded.save_pretrained(tmp_path)
    assert torch.equal(UNet2DModel.from_pretrained(tmp_path)(*inputs).sample, folded(*inputs).sample)


@torch.no_grad()
def test_folding_leaves_the_model_alone(inputs):
    model = tiny("blocks")
    before = model.params()
    model.folded().conv_in.bias += 1
    assert all(torch.equal(before[name], value) for name, value in model.params().items())


@torch.no_grad()
@pytest.mark.parametrize("place", FOLDABLE)
def test_a_saved_pipeline_opens_in_stock_diffusers_and_here(tmp_path, inputs, place):
    model = tiny(place)
    save_pipeline(model, tmp_path / "anna")
    expected = model.forward(*inputs, own(model, 3))
    stock = DDPMPipeline.from_pretrained(tmp_path / "anna").unet
    assert torch.allclose(stock(*inputs).sample, expected, atol=2e-6)
    assert torch.equal(open_folder(tmp_path / "anna").forward(*inputs, None), stock(*inputs).sample)


def test_a_token_is_not_exported_and_nothing_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"train with one of time, blocks, input, gate$"):
        save_pipeline(tiny("token"), tmp_path / "anna")
    assert list(tmp_path.iterdir()) == []


def test_a_gate_changes_the_second_convolutions_alone_and_by_its_rank():
    model = tiny("gate")
    plain = dict(model.unet.named_parameters())
    changed = {n: p - plain[n] for n, p in model.folded().named_parameters() if not torch.equal(p, plain[n])}
    assert changed.keys() == {n for n in plain if n.endswith(".conv2.weight")}
    assert {int(torch.linalg.matrix_rank(c.flatten(1), rtol=1e-5)) for c in changed.values()} == {GATE_RANK}


# --- sizes -------------------------------------------------------------------------------------------------------


def count(arrays):
    return sum(value.numel() for value in arrays.values())


@pytest.mark.parametrize(
    ("name", "millions"), [("tiny", 0.268), ("tiny_attention", 0.285), ("small", 1.708), ("cifar", 35.746)]
)
def test_presets_have_their_published_size(name, millions):
    with torch.device("meta"):
        model = preset(name, schedule(), size=32, channels=3)
    assert count(model.live()) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("place", PLACES)
def test_a_new_client_trains_few_numbers(place):
    with torch.device("meta"):
        small = preset("small", schedule(), size=8, channels=1, embedding_width=128, place=place).live()
        cifar = preset("cifar", schedule(), size=32, channels=3, embedding_width=512, place=place).live()
    personal = under("embedding.")
    assert count(pick(small, personal)) == 128 and 128 / count(small) <= 1e-4
    assert count(pick(cifar, personal)) == 512 and 512 / count(cifar) <= 1e-4


@pytest.mark.parametrize(
    ("name", "size", "nearest"),
    [("tiny", 9, 8), ("small", 10, 8), ("small", 15, 16), ("cifar", 3, 8), ("cifar", 30, 32)],
)
def test_a_size_that_cannot_be_halved_names_the_nearest_that_can(name, size, nearest):
    with pytest.raises(ConfigError, match=rf"found {size}; set data\.size to {nearest}$"):
        preset(name, schedule(), size=size, channels=1)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match="expected one of tiny, tiny_attention, small, cifar"):
        preset("huge", schedule(), size=8, channels=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_paper_preset_trains_for_twenty_steps():
    """Ten of the whole model, then ten of a new client's vector alone, which leave the rest in its bits."""
    model = preset("cifar", schedule(), size=32, channels=3, embedding_width=512)
    model.load(model.initial(stream(0)))
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=stream(1))
    client = Client("c0", ClientData(Images(pixels), Images(pixels)), model, stream(2))
    start = model.params()
    assert math.isfinite(fit(client, everything, Training(10, 1e-4, 1)).loss)
    trained = model.params()
    assert not any(torch.equal(trained[name], start[name]) for name in (EMBEDDING, "conv_in.weight", "conv_out.weight"))
    assert math.isfinite(fit(client, under("embedding."), Training(10, 1e-2, 1)).loss)
    after = model.params()
    assert [name for name in after if not torch.equal(after[name], trained[name])] == [EMBEDDING]


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_a_client_vector_is_drawn_without_building_a_network(monkeypatch, place):
    model = tiny(place)
    whole = model.initial(stream(5))
    monkeypatch.setattr(unet, "_drawn", lambda *_: pytest.fail("a U-Net was built"))
    alone = model.initial(stream(5), under("embedding."))
    assert alone.keys() == {EMBEDDING} and torch.equal(alone[EMBEDDING], whole[EMBEDDING])


def test_initial_values_come_from_the_stream_and_leave_the_global_generator_alone():
    model, state = tiny("blocks"), torch.get_rng_state()
    first, again, other = (model.initial(stream(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.keys() == model.live().keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])


def test_building_opening_and_folding_leave_the_global_generator_alone(folder):
    state = torch.get_rng_state()
    opened = open_folder(folder, embedding_width=5)
    tiny("blocks").folded()
    opened.folded()
    assert torch.equal(torch.get_rng_state(), state)


def test_load_refuses_another_models_values_before_anything_changes():
    model = tiny()
    before = model.params()
    shifted = {name: value + 1 for name, value in before.items()}
    with pytest.raises(MismatchedNames, match=r"1 missing \(conv_in.weight\)"):
        model.load({name: value for name, value in shifted.items() if name != "conv_in.weight"})
    with pytest.raises(ShapeError, match=r"embedding.weight is \[1, 9\], expected \[1, 8\]"):
        model.load({**shifted, EMBEDDING: torch.zeros(1, 9)})
    assert all(torch.equal(before[name], value) for name, value in model.params().items())


def test_params_are_copies_and_live_are_the_parameters():
    model = tiny()
    model.params()["conv_in.bias"].fill_(7)
    assert not (model.live()["conv_in.bias"] == 7).any()
    assert model.live()["conv_in.bias"] is model.unet.conv_in.bias


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_a_zero_vector_can_learn(inputs, place):
    """The null vector starts from zero: no place may make that a point that gradients do not leave."""
    model = tiny(place)
    everybody = model.condition(Batch(inputs[0], torch.ones(3, dtype=torch.bool)))
    model.forward(*inputs, everybody).square().mean().backward()
    assert model.live()[NULL_EMBEDDING].grad.abs().min() > 1e-6


@sdpa_kernel(SDPBackend.MATH)  # the others have no rule for vmap yet
@pytest.mark.parametrize("place", PLACES)
def test_per_example_gradients_of_the_vector_match_one_backward_pass_each(inputs, place):
    model, (x_t, t) = tiny(place), inputs
    noise = torch.randn(x_t.shape, generator=stream(2))

    def loss(vector, x_t, t, noise):
        cond = functional_call(model.part, {EMBEDDING: vector}, (torch.zeros(1, dtype=torch.bool),))
        return (model.forward(x_t[None], t[None], cond) - noise[None]).square().mean()

    vector = model.live()[EMBEDDING]
    together = vmap(grad(loss), in_dims=(None, 0, 0, 0))(vector.detach(), x_t, t, noise)
    for i in range(len(x_t)):
        (alone,) = torch.autograd.grad(loss(vector, x_t[i], t[i], noise[i]), vector)
        assert alone.abs().max() > 1e-3
        assert torch.allclose(together[i], alone, atol=1e-6)
