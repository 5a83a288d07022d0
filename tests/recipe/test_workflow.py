"""What a user does with a run: train, resume, personalize, sample, export."""

import json
import math
import shutil
import subprocess
import sys
import tomllib
from contextlib import ExitStack
from dataclasses import replace
from threading import Timer

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

import personae
from personae.artefact.run_folder import RunFolder
from personae.artefact.save import digest, load_state, read_metadata, save_state
from personae.core import Training
from personae.errors import ArtefactError, ConfigError, DataError
from personae.methods import FedAvgFT
from personae.recipe import measuring, saved, workflow
from personae.recipe.config import load_recipe, parse
from personae.testing.contract import differing_states


def contents(folder):
    """Every file's bytes, by its path below the folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- a run's folder ----------------------------------------------------------------------------------------------


def test_a_run_leaves_what_the_readme_says(tiny_run):
    names = contents(tiny_run.folder).keys()
    files = "report.html summary.json config.toml environment.json rounds.jsonl server.safetensors"
    assert names >= set(files.split()) | {f"clients/c{i}.safetensors" for i in range(5)}
    assert names >= {"checkpoint/checkpoint.json", "samples/c4-real.png", "samples/c4-before.png", "samples/c4.png"}
    assert not [name for name in names if name.endswith(".partial")]
    assert tiny_run.clients == ["c0", "c1", "c2", "c3", "c4"]
    records = [json.loads(line) for line in (tiny_run.folder / "rounds.jsonl").read_text("utf-8").splitlines()]
    assert [record["round"] for record in records] == [1, 2]
    assert all(len(record["clients"]) == 2 for record in records)
    assert "<html" in (tiny_run.folder / "report.html").read_text("utf-8")


def test_the_saved_recipe_is_the_one_that_ran(tiny_run, tiny):
    saved = parse(tomllib.loads((tiny_run.folder / "config.toml").read_text("utf-8")), "config.toml")
    assert saved == load_recipe("quickstart", tiny) == tiny_run.recipe


def test_a_new_client_of_the_recipe_sends_nothing_and_owns_little(tiny_run):
    new = tiny_run.summary["clients"]["c4"]
    assert (new["role"], new["bytes_up"], new["trained_parameters"]) == ("new", 0, 128)
    path = tiny_run.folder / "clients" / "c4.safetensors"
    assert new["personal_file_bytes"] == path.stat().st_size <= 8192
    assert list(load_state(path).params) == ["embedding.weight"]
    assert new["bytes_down"] == load_state(tiny_run.folder / "server.safetensors").num_bytes()


def test_traffic_is_that_of_the_rounds_and_one_download_each(tiny_run):
    summary = tiny_run.summary
    lines = (tiny_run.folder / "rounds.jsonl").read_text("utf-8").splitlines()
    sent = [client for line in lines for client in json.loads(line)["clients"].values()]
    assert summary["bytes_up"] == sum(client["bytes_up"] for client in sent) > 0
    released = load_state(tiny_run.folder / "server.safetensors").num_bytes()
    assert summary["bytes_down"] == sum(client["bytes_down"] for client in sent) + 5 * released


SUMMARY = "recipe method engine seed rounds wall_seconds bytes_up bytes_down heldout_loss versions clients"
CLIENT = """role num_images heldout_loss heldout_loss_before histogram_distance histogram_distance_before kid
kid_features
trained_parameters bytes_up bytes_down personal_file_bytes nearest_train_distance"""


def test_the_summary_has_its_fields(tiny_run):
    summary = tiny_run.summary
    assert summary.keys() >= set(SUMMARY.split())
    assert (summary["recipe"], summary["engine"], summary["seed"], summary["rounds"]) == (
        "quickstart", "in_process", 0, 2,
    )  # fmt: skip
    assert summary["method"] == "server_ema(server_adam(spire))"
    assert summary["wall_seconds"] > 0
    for name, client in summary["clients"].items():
        assert client.keys() >= set(CLIENT.split()), name
        assert client["kid_features"] == "digits-cnn"
        assert 0 <= client["histogram_distance"] <= 1
        assert math.isfinite(client["heldout_loss"])
        new = client["role"] == "new"
        assert (client["heldout_loss_before"] is not None) == (client["histogram_distance_before"] is not None) == new
    mean = sum(c["heldout_loss"] for c in summary["clients"].values()) / 5
    assert summary["heldout_loss"] == pytest.approx(mean)


def strict_json(text):
    """As readers outside Python take it: without NaN and Infinity."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_every_json_file_is_one_for_any_reader(tiny_run):
    for path in tiny_run.folder.rglob("*.json"):
        strict_json(path.read_text("utf-8"))
    for line in (tiny_run.folder / "rounds.jsonl").read_text("utf-8").splitlines():
        strict_json(line)


