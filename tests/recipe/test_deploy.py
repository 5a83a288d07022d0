"""A deployed recipe: the folder that is written, and both halves of it over a loopback grid."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("flwr")

import personae
from personae.cli.progress import Progress
from personae.engine.flower import HELLO, pack
from personae.errors import ArtefactError, ConfigError
from personae.recipe import deploy
from personae.recipe.config import load_recipe
from personae.testing.contract import differing_states
from personae.testing.loopback import LoopbackGrid

ROOT = Path(__file__).resolve().parents[2]
LITTLE = (
    "rounds=2",
    "method.training.steps=2",
    "method.adapt.steps=2",
    "evaluation.num_images=8",
    "evaluation.loss_grid=2",
    "evaluation.loss_draws=1",
    "evaluation.kid_subsets=2",
    "sampling.steps=2",
    "federation.wait_seconds=2",
)
NAMES = ("anna", "ben", "cem")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    script = ROOT / "examples" / "digit_folders.py"
    subprocess.run([sys.executable, str(script), str(folder), *NAMES], check=True, capture_output=True)
    return folder


def grid_of(recipe, folders, state):
    """A loopback grid whose nodes are configured as a SuperNode's command line does it."""
    app = deploy.client_app(recipe)
    grid = LoopbackGrid(app, len(NAMES))
    for node, name in enumerate(NAMES, start=1):
        grid._contexts[node].node_config.update(name=name, data=str(folders / name), state=str(state / name))
    return grid


def test_a_deployment_ends_in_the_bits_of_one_process_and_in_a_report(folders, tmp_path):
    app = deploy.deploy("digits/deployed", tmp_path / "app", LITTLE)
    grid = grid_of(app / "recipe.toml", folders, tmp_path / "state")
    plan = load_recipe(app / "recipe.toml")
    saved = deploy.serve(plan, grid, {"out": str(tmp_path / "run")}, Progress, make=grid.make)
    here = personae.run("digits/deployed", tmp_path / "here", overrides=[*LITTLE, f"data.path={folders}"])

    assert differing_states(saved.released, here.released) == []
    for name in NAMES:
        (mine,) = (tmp_path / "state" / name).rglob(f"clients/{name}.safetensors")
        assert mine.read_bytes() == (here.folder / "clients" / f"{name}.safetensors").read_bytes()
    ours, theirs = saved.summary["clients"], here.summary["clients"]
    assert list(ours) == list(NAMES)
    for name in NAMES:
        for key in (
            "role",
            "num_images",
            "heldout_loss",
            "kid",
            "trained_parameters",
            "bytes_up",
            "personal_file_bytes",
        ):
            assert ours[name][key] == theirs[name][key], (name, key)
        # How many images of which class somebody has stays where it is.
        assert ours[name]["labels"] is None and ours[name]["sampled_labels"] is None
        assert ours[name].keys() == theirs[name].keys()
        assert 0 <= ours[name]["histogram_distance"] <= 1
    assert "<html" in (saved.folder / "report.html").read_text("utf-8")
    assert not list((tmp_path / "run").rglob("*.png"))

    # At a node, without the server: a run folder of its own.
    node = personae.open_run(mine.parent.parent)
    assert node.sample("cem", 2).shape == (2, 1, 8, 8)
    assert node.personalize("dora", folders / "anna")["trained_parameters"] == 128


def test_a_stopped_deployment_goes_on_and_another_recipe_is_refused(folders, tmp_path):
    app = deploy.deploy("digits/deployed", tmp_path / "app", LITTLE)
    plan, grid = load_recipe(app / "recipe.toml"), grid_of(app / "recipe.toml", folders, tmp_path / "state")
    first = deploy.serve(plan, grid, {"out": str(tmp_path / "run")}, Progress, make=grid.make).summary
    again = deploy.serve(plan, grid, {"out": str(tmp_path / "run")}, Progress, make=grid.make).summary
    assert first["clients"] == again["clients"]
    other = load_recipe(app / "recipe.toml", ["seed=1"])
    with pytest.raises(ConfigError, match="holds a run of another recipe"):
        deploy.serve(other, grid, {"out": str(tmp_path / "run")}, Progress, make=grid.make)
    with pytest.raises(ConfigError, match="the run needs a folder"):
        deploy.serve(plan, grid, {"out": ""}, Progress, make=grid.make)


