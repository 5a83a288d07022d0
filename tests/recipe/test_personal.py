"""One person's pictures and a text-to-image pipeline: what the parts learn, stop and resume, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from personae.artefact.save import load_state, read_metadata
from personae.backbone.pipeline import open_pipeline
from personae.core import Batch, Round
from personae.errors import ArtefactError, ConfigError, DataError, ShapeError
from personae.evaluate.grids import save_grid
from personae.recipe import personal
from personae.recipe.config import load_recipe, parse, to_table
from personae.recipe.exchange import export_parts, import_client
from personae.recipe.personal import ROUNDS
from personae.recipe.saved import SavedRun
from personae.recipe.workflow import open_run, resume, run
from personae.testing.tiny_pipeline import tiny_pipeline

LITTLE = (
    "method.training.steps=2",
    "method.adapt.steps=2",
    "sampling.steps=2",
    "evaluation.num_images=4",
    "evaluation.loss_grid=2",
    "evaluation.loss_draws=1",
    "machine.threads=1",
)


def personal_recipe(*args, overrides=(), **options):
    return personal.personal_recipe(*args, **options, overrides=[*LITTLE, *overrides])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline") / "model")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five pictures of 8 x 8, each of one colour."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(5):
        pixels = torch.full((1, 3, 8, 8), 40 * number, dtype=torch.uint8)
        save_grid(folder / f"{number}.png", pixels, columns=1, scale=1)
    return folder


@pytest.fixture(scope="module")
def rex(model, pictures, tmp_path_factory):
    """A finished personalization by adapters and a word. Only read it."""
    recipe = personal_recipe(model, pictures, "lora+tokens", "dog", name="rex")
    return run(recipe, tmp_path_factory.mktemp("rex") / "run")


PARTS = {
    "lora": (".lora_A", ".lora_B"),
    "tokens": ("tokens.<own>",),
    "lora+tokens": (".lora_A", ".lora_B", "tokens.<own>"),
    "embedding": ("embedding.weight",),
}


@pytest.mark.parametrize("method", PARTS)
def test_a_part_trains_and_the_model_stays(model, pictures, tmp_path, method):
    before = {path: path.read_bytes() for path in model.rglob("*.safetensors")}
    saved = run(personal_recipe(model, pictures, method, "dog"), tmp_path / "run")
    params = load_state(saved.folder / "clients" / "own.safetensors").params
    assert params and all(name.endswith(PARTS[method]) for name in params)
    assert {path: path.read_bytes() for path in before} == before
    start = saved.model("own").initial(torch.Generator())
    ends = [name for name in params if not name.endswith((".lora_A", "null_embedding.weight"))]
    assert ends and all(not torch.equal(params[name], start[name]) for name in ends), "everything has moved"
    figures = saved.summary["clients"]["own"]
    assert figures["heldout_loss_before"] != figures["heldout_loss"]
    assert (figures["num_images"], figures["num_heldout"], figures["bytes_down"]) == (4, 1, 0)


def test_weights_of_attention_change_beside_a_new_word(model, pictures, tmp_path):
    changes = ["backbone.delta.targets=cross_kv", "method.training.lr=0.001", "method.vector_rate=10", "rounds=2"]
    saved = run(personal_recipe(model, pictures, "tokens", "dog", overrides=changes), tmp_path / "run")
    params = load_state(saved.folder / "clients" / "own.safetensors").params
    assert {name.split(".")[0] for name in params} == {"delta", "tokens"}
    assert all(value.any() for value in params.values())


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("xl") / "model", "smallest_xl")


@pytest.mark.parametrize("method", PARTS)
def test_a_part_of_a_pipeline_with_two_text_encoders_trains(xl, pictures, tmp_path, method):
    more = ["rounds=2", "method.training.steps=5", "backbone.lora.targets=self+cross+text"]
    saved = run(
        personal_recipe(xl, pictures, method, "dog", overrides=more if "lora" in method else more[:2]), tmp_path / "run"
    )
    params = load_state(saved.folder / "clients" / "own.safetensors").params
    assert all(name.endswith((*PARTS[method], "tokens_2.<own>")) for name in params)
    networks = {name.split(".")[0] for name in params if ".lora_" in name}
    assert networks == ({"unet", "text_encoder", "text_encoder_2"} if "lora" in method else set())
    assert ("tokens_2.<own>" in params) == ("tokens" in method)
    start = saved.model("own").initial(torch.Generator())
    moved = {name for name in params if not torch.equal(params[name], start[name]) and not name.endswith(".lora_A")}
    still = {name for name in params if not name.endswith(".lora_A")} - moved
    assert moved and all("text_encoder.text_model.encoder.layers.1." in n or n.startswith("null") for n in still)
    figures = saved.summary["clients"]["own"]
    assert figures["heldout_loss_before"] != figures["heldout_loss"]
    assert saved.sample("own", 2, prompt="a dog").shape == (2, 3, 8, 8)


def test_its_words_stand_for_the_noun(rex, model):
    assert rex.recipe.data.caption == "a <rex>"
    assert personal_recipe(model, rex.folder, "lora", "animal").data.caption == "an animal"
    assert parse(to_table(rex.recipe), "again") == rex.recipe


def test_previews_show_how_far_it_is_and_stand_in_the_report(rex):
    assert [path.stem for path in sorted((rex.folder / "previews").iterdir())] == [
        f"{number:06d}" for number in range(1, ROUNDS + 1)
    ]
    report = (rex.folder / "report.html").read_text("utf-8")
    assert "While it trained" in report and "trained its own part of a diffusion model" in report


@pytest.mark.parametrize("after", [1, 6])
def test_a_stopped_personalization_ends_in_the_same_bits(rex, tmp_path, after):
    def stop(round: Round) -> None:
        if round.done and round.round == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(rex.recipe, tmp_path / "run", watch=stop)
    again = resume(tmp_path / "run")
    ours, theirs = (folder / "clients" / "rex.safetensors" for folder in (again.folder, rex.folder))
    assert ours.read_bytes() == theirs.read_bytes()
    last = f"previews/{ROUNDS:06d}.png"
    assert (again.folder / last).read_bytes() == (rex.folder / last).read_bytes()


def test_a_stopped_personalization_that_saves_memory_ends_in_the_same_bits(xl, pictures, tmp_path):
    """And near the one that does not."""
    more = ["rounds=2", "backbone.lora.targets=self+cross+text"]
    savings = ["backbone.half=true", "backbone.recompute=true"]
    whole, recipe = (
        personal_recipe(xl, pictures, "lora+tokens", "dog", overrides=each) for each in (more, [*more, *savings])
    )

    def stop(round: Round) -> None:
        if round.done and round.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "stopped", watch=stop)
    again, once, other = resume(tmp_path / "stopped"), run(recipe, tmp_path / "once"), run(whole, tmp_path / "whole")
    ours, theirs = (saved.folder / "clients" / "own.safetensors" for saved in (again, once))
    assert ours.read_bytes() == theirs.read_bytes()
    assert {value.dtype for value in again.denoiser.base().values()} == {torch.bfloat16}
    assert {value.dtype for value in load_state(ours).params.values()} == {torch.float32}
    losses = [saved.summary["clients"]["own"]["heldout_loss"] for saved in (once, other)]
    assert losses[0] == pytest.approx(losses[1], rel=0.03) and losses[0] != losses[1]


@pytest.mark.parametrize("key", ["half", "recompute"])
def test_what_saves_memory_is_for_text_to_image_pipelines(key, tiny, tiny_run, tmp_path):
    with pytest.raises(ConfigError, match=f"backbone.{key}: needs backbone.folder, a text-to-image"):
        run("quickstart", tmp_path / "run", overrides=[*tiny, f"backbone.{key}=true"])
    folder = open_run(tiny_run.folder).export("c4", tmp_path / "unet")
    with pytest.raises(ConfigError, match=f"backbone.{key} is for text-to-image pipelines, and .* has no text_encoder"):
        run("quickstart", tmp_path / "run", overrides=[*tiny, f"backbone.folder={folder}", f"backbone.{key}=true"])
    assert not (tmp_path / "run").exists()


def test_half_precision_needs_weights_that_do_not_train(model, pictures, tmp_path):
    recipe = personal_recipe(model, pictures, "lora", "dog", overrides=["backbone.frozen=false", "backbone.half=true"])
    with pytest.raises(ConfigError, match="half is for weights that do not train"):
        run(recipe, tmp_path / "run")


def stopped(recipe, folder):
    def stop(round: Round) -> None:
        if round.done and round.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, folder, watch=stop)


@pytest.mark.parametrize("change", ["a picture more", "another caption"])
def test_other_pictures_are_noticed_at_a_resume(model, pictures, tmp_path, change):
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    lines = [{"file_name": path.name, "text": "a dog"} for path in sorted(folder.glob("*.png"))]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    stopped(personal_recipe(model, folder, "lora", "dog"), tmp_path / "run")
    if change == "a picture more":
        shutil.copy(folder / "0.png", folder / "9.png")
        lines.append({"file_name": "9.png", "text": "a dog"})
    else:
        lines[0]["text"] = "a cat"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    with pytest.raises(ArtefactError, match=r"the images or captions of .* are not those that .* began with"):
        resume(tmp_path / "run")


def test_another_pipeline_in_the_same_place_is_noticed(model, pictures, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    saved = run(personal_recipe(folder, pictures, "lora", "dog"), tmp_path / "run")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 0.1 for name, value in load_file(path).items()}, path)
    with pytest.raises(ArtefactError, match=r"the weights in .* are not those that .* began with"):
        open_run(saved.folder).sample("own", 1, prompt="a dog")


def test_a_prompt_decides_what_is_drawn(rex):
    saved = open_run(rex.folder)
    own, other = (saved.sample("rex", 2, prompt=prompt) for prompt in ("a <rex>", "a tree"))
    assert own.shape == (2, 3, 8, 8) and not torch.equal(own, other)
    assert torch.equal(own, saved.sample("rex", 2, prompt="a <rex>"))
    with pytest.raises(ConfigError, match="draws what a text says; say it with --prompt"):
        saved.sample("rex", 2)


def test_a_model_that_reads_no_text_takes_no_prompt(tiny_run):
    with pytest.raises(ConfigError, match="reads no text; leave out --prompt 'a dog'"):
        open_run(tiny_run.folder).sample("c4", 1, prompt="a dog")


def test_somebody_else_comes_later(rex, pictures, copy_of):
    saved = open_run(copy_of(rex))
    figures = saved.personalize("tom", pictures)
    assert figures["heldout_loss"] != figures["heldout_loss_before"] and saved.clients == ["rex", "tom"]


def test_captions_of_ones_own_are_kept(model, pictures, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in pictures.glob("*.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    lines = [{"file_name": path.name, "text": "a tree above a dog"} for path in folder.glob("*.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    saved = run(personal_recipe(model, folder, "lora", "dog"), tmp_path / "run")
    assert set(saved._clients.data["own"].train.captions) == {"a tree above a dog"}


def test_what_was_trained_is_written_as_a_pipeline(model, pictures, tmp_path):
    saved = run(
        personal_recipe(model, pictures, "embedding", "dog", overrides=["method.training.lr=0.1"]), tmp_path / "run"
    )
    opened = open_pipeline(saved.export("own", tmp_path / "pipeline"))
    latents, t = torch.randn(1, 4, 4, 4), torch.tensor([300])
    batch = Batch(torch.zeros(1, 3, 8, 8), torch.tensor([False]), ("a dog",))
    own = saved.model("own")
    drawn = [each.forward(latents, t, each.condition(batch)) for each in (own, opened, open_pipeline(model))]
    assert torch.allclose(drawn[0], drawn[1], atol=1e-5) and not torch.allclose(drawn[0], drawn[2], atol=1e-4)


def test_who_comes_later_trains_as_much(model, pictures):
    recipe = personal_recipe(model, pictures, "lora", "dog", overrides=["method.training.lr=0.5", "rounds=3"])
    assert (recipe.method.adapt.lr, recipe.method.adapt.steps) == (0.5, 2)  # steps are said in LITTLE
    plain = personal.personal_recipe(model, pictures, "lora", "dog", overrides=["method.training.steps=7", "rounds=3"])
    assert plain.method.adapt.steps == 21


def test_a_vector_is_as_wide_as_its_place(model, pictures):
    wide = [personal_recipe(model, pictures, "embedding", "dog", overrides=o).backbone.embedding.width
            for o in ([], ["backbone.embedding.place=token"], ["backbone.embedding.width=5"])]  # fmt: skip
    assert wide == [32, 16, 5]


def test_a_caption_that_is_too_long_is_refused_before_there_is_a_folder(model, pictures, tmp_path):
    recipe = personal_recipe(model, pictures, "lora", "dog", overrides=[f"data.caption={'a dog ' * 9}"])
    with pytest.raises(ConfigError, match=r"client 'own': the caption .* tokens, of which this model reads 12"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_somebody_later_must_say_the_word_too(rex, pictures, copy_of, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    for path in pictures.glob("*.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    lines = [{"file_name": path.name, "text": "a cat"} for path in folder.glob("*.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    with pytest.raises(ConfigError, match="no caption of client 'tom' says <rex>"):
        open_run(copy_of(rex)).personalize("tom", folder)


def test_steps_and_guidance_may_be_others_than_the_runs(rex):
    saved = open_run(rex.folder)
    own = saved.sample("rex", 1, prompt="a dog")
    assert torch.equal(own, saved.sample("rex", 1, prompt="a dog", steps=2, guidance=3.0))
    assert not torch.equal(own, saved.sample("rex", 1, prompt="a dog", guidance=8.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noun": " "}, "noun is empty"),
        ({"overrides": ["data.name=x"]}, "leave out data.source, name and partition"),
        ({"method": "dreambooth"}, "method is 'dreambooth'; expected one of lora, tokens"),
        ({"overrides": ["backbone.lora.rank=0"]}, "rank is 0"),
        ({"overrides": ["method.training.lr=0.0"]}, "lr is 0.0, expected above 0"),
        ({"overrides": ["backbone.rank=2"]}, "backbone.rank: unknown key"),
        ({"name": "re x"}, "name is 're x'"),
    ],
)
def test_bad_options_are_refused(model, pictures, options, message):
    given = {"method": "lora+tokens", "noun": "dog"} | options
    with pytest.raises(ConfigError, match=message):
        personal_recipe(model, pictures, **given)


def test_one_picture_is_too_few(model, pictures, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copy(pictures / "0.png", tmp_path / "one")
    with pytest.raises(DataError, match="has 1 images, expected at least 2"):
        run(personal_recipe(model, tmp_path / "one", "lora", "dog"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["lora", "tokens"])
def test_captions_that_say_nothing_are_refused(model, pictures, tmp_path, method):
    silent = shutil.copytree(pictures, tmp_path / "silent")
    lines = [json.dumps({"file_name": path.name, "text": " "}) for path in sorted(silent.glob("*.png"))]
    (silent / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    with pytest.raises(DataError, match="client 'own': 4 of 4 captions say nothing"):
        run(personal_recipe(model, silent, method, "dog"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rounds=", "rounds: missing"),
        ("method.training.steps=", r"method\.training\.steps: missing"),
        ("data=5", "data: "),
        ("method=x", "method: a table"),
    ],
)
def test_what_is_left_out_of_a_personalization_is_named(model, pictures, change, message):
    with pytest.raises(ConfigError, match=message):
        personal_recipe(model, pictures, "lora", "dog", overrides=[change])


@pytest.mark.parametrize(("text", "message"), [("{", "is not readable JSON"), ("{}", "has no block_out_channels")])
def test_a_damaged_config_of_a_pipeline_is_named(model, pictures, tmp_path, text, message):
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "unet" / "config.json").write_text(text)
    with pytest.raises(ArtefactError, match=message):
        personal_recipe(broken, pictures, "lora", "dog")


def test_a_noun_that_the_model_does_not_know_as_one_word_is_refused(model, pictures, tmp_path):
    with pytest.raises(ConfigError, match=r"is to start from 'doghouse', its noun, which is \d tokens"):
        run(personal_recipe(model, pictures, "tokens", "doghouse"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_word_that_no_caption_says_is_refused(model, pictures, tmp_path):
    recipe = personal_recipe(model, pictures, "tokens", "dog")
    other = parse({**(table := to_table(recipe)), "data": {**table["data"], "caption": "a cat"}}, "it")
    with pytest.raises(ConfigError, match="no caption of client 'own' says <own>"):
        run(other, tmp_path / "run")


def test_parts_need_a_pipeline(tiny):
    table = {"preset": "tiny", "lora": {"rank": 2}}
    with pytest.raises(ConfigError, match=r"backbone.lora: needs backbone.folder, a text-to-image pipeline"):
        parse({**to_table(load_recipe("quickstart", tiny)), "backbone": table}, "it")


def test_previews_are_for_one_client(tiny, tmp_path):
    with pytest.raises(ConfigError, match="previews are for one client in this process, and 4 train"):
        run("quickstart", tmp_path / "run", overrides=[*tiny, "evaluation.preview_rounds=1"])


def test_images_of_another_size_are_refused_before_there_is_a_folder(rex, tmp_path):
    table = to_table(rex.recipe)
    with pytest.raises(ConfigError, match=r"draws \[3, 8, 8\], the images are \[3, 16, 16\]"):
        run(parse({**table, "data": {**table["data"], "size": 16}}, "it"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- other tools ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["diffusers", "peft", "kohya"])
def test_adapters_go_out_and_come_back(rex, copy_of, tmp_path, form):
    saved = open_run(copy_of(rex))
    files = export_parts(saved, "rex", tmp_path / "out", form)
    assert all(path.is_file() for path in files)
    matched = import_client(saved, "again", tmp_path / "out/unet" if form == "peft" else files[0])
    assert not matched.unmatched and matched.missing == ()
    own, other = (load_state(saved.folder / "clients" / f"{name}.safetensors").params for name in ("rex", "again"))
    adapters = [name for name in own if ".lora_" in name]
    assert all(torch.allclose(own[name], other[name]) for name in adapters)
    assert saved.sample("again", 1, prompt="a <rex>").shape == (1, 3, 8, 8)
    assert "again" not in saved.evaluate()["clients"], "nobody knows the images"


def test_words_go_out_and_come_back(rex, copy_of, tmp_path):
    saved = open_run(copy_of(rex))
    (file,) = export_parts(saved, "rex", tmp_path / "out", "textual_inversion")
    import_client(saved, "again", file)
    own, other = (load_state(saved.folder / "clients" / f"{name}.safetensors").params for name in ("rex", "again"))
    assert torch.equal(own["tokens.<rex>"], other["tokens.<rex>"])


def test_another_alpha_changes_nothing_that_is_drawn(rex, model, pictures, copy_of, tmp_path):
    twice = run(
        personal_recipe(model, pictures, "lora", "dog", overrides=["backbone.lora.alpha=8.0"]), tmp_path / "run"
    )
    files = export_parts(twice, "own", tmp_path / "out", "kohya")
    once = run(personal_recipe(model, pictures, "lora", "dog"), tmp_path / "once")
    import_client(once, "again", files[0])
    batch = Batch(torch.zeros(1, 3, 8, 8), torch.tensor([False]), ("a dog",))
    latents, t = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([300])
    drawn = [each.forward(latents, t, each.condition(batch)) for each in (twice.model("own"), once.model("again"))]
    assert torch.allclose(*drawn, atol=1e-6) and not torch.allclose(drawn[0], open_pipeline(model).forward(
        latents, t, open_pipeline(model).condition(batch)), atol=1e-4)  # fmt: skip


def test_what_a_client_does_not_have_is_not_exported(rex, tiny_run, tmp_path):
    with pytest.raises(ConfigError, match=r"client 'c4' in .* has no adapters, which form 'kohya' is for"):
        export_parts(open_run(tiny_run.folder), "c4", tmp_path / "out", "kohya")
    with pytest.raises(ConfigError, match="form is 'pickle'; expected one of diffusers"):
        export_parts(open_run(rex.folder), "rex", tmp_path / "out", "pickle")


def test_a_file_of_another_kind_is_refused_and_nobody_is_added(rex, copy_of, tiny_run):
    saved = open_run(copy_of(rex))
    with pytest.raises(ArtefactError, match="holds neither a LoRA nor a textual inversion"):
        import_client(saved, "again", tiny_run.folder / "clients" / "c4.safetensors")
    assert saved.clients == ["rex"]
    with pytest.raises(ConfigError, match="client 'rex' exists"):
        import_client(saved, "rex", "anything.safetensors")


@pytest.mark.parametrize("form", ["diffusers", "peft", "kohya", "textual_inversion", "textual_inversion_a1111"])
def test_parts_for_another_base_of_the_same_shape_are_refused(rex, model, pictures, copy_of, tmp_path, form):
    """A file of ours knows the weights it was trained on, whatever the folder is called."""
    other = shutil.copytree(model, tmp_path / model.name)
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.1 for name, value in load_file(weights).items()}, weights)
    saved = run(
        personal_recipe(other, pictures, "lora+tokens", "dog", name="rex", overrides=["rounds=1"]), tmp_path / "run"
    )
    files = export_parts(open_run(copy_of(rex)), "rex", tmp_path / "out", form)
    file = tmp_path / "out/unet" if form == "peft" else files[0]
    with pytest.raises(ArtefactError, match=rf"is for another base: it was trained on {model.name} \(.*--other-base"):
        import_client(saved, "again", file)
    assert saved.clients == ["rex"]
    assert import_client(saved, "again", file, other_base=True).base == model.name
    assert saved.clients == ["again", "rex"]


def test_a_base_in_half_precision_is_the_same_base(rex, model, pictures, copy_of, tmp_path):
    recipe = personal_recipe(model, pictures, "lora", "dog", overrides=["backbone.half=true", "rounds=1"])
    halved = run(recipe, tmp_path / "run")
    assert torch.bfloat16 in {value.dtype for value in halved.denoiser.base().values()}
    import_client(halved, "again", export_parts(open_run(copy_of(rex)), "rex", tmp_path / "out", "kohya")[0])
    assert halved.clients == ["again", "own"]


def test_where_the_base_trains_too_no_file_says_what_it_was(rex, tmp_path):
    backbone = dataclasses.replace(rex.recipe.backbone, frozen=False)
    moving = SavedRun(rex.folder, dataclasses.replace(rex.recipe, backbone=backbone))
    for saved, told in ((open_run(rex.folder), True), (moving, False)):
        (file,) = export_parts(saved, "rex", tmp_path / str(told), "kohya")
        assert ("personae_base" in read_metadata(file)) is told


def test_an_adapter_of_another_width_is_refused_and_nobody_is_added(rex, copy_of, tmp_path):
    saved = open_run(copy_of(rex))
    (file,) = export_parts(saved, "rex", tmp_path / "out", "kohya")
    wider = {n: torch.cat([v, v], 1) if n.endswith("lora_down.weight") else v for n, v in load_file(file).items()}
    save_file(wider, file)
    before = sorted(path.name for path in (saved.folder / "clients").iterdir())
    with pytest.raises(ShapeError, match=r"-> .*, the model's is"):
        import_client(saved, "again", file)
    assert saved.clients == open_run(saved.folder).clients == ["rex"]
    assert sorted(path.name for path in (saved.folder / "clients").iterdir()) == before