def test_a_loss_that_is_not_finite_is_null(tiny_run, copy_of, monkeypatch):
    run = personae.open_run(copy_of(tiny_run))
    monkeypatch.setattr(measuring, "denoising_loss", lambda *_, **__: math.nan)
    summary = run.evaluate()
    assert summary == strict_json((run.folder / "summary.json").read_text("utf-8"))
    assert summary["heldout_loss"] is None
    assert {c["heldout_loss"] for c in summary["clients"].values()} == {None}
    run.report()


# --- existing folders, resume ------------------------------------------------------------------------------------


def test_an_existing_folder_is_refused_and_keeps_its_bits(tiny_run, tiny):
    before = contents(tiny_run.folder)
    with pytest.raises(ArtefactError, match="nothing was overwritten"):
        personae.run("quickstart", tiny_run.folder, overrides=tiny)
    assert contents(tiny_run.folder) == before


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path, tiny):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ArtefactError, match="nothing was overwritten"):
        personae.run("quickstart", tmp_path / "run", overrides=tiny)
    assert (tmp_path / "run").read_text() == "mine"


def test_resuming_a_complete_run_changes_no_bit(tiny_run, copy_of):
    folder = copy_of(tiny_run)
    before = contents(folder)
    workflow.resume(folder)
    assert contents(folder) == before


# --- beginning with what an earlier run's clients kept -------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tiny_run):
    """What every training client kept, each with another embedding than it would begin with."""
    folder = RunFolder(tiny_run.folder)
    found = {name: folder.last_kept(name) for name in ("c0", "c1", "c2", "c3")}
    return {name: replace(state, params={k: v + 1 for k, v in state.params.items()}) for name, state in found.items()}


def trained_files(folder):
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def gone_on(kept, tiny, tmp_path_factory):
    return personae.run("quickstart", tmp_path_factory.mktemp("kept") / "run", overrides=tiny, kept=kept)


def test_clients_begin_with_what_they_kept(gone_on, tiny_run, kept, tiny):
    without = trained_files(tiny_run.folder)
    assert trained_files(gone_on.folder)["server.safetensors"] != without["server.safetensors"]
    asked = {name for line in RunFolder(gone_on.folder).rounds(2) for name in line["clients"]}
    idle = kept.keys() - asked
    assert idle
    for name in idle:
        assert not differing_states(RunFolder(gone_on.folder).last_kept(name), kept[name])


@pytest.mark.parametrize("stopped_at", ["_finish", "write_bytes"])
def test_a_run_that_begins_with_something_is_stopped_and_goes_on_with_the_same_bits(
    stopped_at, gone_on, kept, tiny, tmp_path, monkeypatch
):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr(workflow, stopped_at, stopped)
        with pytest.raises(KeyboardInterrupt):
            personae.run("quickstart", tmp_path / "run", overrides=tiny, kept=kept)
    if stopped_at == "_finish":
        done = workflow.resume(tmp_path / "run")
    else:  # before its recipe was written nothing can be resumed, and nothing is in the way
        with pytest.raises(ArtefactError, match="is not a run"):
            workflow.resume(tmp_path / "run")
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        done = personae.run("quickstart", tmp_path / "run", overrides=tiny, kept=kept)
    assert trained_files(done.folder) == trained_files(gone_on.folder)


