"""Adapters and words leave for other tools, which draw the same with them; and come back with the same values."""

import copy
import json
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from personae.artefact.formats import FORMS, Parts, export_parts
from personae.artefact.formats_read import described, import_parts
from personae.artefact.inspect import inspect_file
from personae.artefact.save import save_state
from personae.backbone.pipeline import open_pipeline
from personae.backbone.schedule import schedule
from personae.backbone.text2image import Networks, TextToImage
from personae.backbone.vocabulary import write_tokenizer
from personae.core import Batch, State, nothing, pick, stream, under
from personae.errors import ArtefactError, ConfigError, ShapeError
from personae.personal.lora import A, B, Lora
from personae.personal.tokens import Words
from personae.testing.tiny_pipeline import tiny_pipeline

# Within peft and transformers, of each other.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

VERSION = tuple(map(int, diffusers.__version__.split(".")[:2]))
READS_HEADER = VERSION >= (0, 34)
SCHEDULE = schedule(prediction_type="v_prediction", clip_sample=False)
LORA_FORMS = ("diffusers", "peft", "kohya")
X_T, T = torch.randn(2, 4, 4, 4, generator=stream(0)), torch.tensor([1, 400])
CAPTIONS = ("a <rex> dog", "a cat")
BATCH = Batch(X_T, torch.tensor([False, False]), CAPTIONS)
WORD = {"tokens.<rex>": torch.randn(2, 16, generator=stream(3))}
LAYER = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"

# (alpha, ranks that the layers take in turn)
CASES = {
    "alpha is the rank": (None, (2,)),
    "alpha is not": (3.0, (2,)),
    "ranks differ": (None, (2, 3, 2)),
    "ranks differ, alpha": (5.0, (2, 3, 2)),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), ["a", "dog", "cat"], max_tokens=600, length=12)


@pytest.fixture(scope="module")
def networks(tokenizer):
    """A function that makes the smallest networks with every kind of layer, always the same."""

    def make():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=4)
            text = CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=12,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            unet = UNet2DConditionModel(
                sample_size=4,
                block_out_channels=(8, 8),
                norm_num_groups=4,
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=2,
                cross_attention_dim=16,
            )
            return Networks(vae, copy.deepcopy(tokenizer), CLIPTextModel(text).eval(), unet.eval())

    return make


@pytest.fixture
def pipeline(networks):
    n, scheduler = networks(), DDIMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionPipeline(
        n.vae, n.text_encoder, n.tokenizer, n.unet, scheduler, None, None, requires_safety_checker=False
    )


@pytest.fixture(scope="module")
def model(networks):
    return TextToImage(networks(), SCHEDULE, nothing, lora=Lora(2, "self+cross+text"))


@pytest.fixture(scope="module")
def bare(networks):
    return TextToImage(networks(), SCHEDULE, nothing)


def drawn(model, ranks=(2,)):
    """Adapters that do something, of these ranks in turn."""
    layers = sorted(name.removesuffix(A) for name in model.params() if name.endswith(A))
    params = {}
    for number, layer in enumerate(layers):
        rank, shapes = ranks[number % len(ranks)], model.params()
        params[layer + A] = torch.randn(rank, shapes[layer + A].shape[1], generator=stream(1, layer, "A")) * 0.4
        params[layer + B] = torch.randn(len(shapes[layer + B]), rank, generator=stream(1, layer, "B")) * 0.4
    return params


@torch.no_grad()
def ours(networks, params, alpha=None):
    """(vectors of the captions, the U-Net's prediction) of our own model with these parts."""
    lora = Lora(2, "self+cross+text", alpha) if any(name.endswith(A) for name in params) else None
    words = Words(("<rex>",), "dog", 2) if "tokens.<rex>" in params else None
    model = TextToImage(networks(), SCHEDULE, nothing, lora=lora, words=words)
    model.load(params)
    told = model.condition(BATCH)
    return told.text, model.forward(X_T, T, told)


@torch.no_grad()
def theirs(numbers, text_encoder, unet):
    text = text_encoder(numbers)[0]
    return text, unet(X_T, T, encoder_hidden_states=text).sample


@torch.no_grad()
def apart(one, other):
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def read_by_diffusers(pipeline, files, numbers):
    pipeline.load_lora_weights(str(files[0].parent), weight_name=files[0].name)
    return theirs(numbers, pipeline.text_encoder, pipeline.unet)


