"""A model that is taught, put away, taken up, and taught more."""

import dataclasses
import json
import shutil
import tomllib
import warnings

import pytest
import tomli_w
import torch

from personae.artefact.save import load_state, write_bytes
from personae.continual import CONTINUAL
from personae.core import Images, Task
from personae.errors import ArtefactError, ConfigError, DataError, Diverged
from personae.infer.regions import Region
from personae.recipe.config import change as change_table
from personae.recipe.schema import Data
from personae.sequence import concepts, history
from personae.sequence.config import RATES, Concept, own_recipe, parse_sequence, sequence_toml
from personae.sequence.workflow import SavedSequence, begin_sequence, open_sequence, run_sequence
from personae.testing.contract import differing_states

RANK = "continual.rank=2"
OPTIONS = {
    "textual_inversion": (),
    "cns": (
        "continual.budget=0.01",
        "continual.draws=4",
        "continual.general_draws=1",
        "continual.drawing_steps=2",
    ),
    "custom_diffusion": (),
    "mix_of_show": (RANK, "continual.sampling_steps=2"),
    "ewc": (RANK, "continual.draws=2"),
    "dsc": (RANK, "continual.consolidation.steps=2", "continual.consolidation.batch_size=2"),
}
"""By method, so that it is quick; a low rank where nothing is said."""
NOUNS = {"rex": "dog", "tom": "cat", "pip": "dog"}


@pytest.fixture
def concept(pictures):
    return lambda name: Concept(name, NOUNS[name], Data("folder", path=str(pictures / name)))


@pytest.fixture
def begin(pipeline, small, tmp_path):
    """A function from a method's name to a new run with it."""

    def begun(method="sequential_lora", *overrides, folder="run"):
        options = (*small, *OPTIONS.get(method, (RANK,)), *overrides)
        return begin_sequence(*own_recipe(str(pipeline), method, "run", options), tmp_path / folder)

    return begun


@pytest.mark.parametrize("method", CONTINUAL)
def test_a_concept_after_another_and_all_in_one_run_end_in_the_same_bits(begin, concept, tmp_path, pictures, method):
    one = begin(method)
    for name in NOUNS:
        open_sequence(one.folder).learn(concept(name))  # as somebody does who comes back
    table = sequence_toml(one.recipe, one.method)
    listed = "".join(
        f'\n[[concepts]]\nname = "{n}"\nnoun = "{noun}"\ndata = {{ source = "folder", path = "{pictures / n}" }}\n'
        for n, noun in NOUNS.items()
    )
    (tmp_path / "all.toml").write_text(table.replace("concepts = []\n", "") + listed)
    whole = run_sequence(tmp_path / "all.toml", tmp_path / "whole")
    assert differing_states(one.kept, whole.kept) == [] and one.concepts == whole.concepts == list(NOUNS)
    assert [event["scores"] for event in one.events] == [event["scores"] for event in whole.events]
    assert sorted(path.name for path in whole.folder.glob("*.safetensors")) == ["kept-003.safetensors"]


class Stopped(Exception):
    pass


def stop(round):
    raise Stopped


@pytest.mark.parametrize("method", ["ewc", "dreambooth"])
def test_a_lesson_that_was_stopped_goes_on(begin, concept, method):
    whole, stopped = begin(method, "lesson.stretches=3", folder="whole"), begin(method, "lesson.stretches=3")
    for run in (whole, stopped):
        run.learn(concept("rex"))
    with pytest.raises(Stopped):
        stopped.learn(concept("tom"), watch=stop)
    assert stopped.concepts == ["rex"] and (stopped.folder / "lesson.safetensors").is_file()
    seen = []
    open_sequence(stopped.folder).learn(concept("tom"), watch=seen.append)
    assert [round.clients_done for round in seen if not round.done] == [2, 3], (
        "the stretch that was done is not repeated"
    )
    whole.learn(concept("tom"))
    assert differing_states(whole.kept, stopped.kept) == []
    assert not (stopped.folder / "lesson.safetensors").exists()


def test_a_lesson_on_another_noun_begins_anew(begin, concept):
    run = begin("sequential_lora", "lesson.stretches=2")
    with pytest.raises(Stopped):
        run.learn(concept("rex"), watch=stop)
    seen = []
    run.learn(dataclasses.replace(concept("rex"), noun="cat"), watch=seen.append)
    assert [(round.clients_done, round.done) for round in seen] == [(1, False), (2, False), (3, True)] and run.tasks[
        0
    ].noun == "cat"