@pytest.mark.parametrize(
    ("changes", "names", "told"),
    [
        ((), ("c0", "zoe"), "something was kept for zoe, and no client is called so here"),
        (("engine=flower",), ("c0",), "whose clients keep what is theirs where they are"),
    ],
)
def test_what_cannot_be_begun_with_is_refused_before_there_is_a_folder(changes, names, told, kept, tiny, tmp_path):
    given = dict.fromkeys(names, kept["c0"])
    with pytest.raises(ConfigError, match=told):
        personae.run("quickstart", tmp_path / "run", overrides=(*tiny, *changes), kept=given)
    assert not (tmp_path / "run").exists()


def test_resuming_makes_what_is_missing_of_a_complete_run(tiny_run, copy_of):
    folder = copy_of(tiny_run)
    before = contents(folder)
    for name in ("report.html", "environment.json", "images.json", "cost.json", "clients/c1.safetensors"):
        (folder / name).unlink()
    workflow.resume(folder)
    after = contents(folder)
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] != before[name]] in ([], ["cost.json"])


@pytest.mark.parametrize("call", [workflow.resume, workflow.open_run])
def test_a_folder_that_is_no_run_is_refused(tmp_path, call):
    with pytest.raises(ArtefactError, match=r"is not a run: it has no config\.toml"):
        call(tmp_path)


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.toml").write_text("rounds = ")
    with pytest.raises(ArtefactError, match=r"config\.toml cannot be read"):
        personae.open_run(tmp_path)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("backbone.embedding=", "spire needs a backbone with a client embedding"),
        ("backbone.preset=small", "needs pictures whose size is a multiple of 4, found 6"),
        ("evaluation.features=digit", "no feature map and no file is called 'digit'"),
        ("machine.device=abacus", "machine.device 'abacus' cannot be used here"),
        ("data.path=photos", "source 'digits' does not take data.path"),
        ('data.new=["anna"]', "data.new names clients of source 'clients'"),
        ("data.partition.min_images=5000", "min_images is 5000, expected 0 to 359"),
        ("data.partition.num_clients=5000", "num_clients is 5000, expected 1 to 1797"),
    ],
)
def test_what_does_not_go_together_is_refused_before_there_is_a_folder(tmp_path, tiny, override, sentence):
    with pytest.raises(ConfigError, match=sentence):
        personae.run("quickstart", tmp_path / "run", overrides=[*tiny, "data.size=6", override])
    assert not (tmp_path / "run").exists()


# --- a new client ------------------------------------------------------------------------------------------------


def test_a_new_client_needs_nobody_elses_images(tiny_run, copy_of, photos, monkeypatch):
    folder = copy_of(tiny_run)
    before = contents(folder)

    def fail(_):
        raise AssertionError("somebody else's images were asked for")

    monkeypatch.setattr(saved, "build_clients", fail)
    run = personae.open_run(folder)
    figures = run.personalize("anna", photos)
    assert run.sample("anna", 2).shape == (2, 1, 8, 8)

    assert (figures["bytes_up"], figures["num_images"], figures["num_heldout"]) == (0, 5, 1)
    assert (figures["role"], figures["trained_parameters"]) == ("new", 128)
    path = folder / "clients" / "anna.safetensors"
    assert path.stat().st_size == figures["personal_file_bytes"] <= 8192
    after = contents(folder)
    assert {name for name in before if after[name] != before[name]} == set()
    assert "anna" in run.clients


def test_a_new_client_is_measured_with_the_others_afterwards(tiny_run, copy_of, photos):
    run = personae.open_run(copy_of(tiny_run))
    run.personalize("anna", photos)
    summary = run.evaluate()
    assert summary["clients"]["anna"]["role"] == "new"
    assert summary["clients"]["c0"] == tiny_run.summary["clients"]["c0"]
    assert "anna" in run.report().read_text("utf-8")


