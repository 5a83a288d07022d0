"""Reading a recipe says all that is wrong with it, and writing it back loses nothing."""

import re
import tomllib
from pathlib import Path

import pytest

import personae
from personae.errors import ConfigError
from personae.recipe.config import (
    find_recipe,
    load_recipe,
    method_name,
    parse,
    read_table,
    recipe_folders,
    to_table,
    to_toml,
)
from personae.sequence.config import parse_sequence, sequence_toml

RECIPES = sorted(path for folder in recipe_folders() for path in folder.rglob("*.toml"))
SEQUENCES = [path for path in RECIPES if "\n[continual]\n" in path.read_text("utf-8")]
SHIPPED = [path for path in RECIPES if "\nstudy = " not in path.read_text("utf-8") and path not in SEQUENCES]


def problems(*overrides, recipe="quickstart"):
    """The lines of the error, without the first that counts them."""
    with pytest.raises(ConfigError) as found:
        load_recipe(recipe, overrides)
    first, *lines = str(found.value).split("\n  - ")
    assert f"has {len(lines)} problem" in first
    return lines


def test_all_problems_are_said_at_once_each_with_the_nearest_key():
    found = problems(
        "data.partition.num_client=3",
        "method.training.step=3",
        "method.embeding_rate=1",
        "wrap.server_emma.decay=0.5",
        "sampling.sampler=ddimm",
        "zzz=red",
    )
    text = "\n".join(found)
    assert len(found) == 6
    assert "data.partition.num_client: unknown key; did you mean 'num_clients'?" in text
    assert "method.training.step: unknown key; did you mean 'steps'?" in text
    assert "method.embeding_rate: unknown key; did you mean 'embedding_rate'?" in text
    assert "wrap.server_emma: unknown; did you mean 'server_ema'?" in text
    assert "sampling.sampler: " in text
    assert "'dpmsolver++'" in text
    assert "zzz: unknown key; valid are name, rounds, data" in text


def test_values_that_do_not_go_together_stand_beside_the_methods_own_problems():
    found = problems("rounds=0", "method.training.lr=0", "method.adapt.steps=-1", "data.heldout=1.5")
    assert found == [
        "method.training: lr is 0.0, expected above 0",
        "method.adapt: steps is -1, expected at least 0",
        "rounds: 0, expected at least 1",
        "data.heldout: 1.5, expected between 0 and 1",
    ]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("rounds=two", "rounds: input should be a valid integer, found 'two'"),
        ("rounds=2.5", "rounds: input should be a valid integer"),
        ("rounds=true", "rounds: input should be a valid integer, found True"),
        ("name=3", "name: input should be a valid string, found 3"),
        ("data.channels=2", "data.channels: input should be 1 or 3, found 2"),
        ("data.new=anna", "data.new: input should be a valid array, found 'anna'"),
        ("data.pooled=1", "data.pooled: input should be a valid boolean, found 1"),
        ("data=3", "data: input should be an object, found 3"),
        ("method.training.decay=linear", "method.training.decay: input should be 'constant' or 'cosine'"),
        ("rounds=-1", "rounds: -1, expected at least 1"),
        ("cohort=0", "cohort: 0, expected at least 1"),
        ("cohort=21", "cohort: 21, but only 20 clients train"),
        ("data.partition.num_new=25", "data.partition: 25 clients of which 25 are new leave none to train"),
        ("data.partition.num_new=-1", "data.partition.num_new: -1, expected at least 0"),
        ("data.partition.alpha=", "data.partition.alpha: missing"),
        ("data.partition.kind=by_label", "data.partition.classes_per_client: missing"),
        ("sampling.steps=0", "sampling.steps: 0 sampling steps were asked for, expected 1 to 1000"),
        ("sampling.steps=2000", "sampling.steps: 2000 sampling steps were asked for, expected 1 to 1000"),
        ("evaluation.num_images=0", "evaluation.num_images: 0, expected at least 1"),
        ("machine.threads=0", "machine: threads is 0, expected at least 1"),
        ("method.name=spyre", "method.name: 'spyre' is unknown; did you mean 'spire'?"),
        ("method.name=[1]", "method.name: [1] is unknown; valid are spire, fedavg_ft"),
        ("method=3", "method: a table [method] with a name is needed; names are spire"),
        ("method.training=", "method.training: missing"),
        ("wrap=3", "wrap: expected tables such as [wrap.server_ema]"),
        ("wrap.proximal=3", "wrap.proximal: expected a table"),
        ("wrap.proximal={}", "wrap.proximal.mu: missing"),
        ("aggregation.rule=meen", "aggregation.rule: 'meen' is unknown; did you mean 'mean'?"),
        ("aggregation.attackers=-1", "aggregation.attackers: -1, expected at least 0"),
        ("aggregation.attackers=2", "aggregation.attackers: 2, but rule 'mean' withstands none; median, trimmed_mean"),
        ("aggregation.rule=krum", "aggregation.attackers: missing; how many clients of a round rule 'krum' is to"),
        (
            "aggregation={rule='bulyan', attackers=2}",
            "aggregation.attackers: 2, against which rule 'bulyan' needs 4 x 2 + 3 = 11 clients in a round, and there "
            "are 6",
        ),
        ("aggregation={rule='median', attackers=3}", "aggregation.attackers: 3, against which rule 'median' needs 2 x"),
        ("aggregation.clip_norm=0", "aggregation.clip_norm: 0.0, expected above 0, or left out for no clipping"),
        ("aggregation.clip_norm=nan", "aggregation.clip_norm: "),
        ("wrap.poisoned={attack='flip', clients=[]}", "wrap.poisoned.attack: input should be 'sign_flip'"),
        ("wrap.poisoned={attack='scale', clients=[]}", "wrap.poisoned: strength is None, expected a number above 0"),
        ("engine=in_proces", "engine: 'in_proces' is unknown; did you mean 'in_process'?"),
        ("backbone.preset=", "backbone: exactly one of preset and folder is needed"),
        ("data.partition=", "data.partition: missing"),
    ],
)
def test_one_problem_is_named_where_it_is(override, sentence):
    (found,) = problems(override)
    assert found.startswith(sentence)


