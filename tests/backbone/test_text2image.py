"""A text-to-image pipeline as a denoiser: captions matter, pictures become latents, other tools read what it saves."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from personae.backbone.pipeline import COMPONENTS, SIZES, fresh, open_pipeline, save_pipeline
from personae.backbone.text2image import TextToImage, Vector
from personae.core import Batch, Client, ClientData, Images, Training, everything, nothing, stream, under
from personae.errors import ArtefactError, ConfigError, ShapeError
from personae.infer.sample import sample
from personae.local.fit import fit
from personae.personal.delta import Delta
from personae.personal.lora import TEXT, UNET, Lora
from personae.personal.tokens import Words
from personae.testing import check_denoiser
from personae.testing.tiny_pipeline import SCHEDULE, tiny_networks


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_networks(tmp_path_factory.mktemp("tokenizer")).tokenizer


@pytest.fixture
def make(tmp_path_factory):
    """The smallest networks that have every kind of layer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    return lambda opened=everything, **parts: TextToImage(tiny_networks(folder), SCHEDULE, opened, **parts)


BATCH = Batch(
    torch.randn(3, 3, 8, 8, generator=stream(0)), torch.tensor([False, False, True]), ("a dog", "a cat", "a dog")
)


def unused(name):
    """Rows of words that no caption has are not trained; the last norm's are, and everything else."""
    return "token_embedding" in name or "position_embedding" in name


@pytest.mark.parametrize("opened", [everything, under(UNET), under(TEXT)])
def test_the_contract_of_denoisers(make, opened):
    latents = Batch(torch.randn(3, 4, 4, 4, generator=stream(0)), BATCH.unconditional, BATCH.captions)
    check_denoiser(lambda: make(opened), latents, idle=unused)


PARTS = {"lora": Lora(2, "self+cross+text"), "delta": Delta("cross"), "words": Words(("<rex>",), "dog", 2)}


def test_the_contract_with_parts(make):
    latents = Batch(torch.randn(3, 4, 4, 4, generator=stream(0)), BATCH.unconditional, ("a <rex>", "a cat", "a dog"))
    check_denoiser(lambda: make(nothing, **PARTS), latents)


def test_parts_have_names_of_their_own_and_hide_what_peft_calls_the_rest(make):
    model, bare = make(nothing, **PARTS), make(nothing)
    assert set(model.base()) == set(bare.base())
    assert {name.rsplit(".", 1)[1] for name in model.params()} == {"lora_A", "lora_B", "weight", "<rex>"}
    model.load(model.initial(stream(1)))
    assert torch.equal(model.condition(BATCH).text, bare.condition(BATCH).text)
    t, cond = torch.tensor([1, 2, 3]), bare.condition(BATCH)
    latents = bare.encode(BATCH.images)
    assert torch.equal(model.forward(latents, t, cond), bare.forward(latents, t, cond)), "new parts add nothing"


def test_a_new_word_is_read_where_it_stands(make):
    model = make(nothing, **PARTS)
    plain, dog = make(nothing).captions.readers[0].tokens(["a dog"]), model.captions.readers[0].tokens(["a <rex> dog"])
    assert dog[0, :6].tolist() == [plain[0, 0], plain[0, 1], 535, 536, plain[0, 2], plain[0, 3]]
    model.load({**model.initial(stream(1)), "tokens.<rex>": torch.ones(2, 16)})
    told = model.condition(Batch(BATCH.images, BATCH.unconditional, ("a <rex>", "a dog", "a cat")))
    assert not torch.allclose(told.text[0], told.text[1])


def test_adapters_take_the_rank_that_is_loaded_or_nothing_changes(make):
    model, wide = make(nothing, **PARTS), make(nothing, **{**PARTS, "lora": Lora(5, "self+cross+text")})
    values = {name: torch.randn(v.shape, generator=stream(2, name)) for name, v in wide.params().items()}
    model.load(values)
    assert all(torch.equal(values[name], value) for name, value in model.params().items())
    with pytest.raises(ShapeError):
        model.load({**make(nothing, **PARTS).params(), "tokens.<rex>": torch.zeros(3, 16)})
    assert all(torch.equal(values[name], value) for name, value in model.params().items())