def test_what_was_measured(begin, concept):
    run = begin("orthogonal")
    for name in NOUNS:
        run.learn(concept(name))
    rows = [set(event["scores"]) for event in run.events]
    assert rows == [{"rex"}, {"rex", "tom"}, {"rex", "tom", "pip"}], "the upper triangle is empty"
    assert [event["facts"]["room"] for event in run.events] == [7, 6, 5]
    assert all(sum(score["taken"].values()) == 1 for event in run.events for score in event["scores"].values())
    assert all(event["drift"] > 0 for event in run.events)
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["losses"][0][1:] == [None, None] and len(summary["losses"][2]) == 3
    page = (run.folder / "report.html").read_text()
    assert "after pip" in page and page.count("data:image/png") == 6


def test_words_alone_forget_nothing(begin, concept):
    run = begin("textual_inversion", "lesson.training.weight_decay=10")
    for name in ("rex", "tom"):
        run.learn(concept(name))
    summary = json.loads((run.folder / "summary.json").read_text())
    (at_once, _), (later, _) = summary["losses"]
    assert later == at_once and summary["forgetting"]["forgetting"] == 0
    assert later != run.events[0]["untaught"], "something was learned that could have been forgotten"


def test_no_room_is_said_and_nothing_is_lost(begin, concept):
    run = begin("orthogonal", "continual.rank=8")  # layers read 16 numbers
    rooms = [run.learn(concept(name))["facts"]["room"] for name in ("rex", "tom")]
    assert rooms == [1, 0]
    before = load_state(run.folder / "kept-002.safetensors")
    with pytest.raises(ConfigError, match="'pip' is number 3, and with rank 8 there is room for 2"):
        run.learn(concept("pip"))
    again = open_sequence(run.folder)
    assert again.concepts == ["rex", "tom"] and differing_states(again.kept, before) == []


def test_earlier_pictures_are_not_needed(begin, concept, pictures, tmp_path):
    run = begin()
    shutil.copytree(pictures / "rex", tmp_path / "gone")
    run.learn(Concept("rex", "dog", Data("folder", path=str(tmp_path / "gone"))))
    shutil.rmtree(tmp_path / "gone")
    event = run.learn(concept("tom"))
    assert set(event["scores"]) == {"tom"} and run.concepts == ["rex", "tom"]
    assert "after tom" in (run.folder / "report.html").read_text()


def test_words_alone_are_forgotten_wholly_and_adapters_are_not(begin, concept):
    words, adapter = begin("textual_inversion", folder="words"), begin("dsc", folder="adapter")
    for run in (words, adapter):
        run.learn(concept("rex"))
        run.learn(concept("tom"))
    assert "Nothing of it remains in the model" in words.forget("rex")
    assert not list(words.folder.glob("samples/**/rex.png")) and list(words.folder.glob("samples/*/tom.png"))
    assert set(words.kept.params) == {"tokens.<tom>"}
    assert "cannot be taken out" in adapter.forget("rex")
    left = adapter.kept
    assert "tokens.<rex>" not in left.params and not any("rex" in name for name in left.extras)
    assert adapter.concepts == ["tom"]
    adapter.learn(concept("pip"))
    assert adapter.concepts == ["tom", "pip"]
    with pytest.raises(ConfigError, match="'rex', taught before, has the word <rex>, also if it was forgotten since"):
        adapter.learn(concept("rex"))
    with pytest.raises(ConfigError, match="no concept is called 'rex' here; there are tom, pip"):
        adapter.forget("rex")
    assert "rex was removed" in (adapter.folder / "report.html").read_text()


def test_custom_diffusion_forgets_as_if_it_had_never_learned(begin, concept):
    both, alone = begin("custom_diffusion", folder="both"), begin("custom_diffusion", folder="alone")
    both.learn(concept("rex"))
    both.learn(concept("tom"))
    alone.learn(concept("tom"))
    before = both.kept
    assert "Nothing of it remains in the model" in both.forget("rex")
    left, never = both.kept, alone.kept
    assert left.params.keys() == never.params.keys() and left.extras.keys() == never.extras.keys()
    for name, value in never.params.items():
        assert torch.allclose(left.params[name], value, atol=1e-6), name
    assert any(not torch.allclose(before.params[name], value, atol=1e-4) for name, value in never.params.items())
    both.learn(concept("pip"))
    for name in ("tom", "pip"):
        both.forget(name)
    assert not both.kept.extras and all(not value.any() for value in both.kept.params.values())
    both.sample("a dog", 1)


