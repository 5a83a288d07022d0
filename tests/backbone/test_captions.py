"""A pipeline with two text encoders, as XL has them: what its U-Net is told, by us and by diffusers' own pipeline."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from personae.backbone.pipeline import COMPONENTS_XL, open_pipeline, save_pipeline
from personae.backbone.text2image import TextToImage, Vector
from personae.core import Batch, Client, ClientData, Images, Training, everything, nothing, stream, under
from personae.errors import ArtefactError, ConfigError, MismatchedNames
from personae.infer.sample import sample
from personae.local.fit import fit
from personae.personal.lora import TEXT, TEXT_2, UNET, Lora
from personae.personal.tokens import Words
from personae.testing import check_denoiser
from personae.testing.tiny_pipeline import SCHEDULE, tiny_networks, tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Only read it."""
    return tiny_pipeline(tmp_path_factory.mktemp("xl") / "xl", "smallest_xl")


@pytest.fixture
def make(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return lambda opened=nothing, **parts: TextToImage(tiny_networks(folder, "smallest_xl"), SCHEDULE, opened, **parts)


def pipeline(folder):
    return StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)


CAPTIONS = ("a dog left of a tree", "a cat", "")
LATENTS, T = torch.randn(3, 4, 4, 4, generator=stream(0)), torch.tensor([1, 200, 900])
BATCH = Batch(LATENTS, torch.tensor([False, False, False]), CAPTIONS)
NULL = Batch(LATENTS, torch.tensor([True, True, True]), CAPTIONS)
PARTS = {"lora": Lora(2, "self+cross+text"), "words": Words(("<rex>",), "dog", 2)}


def idle(name):
    """Rows of words that no caption has, and what comes behind the first text encoder's last layer but one."""
    after = ("encoder.layers.1.", "final_layer_norm.")
    first = name.startswith(TEXT) and name.removeprefix(TEXT + "text_model.").startswith(after)
    return "token_embedding" in name or "position_embedding" in name or first


@pytest.mark.parametrize("opened", [everything, under(UNET), under(TEXT_2)])
def test_the_contract_of_denoisers(make, opened):
    check_denoiser(lambda: make(opened), Batch(LATENTS, torch.tensor([False, False, True]), CAPTIONS), idle=idle)


@pytest.mark.parametrize("parts", [PARTS, {"vector": Vector(32)}, {"vector": Vector(3, "token")}])
def test_the_contract_with_parts(make, parts):
    batch = Batch(LATENTS, torch.tensor([False, False, True]), ("a <rex>", "a cat", "a dog"))
    check_denoiser(lambda: make(**parts), batch, idle=idle)


@torch.no_grad()
def test_the_unet_is_told_what_diffusers_tells_it(folder):
    """Recorded where diffusers' own pipeline calls it, with guidance: zeros, and then the caption."""
    model, theirs = open_pipeline(folder), pipeline(folder)
    theirs.set_progress_bar_config(disable=True)
    calls = []
    theirs.unet.register_forward_hook(
        lambda _, inputs, named, output: calls.append((inputs, named, output[0])), with_kwargs=True
    )
    theirs(prompt=list(CAPTIONS), num_inference_steps=1, guidance_scale=3.0, output_type="latent", latents=LATENTS)
    ((x_t, t), named, output), *_ = calls
    told = [model.condition(batch) for batch in (NULL, BATCH)]
    assert torch.allclose(torch.cat([each.text for each in told]), named["encoder_hidden_states"], atol=1e-5)
    also = named["added_cond_kwargs"]
    assert torch.allclose(torch.cat([each.pooled for each in told]), also["text_embeds"], atol=1e-5)
    assert also["time_ids"].tolist() == [[8, 8, 0, 0, 8, 8]] * 6
    ours = [model.forward(x, t.expand(3), each) for x, each in zip(x_t.chunk(2), told, strict=True)]
    assert torch.allclose(torch.cat(ours), output, atol=1e-5)