def read_by_peft(pipeline, files, numbers):
    folder = files[0].parent.parent
    text = PeftModel.from_pretrained(pipeline.text_encoder, str(folder / "text_encoder"))
    return theirs(numbers, text, PeftModel.from_pretrained(pipeline.unet, str(folder / "unet")))


READERS = {
    "diffusers": ("diffusers", read_by_diffusers),
    "kohya": ("diffusers", read_by_diffusers),
    "peft": ("peft", read_by_peft),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", LORA_FORMS)
def test_another_tool_draws_the_same_with_our_adapters(form, case, networks, model, bare, pipeline, tmp_path):
    alpha, ranks = CASES[case]
    since = {"diffusers": (0, 34), "kohya": (0, 33), "peft": (0, 0)}[form]
    if len(ranks) > 1 and since > VERSION:
        pytest.skip("where ranks differ, this diffusers has alphas of its own, whatever the file says")
    params = drawn(model, ranks)
    expected, without = ours(networks, params, alpha), ours(networks, {})
    files = export_parts(Parts(params, alpha), tmp_path / "rex", form)
    found = READERS[form][1](pipeline, files, bare.captions.readers[0].tokens(CAPTIONS))
    for what, mine, yours, plain in zip(("text encoder", "U-Net"), expected, found, without, strict=True):
        assert apart([mine], [yours]) < 1e-5, what
        assert apart([mine], [plain]) > 1e-2, f"the {what}'s adapters do nothing, so nothing was shown"
    weights = [*pipeline.unet.named_parameters(), *pipeline.text_encoder.named_parameters()]
    loaded = [value for name, value in weights if ".lora_A." in name or ".lora_B." in name]
    assert len(loaded) == len(params), "every layer of the file has its adapter, and no other layer has one"
    assert all(value.any() for value in loaded), "none is as it was before its file was read"


@pytest.mark.parametrize("form", ["textual_inversion", "textual_inversion_a1111"])
@pytest.mark.parametrize("num_vectors", [1, 2])
def test_diffusers_reads_our_words(form, num_vectors, networks, pipeline, tmp_path):
    word = {"tokens.<rex>": WORD["tokens.<rex>"][:num_vectors]}
    reads = TextToImage(networks(), SCHEDULE, nothing, words=Words(("<rex>",), "dog", num_vectors))
    reads.load(word)
    (file,) = export_parts(Parts(word), tmp_path / "words", form)
    assert file.name == "rex.safetensors"
    pipeline.load_textual_inversion(str(file), token="<rex>" if form.endswith("a1111") else None)
    found = pipeline.encode_prompt(list(CAPTIONS), "cpu", 1, False)[0]
    assert apart([reads.condition(BATCH).text], [found]) < 1e-5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", LORA_FORMS)
@pytest.mark.parametrize("knows_the_model", [True, False])
def test_adapters_come_back(form, case, knows_the_model, model, bare, tmp_path):
    """Bit by bit; where alpha went into lora_B, the products are equal but for its rounding."""
    alpha, ranks = CASES[case]
    params = drawn(model, ranks)
    files = export_parts(Parts(params, alpha, "tiny-sd"), tmp_path / "rex", form)
    where = files[0].parent.parent if form == "peft" else files[0]
    back, matched = import_parts(where, bare.base() if knows_the_model else None)
    assert back.params.keys() == params.keys() == set(matched.taken) and back.base == "tiny-sd"
    assert not matched.unmatched and not matched.missing
    folded = (form == "diffusers" and alpha) or (form == "kohya" and alpha is None and len(ranks) > 1)
    if not folded:
        assert back.alpha == alpha and all(torch.equal(params[n], v) for n, v in back.params.items())
    for layer in (name.removesuffix(A) for name in params if name.endswith(A)):
        products = []
        for part in (Parts(params, alpha), back):
            down, up = part.params[layer + A], part.params[layer + B]
            products.append((part.alpha or len(down)) / len(down) * (up @ down))
        assert torch.allclose(*products, rtol=1e-6, atol=1e-7)


def test_the_header_that_diffusers_reads(model, tmp_path):
    """A rank for most layers and patterns for the others, by network; the text encoder's without their first level."""
    params = drawn(model, (2, 3, 2))
    (file,) = export_parts(Parts(params, 5.0, "tiny-sd"), tmp_path / "rex", "diffusers")
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    about = json.loads(header["lora_adapter_metadata"])
    assert header["base_model"] == "tiny-sd" and about["unet.r"] == about["unet.lora_alpha"] == 2
    others = {
        name.removesuffix(A).removeprefix("unet.") for name, v in params.items() if name.endswith(A) and len(v) == 3
    }
    unet = {name for name in others if not name.startswith("text_encoder.")}
    assert about["unet.rank_pattern"] == about["unet.alpha_pattern"] == dict.fromkeys(unet, 3)
    assert all(name.startswith("encoder.layers.") for name in about["text_encoder.target_modules"])


@pytest.mark.parametrize("form", ["textual_inversion", "textual_inversion_a1111"])
def test_words_come_back_a_file_each(form, tmp_path):
    params = {**WORD, "tokens.<my-cat>": torch.ones(1, 16)}
    files = export_parts(Parts(params, base="tiny-sd"), tmp_path / "words", form)
    assert [file.name for file in files] == ["rex.safetensors", "my-cat.safetensors"]
    for file, (name, rows) in zip(files, params.items(), strict=True):
        back, matched = import_parts(file)
        assert back.params.keys() == {name} and torch.equal(back.params[name], rows) and back.base == "tiny-sd"
        assert matched.taken == (name,) and not matched.unmatched


def test_the_table_of_readers(networks, model, bare, pipeline, tmp_path, capsys):
    """Form by reader, for adapters whose alpha is not their rank and for a word of two vectors."""
    params, rows = drawn(model), []
    expected = ours(networks, params, 3.0)
    for form in LORA_FORMS:
        n = networks()
        fresh = StableDiffusionPipeline(**{**pipeline.components, "text_encoder": n.text_encoder, "unet": n.unet})
        files = export_parts(Parts(params, 3.0), tmp_path / form, form)
        reader, read = READERS[form]
        rows.append((form, reader, apart(expected, read(fresh, files, bare.captions.readers[0].tokens(CAPTIONS)))))
        where = files[0].parent.parent if form == "peft" else files[0]
        back, _ = import_parts(where, bare.base())
        rows.append((form, "personae", apart(expected, ours(networks, back.params, back.alpha))))
    expected = ours(networks, WORD)
    for form, token in (("textual_inversion", None), ("textual_inversion_a1111", "<rex>")):
        n = networks()
        fresh = StableDiffusionPipeline(
            **{**pipeline.components, "tokenizer": n.tokenizer, "text_encoder": n.text_encoder, "unet": n.unet}
        )
        (file,) = export_parts(Parts(WORD), tmp_path / form, form)
        fresh.load_textual_inversion(str(file), token=token)
        text = fresh.encode_prompt(list(CAPTIONS), "cpu", 1, False)[0]
        with torch.no_grad():
            found = text, n.unet(X_T, T, encoder_hidden_states=text).sample
        rows.append((form, "diffusers", apart(expected, found)))
        rows.append((form, "personae", apart(expected, ours(networks, import_parts(file)[0].params))))
    with capsys.disabled():
        print(f"\n{'written as':25}{'read by':12}largest difference")
        for form, reader, difference in rows:
            print(f"{form:25}{reader:12}{difference:.1e}")
    assert {form for form, _, _ in rows} == set(FORMS) and len(rows) == 10
    assert all(difference < 1e-5 for *_, difference in rows)


# --- two text encoders ------------------------------------------------------------------------------------------------


@pytest.fixture
def xl(tmp_path):
    """(a function that makes the model with parts, diffusers' own pipeline of the same weights)"""
    folder = tiny_pipeline(tmp_path / "xl", "smallest_xl")
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)
    return lambda **parts: open_pipeline(folder, **parts), pipeline