def test_what_is_written_is_small_and_has_no_weights(tmp_path):
    app = deploy.deploy("quickstart", tmp_path / "app", ["federation.minimum=3"])
    names = {path.name for path in app.iterdir()}
    assert names == {
        "README.md",
        "keys.sh",
        "node.sh",
        "personae_app.py",
        "pyproject.toml",
        "recipe.toml",
        "server.sh",
        "start.sh",
    }
    assert sum(path.stat().st_size for path in app.iterdir()) < 20_000
    for script in app.glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert script.stat().st_mode & 0o111
    assert not [path for path in app.iterdir() if "$$" in path.read_text("utf-8")]
    assert load_recipe(app / "recipe.toml").engine == "flower"


def test_only_the_app_travels_to_the_clients(tmp_path):
    """Not what the server's own folder comes to hold: keys, Flower's files, a run."""
    app = deploy.deploy("quickstart", tmp_path / "app", ["federation.minimum=3"])
    for other in ("flower/config.toml", "flower/apps/x/personae_app.py", "run/summary.json", "keys/notes.md"):
        (app / other).parent.mkdir(parents=True, exist_ok=True)
        (app / other).write_text("{}")
    flwr = Path(sysconfig.get_path("scripts")) / "flwr"
    subprocess.run(
        [flwr, "build"], cwd=app, env={**os.environ, "FLWR_HOME": str(tmp_path)}, check=True, capture_output=True
    )
    (built,) = app.glob("*.fab")
    names = set(zipfile.ZipFile(built).namelist())
    assert names == {".info/CONTENT", "README.md", "personae_app.py", "pyproject.toml", "recipe.toml"}


def test_a_deployment_must_say_how_many_clients_a_round_needs(tmp_path):
    with pytest.raises(ConfigError, match=r"federation\.minimum is missing.*--set federation\.minimum=2"):
        deploy.deploy("quickstart", tmp_path / "app")
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "mine").write_text("mine")
    with pytest.raises(ArtefactError, match="exists; nothing was overwritten"):
        deploy.deploy("quickstart", tmp_path / "app", ["federation.minimum=3"])


@pytest.mark.parametrize("config", [{}, {"name": "anna"}, {"name": "../anna", "state": "s"}, {"state": "s"}])
def test_a_node_that_is_configured_badly_says_how(config, tmp_path, capsys):
    app = deploy.deploy("digits/deployed", tmp_path / "app", LITTLE)
    grid = LoopbackGrid(deploy.client_app(app / "recipe.toml"), 1)
    grid._contexts[1].node_config.update(config)
    (asked,) = grid.push_messages([grid.make(pack({"run": "r"}), 1, HELLO)])
    (reply,) = grid.pull_messages([asked])
    assert reply.content.config_records["about"]["problem"] == "ConfigError"
    assert '--node-config \'name="anna"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ({"heldout_loss": 0.3, "kid_features": "x", "role": "new"}, {"heldout_loss": 0.3, "role": "new"}),
        ({"heldout_loss": "abc", "kid": b"x", "labels": "abc", "role": "boss", "other": [1]}, {"role": "train"}),
        ({"heldout_loss": 1e308, "kid": float("nan"), "recall": True, "bytes_up": 7}, {"role": "train"}),
    ],
)
def test_only_figures_of_the_right_kind_are_believed(told, kept):
    found = deploy.believable(told)
    assert {k: v for k, v in found.items() if v is not None and k != "kid_features"} == kept
    json.dumps(found)


@pytest.mark.parametrize("override", ["backbone.folder=/home/me/model", "evaluation.features=/home/me/features.pt"])
def test_files_of_this_machine_are_not_sent_to_others(override, tmp_path):
    with pytest.raises(ConfigError, match="names files of this machine"):
        deploy.deploy("digits/deployed", tmp_path / "app", [*LITTLE, override])
    assert not (tmp_path / "app").exists()


def test_the_command_says_what_to_read_next(command, tmp_path):
    code, out, _ = command("deploy", "quickstart", "--to", tmp_path / "app", "--set", "federation.minimum=3")
    assert code == 0 and "README.md says how to start it" in out