@pytest.mark.parametrize("taught", [1, 2])
def test_nothing_is_overwritten_where_the_events_were_lost(begin, concept, taught):
    run = begin()
    for name in list(NOUNS)[:taught]:
        run.learn(concept(name))
    (run.folder / "events.jsonl").unlink()
    kept = run.folder / f"kept-00{taught}.safetensors"
    before = kept.read_bytes()
    with pytest.raises(ArtefactError, match=f"holds {kept.name}, and events.jsonl there tells of 0 events"):
        run.learn(concept("pip"))
    assert kept.read_bytes() == before


def test_forgetting_one_leaves_another_whose_name_ends_alike(begin, concept):
    run = begin("dsc")
    run.learn(dataclasses.replace(concept("rex"), name="old.rex"))
    run.learn(concept("rex"))
    before = set(run.kept.extras)
    run.forget("rex")
    assert {name for name in before if name.startswith("pool.old.rex/")} == set(run.kept.extras) != set()


def test_a_folder_is_begun_by_one(begin, pipeline, tmp_path, monkeypatch):
    def slowly(saved, concepts):
        monkeypatch.undo()
        begin("textual_inversion")

    monkeypatch.setattr(SavedSequence, "check", slowly)
    with pytest.raises(ArtefactError, match="exists; nothing was overwritten"):
        begin("sequential_lora")
    assert "textual_inversion" in next(tmp_path.rglob("config.toml")).read_text("utf-8")


@pytest.mark.parametrize("value", ["loss_grid", "loss_draws", "draws", "num_images", "num_general"])
def test_scoring_nothing_is_refused_before_a_lesson(pipeline, value):
    with pytest.raises(ConfigError, match=f"scoring: {value} is 0, expected at least 1"):
        own_recipe(str(pipeline), "ewc", "run", [f"scoring.{value}=0"])


def test_drawing(begin, concept):
    run = begin()
    run.learn(concept("rex"))
    run.learn(concept("tom"))
    both = run.sample("a <rex> left of a <tom>", 2)
    assert both.shape == (2, 3, 8, 8) and both.dtype == torch.uint8
    assert torch.equal(both, open_sequence(run.folder).sample("a <rex> left of a <tom>", 2))
    with pytest.raises(ConfigError, match=r"<pip>: nobody has taught that; words are <rex>, <tom>"):
        run.sample("a <pip>", 2)


def test_drawing_concepts_at_their_places(begin, concept, monkeypatch):
    run, composed = begin(), []
    run.learn(concept("rex"))
    run.learn(concept("tom"))
    compose = type(run.method).compose

    def noted(method, model, kept, concepts):
        composed.append(concepts)
        compose(method, model, kept, concepts)

    monkeypatch.setattr(type(run.method), "compose", noted)
    left, right = Region((0.0, 0.0, 0.5, 1.0), "a <Rex>"), Region((0.5, 0.0, 1.0, 1.0), "a <tom>")
    plain, placed, turned = (run.sample("a dog", 2, regions=each) for each in ((), (left, right), (right,)))
    assert composed == [[], ["rex", "tom"], ["tom"]], "what a region says is made ready as what the prompt says"
    assert torch.equal(plain, run.sample("a dog", 2))
    assert placed.shape == plain.shape and not torch.equal(placed, plain) and not torch.equal(placed, turned)
    assert torch.equal(placed, open_sequence(run.folder).sample("a dog", 2, regions=(left, right)))
    with pytest.raises(ConfigError, match=r"<pip>: nobody has taught that; words are <rex>, <tom>"):
        run.sample("a dog", 2, regions=(left, Region((0.0, 0.0, 1.0, 1.0), "a <pip>")))


def test_a_model_that_is_another_one_now(begin, concept, pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "copy")
    run = begin("sequential_lora", f"model={json.dumps(str(folder))}")
    run.learn(concept("rex"))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(ArtefactError, match="are not those that"):
        run.learn(concept("tom"))
    assert run.concepts == ["rex"]