@pytest.mark.parametrize(("more", "clients"), [("cohort=", 20), ("data.pooled=true", 1)])
def test_a_cohort_is_counted_where_it_can_be(more, clients):
    (found,) = problems("aggregation={rule='krum', attackers=9}", more)
    assert found.endswith(f"needs 2 x 9 + 3 = 21 clients in a round, and there are {clients}")


def test_no_round_may_be_smaller_than_its_rule_needs():
    (found,) = problems("aggregation={rule='krum', attackers=1}", "federation.minimum=4")
    assert found == (
        "aggregation.attackers: 1, against which rule 'krum' needs 2 x 1 + 3 = 5 clients in a round, and "
        "federation.minimum lets 4 do"
    )


def test_a_robust_rule_reaches_the_engine():
    assert load_recipe("quickstart", ["aggregation={rule='median', clip_norm=2}"]).aggregation.clip_norm == 2.0
    assert load_recipe("quickstart", ["aggregation={rule='krum', attackers=1}"]).aggregation.attackers == 1


def test_a_source_of_folders_needs_a_path_and_a_size():
    found = problems("data.path=", "data.size=", recipe="own_folder")
    assert found == ["data.path: needed for source 'clients'", "data.size: needed for source 'clients', in pixels"]


def test_set_takes_every_kind_of_value():
    recipe = load_recipe(
        "quickstart",
        [
            "rounds=3",
            "method.training.lr=1e-3",
            "name=mine",
            'engine="in_process"',
            "data.pooled=true",
            "data.path = a folder/b ",
            'data.new=["a", "b"]',
            "wrap.proximal.mu=1",
            "backbone.embedding={width = 4, place = 'blocks'}",
            "cohort=",
        ],
    )
    assert (recipe.rounds, recipe.name, recipe.data.pooled, recipe.cohort) == (3, "mine", True, None)
    assert (recipe.data.path, recipe.data.new) == ("a folder/b", ("a", "b"))
    assert (recipe.backbone.embedding.width, recipe.backbone.embedding.place) == (4, "blocks")
    assert method_name(recipe.method) == "server_ema(server_adam(proximal(spire)))"
    assert recipe.method.method.method.method.training.lr == 1e-3


def test_setting_a_backbone_folder_replaces_the_preset_and_back():
    assert load_recipe("quickstart", ["backbone.folder=a"]).backbone.preset is None
    both = load_recipe("quickstart", ["backbone.folder=a", "backbone.preset=small"]).backbone
    assert (both.folder, both.preset) == (None, "small")