def test_an_added_client_whose_images_are_gone_keeps_its_figures(tiny_run, copy_of, photos):
    run = personae.open_run(copy_of(tiny_run))
    figures = run.personalize("anna", photos)
    photos.rename(photos.with_name("elsewhere"))
    assert run.evaluate()["clients"]["anna"] == figures


def test_an_added_client_is_added_again_when_the_backbone_has_changed(tiny_run, copy_of, photos):
    run = personae.open_run(copy_of(tiny_run))
    run.personalize("anna", photos)
    with pytest.raises(ConfigError, match="client 'anna' exists"):
        run.personalize("anna", photos)
    path = run.folder / "clients" / "anna.safetensors"
    save_state(path, load_state(path), kind="personal", client="anna", backbone="0123456789abcdef")
    with pytest.raises(ArtefactError, match=r"anna\.safetensors belongs to backbone 0123456789abcdef"):
        run.evaluate()
    run.personalize("anna", photos)
    assert run.evaluate()["clients"]["anna"]["role"] == "new"


def test_a_finished_run_is_given_more_rounds(tiny_run, copy_of, tmp_path):
    folder = copy_of(tiny_run)
    text = (folder / "config.toml").read_text("utf-8")
    assert "rounds = 2\n" in text
    (folder / "config.toml").write_text(text.replace("rounds = 2\n", "rounds = 3\n"), "utf-8")
    seen = []
    summary = workflow.resume(folder, watch=seen.append).summary
    assert [round.round for round in seen if round.stage == "train" and round.done] == [3] and summary["rounds"] == 3
    again = copy_of(tiny_run, "again")
    shutil.rmtree(again / "checkpoint")
    assert workflow.resume(again).summary["rounds"] == 2, "what is complete needs no checkpoint"


def test_two_who_add_clients_at_once_wait_for_each_other_and_take_no_name_twice(tiny_run, copy_of, photos, monkeypatch):
    run = personae.open_run(copy_of(tiny_run))
    with ExitStack() as other:
        other.enter_context(RunFolder(run.folder).held())
        Timer(0.3, other.close).start()
        run.personalize("anna", photos)

    def meanwhile(*_):
        monkeypatch.undo()
        personae.open_run(run.folder).personalize("ben", photos)
        return saved.personalize_one(*_)

    monkeypatch.setattr(saved, "personalize_one", meanwhile)
    with pytest.raises(ConfigError, match="client 'ben' exists"):
        run.personalize("ben", photos)
    monkeypatch.setattr(saved, "PATIENCE", 0.0)
    with RunFolder(run.folder).held(), pytest.raises(ArtefactError, match="in use by another process"):
        run.personalize("cleo", photos)


def test_other_images_are_not_evaluated(tiny_run, copy_of):
    folder = copy_of(tiny_run)
    path = folder / "images.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "images": "0123456789abcdef"}), "utf-8")
    with pytest.raises(ArtefactError, match=r"are not those that .* began with; put them back"):
        personae.open_run(folder).evaluate()


def test_what_is_not_finished_is_not_evaluated(tiny_run, copy_of):
    folder = copy_of(tiny_run)
    (folder / "cost.json").unlink()
    with pytest.raises(ArtefactError, match="is not finished; finish it first: personae resume"):
        personae.open_run(folder).evaluate()


def test_a_resume_with_another_version_says_so_and_is_written_down(tiny_run, copy_of):
    folder = copy_of(tiny_run)
    (folder / "cost.json").unlink()
    path = folder / "environment.json"
    began = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**began, "threads": 7, "versions": {**began["versions"], "torch": "1.0"}}), "utf-8")
    with pytest.warns(UserWarning, match="began with torch 1.0, is now .*; threads 7, is now 1: it will not end in"):
        workflow.resume(folder)
    assert json.loads(path.read_text("utf-8"))["resumed_with"] == [began]
    assert "<html" in (folder / "report.html").read_text("utf-8")