def test_a_line_that_was_cut_short_has_not_happened(begin, concept):
    run = begin()
    run.learn(concept("rex"))
    before = load_state(run.folder / "kept-001.safetensors")
    with open(run.folder / "events.jsonl", "a") as file:
        file.write('{"event": "learn", "conc')
    again = open_sequence(run.folder)
    assert again.concepts == ["rex"] and differing_states(again.kept, before) == []
    again.learn(concept("tom"))
    assert again.concepts == ["rex", "tom"]


def test_killed_after_kept_and_before_its_line(begin, concept, monkeypatch):
    whole, killed = begin(folder="whole"), begin()
    for run in (whole, killed):
        run.learn(concept("rex"))
    before = killed.kept

    def kill(path, data, **how):
        if path.name == "events.jsonl":
            monkeypatch.undo()
            raise ArtefactError("killed")
        write_bytes(path, data, **how)

    monkeypatch.setattr(history, "write_bytes", kill)
    with pytest.raises(ArtefactError, match="killed"):
        killed.learn(concept("tom"))
    assert (killed.folder / "kept-002.safetensors").is_file(), "what was kept had been written"
    again = open_sequence(killed.folder)
    assert again.concepts == ["rex"] and differing_states(again.kept, before) == []
    again.learn(concept("tom"))
    whole.learn(concept("tom"))
    assert again.concepts == ["rex", "tom"] and differing_states(again.kept, whole.kept) == []


def test_what_cannot_be_taught(begin, concept, pictures, tmp_path):
    run = begin()
    run.learn(concept("rex"))
    before = run.kept
    (tmp_path / "empty").mkdir()
    shutil.copytree(pictures / "tom", tmp_path / "damaged")
    (tmp_path / "damaged" / "1.png").write_bytes((pictures / "tom" / "1.png").read_bytes()[:40])
    (tmp_path / "single").mkdir()
    shutil.copy(pictures / "tom" / "0.png", tmp_path / "single")
    for wrong, kind, message in (
        (Concept("REX", "dog", concept("tom").data), ConfigError, "called 'REX': 'rex', taught before"),
        (Concept("new", "dog", Data("folder", path=str(tmp_path / "empty"))), DataError, "no image"),
        (Concept("new", "dog", Data("folder", path=str(tmp_path / "absent"))), DataError, "absent"),
        (Concept("new", "dog", Data("folder", path=str(tmp_path / "damaged"))), DataError, r"1\.png: cannot be read"),
        (Concept("new", "dog", Data("folder", path=str(tmp_path / "single"))), DataError, "at least 2 are needed"),
        (Concept("new", "gryphon", concept("tom").data), ConfigError, "'<new>' is to start from 'gryphon', its noun"),
    ):
        with pytest.raises(kind, match=message):
            run.learn(wrong)
        assert differing_states(run.kept, before) == []
    for name, noun, message in (
        ("a b", "dog", "cannot be a concept's name"),
        ("a" * 65, "dog", "cannot be a concept's name; use up to 64 letters"),
        ("new", " ", "has no noun"),
    ):
        with pytest.raises(ConfigError, match=message):
            Concept(name, noun, concept("tom").data)
    assert run.concepts == ["rex"] and len(list(run.folder.glob("kept-*"))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("continual.rank=4", r"has continual\.rank = 4, and what is kept there was learned with 2"),
        ("continual.name=ewc", r"has continual\.\w+ = "),
        ("wording=a photo of {concept}", r"has wording = 'a photo of {concept}'"),
        ("num_vectors=2", r"has num_vectors = 2, and what is kept there was learned with 1"),
    ],
)
def test_what_was_learned_keeps_its_method(begin, concept, change, message):
    run = begin()
    run.learn(concept("rex"))
    where = run.folder / "config.toml"
    table = tomllib.loads(where.read_text())
    change_table(table, change)
    where.write_text(tomli_w.dumps(table))
    for use in (lambda saved: saved.learn(concept("tom")), lambda saved: saved.sample("a <rex>", 1)):
        with pytest.raises(ArtefactError, match=message):
            use(open_sequence(run.folder))


def test_how_long_to_train_may_change_between_concepts(begin, concept):
    run = begin()
    run.learn(concept("rex"))
    where = run.folder / "config.toml"
    table = tomllib.loads(where.read_text())
    change_table(table, "lesson.training.steps=1")
    where.write_text(tomli_w.dumps(table))
    open_sequence(run.folder).learn(concept("tom"))
    assert run.concepts == ["rex", "tom"]