@torch.no_grad()
def xl_theirs(pipeline):
    text, _, pooled, _ = pipeline.encode_prompt(list(CAPTIONS), device="cpu", do_classifier_free_guidance=False)
    also = {"text_embeds": pooled, "time_ids": torch.tensor([[8.0, 8, 0, 0, 8, 8]] * 2)}
    return text, pooled, pipeline.unet(X_T, T, encoder_hidden_states=text, added_cond_kwargs=also).sample


@torch.no_grad()
def xl_ours(model):
    told = model.condition(BATCH)
    return told.text, told.pooled, model.forward(X_T, T, told)


XL_LORA = Lora(2, "self+cross+text", 3.0)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_diffusers_draws_the_same_with_our_adapters_of_both_text_encoders(form, xl, tmp_path):
    make, pipeline = xl
    model = make(lora=XL_LORA)
    params = drawn(model)
    model.load(params)
    files = export_parts(Parts(params, 3.0, "tiny-xl"), tmp_path / "rex", form)
    if form == "kohya":
        assert {key.split("_text")[0] for key in load_file(files[0]) if "_te" in key} == {"lora_te1", "lora_te2"}
    pipeline.load_lora_weights(str(files[0].parent), weight_name=files[0].name)
    expected, plain = xl_ours(model), xl_ours(make())
    assert apart(expected, xl_theirs(pipeline)) < 1e-5
    assert all(apart([one], [other]) > 1e-3 for one, other in zip(expected, plain, strict=True))