@pytest.mark.parametrize("parts", [{"words": PARTS["words"]}, {"vector": Vector(4, "token")}])
def test_what_bare_networks_have_no_weights_for_is_not_written(make, tmp_path, parts):
    with pytest.raises(ConfigError, match="cannot be written as a pipeline of its own"):
        save_pipeline(make(nothing, **parts), tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.parametrize(
    "parts",
    [
        {"lora": Lora(2, "self+cross+text", alpha=3)},
        {"delta": Delta("self+cross")},
        {"vector": Vector(5)},
        {"lora": Lora(2), "delta": Delta()},
    ],
)
def test_a_pipeline_with_parts_in_its_weights_draws_the_same(make, tmp_path, parts):
    model = make(nothing, **parts)
    model.load({name: torch.randn(v.shape, generator=stream(3, name)) for name, v in model.params().items()})
    before = model.params()
    save_pipeline(model, tmp_path / "pipeline")
    opened, bare = open_pipeline(tmp_path / "pipeline"), make(nothing)
    latents, t = torch.randn(3, 4, 4, 4, generator=stream(0)), torch.tensor([1, 200, 900])
    own = Batch(BATCH.images, torch.zeros(3, dtype=torch.bool), BATCH.captions)
    ours, theirs, without = (m.forward(latents, t, m.condition(own)) for m in (model, opened, bare))
    assert torch.allclose(ours, theirs, atol=1e-4) and not torch.allclose(ours, without, atol=1e-2)
    assert all(torch.equal(before[name], value) for name, value in model.params().items())


def test_changes_are_added_in_float32_to_weights_that_stay(make):
    model, bare = make(nothing, delta=Delta()), make(nothing)
    names = {
        f"unet.{name}"
        for name, _ in bare.unet.named_parameters()
        if name.endswith(("n2.to_k.weight", "n2.to_v.weight"))
    }
    assert set(model.params()) == {f"delta.{name}" for name in names} and set(model.base()) == set(bare.base())
    model.load({name: torch.full_like(value, 1e-6) for name, value in model.params().items()})
    assert all(torch.equal(bare.base()[name], value) for name, value in model.base().items())
    folded = {f"unet.{name}": value for name, value in model.folded().unet.named_parameters()}
    assert all(
        torch.equal(folded[name], value + 1e-6 * (name in names))
        for name, value in bare.base().items()
        if name in folded
    )
    with pytest.raises(ConfigError, match="freeze the base"):
        make(everything, delta=Delta())
    with pytest.raises(ConfigError, match="expected one of cross_kv, cross, self\\+cross"):
        Delta("everything")


def test_a_part_that_was_put_into_weights_and_taken_out_leaves_the_bases_bits(make, tmp_path):
    model, bare = make(nothing, lora=PARTS["lora"], vector=Vector(5)), make(nothing)
    nobody = model.initial(stream(1))
    model.load({name: torch.randn(value.shape, generator=stream(3, name)) for name, value in nobody.items()})
    save_pipeline(model, tmp_path / "pipeline")
    model.load({**nobody, "embedding.weight": torch.zeros(1, 5)})
    assert all(torch.equal(bare.base()[name], value) for name, value in model.base().items())
    latents, t = torch.randn(3, 4, 4, 4, generator=stream(0)), torch.tensor([1, 200, 900])
    alone = Batch(BATCH.images, torch.ones(3, dtype=torch.bool), BATCH.captions)  # the null vector adds nothing
    assert torch.equal(*(each.forward(latents, t, each.condition(alone)) for each in (model, bare)))


# --- a client's vector ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", [Vector(32), Vector(3), Vector(16, "token"), Vector(3, "token", "noise")])
def test_the_contract_with_a_vector(make, vector):
    latents = Batch(torch.randn(3, 4, 4, 4, generator=stream(0)), BATCH.unconditional, BATCH.captions)
    check_denoiser(lambda: make(nothing, vector=vector), latents)


def test_a_vector_is_a_few_numbers_and_the_null_one_stands_for_nobody(make):
    """32 is the width of this U-Net's time embedding, 16 of a token's vector: no projection is needed then."""
    bare = make(nothing)
    latents, t, alone = torch.randn(3, 4, 4, 4, generator=stream(0)), torch.tensor([1, 200, 900]), BATCH.unconditional
    expected = bare.forward(latents, t, bare.condition(BATCH))
    for vector, tolerance in ((Vector(32), 1e-6), (Vector(16, "token"), 0.05)):
        model = make(nothing, vector=vector)
        assert set(model.params()) == {"embedding.weight", "null_embedding.weight"}
        model.load({**model.initial(stream(1)), "embedding.weight": torch.full((1, vector.width), 3.0)})
        drawn = model.forward(latents, t, model.condition(BATCH))
        assert torch.allclose(drawn[alone], expected[alone], atol=tolerance), vector
        assert not torch.allclose(drawn[~alone], expected[~alone], atol=1e-3), vector


def test_several_clients_vectors_stand_side_by_side(make):
    model = make(nothing, vector=Vector(16, "token"))
    values = torch.randn(2, 16, generator=stream(4))
    model.load({**model.initial(stream(1)), "embedding.weight": values}, 2)
    latents, t = torch.randn(2, 4, 4, 4, generator=stream(0)), torch.tensor([5, 5])
    none, said = torch.zeros(2, dtype=torch.bool), ("a dog", "a cat")
    both = model.forward(latents, t, model.condition(Batch(latents, none, said, torch.tensor([0, 1]))))
    for row in (0, 1):
        model.load({**model.params(), "embedding.weight": values[row : row + 1]})
        told = model.condition(Batch(latents[:1], none[:1], said[row : row + 1]))
        assert torch.allclose(model.forward(latents[row : row + 1], t[:1], told)[0], both[row], atol=1e-5)


def test_a_place_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="place 'blocks'; expected at least 1, and for a text-to-image model of time"):
        Vector(4, "blocks")


