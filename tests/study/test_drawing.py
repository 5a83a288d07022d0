"""A model is judged by what captions ask for: real pictures pass, an untrained model does not."""

import pytest

from personae.errors import ConfigError
from personae.study import drawing
from personae.study.drawing import PACKAGES, Drawing


def measured(study, folder):
    return [{**cell, **study.measure(cell, 0, folder)} for cell in study.cells([])]


def test_an_untrained_model_draws_nothing_that_was_asked_for(untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "PACKAGES", {"no_such_package": "minilm"})
    names, scenes = measured(Drawing(str(untrained), num_names=4, num_scenes=3, steps=1), tmp_path)
    assert names["nearest rendering"]["drawn"] < 0.2 < 0.9 < names["nearest rendering"]["real"]
    assert scenes["both anywhere"] == {"drawn": 0, "real": 1, "through the autoencoder": 0, "other captions": 0}
    assert names["lacking"] == ["minilm"] and "name" not in names
    answer = Drawing(str(untrained)).answer([names, scenes])
    assert "install minilm" in answer.findings[2] and len(answer.pictures) == 2
    assert all((tmp_path / picture.path).is_file() for picture in answer.pictures)


def test_real_pictures_pass(untrained, tmp_path, monkeypatch):
    """In the place of drawn ones."""
    for package in PACKAGES:
        pytest.importorskip(package)
    monkeypatch.setattr(Drawing, "_drawn", lambda self, captions, real, seed: (real, real))
    few = drawing.scene_names()[:20]
    monkeypatch.setattr(drawing, "scene_names", lambda: few)
    names, scenes = measured(Drawing(str(untrained), num_names=20, num_scenes=8), tmp_path)
    assert names["nearest rendering"]["drawn"] == 1 and names["style"]["drawn"] == names["style"]["real"] > 0.5
    assert names["name"]["drawn"] == names["name"]["real"] > 0.5
    assert scenes["both at their places"]["drawn"] == 1 and scenes["both at their places"]["other captions"] < 0.2
    table = Drawing(str(untrained), num_names=20).answer([names, scenes]).tables[0]
    assert [row[0] for row in table.rows] == [
        "style",
        "nearest rendering",
        "name",
        "both at their places",
        "both anywhere",
    ]
    assert all(row[-1] == pytest.approx(1, abs=0.05) for row in table.rows)


@pytest.mark.parametrize("changes", [{"num_names": 0}, {"num_names": 9999}, {"num_scenes": 1}, {"steps": 0}])
def test_problems_are_named(changes):
    with pytest.raises(ConfigError, match="expected 1 to"):
        Drawing("model", **changes)