@pytest.mark.parametrize("knows_the_model", [True, False])
@pytest.mark.parametrize("form", LORA_FORMS)
def test_adapters_of_both_text_encoders_come_back(form, knows_the_model, xl, tmp_path):
    make, _ = xl
    model = make(lora=XL_LORA)
    params = drawn(model)
    files = export_parts(Parts(params, None, "tiny-xl"), tmp_path / "rex", form)
    where = files[0].parent.parent if form == "peft" else files[0]
    back, matched = import_parts(where, make().base() if knows_the_model else None)
    assert all(torch.equal(back.params[name], value) for name, value in params.items())
    assert back.params.keys() == params.keys() and not matched.unmatched and not matched.missing
    assert described(where)["networks"] == ["unet", "text_encoder", "text_encoder_2"]


def test_peft_reads_the_second_text_encoder(xl, tmp_path):
    make, pipeline = xl
    model = make(lora=XL_LORA)
    params = drawn(model)
    model.load(params)
    export_parts(Parts(params, 3.0), tmp_path / "rex", "peft")
    for name in ("text_encoder", "text_encoder_2", "unet"):
        setattr(pipeline, name, PeftModel.from_pretrained(getattr(pipeline, name), str(tmp_path / "rex" / name)))
    assert apart(xl_ours(model), xl_theirs(pipeline)) < 1e-5