def test_a_lesson_that_was_stopped_is_finished_by_resume(begin, concept):
    whole, killed = begin(folder="whole"), begin()
    for run in (whole, killed):
        run.learn(concept("rex"))
    whole.learn(concept("tom"))

    def stop(now):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed.learn(concept("tom"), watch=stop)
    again = open_sequence(killed.folder).finish()
    assert again.concepts == ["rex", "tom"] and differing_states(again.kept, whole.kept) == []


def test_nothing_taught_is_nothing_to_go_on_with(begin):
    with pytest.raises(ArtefactError, match="nothing taught yet; give the command that began it again"):
        begin().finish()


def test_what_is_refused_before_anything_was_taught_leaves_no_run(pipeline, small, tmp_path, pictures):
    recipe = tmp_path / "recipe.toml"
    data = {"source": "folder", "path": str(pictures / "rex")}
    concepts = [{"name": "rex", "noun": "dog", "data": data}]
    table = tomllib.loads(sequence_toml(*own_recipe(str(pipeline), "cns", "run", (*small, *OPTIONS["cns"]))))
    table["concepts"], table["continual"]["budget"] = concepts, 1e-6
    recipe.write_text(tomli_w.dumps(table))
    with pytest.raises(ConfigError, match="is less than one; raise"):
        run_sequence(recipe, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    table["continual"]["budget"] = 0.01
    recipe.write_text(tomli_w.dumps(table))
    assert run_sequence(recipe, tmp_path / "run").concepts == ["rex"]


def test_a_lesson_that_was_taught_waits_for_nobody(begin, concept):
    """A kill between an event's line and the removal of its lesson."""
    run = begin()
    run.learn(concept("rex"))
    with pytest.raises(Stopped):
        run.learn(concept("tom"), watch=stop)
    left = (run.folder / "lesson.safetensors").read_bytes()
    run.learn(concept("tom"))
    (run.folder / "lesson.safetensors").write_bytes(left)
    assert open_sequence(run.folder).finish().concepts == ["rex", "tom"]
    open_sequence(run.folder).forget("rex")


def test_a_stopped_lesson_is_not_lost_without_a_word(begin, concept, tmp_path, pictures):
    run = begin()
    run.learn(concept("rex"))
    with pytest.raises(Stopped):
        run.learn(concept("tom"), watch=stop)
    with pytest.raises(ConfigError, match=r"the lesson on 'tom' was stopped, .* finish it first: personae resume"):
        run.forget("rex")
    with pytest.warns(UserWarning, match="the lesson on tom, which was stopped, is given up"):
        run.learn(concept("pip"))
    assert run.concepts == ["rex", "pip"] and open_sequence(run.folder).finish().concepts == ["rex", "pip"]


def test_the_stopped_lesson_is_finished_before_the_recipes(begin, concept, small, pipeline, pictures, tmp_path):
    table = tomllib.loads(sequence_toml(*own_recipe(str(pipeline), "sequential_lora", "run", (*small, RANK))))
    listed = {"name": "rex", "noun": "dog", "data": {"source": "folder", "path": str(pictures / "rex")}}
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(table | {"concepts": [listed]}))
    with pytest.raises(Stopped):
        run_sequence(tmp_path / "recipe.toml", tmp_path / "run", watch=stop)
    with pytest.warns(UserWarning, match="on rex"), pytest.raises(Stopped):
        open_sequence(tmp_path / "run").learn(concept("tom"), watch=stop)
    assert open_sequence(tmp_path / "run").finish().concepts == ["tom", "rex"]


def test_what_is_not_finite_is_not_kept(begin, concept):
    run = begin("sequential_lora", "lesson.training.lr=1e30", "lesson.stretches=1", "lesson.training.steps=1")
    with pytest.raises(Diverged, match=r"concept 'rex' is not finite in .*Lower lesson"):
        run.learn(concept("rex"))
    assert run.concepts == [] and not (run.folder / "lesson.safetensors").exists()


@pytest.mark.parametrize(
    ("method", "caption", "expected"),
    [
        ("sequential_lora", "a <rex> dog on grass", "a <rex> on grass"),
        ("sequential_lora", "a <rex> and a hot-dog", "a <rex> and a hot-dog"),
        ("sequential_lora", "a Dog on grass", "a <rex> on grass"),
        ("dreambooth", "a <rex> dog on grass", "a <rex> dog on grass"),
        ("dreambooth", "a <REX> on grass", "a <rex> dog on grass"),
        ("dreambooth", "a dog on grass", "a <rex> dog on grass"),
    ],
)
def test_captions_of_ones_own_name_the_concept_as_the_method_does(caption, expected, method):
    images = Images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), captions=(caption,))
    task = Task("rex", "<rex>", "dog")
    said = "<rex> dog" if method == "dreambooth" else "<rex>"
    assert concepts._captions(images, task, said) == (expected,)