@torch.no_grad()
def test_captions_are_encoded_as_by_diffusers(folder):
    model, theirs = open_pipeline(folder), pipeline(folder)
    text, null, pooled, null_pooled = theirs.encode_prompt(list(CAPTIONS), device="cpu")
    told, alone = model.condition(BATCH), model.condition(NULL)
    for ours, other in ((told.text, text), (told.pooled, pooled), (alone.text, null), (alone.pooled, null_pooled)):
        assert torch.allclose(ours, other, atol=1e-5)
    assert not null.any(), "zeros"
    assert not torch.allclose(told.text[2], alone.text[2]), "an empty caption is a text like others"


@torch.no_grad()
def test_a_pipeline_may_lead_away_from_the_empty_text_instead(folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "xl")
    index = json.loads((own / "model_index.json").read_text("utf-8"))
    (own / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}), "utf-8")
    model, theirs = open_pipeline(own), pipeline(own)
    _, null, _, null_pooled = theirs.encode_prompt(list(CAPTIONS), device="cpu")
    alone = model.condition(NULL)
    assert torch.allclose(alone.text, null, atol=1e-5) and torch.allclose(alone.pooled, null_pooled, atol=1e-5)
    assert null.any() and torch.equal(alone.text[0], model.condition(BATCH).text[2])
    save_pipeline(model, tmp_path / "again")
    assert pipeline(tmp_path / "again").config.force_zeros_for_empty_prompt is False
    (own / "model_index.json").write_text("{", "utf-8")
    with pytest.raises(ArtefactError, match="model_index"):
        open_pipeline(own)


@pytest.mark.parametrize("end", ["the tokenizer's", 2])
@torch.no_grad()
def test_new_words_are_read_as_by_diffusers(folder, tmp_path, end):
    """2 stands in the published files, and makes the highest number of a text its end."""
    own = shutil.copytree(folder, tmp_path / "xl")
    for path in own.glob("text_encoder*/config.json"):
        config = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps(config if end != 2 else {**config, "eos_token_id": end}), "utf-8")
    model, theirs = open_pipeline(own, words=PARTS["words"]), pipeline(own)
    params = {name: torch.randn(v.shape, generator=stream(6, name)) for name, v in model.params().items()}
    model.load(params)
    for front, each in (("tokens.", ""), ("tokens_2.", "_2")):
        encoder, tokenizer = getattr(theirs, f"text_encoder{each}"), getattr(theirs, f"tokenizer{each}")
        theirs.load_textual_inversion(params[f"{front}<rex>"], "<rex>", text_encoder=encoder, tokenizer=tokenizer)
    captions = ["a <rex> dog", "a cat", "a <rex>"]
    text, _, pooled, _ = theirs.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
    told = model.condition(Batch(LATENTS, BATCH.unconditional, tuple(captions)))
    assert torch.allclose(told.text, text, atol=1e-5) and torch.allclose(told.pooled, pooled, atol=1e-5)


def test_the_second_tokenizer_fills_up_with_another_token(folder):
    model = open_pipeline(folder)
    first, second = (reader.tokens(["a dog"])[0] for reader in model.captions.readers)
    assert torch.equal(first[:4], second[:4]) and len(first) == len(second) == 12
    mark = model.captions.readers[1].tokenizer.get_vocab()["!"]
    assert set(first[4:].tolist()) == {first[3].item()} and set(second[4:].tolist()) == {mark}


def test_names_are_those_of_published_files(make):
    names = set(make(everything).params())
    assert {f"{TEXT_2}text_projection.weight", f"{TEXT_2}text_model.final_layer_norm.weight"} <= names
    assert all(name.removeprefix(TEXT).startswith("text_model.") for name in names if name.startswith(TEXT))
    adapted = set(make(**PARTS).params())
    assert {name for name in adapted if ".lora_" not in name} == {"tokens.<rex>", "tokens_2.<rex>"}
    assert {TEXT, TEXT_2, UNET} == {name.split(".")[0] + "." for name in adapted if ".lora_" in name}
    assert f"{TEXT_2}text_model.encoder.layers.1.self_attn.q_proj.lora_A" in adapted


