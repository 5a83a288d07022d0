"""personae learn and forget, and what other commands say of a model that is taught."""

import json

import numpy as np
import pytest
from PIL import Image

from personae.testing.tiny_pipeline import tiny_pipeline

SMALL = (
    *("lesson.stretches=1", "lesson.training.steps=2", "lesson.training.batch_size=2", "continual.rank=2"),
    *("scoring.loss_grid=2", "scoring.loss_draws=1", "scoring.draws=2", "scoring.num_images=2"),
    *("scoring.num_general=2", "sampling.steps=2", "machine.threads=1"),
)
SETTINGS = [part for override in SMALL for part in ("--set", override)]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline") / "model")


@pytest.fixture
def pictures(tmp_path):
    for concept in ("rex", "tom"):
        (tmp_path / "photos" / concept).mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng((ord(concept[0]), number)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / concept / f"{number}.png")
    return tmp_path / "photos"


def test_two_concepts_and_one_of_them_forgotten(command, pipeline, pictures, tmp_path):
    run = tmp_path / "pets"
    new = ("--model", pipeline, "--method", "sequential_lora", *SETTINGS)

    code, out, error = command("learn", run, "--concept", "rex", "--data", pictures / "rex", "--noun", "dog", *new)
    assert code == 0, error
    assert "rex: 3 pictures" in out and f'next: personae sample {run} --prompt "a <rex>"' in out
    assert "learning      concept 1/1 (rex)  stretch 1/1  loss" in error and "client" not in error
    assert "concept 1/1 (rex)  kept, measured and drawn" in error

    again = ("learn", run, "--concept", "tom", "--data", pictures / "tom", "--noun", "cat")
    code, _, error = command(*again, *new, "--set", "lesson.training.lr=0.5")
    assert code == 2 and "not those of this command" in error, "the same command goes on, another one does not"
    code, out, error = command(*again, *new, "--json")
    assert code == 0, error
    assert set(json.loads(out)["scores"]) == {"rex", "tom"}

    assert command("resume", run)[0] == 0, "there is nothing left to do"
    assert command("report", run)[1] == f"wrote {run / 'report.html'}\n"
    code, out, _ = command("sample", run, "--prompt", "a <rex> left of a <tom>", "-n", 2)
    assert code == 0 and f"to {run / 'samples' / 'drawn-0'}" in out
    assert len(list((run / "samples" / "drawn-0").glob("000*.png"))) == 2
    placed = ["--region", "0,0,0.5,1: a <rex>", "--region", "0.5,0,1,1: a <tom>"]
    drawn = ("sample", run, "--prompt", "a <rex> left of a <tom>", "-n", 1, "--seed", 1, "--json")
    code, out, error = command(*drawn, *placed)
    assert code == 0 and json.loads(out)["regions"] == placed[1::2], error

    code, out, _ = command("forget", run, "--concept", "rex")
    assert code == 0 and "cannot be taken out again" in out and "concepts now: tom" in out
    code, out, error = command("sample", run, "--prompt", "a <rex>", "--out", tmp_path / "drawn")
    assert code == 2 and "<rex>: nobody has taught that; words are <tom>" in error