def test_classes_are_counted_only_where_the_classifier_knows_them(tiny_run, copy_of):
    folder = copy_of(tiny_run)
    images = json.loads((folder / "images.json").read_text("utf-8"))
    (folder / "images.json").write_text(json.dumps({**images, "label_names": list("abcdefghij")}), "utf-8")
    assert personae.open_run(folder).evaluate()["clients"]["c0"]["sampled_labels"] is None


def test_two_people_with_the_same_images_have_files_of_their_own(tiny_run, copy_of, photos):
    run = personae.open_run(copy_of(tiny_run))
    run.personalize("anna", photos)
    run.personalize("ben", photos)
    anna, ben = (load_state(run.folder / "clients" / f"{name}.safetensors").params for name in ("anna", "ben"))
    assert digest(anna) != digest(ben)


def test_a_name_that_is_taken_is_refused(tiny_run, copy_of, photos):
    folder = copy_of(tiny_run)
    before = contents(folder)
    with pytest.raises(ConfigError, match="client 'c1' exists"):
        personae.open_run(folder).personalize("c1", photos)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["", ".", "..", "../anna", "a/b", ".anna", "anna smith", "an\nna", "c:\\x"])
def test_a_name_that_is_no_file_name_is_refused(tiny_run, photos, name):
    with pytest.raises(ConfigError, match="cannot be a client's name"):
        tiny_run.personalize(name, photos)