def test_names_are_those_of_the_bare_models(make):
    model = make(under(UNET))
    assert set(model.params()) == {UNET + name for name, _ in model.unet.named_parameters()}
    bare = {name.removeprefix("text_model.") for name, _ in model.captions.readers[0].encoder.named_parameters()}
    assert set(model.base()) == {f"{TEXT}text_model.{name}" for name in bare}
    assert set(make(nothing).base()) == set(make().params())


def test_pictures_become_latents_and_latents_stay(make):
    model = make()
    assert model.sample_shape == (4, 4, 4) and model.image_shape == (3, 8, 8)
    latents = model.encode(BATCH.images)
    assert latents.shape == (3, 4, 4, 4) and torch.equal(model.encode(latents), latents)
    mean = model.vae.encode(BATCH.images).latent_dist.mean
    assert torch.allclose(latents, mean * model.vae.config.scaling_factor)
    assert torch.allclose(model.decode(latents), model.vae.decode(mean).sample, atol=1e-5)
    with pytest.raises(ShapeError, match=r"\[3, 9, 9\], expected \[3, 8, 8\] or latents \[4, 4, 4\]"):
        model.encode(torch.zeros(1, 3, 9, 9))


def test_an_unconditional_example_reads_the_empty_text(make):
    model = make()
    cond = model.condition(BATCH).text
    assert torch.equal(cond[2], model.condition(Batch(BATCH.images[:1], torch.tensor([False]))).text[0])
    assert not torch.allclose(cond[0], cond[1]) and not torch.allclose(cond[0], cond[2])


def test_what_was_told_is_not_remembered_when_the_text_encoder_changes(make):
    model = make(under(TEXT))
    with torch.no_grad():
        before = model.condition(BATCH).text
        model.load({name: value + 0.1 for name, value in model.params().items()})
        assert not torch.allclose(model.condition(BATCH).text, before)
    images = Images(torch.zeros(4, 4, 4, 4), captions=("a dog", "a cat", "a tree", "a dog"))
    with torch.no_grad():
        before = model.condition(BATCH).text
    fit(Client("a", ClientData(images, images), model, stream(1)), everything, Training(2, 0.1, 2))
    with torch.no_grad():
        assert not torch.allclose(model.condition(BATCH).text, before)