@pytest.mark.parametrize("override", ["rounds", "=3", " = 3"])
def test_what_is_no_key_and_value_is_refused(override):
    with pytest.raises(ConfigError, match="is not of the form key=value"):
        load_recipe("quickstart", [override])


def test_a_key_below_a_value_is_refused():
    with pytest.raises(ConfigError, match="rounds is a value, not a table"):
        load_recipe("quickstart", ["rounds.more=3"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_survives_being_written_and_read(path):
    recipe = load_recipe(path)
    assert parse(to_table(recipe), "table") == recipe
    assert parse(tomllib.loads(to_toml(recipe)), "text") == recipe


@pytest.mark.parametrize("path", SEQUENCES, ids=lambda path: path.stem)
def test_every_sequence_survives_being_written_and_read(path):
    recipe, method = parse_sequence(*read_table(path))
    assert parse_sequence(tomllib.loads(sequence_toml(recipe, method)), "text") == (recipe, method)
    with pytest.raises(ConfigError, match="teaches concept after concept"):
        load_recipe(path)


def test_wrappers_survive_in_their_order():
    recipe = load_recipe("quickstart", ["wrap.proximal.mu=0.5", "cohort=", "evaluation.features=none"])
    assert parse(tomllib.loads(to_toml(recipe)), "text") == recipe


def test_a_recipe_is_found_by_its_name_or_path(tmp_path, monkeypatch):
    assert find_recipe("quickstart").name == "quickstart.toml"
    assert find_recipe(SHIPPED[0]) == SHIPPED[0]
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text('name = "mine"\n')
    assert find_recipe("quickstart") == Path("quickstart"), "a file of the user's comes first"


def test_a_name_that_is_nearly_right_is_corrected():
    with pytest.raises(ConfigError, match=r"no file and no shipped recipe 'quickstrat'; did you mean: quickstart"):
        personae.load_recipe("quickstrat")


@pytest.mark.parametrize("content", [b"rounds = ", b"\xff\xfe\x00", b"rounds = 1\nrounds = 2\n", b"\x89PNG\r\n"])
def test_a_file_that_is_no_toml_is_named(tmp_path, content):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"mine\.toml is not valid TOML"):
        load_recipe(path)


def test_an_empty_recipe_says_all_that_is_missing(tmp_path):
    (tmp_path / "empty.toml").touch()
    found = problems(recipe=tmp_path / "empty.toml")
    assert found[1:] == ["name: missing", "rounds: missing", "data: missing", "backbone: missing"]
    assert found[0].startswith("method: a table [method] with a name is needed")


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(ConfigError, match="there is no file"):
        load_recipe(tmp_path)


BY_STYLE = """
name = "by style"
rounds = 1

[data]
source = "emoji"
caption = "a <own> drawing of {thing}"

[data.partition]
kind = "by_attribute"
num_clients = 6

[backbone]
folder = "somewhere"
frozen = true

[backbone.lora]
rank = 2

[backbone.words]
words = ["<own>"]
start = "drawing"

[method]
name = "cluster_lora"
words = {steps = 1, lr = 0.1, batch_size = 2}
training = {steps = 1, lr = 0.1, batch_size = 2}
adapt = {steps = 1, lr = 0.1, batch_size = 2}
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("aggregation.rule=median", "aggregation: cluster_lora combines adapters itself"),
        ("aggregation.clip_norm=1.0", "aggregation: cluster_lora combines adapters itself"),
        ("wrap.server_ema.decay=0.9", "wrap: server_adam and server_ema change what nobody gets"),
        ("backbone.lora.alpha=4", "backbone.lora.alpha: cluster_lora stacks adapters"),
    ],
)
def test_what_adapters_by_style_would_ignore_is_refused(tmp_path, override, message):
    path = tmp_path / "styles.toml"
    path.write_text(BY_STYLE, "utf-8")
    assert load_recipe(path, ["wrap.proximal.mu=0.1"]).method.method.inside == "nearest"
    (problem,) = problems(override, recipe=path)
    assert problem.startswith(message)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_states_what_it_costs(path):
    comments = " ".join(line.lstrip("# ") for line in path.read_text("utf-8").split("\n") if line.startswith("#"))
    assert re.search(r"CPU-(second|minute|hour)", comments), comments