@pytest.mark.parametrize("form", ["textual_inversion", "textual_inversion_a1111"])
def test_a_word_of_both_text_encoders(form, xl, tmp_path):
    make, pipeline = xl
    model = make(words=Words(("<rex>",), "dog", 2))
    params = {name: torch.randn(v.shape, generator=stream(6, name)) for name, v in model.params().items()}
    assert {name: list(v.shape) for name, v in params.items()} == {"tokens.<rex>": [2, 16], "tokens_2.<rex>": [2, 24]}
    model.load(params)
    (file,) = export_parts(Parts(params, base="tiny-xl"), tmp_path / "words", form)
    back, matched = import_parts(file, model.params())
    assert all(torch.equal(back.params[name], value) for name, value in params.items()) and not matched.unmatched
    assert import_parts(file)[0].params.keys() == import_parts(file, make().base())[0].params.keys() == params.keys()
    assert described(file)["words"] == ["<rex>"]
    found = load_file(file)
    for key, tokenizer, encoder in (
        ("clip_l", pipeline.tokenizer, pipeline.text_encoder),
        ("clip_g", pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        pipeline.load_textual_inversion(found[key], token="<rex>", text_encoder=encoder, tokenizer=tokenizer)
    assert apart(xl_ours(model), xl_theirs(pipeline)) < 1e-5


def test_parts_of_one_text_encoder_are_refused_for_two(model, xl, tmp_path):
    make, _ = xl
    for form in LORA_FORMS:
        files = export_parts(Parts(drawn(model)), tmp_path / form, form)
        with pytest.raises(ShapeError, match=r"layers of another width: .*made for another kind of model"):
            import_parts(files[0].parent.parent if form == "peft" else files[0], make().base())
    (file,) = export_parts(Parts(WORD), tmp_path / "word", "textual_inversion")
    with pytest.raises(ArtefactError, match="the word is for 1 text encoder, the model has 2"):
        import_parts(file, make(words=Words(("<rex>",), "dog", 2)).params())
    with pytest.raises(ShapeError, match="as many vectors for the first text encoder as for the second"):
        export_parts(Parts({"tokens_2.<rex>": torch.ones(1, 24)}), tmp_path / "half", "textual_inversion")


# --- what other tools write -------------------------------------------------------------------------------------------


def test_a_file_that_diffusers_wrote(model, bare, networks, tmp_path):
    """Also its header, with an alpha and a rank of their own for one layer."""
    special = LAYER.removeprefix("unet.")
    unet, options = networks().unet, {"r": 2, "lora_alpha": 3, "init_lora_weights": "gaussian"}
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(**options, target_modules=targets, rank_pattern={special: 4}, alpha_pattern={special: 7})
    unet.add_adapter(config)
    with torch.no_grad():
        for name, value in unet.named_parameters():
            if "lora_" in name:
                value.normal_(0, 0.4, generator=stream(5, name))
    layers = {name: value for name, value in unet.state_dict().items() if "lora_" in name}
    layers = {name.replace(".default.", "."): value for name, value in layers.items()}
    about = {"unet_lora_adapter_metadata": config.to_dict()} if READS_HEADER else {}
    StableDiffusionPipeline.save_lora_weights(str(tmp_path), unet_lora_layers=layers, **about)
    if not READS_HEADER:
        told = {f"unet.{key}": value for key, value in config.to_dict().items() if not isinstance(value, set)}
        file = tmp_path / "pytorch_lora_weights.safetensors"
        save_file(load_file(file), file, metadata={"lora_adapter_metadata": json.dumps(told, default=str)})
    back, matched = import_parts(tmp_path, model.params())
    assert back.alpha is None and matched.kind == "LoRA, diffusers" and not matched.unmatched
    assert matched.missing and all(name.startswith("text_encoder.") for name in matched.missing)
    params = {**back.params, **{name: torch.zeros_like(model.params()[name]) for name in matched.missing}}
    told = bare.condition(BATCH)
    with torch.no_grad():
        expected = unet(X_T, T, encoder_hidden_states=told.text).sample
    assert apart([ours(networks, params)[1]], [expected]) < 1e-5


def test_a_folder_that_peft_wrote(model, bare, networks, tmp_path):
    """One network alone, without a name; of rank-stabilized scale."""
    text = networks().text_encoder
    config = LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    adapted = get_peft_model(text, config)
    adapted.save_pretrained(str(tmp_path / "mine"), save_embedding_layers=False)
    back, matched = import_parts(tmp_path / "mine", bare.base())
    assert back.alpha == 6.0 and len(back.params) == 8 and not matched.unmatched
    down = back.params["text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_A"]
    name = next(n for n, _ in adapted.named_parameters() if "layers.1.mlp.fc1.lora_A" in n)
    assert torch.equal(down, dict(adapted.named_parameters())[name])
    assert import_parts(tmp_path / "mine" / "adapter_model.safetensors")[0].alpha == 6.0
    _, matched = import_parts(tmp_path / "mine", model.params())
    assert len(matched.unmatched) == 4 and all("mlp.fc1" in key for key in matched.unmatched)


def pair(rank=2, width=8, out=8, seed=0):
    return torch.randn(rank, width, generator=stream(seed, "A")), torch.randn(out, rank, generator=stream(seed, "B"))


@pytest.mark.parametrize(
    ("down", "up", "layer"),
    [
        ("unet.{u}.to_q.lora.down.weight", "unet.{u}.to_q.lora.up.weight", "unet.{u}.to_q"),
        ("unet.{u}.processor.to_q_lora.down.weight", "unet.{u}.processor.to_q_lora.up.weight", "unet.{u}.to_q"),
        ("{u}.processor.to_out_lora.down.weight", "{u}.processor.to_out_lora.up.weight", "unet.{u}.to_out.0"),
        (
            "text_encoder.{t}.to_q_lora.down.weight",
            "text_encoder.{t}.to_q_lora.up.weight",
            "text_encoder.{t}.q_proj",
        ),
        (
            "text_encoder.{t}.out_proj.lora_linear_layer.down.weight",
            "text_encoder.{t}.out_proj.lora_linear_layer.up.weight",
            "text_encoder.{t}.out_proj",
        ),
    ],
)
@pytest.mark.parametrize("knows_the_model", [True, False])
def test_older_names_of_diffusers(down, up, layer, knows_the_model, bare, tmp_path):
    places = {
        "u": "up_blocks.0.attentions.0.transformer_blocks.0.attn1",
        "t": "text_model.encoder.layers.0.self_attn",
    }
    width = 16 if layer.startswith("text") else 8
    values = pair(2, width, width)
    save_file(
        dict(zip((down.format(**places), up.format(**places)), values, strict=True)), tmp_path / "old.safetensors"
    )
    back, matched = import_parts(tmp_path / "old.safetensors", bare.base() if knows_the_model else None)
    layer = layer.format(**places)
    assert matched.kind == "LoRA, diffusers before peft" and back.alpha is None
    assert torch.equal(back.params[layer + A], values[0]) and torch.equal(back.params[layer + B], values[1])


def kohya(*layers, **more):
    tensors = {}
    for number, (layer, alpha, rank) in enumerate(layers):
        down, up = pair(rank, seed=number)
        tensors |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        tensors |= {} if alpha is None else {f"{layer}.alpha": torch.tensor(alpha)}
    return tensors | more


FLAT = "lora_unet_up_blocks_0_attentions_0_transformer_blocks_0_attn1_"
DOTTED = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1."


def test_alphas_that_differ_go_into_the_second_half(bare, tmp_path):
    tensors = kohya((FLAT + "to_q", 1.0, 2), (FLAT + "to_k", 6.0, 2), (FLAT + "to_v", None, 4))
    save_file(tensors, tmp_path / "k.safetensors")
    back, _ = import_parts(tmp_path / "k.safetensors", bare.base())
    assert back.alpha is None
    for layer, factor in (("to_q", 0.5), ("to_k", 3.0), ("to_v", 1.0)):
        assert torch.equal(back.params[DOTTED + layer + B], tensors[f"{FLAT}{layer}.lora_up.weight"] * factor)


def test_a_flat_name_that_fits_two_layers_is_not_guessed(tmp_path):
    save_file(kohya(("lora_unet_a_b_c", None, 2), ("lora_unet_d_e", None, 2)), tmp_path / "k.safetensors")
    model = {"unet.a.b_c.weight": torch.ones(8, 8), "unet.a_b.c.weight": torch.ones(8, 8)}
    model["unet.d_e.weight"] = torch.ones(8, 8)
    back, matched = import_parts(tmp_path / "k.safetensors", model)
    assert set(back.params) == {"unet.d_e.lora_A", "unet.d_e.lora_B"}
    reasons = set(matched.unmatched.values())
    assert reasons == {"it may be unet.a.b_c or unet.a_b.c"} and len(matched.unmatched) == 2


UNREADABLE = {
    "DoRA": {f"{FLAT}to_q.dora_scale": torch.ones(8, 1)},
    "LoHa": {f"{FLAT}to_k.hada_w1_a": torch.ones(8, 2), f"{FLAT}to_k.alpha": torch.tensor(1.0)},
    "LoKr": {f"{FLAT}to_k.lokr_w1": torch.ones(2, 2)},
    "a bias": {f"{FLAT}to_q.lora_up.bias": torch.ones(8)},
    "a LoCon's middle factor": {f"{FLAT}to_q.lora_mid.weight": torch.ones(2, 2, 3, 3)},
    "a convolution": {
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.ones(8, 2, 1, 1),
    },
    "half of its adapter is missing": {f"{FLAT}to_k.lora_down.weight": torch.ones(2, 8)},
    "no part of a LoRA": {"bundle_emb.rex.string_to_param": torch.ones(2, 8)},
    "SDXL": kohya(("lora_te2_text_model_x", 1.0, 2)),
    "no place": kohya((f"{FLAT}to_z", None, 2)),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_named_and_the_rest_is(kind, bare, tmp_path):
    """A layer is taken whole or not at all: never an adapter without its DoRA."""
    save_file(kohya((FLAT + "to_q", None, 2), (FLAT + "to_v", None, 2), **UNREADABLE[kind]), tmp_path / "k.safetensors")
    back, matched = import_parts(tmp_path / "k.safetensors", bare.base())
    assert {f"{DOTTED}to_v{A}", f"{DOTTED}to_v{B}"} <= set(back.params)
    touched = {key.split(".")[0] for key in UNREADABLE[kind]}
    everything = load_file(tmp_path / "k.safetensors")
    assert set(matched.unmatched) == {key for key in everything if key.split(".")[0] in touched}
    assert all(kind in reason for key, reason in matched.unmatched.items() if key in UNREADABLE[kind])


@pytest.mark.parametrize(
    "layer",
    [
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
    ],
)
def test_sdxl_is_recognised_and_not_mistaken(layer, bare, tmp_path):
    save_file(kohya((layer, 1.0, 2)), tmp_path / "xl.safetensors")
    with pytest.raises(ArtefactError, match="SDXL"):
        import_parts(tmp_path / "xl.safetensors", bare.base())
    assert described(tmp_path / "xl.safetensors")["type"].endswith("(SDXL)")


def test_words_of_others(bare, tmp_path):
    save_file({"<cat>": torch.ones(16).half()}, tmp_path / "one.safetensors")
    save_file({"emb_params": torch.ones(3, 16)}, tmp_path / "rex.safetensors")
    save_file({"clip_l": torch.ones(1, 16), "clip_g": torch.ones(1, 20)}, tmp_path / "xl.safetensors")
    save_file({"<cat>": torch.ones(2, 24)}, tmp_path / "wide.safetensors")
    assert import_parts(tmp_path / "one.safetensors", bare.base())[0].params["tokens.<cat>"].tolist() == [[1.0] * 16]
    assert import_parts(tmp_path / "rex.safetensors")[0].params["tokens.rex"].shape == (3, 16)
    assert set(import_parts(tmp_path / "xl.safetensors")[0].params) == {"tokens.xl", "tokens_2.xl"}
    with pytest.raises(ArtefactError, match="the word is for 2 text encoders, the model has 1"):
        import_parts(tmp_path / "xl.safetensors", bare.base())
    with pytest.raises(ShapeError, match=r"'<cat>' is \[2, 24\], the model's is \[2, 16\]"):
        import_parts(tmp_path / "wide.safetensors", bare.base())
    with pytest.raises(ArtefactError, match="the model has no word '<cat>'"):
        import_parts(tmp_path / "one.safetensors", {"tokens.<rex>": torch.ones(1, 16)})


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth"])
def test_a_pickle_is_refused_by_name(suffix, tmp_path):
    with pytest.raises(ArtefactError, match="may hold a pickle"):
        import_parts(tmp_path / f"lora{suffix}")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ArtefactError, match=r"adapter_model\.bin may hold a pickle"):
        import_parts(tmp_path)


def test_files_that_are_no_lora(tmp_path, model):
    (tmp_path / "empty.safetensors").write_bytes(b"")
    save_file({}, tmp_path / "nothing.safetensors")
    save_file({"a.weight": torch.ones(2, 2), "a.alpha": torch.ones(1)}, tmp_path / "other.safetensors")
    save_file({"head.weight": torch.ones(2, 2)}, tmp_path / "one.safetensors")
    save_state(tmp_path / "own.safetensors", State(model.params()))
    (tmp_path / "folder").mkdir()
    for name in ("nothing.safetensors", "other.safetensors", "one.safetensors", "own.safetensors", "folder"):
        with pytest.raises(ArtefactError, match="neither a LoRA nor a textual inversion"):
            import_parts(tmp_path / name)
    for name in ("empty.safetensors", "absent.safetensors"):
        with pytest.raises(ArtefactError, match=r"is damaged|does not exist"):
            import_parts(tmp_path / name)


@pytest.mark.parametrize("form", LORA_FORMS)
def test_a_damaged_file(form, model, tmp_path):
    file = export_parts(Parts(drawn(model)), tmp_path / "rex", form)[-1]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ArtefactError, match="is damaged or cut short"):
        import_parts(file if form != "peft" else file.parent.parent)


@pytest.mark.parametrize(
    "config",
    ["[]", "{", '{"lora_alpha": "many"}', '{"alpha_pattern": {"(": 1}}', '{"init_lora_weights": "pissa_niter_4"}'],
)
def test_settings_of_peft_that_cannot_be_used(config, tmp_path):
    down, up = pair()
    keys = ("base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight")
    save_file(dict(zip(keys, (down, up), strict=True)), tmp_path / "adapter_model.safetensors")
    with pytest.raises(ArtefactError, match=r"adapter_config\.json, which says its alpha, is not beside it"):
        import_parts(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(ArtefactError):
        import_parts(tmp_path)


def test_a_header_of_diffusers_that_cannot_be_used(tmp_path):
    tensors = dict(zip(("unet.a.lora_A.weight", "unet.a.lora_B.weight"), pair(), strict=True))
    for header in ("{", "[]", "7"):
        save_file(tensors, tmp_path / "l.safetensors", metadata={"lora_adapter_metadata": header})
        with pytest.raises(ArtefactError, match="lora_adapter_metadata"):
            import_parts(tmp_path / "l.safetensors")


def test_another_width_another_rank_and_numbers_that_are_none(bare, tmp_path):
    file, keys = tmp_path / "l.safetensors", (f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight")
    for shapes, error, message in (
        ((pair(2, 24, 8)), ShapeError, f"{LAYER} is 24 -> 8, the model's is 8 -> 8"),
        ((torch.ones(3, 8), torch.ones(8, 2)), ShapeError, f"{LAYER}: lora_A is"),
        ((torch.full((2, 8), torch.inf), torch.ones(8, 2)), ArtefactError, "not finite"),
    ):
        save_file(dict(zip(keys, shapes, strict=True)), file)
        with pytest.raises(error, match=message.replace(".", r"\.")):
            import_parts(file, bare.base())


def test_no_key_matches(bare, model, tmp_path):
    save_file(kohya(("lora_unet_nowhere", 1.0, 2)), tmp_path / "k.safetensors")
    for names in (bare.base(), model.params()):
        with pytest.raises(ArtefactError, match=r"none of 3 keys can be used: .*no place for it"):
            import_parts(tmp_path / "k.safetensors", names)


def test_export_refuses(model, tmp_path):
    params = drawn(model)
    for parts, form, message in (
        (WORD, "diffusers", "form 'diffusers' holds adapters, and not the 1 of 1"),
        (params | WORD, "kohya", "export adapters and words apart"),
        (params, "textual_inversion", "holds words"),
        ({}, "peft", "not the 0 of 0"),
        ({"unet.a.weight": torch.ones(2, 2)}, "peft", "unet.a.weight"),
        (params, "ckpt", "expected one of diffusers"),
        ({"tokens.<rex>": torch.ones(1, 2), "tokens.rex": torch.ones(1, 2)}, "textual_inversion", "would both be"),
    ):
        with pytest.raises(ConfigError, match=message):
            export_parts(Parts(parts), tmp_path / "to", form)
    half = {name: value for name, value in params.items() if name != LAYER + B}
    with pytest.raises(ShapeError, match=LAYER):
        export_parts(Parts(half), tmp_path / "to", "kohya")
    with pytest.raises(ArtefactError, match="not finite"):
        export_parts(Parts({**params, LAYER + A: params[LAYER + A] / 0}), tmp_path / "to", "kohya")
    with pytest.raises(ConfigError, match="alpha is -1"):
        Parts(params, -1.0)
    assert not list(tmp_path.iterdir())
    export_parts(Parts(params), tmp_path / "to", "kohya")
    with pytest.raises(ArtefactError, match="exists; nothing was overwritten"):
        export_parts(Parts(params), tmp_path / "to", "diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["to"]


# --- saying what a file is --------------------------------------------------------------------------------------------


def test_inspect_says_what_a_file_is(model, tmp_path):
    params = drawn(model, (2, 3))
    (file,) = export_parts(Parts(params, 5.0, "sd_v1"), tmp_path / "rex", "kohya")
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["ss_network_dim"] == "Dynamic" and opened.metadata()["ss_network_alpha"] == "5"
    found = inspect_file(file)
    assert "kind" not in found and len(found["tensors"]) == found["keys"] == 3 * len(params) // 2
    assert found["type"] == "LoRA, kohya" and found["base_model"] == "sd_v1" and found["alphas"] == [5.0]
    assert found["ranks"] == [2, 3] and found["networks"] == ["unet", "text_encoder"] and not found["not_readable"]
    assert "A1111" in found["read_by"] and "diffusers" in found["read_by"]


def test_inspect_knows_a_folder_of_peft_and_a_word(model, tmp_path):
    export_parts(Parts(drawn(model), base="sd"), tmp_path / "rex", "peft")
    found = inspect_file(tmp_path / "rex")
    assert (
        found["type"] == "LoRA, peft"
        and found["alphas"] == [2.0]
        and found["alpha_is_rank"]
        and found["base_model"] == "sd"
    )
    assert inspect_file(tmp_path / "rex" / "unet")["networks"] == ["unet"]
    (file,) = export_parts(Parts(WORD), tmp_path / "word", "textual_inversion")
    assert inspect_file(file)["words"] == ["<rex>"] and inspect_file(file)["networks"] == []


def test_inspect_names_what_we_cannot_read(tmp_path):
    save_file(UNREADABLE["LoHa"], tmp_path / "loha.safetensors")
    found = inspect_file(tmp_path / "loha.safetensors")
    assert found["not_readable"] == ["LoHa, which we do not read: 2 keys"] and not found["networks"]


def test_our_own_files_look_as_before(model, tmp_path):
    save_state(tmp_path / "own.safetensors", replace(State(), params=pick(model.params(), under("unet."))))
    assert "type" not in inspect_file(tmp_path / "own.safetensors")
    with pytest.raises(ArtefactError, match="neither a run nor a study"):
        inspect_file(tmp_path)