def test_a_caption_that_is_too_long_is_refused_not_cut(make):
    with pytest.raises(ConfigError, match=r"has 14 tokens, of which this model reads 12; shorten it"):
        make().captions.readers[0].tokens(["a dog " * 6])


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(make, tmp_path):
    save_pipeline(make(), tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_what_is_saved_opens_here_and_in_diffusers(make, folder):
    opened, model = open_pipeline(folder, everything), make()
    assert all(torch.equal(value, opened.params()[name]) for name, value in model.params().items())
    assert opened.schedule.prediction_type == "v_prediction"
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a dog left of a tree", num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)
    ids = pipeline.tokenizer("a dog", padding="max_length", return_tensors="pt")["input_ids"]
    assert torch.equal(ids, model.captions.readers[0].tokens(["a dog"]))
    told = model.condition(Batch(BATCH.images[:1], torch.tensor([False]), ("a dog",)))
    assert torch.allclose(pipeline.text_encoder(ids)[0], told.text, atol=1e-5)


def test_half_precision_is_half_the_size_and_leaves_the_model_alone(make, tmp_path):
    model = make()
    before = model.params()
    save_pipeline(model, tmp_path / "half", torch.float16)
    save_pipeline(model, tmp_path / "whole")
    assert all(torch.equal(value, before[name]) for name, value in model.params().items())
    half, whole = (
        (tmp_path / n / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size for n in ("half", "whole")
    )
    assert half < 0.65 * whole
    assert open_pipeline(tmp_path / "half").unet.dtype == torch.float32


def test_latents_are_not_cut_whatever_the_scheduler_says_or_leaves_out(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text("utf-8"))
    for clip in (None, True):
        path.write_text(
            json.dumps({k: v for k, v in {**config, "clip_sample": clip}.items() if v is not None}), "utf-8"
        )
        opened = open_pipeline(folder)
        for kind in (DDPMScheduler, DDIMScheduler):
            assert kind.from_config(dict(opened.schedule.config)).config.clip_sample is False


@pytest.mark.parametrize("part", COMPONENTS)
def test_a_missing_component_is_named(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(ArtefactError, match=f"it has no {part}; expected the folders"):
        open_pipeline(folder)


def test_a_folder_is_not_overwritten(make, folder):
    with pytest.raises(ArtefactError, match="nothing was overwritten"):
        save_pipeline(make(), folder)


@pytest.mark.parametrize("files", ["text_encoder/model.safetensors", "tokenizer/*.json", "vae/config.json"])
def test_a_damaged_file_is_named(folder, files):
    for path in folder.glob(files):
        path.write_bytes(b"{")
    with pytest.raises(ArtefactError, match=files.split("/")[0]):
        open_pipeline(folder)


def test_older_and_newer_readers_of_tokenizers_find_their_files(folder, tokenizer):
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text("utf-8"))
    assert vocabulary == tokenizer.get_vocab()
    assert len((folder / "tokenizer" / "merges.txt").read_text("utf-8").splitlines()) > 10


def test_networks_that_do_not_fit_each_other_are_refused(folder):
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**config, "dropout": 0.3}), "utf-8")
    with pytest.raises(ConfigError, match=r"the unet in .* has dropout 0\.3"):
        open_pipeline(folder)


def test_a_plain_pipeline_is_sampled_from(folder):
    drawn = sample(open_pipeline(folder), 2, stream(0), steps=2, guidance=2.0, captions=["a dog", "a cat"])
    assert drawn.shape == (2, 3, 8, 8) and not torch.equal(drawn[0], drawn[1])


def test_every_picture_goes_through_the_autoencoder_once(make, monkeypatch):
    model, seen = make(), []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda images: seen.append(images) or encode(images))
    pixels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=stream(2))
    images = Images(pixels, captions=BATCH.captions)
    twin = make()
    latents = Images(twin.encode(images.floats()), captions=BATCH.captions)
    for client in (
        Client("a", ClientData(images, images), model, stream(1)),
        Client("a", ClientData(latents, latents), twin, stream(1)),
    ):
        fit(client, everything, Training(20, 0.1, 2, optimizer="sgd"))
    assert sum(len(images) for images in seen) == 3
    assert all(torch.allclose(value, twin.params()[name], atol=1e-4) for name, value in model.params().items())


def test_captions_are_encoded_as_in_sampling_whatever_trained_before(make):
    model, clean = make(under(UNET)), make(under(UNET))
    images = Images(torch.zeros(4, 4, 4, 4), captions=("a dog",) * 4)
    fit(
        Client("a", ClientData(images, images), model, stream(1)), everything, Training(1, 0.1, 2, precision="bfloat16")
    )
    batch = Batch(BATCH.images[:1], torch.tensor([False]), ("a dog",))
    assert torch.equal(model.condition(batch).text, clean.condition(batch).text)