def test_a_folder_without_images_is_refused(tiny_run, tmp_path):
    with pytest.raises(DataError, match="no image that can be read"):
        tiny_run.personalize("anna", tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        tiny_run.personalize("anna", tmp_path / "nowhere")
    assert "anna" not in tiny_run.clients


# --- several new clients -----------------------------------------------------------------------------------------


@pytest.fixture
def people(photos):
    """Three more folders of pictures beside anna's, of 6, 4 and 2."""
    rng = np.random.default_rng(9)
    for name, count in (("ben", 4), ("cleo", 2)):
        (photos.parent / name).mkdir()
        for number in range(count):
            picture = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
            picture.save(photos.parent / name / f"{number}.png")
    return {name: photos.parent / name for name in ("anna", "ben", "cleo")}


def vector(run, name):
    return load_state(run.folder / "clients" / f"{name}.safetensors").params["embedding.weight"]


@pytest.mark.parametrize("at_once", [1, 2, 16])
def test_several_new_clients_have_what_each_would_have_alone(tiny_run, copy_of, people, at_once):
    one, many = (personae.open_run(copy_of(tiny_run, name)) for name in ("one", "many"))
    before = contents(many.folder)
    alone = {name: one.personalize(name, folder) for name, folder in people.items()}
    together = many.personalize_many(people, at_once=at_once)
    assert list(together) == ["anna", "ben", "cleo"]
    assert contents(one.folder).keys() == contents(many.folder).keys()
    for name in people:
        torch.testing.assert_close(vector(many, name), vector(one, name), atol=1e-4, rtol=1e-4)
        assert together[name].keys() == alone[name].keys()
        assert together[name]["num_images"] == alone[name]["num_images"]
        assert together[name]["heldout_loss"] == pytest.approx(alone[name]["heldout_loss"], rel=1e-4)
    assert json.loads((many.folder / "added.json").read_text("utf-8"))["ben"] == {
        "data": str(people["ben"]), "figures": together["ben"],
    }  # fmt: skip
    after = contents(many.folder)
    assert {name for name in before if after[name] != before[name]} == set()
    assert many.evaluate()["clients"]["cleo"]["role"] == "new"


def test_a_call_that_was_stopped_is_made_again(tiny_run, copy_of, people, monkeypatch):
    run, whole = (personae.open_run(copy_of(tiny_run, name)) for name in ("stopped", "whole"))
    expected = whole.personalize_many(people, at_once=2)
    measure, trained = type(run).measure_client, []

    def stop(self, name, *given):
        if name == "ben":
            raise KeyboardInterrupt
        return measure(self, name, *given)

    monkeypatch.setattr(type(run), "measure_client", stop)
    with pytest.raises(KeyboardInterrupt):
        run.personalize_many({n: people[n] for n in ("anna", "ben")}, at_once=2)
    monkeypatch.setattr(type(run), "measure_client", measure)
    adapt = saved.personalize_many
    monkeypatch.setattr(
        saved, "personalize_many", lambda job, got, names: trained.extend(names) or adapt(job, got, names)
    )
    again = personae.open_run(run.folder)
    assert again.personalize_many(people, at_once=2) == expected
    assert trained == ["cleo"], "who was trained before stays as it is"
    assert again.personalize_many(people, at_once=2) == expected
    assert trained == ["cleo"]


def test_all_names_are_checked_before_anybody_is_trained(tiny_run, people):
    wrong = {**people, "c1": people["anna"], "../x": people["ben"]}
    with pytest.raises(ConfigError, match=r"client 'c1' exists in .*; '\.\./x' cannot be a client's name"):
        tiny_run.personalize_many(wrong)
    with pytest.raises(ConfigError, match="0 clients at once were asked for"):
        tiny_run.personalize_many(people, at_once=0)
    with pytest.raises(DataError, match="is no folder"):
        tiny_run.personalize_many({**people, "dora": people["anna"].parent / "nowhere"})
    assert tiny_run.clients == ["c0", "c1", "c2", "c3", "c4"]


def test_a_name_from_another_folder_is_taken(tiny_run, copy_of, people):
    run = personae.open_run(copy_of(tiny_run))
    run.personalize("anna", people["anna"])
    with pytest.raises(ConfigError, match="client 'anna' exists"):
        run.personalize_many({"anna": people["ben"]})


def test_a_method_without_an_embedding_is_refused_together(tiny_run, copy_of, people):
    run = personae.open_run(copy_of(tiny_run))
    run.recipe = replace(run.recipe, method=FedAvgFT(Training(1, 0.1, 2), Training(1, 0.1, 2)))
    for call in (lambda: run.personalize_many(people), lambda: run.sample_many(["c0", "c1"])):
        with pytest.raises(ConfigError, match=r"FedAvgFT gives every client .*: the whole model"):
            call()
    assert run.clients == ["c0", "c1", "c2", "c3", "c4"]


def test_several_clients_draw_what_each_would_draw_alone(tiny_run):
    """To the byte, but for those that rounding tips over."""
    together = tiny_run.sample_many(["c4", "c0", "c2"], 3, seed=1)
    assert list(together) == ["c4", "c0", "c2"]
    for name, drawn in together.items():
        assert drawn.shape == (3, 1, 8, 8) and drawn.dtype == torch.uint8
        assert (drawn.int() - tiny_run.sample(name, 3, seed=1).int()).abs().max() <= 1
    assert tiny_run.sample_many([]) == {}
    with pytest.raises(ConfigError, match="there is no client 'c9'"):
        tiny_run.sample_many(["c0", "c9"])


# --- sampling ----------------------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_bits(tiny_run):
    first = tiny_run.sample("c4", 3, seed=1)
    assert first.dtype == torch.uint8
    assert first.shape == (3, 1, 8, 8)
    tiny_run.sample("c0", 1)  # another client's parts in the same model
    assert torch.equal(first, tiny_run.sample("c4", 3, seed=1))
    assert torch.equal(first, personae.open_run(tiny_run.folder).sample("c4", 3, seed=1))
    assert not torch.equal(first, tiny_run.sample("c4", 3, seed=2))


def test_a_client_that_does_not_exist_is_named_beside_those_that_do(tiny_run):
    with pytest.raises(ConfigError, match=r"no client 'c9' .* clients are c0, c1, c2, c3, c4"):
        tiny_run.sample("c9")


def test_no_images_is_no_number_of_images(tiny_run):
    with pytest.raises(ConfigError, match="0 images were asked for"):
        tiny_run.sample("c4", 0)


def test_a_personal_file_of_another_backbone_is_refused(tiny_run, copy_of):
    folder = copy_of(tiny_run)
    path = folder / "clients" / "c4.safetensors"
    save_state(path, load_state(path), kind="personal", client="c4", backbone="0123456789abcdef")
    run = personae.open_run(folder)
    ours = read_metadata(folder / "server.safetensors")["backbone"]
    with pytest.raises(ArtefactError, match=f"belongs to backbone 0123456789abcdef, this run's is {ours}"):
        run.sample("c4")
    with pytest.raises(ArtefactError, match="belongs to backbone"):
        run.export("c4", folder / "exported")
    assert not (folder / "exported").exists()


@pytest.mark.parametrize("name", ["server.safetensors", "clients/c4.safetensors"])
@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, -1])
def test_a_file_cut_short_is_named(tiny_run, copy_of, name, kept):
    path = copy_of(tiny_run) / name
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(ArtefactError, match=rf"{path.name} is damaged or cut short"):
        personae.open_run(path.parents[name.count("/")]).sample("c4", 1)