@pytest.mark.parametrize("parts", [{"lora": PARTS["lora"]}, PARTS, {"vector": Vector(5)}, {"opened": everything}])
def test_what_can_train_does(make, parts):
    model = make(**parts)
    model.load(model.initial(stream(1)))
    before, base = model.params(), {name: value.clone() for name, value in model.base().items()}
    images = Images(LATENTS, captions=("a <rex>", "a cat", "a dog") if "words" in parts else CAPTIONS)
    fit(Client("a", ClientData(images, images), model, stream(1)), everything, Training(2, 0.1, 3))
    after = model.params()
    may = [n for n in after if not idle(n) and not n.endswith("null_embedding.weight")]
    assert may and all(not torch.equal(before[name], after[name]) for name in may)
    assert all(torch.equal(base[name], value) for name, value in model.base().items())


@pytest.mark.parametrize("parts", [{"lora": Lora(2, "self+cross+text", alpha=3)}, {"vector": Vector(5)}])
@torch.no_grad()
def test_a_saved_pipeline_with_parts_in_its_weights_draws_the_same(make, tmp_path, parts):
    model = make(**parts)
    model.load({name: torch.randn(v.shape, generator=stream(3, name)) for name, v in model.params().items()})
    save_pipeline(model, tmp_path / "xl")
    opened, theirs, bare = open_pipeline(tmp_path / "xl"), pipeline(tmp_path / "xl"), make()
    expected = model.forward(LATENTS, T, model.condition(BATCH))
    text, _, pooled, _ = theirs.encode_prompt(list(CAPTIONS), device="cpu", do_classifier_free_guidance=False)
    also = {"text_embeds": pooled, "time_ids": torch.tensor([[8.0, 8, 0, 0, 8, 8]] * 3)}
    found = theirs.unet(LATENTS, T, encoder_hidden_states=text, added_cond_kwargs=also).sample
    assert torch.allclose(expected, opened.forward(LATENTS, T, opened.condition(BATCH)), atol=1e-4)
    assert torch.allclose(expected, found, atol=1e-4)
    assert not torch.allclose(expected, bare.forward(LATENTS, T, bare.condition(BATCH)), atol=1e-2)
    assert theirs("a dog", num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)


def test_it_is_sampled_from_as_by_diffusers(folder):
    drawn = sample(open_pipeline(folder), 3, stream(0), steps=2, guidance=3.0, captions=CAPTIONS)
    assert drawn.shape == (3, 3, 8, 8) and not torch.equal(drawn[0], drawn[1])
    theirs = pipeline(folder)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = theirs.scheduler.from_config(theirs.scheduler.config, timestep_spacing="trailing")
    rng = stream(0)
    latents = torch.randn(3, 4, 4, 4, generator=rng)
    images = theirs(list(CAPTIONS), num_inference_steps=2, guidance_scale=3.0, latents=latents, output_type="pt").images
    assert torch.allclose(images, (drawn / 2 + 0.5).clamp(0, 1), atol=1e-4)


# --- folders that are not whole ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", COMPONENTS_XL)
def test_a_missing_component_is_named(folder, tmp_path, part):
    own = shutil.copytree(folder, tmp_path / "xl")
    shutil.rmtree(own / part)
    with pytest.raises(ArtefactError, match=f"it has no {part}; .* as StableDiffusionXLPipeline"):
        open_pipeline(own)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"addition_time_embed_dim": 5}, r"takes 44 numbers .* this pipeline gives 50"),
        ("text_encoder_2/config.json", {"attention_dropout": 0.1}, r"the text_encoder_2 in .* has dropout 0\.1"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "latents_mean"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(folder, tmp_path, file, changes, message):
    own = shutil.copytree(folder, tmp_path / "xl")
    config = json.loads((own / file).read_text("utf-8"))
    (own / file).write_text(json.dumps({**config, **changes}), "utf-8")
    with pytest.raises((ArtefactError, ConfigError), match=message):
        open_pipeline(own)


def test_parts_of_a_pipeline_with_one_text_encoder_are_refused(make, tmp_path):
    one = TextToImage(tiny_networks(tmp_path), SCHEDULE, nothing, lora=PARTS["lora"])
    with pytest.raises(MismatchedNames, match="missing"):
        make(lora=PARTS["lora"]).load(one.params())