def test_names_are_those_of_published_files(make, folder):
    names = set(load_file(folder / "text_encoder" / "model.safetensors"))
    assert {name.removeprefix(TEXT) for name in make(under(TEXT)).params()} <= names
    assert all(name.startswith("text_model.") for name in names)


def test_weights_that_do_not_fit_are_refused(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"no weights")
    with pytest.raises(ArtefactError, match="cannot be read as UNet2DConditionModel"):
        open_pipeline(folder)


def test_fresh_networks_come_from_their_generator(tokenizer):
    one, two, other = (fresh("tiny", tokenizer, stream(seed)) for seed in (0, 0, 1))
    for part in ("vae", "text_encoder", "unet"):
        a, b, c = (next(iter(getattr(n, part).parameters())) for n in (one, two, other))
        assert torch.equal(a, b) and not torch.equal(a, c)
    model = TextToImage(one, SCHEDULE)
    assert model.image_shape == (3, 32, 32) and model.sample_shape == (8, 8, 8)
    total = sum(p.numel() for part in (one.vae, one.text_encoder, one.unet) for p in part.parameters())
    assert total < 10e6, "20 MB in half precision"
    with pytest.raises(ConfigError, match=f"expected one of {', '.join(SIZES)}"):
        fresh("huge", tokenizer, stream(0))


# --- folders as people have them --------------------------------------------------------------------------------------


def changed(folder, component, **values):
    path = folder / component
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def test_a_folder_of_half_precision_alone_opens(make, folder):
    for name in ("unet", "vae"):
        path = folder / name / "diffusion_pytorch_model.safetensors"
        path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    path = folder / "text_encoder" / "model.safetensors"
    path.rename(path.with_name("model.fp16.safetensors"))
    assert all(torch.equal(value, open_pipeline(folder).base()[name]) for name, value in make(nothing).base().items())


def test_a_folder_without_safetensors_says_how_to_get_some(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(
        ArtefactError, match="holds no weights in safetensors; save the pipeline again with safe_serial"
    ):
        open_pipeline(folder)


@pytest.mark.parametrize(
    ("component", "values", "message"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "no discrete betas"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "cosine"}, "scheduler_config.json cannot be read"),
        ("unet/config.json", {"sample_size": None}, "has no sample_size; set it"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(folder, component, values, message):
    changed(folder, component, **values)
    with pytest.raises(ArtefactError, match=message):
        open_pipeline(folder)


def test_a_model_for_inpainting_is_refused(make, folder):
    config = {**make(nothing).unet.config, "in_channels": 9}
    config.pop("_use_default_values", None)  # diffusers would take its own number for a key that stands there
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    with pytest.raises(ArtefactError, match=r"takes 9 channels and gives 4, the vae's latents have 4.*inpainting"):
        open_pipeline(folder)


def test_no_path_of_the_disk_leaves_with_an_export(folder, tmp_path):
    save_pipeline(open_pipeline(folder, lora=Lora(2)), tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files and not any(str(tmp_path).encode() in path.read_bytes() for path in files)


def test_new_adapters_have_the_rank_that_was_asked_for_whatever_was_loaded(make):
    model, wide = make(nothing, lora=Lora(2)), make(nothing, lora=Lora(5))
    expected = model.initial(stream(1))
    model.load(wide.initial(stream(2)))
    again = model.initial(stream(1))
    assert all(torch.equal(expected[name], again[name]) for name in expected)
    model.load(again)


def test_a_vector_in_the_weights_is_in_both_halves_of_guidance(make, tmp_path):
    """So that a pipeline draws as the run does without guidance only, which the guide says."""
    model = make(nothing, vector=Vector(32))
    model.load({**model.initial(stream(1)), "embedding.weight": 3 * torch.randn(1, 32, generator=stream(2))})
    save_pipeline(model, tmp_path / "pipeline")
    opened = open_pipeline(tmp_path / "pipeline")
    for guidance, same in ((1.0, True), (3.0, False)):
        drawn = [sample(m, 1, stream(0), steps=2, guidance=guidance, captions=["a dog"]) for m in (model, opened)]
        assert torch.allclose(*drawn, atol=1e-4) == same
