"""What the README says is true: its code runs as it stands, its links lead somewhere, its files exist."""

import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest

import personae
from personae.testing.tiny_pipeline import tiny_pipeline

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language):
    found = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    return [text for named, text in found if named == language]


def commands():
    """Every line that calls `personae`, without its remark."""
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("personae ")]


def test_the_python_runs_as_it_stands(tmp_path, photos, tiny, monkeypatch):
    """With fewer rounds, images and steps, which come from outside the text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(personae, "run", partial(personae.run, overrides=tiny))
    first, second = blocks("python")
    spoken = {}
    exec(compile(first, "README.md", "exec"), spoken)
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    exec(compile(second, "README.md", "exec"), spoken)
    assert spoken["images"].shape == (16, 1, 8, 8)
    assert "anna" in spoken["run"].clients


@pytest.mark.parametrize(("number", "most"), [(0, 6), (1, 4)])
def test_the_python_is_short(number, most):
    """Lines of code; the empty one after the import is for the eyes."""
    lines = [line for line in blocks("python")[number].splitlines() if line.strip()]
    assert len(lines) <= most


def test_the_commands_run_as_they_stand(tmp_path, photos, tiny, monkeypatch, command):
    from personae.recipe import environment

    monkeypatch.setattr(environment, "versions", lambda: dict.fromkeys(environment.LIBRARIES, "1.0"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, photos.parent / "ben")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    spoken = [words for words in commands() if "flower" not in words]  # its processes take a minute: tests/slow
    assert [words[0] for words in spoken] == [
        "run", "resume", "personalize", "sample", "export", "evaluate", "inspect", "doctor",
        "personalize", "sample", "sample", "export", "import", "inspect",
        "learn", "learn", "sample", "forget", "run", "deploy", "bench",
    ]  # fmt: skip
    tiny_pipeline(tmp_path / "sd-folder")
    shutil.copytree(photos, tmp_path / "photos" / "rex")
    shutil.copytree(photos, tmp_path / "photos" / "tom")
    lesson = (
        *("lesson.stretches=1", "lesson.training.steps=2", "continual.draws=2", "num_prompts=4", "sampling.steps=2"),
        *("scoring.num_images=2", "scoring.num_general=2", "scoring.draws=2", "scoring.loss_draws=1"),
    )
    little = ("rounds=2", "method.training.steps=2", "sampling.steps=2", "evaluation.num_images=2")
    for words in spoken:
        if words[0] == "import":
            shutil.copy(tmp_path / "rex-lora" / "pytorch_lora_weights.safetensors", tmp_path / "other.safetensors")
        chosen = [o for o in tiny if words[1:2] == ["quickstart"] or ("partition" not in o and "cohort" not in o)]
        chosen = {"run": chosen, "personalize": little if "sd-folder" in words else ()}.get(words[0], ())
        chosen = lesson if words[0] == "learn" and "--model" in words else chosen
        more = [part for override in chosen for part in ("--set", override)]
        code, _, error = command(*words, *more)
        assert code == 0, f"personae {shlex.join(words)}: {error}"


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)", README)
    local = [target for target in targets if "://" not in target]
    assert len(local) > 5
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_the_tree_names_what_there_is():
    (tree,) = [block for block in blocks("") if block.startswith("src/personae/")]
    named, above = [], Path()
    for line in tree.splitlines():
        names = re.findall(r"\S+", line.strip().split("  ")[0])
        above = above if line.startswith(" ") else Path(names[0])
        named += [above / name for name in names] if line.startswith(" ") else [above]
    assert [str(path) for path in named if not (ROOT / path).exists()] == []
    rooms = {path.name for path in (ROOT / "src" / "personae").iterdir() if (path / "__init__.py").is_file()}
    assert rooms <= {path.name for path in named}, "a room has no line"


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("sh")), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_commands_it_names_exist():
    from personae.cli.app import app

    names = {found.name or found.callback.__name__ for found in app.registered_commands}
    names |= {group.name for group in app.registered_groups}
    assert {words[0] for words in commands()} <= names