def test_a_word_that_holds_its_noun_is_left_whole():
    images = Images(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), captions=("a <my-dog>", "a dog by <my-dog>"))
    found = concepts._captions(images, Task("my-dog", "<my-dog>", "dog"), "<my-dog>")
    assert found == ("a <my-dog>", "a <my-dog> by <my-dog>")


def test_settings_of_one_run_are_not_the_next_ones(pipeline):
    own_recipe(str(pipeline), "dsc", "run", ["continual.consolidation.steps=5"])
    assert own_recipe(str(pipeline), "dsc", "run")[1].consolidation.steps == 100


@pytest.mark.parametrize(
    ("prompt", "note"),
    [("a rex", "says rex, and not <rex>"), ("a < rex >", "says rex, and not <rex>"), ("a <rex> of a rex", None)],
)
def test_a_name_without_its_brackets_is_noted(begin, concept, prompt, note):
    run = begin("textual_inversion")
    run.learn(concept("rex"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run.sample(prompt, 1)
    assert [str(each.message) for each in said if "and not" in str(each.message)] == (
        [f"the prompt {note}, which draws the concept"] if note else []
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lesson.training.steps=0", "lesson: 10 stretches of 0 training steps; expected at least 1 of each"),
        ("sampling.sampler=ddim", r"sampling\.sampler: unknown key"),
        ("sampling.guidance=nan", "sampling: guidance is nan, expected a finite number"),
        ("num_prompts=0", "- num_prompts is 0, expected at least 1"),
        ("machine.threads=0", "machine: threads is 0, expected at least 1"),
        ('continual.name=["ewc"]', r"continual\.name: \['ewc'\] is unknown"),
        ("continual.name=textual_inversion", "continual.rank: unknown key; valid are none"),
    ],
)
def test_recipes_that_cannot_be(pipeline, change, message):
    with pytest.raises(ConfigError, match=message):
        own_recipe(str(pipeline), "sequential_lora", "run", ["continual.rank=2", change])


def test_sampler_steps_are_looked_at_before_a_lesson(begin):
    with pytest.raises(ConfigError, match="0 sampling steps were asked for"):
        begin("sequential_lora", "sampling.steps=0")


def test_more_timesteps_than_there_are_is_said_before_a_lesson(begin):
    with pytest.raises(ConfigError, match="loss_grid is 2000, draws 2; the model has 1000 timesteps"):
        begin("sequential_lora", "scoring.loss_grid=2000")


def test_a_damaged_recipe_is_not_taken_for_none(begin, concept):
    run = begin()
    (run.folder / "config.toml").write_text("name = [")
    with pytest.raises(ArtefactError, match=r"config\.toml cannot be read: .*damaged or edited by hand"):
        open_sequence(run.folder)


def test_recipes_are_read_whole(pipeline, small):
    recipe, method = own_recipe(str(pipeline), "ewc", "run", [*small, "continual.weight=3"])
    assert method.weight == 3 and parse_sequence(tomllib.loads(sequence_toml(recipe, method)), "x") == (
        recipe,
        method,
    )
    with pytest.raises(ConfigError, match=r"continual\.name: 'ewcc' is unknown; did you mean 'ewc'"):
        own_recipe(str(pipeline), "ewcc", "run")
    with pytest.raises(ConfigError, match=r"continual\.wait: unknown key"):
        own_recipe(str(pipeline), "ewc", "run", ["continual.wait=3"])


@pytest.mark.parametrize("method", CONTINUAL)
def test_every_method_begins_at_a_rate_of_its_own(pipeline, method):
    recipe, made = own_recipe(str(pipeline), method, "run")
    assert recipe.lesson.training.lr == RATES[method] and isinstance(made, CONTINUAL[method])
    assert own_recipe(str(pipeline), method, "run", ["lesson.training.lr=0.25"])[0].lesson.training.lr == 0.25


def test_a_folder_that_is_no_such_run(tmp_path):
    with pytest.raises(ArtefactError, match="personae learn"):
        open_sequence(tmp_path)
    assert SavedSequence.__doc__