def test_bad_input(command, pipeline, pictures, tmp_path):
    run = tmp_path / "pets"
    own = ("learn", run, "--concept", "rex", "--data", pictures / "rex", "--noun", "dog")
    for arguments, expected, message in (
        (own, 2, "is new; say --model"),
        ((*own, "--model", pipeline, "--method", "ewcc"), 2, "did you mean 'ewc'"),
        ((*own, "--model", tmp_path, "--method", "ewc"), 5, "is not a text-to-image pipeline"),
        ((*own, "--model", "tinyt2i", "--method", "ewc"), 5, "a model that comes with personae: tiny-t2i"),
        ((*own[:-1], "gryphon", "--model", pipeline, "--method", "ewc"), 2, "'<rex>' is to start from 'gryphon'"),
        ((*own[:5], tmp_path / "absent", *own[6:], "--model", pipeline, "--method", "ewc"), 3, "absent"),
        (("forget", tmp_path, "--concept", "rex"), 5, "holds no model that learns"),
    ):
        code, _, error = command(*arguments)
        assert (code, message in error) == (expected, True), error
    assert command(*own, "--model", pipeline, "--method", "sequential_lora", *SETTINGS)[0] == 0
    code, _, error = command(*own, "--model", pipeline)
    assert code == 2 and "leave out --model" in error
    code, _, error = command(*own)
    assert code == 2 and "cannot be called 'rex': 'rex', taught before" in error
    drawn = ("--prompt", "a <rex>", "--out", tmp_path / "drawn")
    code, _, error = command("sample", run, *drawn, "--region", "0,0,2,1: a <rex>")
    assert code == 2 and "is outside the picture" in error and not (tmp_path / "drawn").exists()
    code, _, error = command("sample", pipeline, *drawn, "--region", "0,0,1,1: a <rex>")
    assert code == 2 and f"that personae learn has taught, and {pipeline} is none" in error
    code, _, error = command("sample", run, "--client", "own", "--prompt", "a <rex>")
    assert code == 2 and "leave out --client" in error and "say" not in error
    code, _, error = command("sample", run)
    assert code == 2 and "say --prompt, what to draw" in error and "--client" not in error
    (tmp_path / "file").write_text("")
    code, _, error = command("sample", run, "--prompt", "a <rex>", "--out", tmp_path / "file" / "drawn")
    assert code == 5 and f"creating {tmp_path / 'file' / 'drawn'} failed" in error
    code, _, error = command("sample", run, *drawn, "--guidance", "nan")
    assert code == 2 and "guidance is nan, expected a finite number" in error
    code, _, error = command("sample", run, *drawn, "-n", -3)
    assert code == 2 and "-3 images were asked for, expected at least 1" in error
    assert not (tmp_path / "drawn").exists()
    found = json.loads(command("inspect", run, "--json")[1])
    assert (found["method"], found["concepts"], found["forgotten"]) == ("sequential_lora", ["rex"], [])
    assert found["bytes_kept"] > 0 and "rounds_done" not in found
    (run / "config.toml").write_text("name = [")
    for arguments in (own, (*own, "--model", pipeline, "--method", "ewc"), ("resume", run), ("sample", run, *drawn)):
        code, _, error = command(*arguments)
        assert code == 5 and f"{run / 'config.toml'} cannot be read" in error, error


def test_a_refusal_at_the_first_lesson_leaves_no_run(command, pipeline, pictures, tmp_path):
    run = tmp_path / "my pets"
    own = ("learn", run, "--concept", "rex", "--data", pictures / "rex", "--noun", "dog", "--model", pipeline)
    small = [part for override in SMALL[:-1] if "rank" not in override for part in ("--set", override)]
    tight = ("--method", "cns", *small, "--set", "num_prompts=4", "--set", "continual.budget=1e-6")
    code, _, error = command(*own, *tight)
    assert code == 2 and "is less than one" in error
    code, out, error = command(*own, "--method", "textual_inversion", *small)
    assert code == 0, error
    assert f"next: personae sample '{run}' --prompt" in out


def test_resume_takes_up_the_lesson_that_was_stopped(command, pipeline, pictures, tmp_path, monkeypatch):
    from personae.sequence import workflow

    def stop(*_):
        raise KeyboardInterrupt

    run = tmp_path / "my pets"
    own = ("learn", run, "--concept", "rex", "--data", pictures / "rex", "--noun", "dog", "--model", pipeline)
    with monkeypatch.context() as patched:
        patched.setattr(workflow.SavedSequence, "_figures", stop)
        assert command(*own, "--method", "sequential_lora", *SETTINGS)[0] != 0
    found = json.loads(command("inspect", run, "--json")[1])
    assert (found["concepts"], found["waiting"]) == ([], ["rex"])
    code, out, error = command("resume", run)
    assert code == 0 and "rex: held-out loss" in out, error