def test_a_run_that_is_not_done_says_how_to_continue_it(tiny_run, copy_of):
    folder = copy_of(tiny_run)
    (folder / "server.safetensors").unlink()
    with pytest.raises(ArtefactError, match="continue it with: personae resume"):
        personae.open_run(folder).sample("c4")


# --- export ------------------------------------------------------------------------------------------------------

STOCK = """
import sys
sys.modules["personae"] = None  # an import of ours fails, installed or not
import safetensors.torch, torch  # diffusers 0.32 reads through the first without importing it
from diffusers import DDPMPipeline
pipeline = DDPMPipeline.from_pretrained(sys.argv[1])
drawn = pipeline(batch_size=1, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0))
print(drawn.images.shape, any(name.startswith("personae.") for name in sys.modules))
"""


def test_an_exported_folder_needs_nothing_of_ours(tiny_run, tmp_path):
    folder = tiny_run.export("c4", tmp_path / "exported")
    done = subprocess.run(
        [sys.executable, "-I", "-c", STOCK, str(folder)], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 8, 8, 1) False"
    assert not list(folder.rglob("*.bin")), "pickle"


@pytest.mark.parametrize("client", ["c0", "c4"])
def test_the_exported_unet_equals_the_clients_model(tiny_run, tmp_path, client):
    exported = DDPMPipeline.from_pretrained(tiny_run.export(client, tmp_path / "exported")).unet.eval()
    model = tiny_run.model(client).eval()
    x_t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 10, 500, 999])
    with torch.no_grad():
        ours = model(x_t, t, model.part(torch.zeros(4, dtype=torch.bool)))
        theirs = exported(x_t, t).sample
        unconditional = model(x_t, t, model.part(torch.ones(4, dtype=torch.bool)))
    assert (ours - theirs).abs().max() <= 1e-6
    assert (ours - unconditional).abs().max() > 1e-4, "the client's vector is heard"


def test_an_export_overwrites_nothing(tiny_run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="nothing was overwritten"):
        tiny_run.export("c4", tmp_path)
    assert contents(tmp_path) == {"mine.txt": b"mine"}


# --- own images, own model ---------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """Three clients whose pictures differ in size, mode and format."""
    rng = np.random.default_rng(0)

    def pixels(*shape):
        return rng.integers(0, 256, shape, dtype=np.uint8)

    root = tmp_path / "mixed"
    pictures = {
        "anna/grey.png": Image.fromarray(pixels(8, 8)),
        "anna/wide.jpg": Image.fromarray(pixels(20, 33, 3)),
        "anna/tiny.bmp": Image.fromarray(pixels(1, 1, 3)),
        "anna/deep.png": Image.fromarray(rng.integers(0, 65536, (9, 9)).astype(np.uint16)),
        "ben/palette.png": Image.fromarray(pixels(12, 12, 3)).convert("P"),
        "ben/alpha.png": Image.fromarray(pixels(10, 7, 4)),
        "ben/grey-alpha.png": Image.fromarray(pixels(10, 7, 4)).convert("LA"),
        "cleo/one-bit.png": Image.fromarray(pixels(16, 16)).convert("1"),
        "cleo/two.webp": Image.fromarray(pixels(16, 24, 3)),
    }
    for name, picture in pictures.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(root / name)
    (root / "ben" / "notes.txt").write_text("not a picture")
    return root


def own(tiny, root):
    """Overrides for recipes/own_folder.toml."""
    shorter = [override for override in tiny if "partition" not in override]
    return [*shorter, f"data.path={root}", "data.size=8"]


def test_own_pictures_of_all_sizes_and_modes_run(tiny, mixed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = personae.run("own_folder", "run", overrides=[*own(tiny, "mixed"), 'data.new=["cleo"]'])
    clients = run.summary["clients"]
    assert {name: (c["role"], c["num_images"], c["num_heldout"]) for name, c in clients.items()} == {
        "anna": ("train", 3, 1),
        "ben": ("train", 2, 1),
        "cleo": ("new", 1, 1),
    }
    assert clients["cleo"]["histogram_distance"] is None
    assert clients["cleo"]["kid_features"] is None
    monkeypatch.chdir("/")  # what a run needs is found from anywhere
    assert personae.open_run(tmp_path / "run").evaluate()["clients"]["ben"] == clients["ben"]


def test_a_client_that_is_new_must_exist(tiny, mixed, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.new names dora, but the folder holds anna, ben, cleo"):
        personae.run("own_folder", tmp_path / "run", overrides=[*own(tiny, mixed), 'data.new=["dora"]'])


def test_a_cohort_larger_than_all_own_clients_leaves_no_folder(tiny, mixed, tmp_path):
    with pytest.raises(ConfigError, match="cohort is 9, expected 1 to 3"):
        personae.run("own_folder", tmp_path / "run", overrides=[*own(tiny, mixed), "cohort=9"])
    assert not (tmp_path / "run").exists()


def diffusers_folder(path, channels=1):
    unet = UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
    )
    DDPMPipeline(unet, DDPMScheduler(50, beta_schedule="squaredcos_cap_v2")).save_pretrained(path)
    return unet


def test_a_local_diffusers_folder_is_the_backbone(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unet = diffusers_folder("my-ddpm")
    run = personae.run("quickstart", "run", overrides=[*tiny, "backbone.folder=my-ddpm", "backbone.embedding.width=8"])
    released = load_state(run.folder / "server.safetensors").params
    assert released.keys() >= unet.state_dict().keys()
    assert run.summary["clients"]["c4"]["trained_parameters"] == 8
    exported = DDPMPipeline.from_pretrained(run.export("c4", "exported"))
    assert exported.scheduler.config.num_train_timesteps == 50


def test_a_diffusers_folder_of_other_channels_is_refused(tiny, tmp_path):
    diffusers_folder(tmp_path / "rgb", channels=3)
    with pytest.raises(ConfigError, match=r"draws \[3, 8, 8\], the images are \[1, 8, 8\]"):
        personae.run("quickstart", tmp_path / "run", overrides=[*tiny, f"backbone.folder={tmp_path / 'rgb'}"])
    assert not (tmp_path / "run").exists()


def test_everybodys_images_in_one_place(tiny, tmp_path):
    run = personae.run("quickstart", tmp_path / "run", overrides=[*tiny, "data.pooled=true", "rounds=1", "cohort="])
    assert set(run.summary["clients"]) == {f"c{i}" for i in range(5)}
    (line,) = (run.folder / "rounds.jsonl").read_text("utf-8").splitlines()
    assert list(json.loads(line)["clients"]) == ["pooled"]
