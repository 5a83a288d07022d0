"""The commands: what they print, what they return, and that stopping costs nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from personae.cli.app import app
from personae.cli.progress import Progress
from personae.core import Round
from personae.testing.tiny_pipeline import tiny_pipeline

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "numpy", "diffusers", "matplotlib", "sklearn", "torchmetrics"}
COMMANDS = [
    "run",
    "resume",
    "personalize",
    "learn",
    "forget",
    "sample",
    "serve",
    "evaluate",
    "report",
    "export",
    "import",
    "deploy",
    "inspect",
    "doctor",
]


def settings(overrides):
    return [part for override in overrides for part in ("--set", override)]


def one_sentence(error, kind):
    """What a user is to see of an error: our words, no traceback."""
    assert error.startswith(f"{kind}: "), error
    assert "Traceback" not in error
    assert "File " not in error
    return error


# --- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_nothing_heavy(option):
    code = (
        "import sys; from personae.cli.app import main; sys.argv = ['personae', sys.argv[1]]\n"
        "try: main()\nexcept SystemExit as end: code = end.code\n"
        "print('LOADED', code or 0, *{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, check=True)
    printed, _, after = done.stdout.partition("LOADED")
    status, *modules = after.split()
    assert status == "0"
    assert printed.strip()
    assert not HEAVY & set(modules)


def test_help_lists_every_command_and_the_exit_codes(command):
    code, out, _ = command("--help")
    assert code == 0
    assert [name for name in COMMANDS if f"  {name} " not in out] == []
    assert len(app.registered_commands) == len(COMMANDS)
    assert "130 Ctrl-C" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_on_one_screen(command, name):
    code, out, _ = command(name, "--help")
    assert code == 0
    assert len(out.splitlines()) <= 24
    assert max(map(len, out.splitlines())) <= 80


LOCKED = f"typer=={metadata.version('typer')}\n" in (ROOT / "requirements.lock").read_text("utf-8")


@pytest.mark.skipif(not LOCKED, reason="every typer lays its pages out differently; compared under the locked one")
def test_the_written_help_is_what_make_docs_writes(tmp_path):
    options = ["utils", "docs", "--name", "personae", "--output", "cli.md"]
    subprocess.run(
        [sys.executable, "-m", "typer", "personae.cli.app", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        check=True,
        capture_output=True,
    )
    assert (ROOT / "docs" / "cli.md").read_text("utf-8") == (tmp_path / "cli.md").read_text("utf-8"), "run `make docs`"


# --- every command -------------------------------------------------------------------------------------------------


def test_run_prints_figures_and_where_the_report_is(command, tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, error = command("run", "quickstart", *settings(tiny))
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("4 training clients: held-out loss ")
    assert lines[1].startswith("1 new clients: held-out loss ")
    assert "128 numbers trained, 0 bytes sent" in lines[2]
    assert lines[-1] == "report: runs/quickstart/report.html"
    assert (tmp_path / lines[-1].removeprefix("report: ")).is_file()
    assert "training      round 1/2" in error
    assert "personalizing client 5/5 (c4)" in error
    assert "measuring     client 5/5 (c4)" in error
    assert "\x1b" not in error, "no terminal, no control characters"

    code, out, _ = command("resume", "runs/quickstart")
    assert code == 0
    assert out.splitlines() == lines

    code, _, error = command("run", "quickstart", *settings(tiny))
    assert code == 5
    assert "runs/quickstart exists; nothing was overwritten" in one_sentence(error, "ArtefactError")


def test_run_prints_one_json_object(command, tmp_path, tiny):
    code, out, error = command("run", "quickstart", "--out", tmp_path / "run", "--json", *settings(tiny))
    assert (code, error) == (0, "")
    found = json.loads(out)
    assert found["summary"] == json.loads((tmp_path / "run/summary.json").read_text("utf-8"))
    assert found["report"] == str(tmp_path / "run/report.html")


def test_a_new_client_from_folder_to_pictures(command, copy_of, tiny_run, photos, tmp_path):
    folder = copy_of(tiny_run)
    code, out, _ = command("personalize", folder, "--data", photos, "--name", "anna")
    assert code == 0
    assert "anna: 128 numbers trained, 5 images, nothing sent" in out
    assert f"wrote {folder}/clients/anna.safetensors" in out

    code, out, _ = command("sample", folder, "--client", "anna", "-n", "3")
    assert (code, out) == (0, f"wrote 3 images and grid.png to {folder}/samples/anna-0\n")
    drawn = {path.name for path in (folder / "samples" / "anna-0").iterdir()}
    assert drawn == {"0000.png", "0001.png", "0002.png", "grid.png"}
    code, _, error = command("sample", folder, "--client", "anna", "-n", "3")
    assert code == 5
    assert "nothing was overwritten" in one_sentence(error, "ArtefactError")

    code, out, _ = command("export", folder, "--client", "anna", "--to", tmp_path / "exported")
    assert code == 0
    assert f'diffusers.DDPMPipeline.from_pretrained("{tmp_path / "exported"}")' in out
    assert (tmp_path / "exported" / "model_index.json").is_file()

    code, out, _ = command("evaluate", folder, "--json")
    assert code == 0
    assert json.loads(out)["clients"]["anna"]["role"] == "new"
    code, out, _ = command("report", folder)
    assert (code, out) == (0, f"wrote {folder}/report.html\n")


def test_personalize_and_sample_as_json(command, copy_of, tiny_run, photos):
    folder = copy_of(tiny_run)
    found = json.loads(command("personalize", folder, "--data", photos, "--name", "anna", "--json")[1])
    assert (found["client"], found["bytes_up"]) == ("anna", 0)
    assert Path(found["file"]).is_file()
    found = json.loads(command("sample", folder, "--client", "anna", "-n", "1", "--seed", "3", "--json")[1])
    assert found == {"client": "anna", "num_images": 1, "folder": str(folder / "samples/anna-3")}


def test_a_pipeline_is_personalized_and_drawn_from(command, photos, tmp_path):
    model, folder = tiny_pipeline(tmp_path / "model"), tmp_path / "rex"
    little = settings(["rounds=2", "method.training.steps=1", "sampling.steps=2", "evaluation.num_images=2"])
    told = ("--method", "lora+tokens", "--noun", "dog", "--name", "rex")
    code, out, error = command("personalize", model, "--data", photos, *told, "--out", folder, *little)
    assert code == 0 and "rex: 2,320 numbers trained" in out and f"wrote {folder}/clients/rex.safetensors" in out
    assert "training      round 2/2" in error
    code, out, _ = command(
        "sample", folder, "--client", "rex", "--prompt", "a <rex> left of a tree", "-n", "2", "--json"
    )
    assert code == 0 and json.loads(out)["prompt"] == "a <rex> left of a tree"
    plain = ("sample", model, "--prompt", "a dog", "--steps", "2", "-n", "1", "--out", tmp_path / "plain")
    assert command(*plain)[0] == 0 and (tmp_path / "plain" / "grid.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("personalize", "MODEL", "--data", "."), "is a pipeline; say --method lora, tokens, lora+tokens or embedding"),
        (("personalize", ".", "--data", ".", "--noun", "dog"), "are for a pipeline's folder"),
        (("sample", "MODEL", "--prompt", "a dog"), "is a pipeline; say --out, where to"),
        (("sample", "MODEL", "--out", "x"), "is a pipeline; say --prompt"),
        (("sample", "."), "whose model is to draw"),
    ],
)
def test_what_a_pipeline_needs_is_said(command, tmp_path, arguments, message):
    (tmp_path / "model" / "text_encoder").mkdir(parents=True)
    code, _, error = command(*(str(tmp_path / "model") if part == "MODEL" else part for part in arguments))
    assert code == 2 and message in one_sentence(error, "ConfigError")


@pytest.mark.parametrize("verb", [("personalize", "--data", "."), ("sample", "--client", "a")])
def test_a_folder_that_is_not_there_is_said_to_be_missing(command, tmp_path, verb):
    code, _, error = command(verb[0], tmp_path / "nothing", *verb[1:])
    assert code == 5 and "nothing does not exist" in one_sentence(error, "ArtefactError")


def test_every_sub_folder_is_a_new_client(command, copy_of, tiny_run, photos):
    folder = copy_of(tiny_run)
    shutil.copytree(photos, photos.parent / "ben")
    code, out, error = command("personalize", folder, "--data", photos.parent, "--each")
    assert (code, error) == (0, "")
    lines = out.splitlines()
    assert [line.partition(", held-out loss ")[0] for line in lines[:2]] == [
        "anna: 128 numbers trained, 5 images",
        "ben: 128 numbers trained, 5 images",
    ]
    assert lines[2:] == [f"wrote 2 files to {folder}/clients; nothing was sent"]
    found = json.loads(command("personalize", folder, "--data", photos.parent, "--each", "--at-once", 1, "--json")[1])
    assert found["clients"].keys() == {"anna", "ben"}
    assert found["folder"] == str(folder / "clients")


def test_inspect_a_file_and_a_run(command, tiny_run):
    path = tiny_run.folder / "clients" / "c4.safetensors"
    code, out, _ = command("inspect", path)
    assert code == 0
    assert "kind: personal" in out
    assert "params/embedding.weight  float32 [1, 128]" in out
    found = json.loads(command("inspect", path, "--json")[1])
    assert (found["values"], found["bytes"]) == (128, path.stat().st_size)
    found = json.loads(command("inspect", tiny_run.folder, "--json")[1])
    assert (found["rounds_done"], found["complete"], found["evaluated"]) == (2, True, True)
    assert found["clients"] == ["c0", "c1", "c2", "c3", "c4"]


def test_doctor_says_what_is_there(command, monkeypatch):
    from personae.recipe import environment

    monkeypatch.setattr(environment, "versions", lambda: dict.fromkeys(environment.LIBRARIES, "1.0"))
    code, out, _ = command("doctor")
    assert code == 0
    assert "ok   torch" in out
    code, out, _ = command("doctor", "--json")
    assert json.loads(out)["torch"] == {"fine": True, "found": "1.0"}
    monkeypatch.setattr(environment, "versions", lambda: dict.fromkeys(environment.LIBRARIES, "not installed"))
    code, out, _ = command("doctor")
    assert code == 1
    assert "BAD  torch" in out


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["run", "quickstrat"], 2, "no shipped recipe 'quickstrat'; did you mean: quickstart"),
        (["run", "quickstart", "--set", "rounds=0", "--set", "cohort=0"], 2, "has 2 problems"),
        (["run", "quickstart", "--set", "colour=red"], 2, "colour: unknown key"),
        (["run", "quickstart", "--set", "rounds"], 2, "is not of the form key=value"),
        (["sample", "RUN", "--client", "c9"], 2, "there is no client 'c9'"),
        (["sample", "RUN", "--client", "c4", "-n", "0", "--out", "HERE/new"], 2, "0 images were asked for"),
        (["export", "RUN", "--client", "c9", "--to", "HERE/new"], 2, "there is no client 'c9'"),
        (["personalize", "RUN", "--data", "HERE", "--name", "c4"], 2, "client 'c4' exists"),
        (["personalize", "RUN", "--data", "HERE", "--name", "../x"], 2, "cannot be a client's name"),
        (["personalize", "RUN", "--data", "HERE", "--name", "anna"], 3, "no image that can be read"),
        (["personalize", "RUN", "--data", "HERE/no", "--name", "anna"], 3, "is no folder"),
        (["personalize", "RUN", "--data", "HERE"], 2, "Say --name NAME, or --each for"),
        (["personalize", "RUN", "--data", "HERE", "--name", "anna", "--each"], 2, "leave out --name"),
        (["personalize", "RUN", "--data", "HERE", "--each"], 3, "holds no folder; --each expects one folder of images"),
        (["resume", "HERE"], 5, "is not a run"),
        (["evaluate", "HERE"], 5, "is not a run"),
        (["report", "HERE"], 5, "is not a run"),
        (["inspect", "HERE"], 5, "is a folder, but neither a run nor a study"),
        (["inspect", "HERE/no.safetensors"], 5, "does not exist"),
        (["run", "quickstart", "--out", "RUN"], 5, "nothing was overwritten"),
    ],
)
def test_an_error_is_its_own_sentence_and_exit_code(command, tiny_run, tmp_path, arguments, code, sentence):
    places = {"RUN": str(tiny_run.folder), "HERE": str(tmp_path)}
    filled = [places.get(a, a.replace("HERE/", f"{tmp_path}/")) for a in arguments]
    found, out, error = command(*filled)
    kind = {2: "ConfigError", 3: "DataError", 5: "ArtefactError"}[code]
    assert (found, out) == (code, "")
    assert sentence in one_sentence(error, kind)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("arguments", [["fly"], ["run"], ["sample", "."], ["run", "quickstart", "--fast"]])
def test_a_wrong_command_or_option_is_two(command, arguments):
    code, _, error = command(*arguments)
    assert code == 2
    assert "Traceback" not in error


def test_a_pickle_is_named_and_not_opened(command, tmp_path):
    (tmp_path / "model.pth").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    code, _, error = command("inspect", tmp_path / "model.pth")
    assert code == 5
    assert "may hold a pickle" in error


def test_no_command_shows_the_help(command):
    code, out, error = command()
    assert code in (0, 2)
    assert "Usage" in out + error


# --- progress ------------------------------------------------------------------------------------------------------


def progress_round(number, *, stage="train", done=True):
    return Round(stage, number, 100, "c0", 1, 1, 0.5, 2**20, 2**21, 0.1, done)


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys, tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress(tmp_path, "resume") as watch:
        for number in range(1, 101):
            now[0] += 1
            watch(progress_round(number))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11, "the first, one every ten seconds, and the last"
    assert lines[0] == "training      round 1/100  clients 1/1  loss 0.5000  up 1.0 MiB  down 2.0 MiB"
    assert lines[-2].startswith("training      round 91/100")
    assert lines[-2].endswith("  0:08 left")
    assert lines[-1].startswith("training      round 100/100")


def test_on_a_terminal_progress_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(tmp_path, "resume") as watch:
        for number in (1, 2, 100):
            watch(progress_round(number))
    text = capsys.readouterr().err
    assert text.count("\r\x1b[K") == 3
    assert text.count("\n") == 2, "after the last round, and at the end"


def test_a_quiet_one_says_nothing(capsys, tmp_path):
    with Progress(tmp_path, "resume", quiet=True) as watch:
        watch(progress_round(1))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("saved", [True, False])
def test_a_stopped_run_says_how_to_continue_once_there_is_one(capsys, tmp_path, saved):
    if saved:
        (tmp_path / "config.toml").touch()
    with pytest.raises(SystemExit), Progress(tmp_path, f"personae resume {tmp_path}"):
        raise SystemExit(130)
    error = capsys.readouterr().err
    assert (f"Continue with: personae resume {tmp_path}" in error) == saved
    assert ("stopped before anything was saved" in error) != saved


# --- Ctrl-C --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_ends_in_130_and_a_resume_in_the_same_bits(tmp_path, tiny):
    """SIGINT to the console script while it trains, three times over."""

    def start(*arguments):
        code = f"import sys; sys.argv = ['personae', *{list(map(str, arguments))!r}]\n"
        code += "from personae.cli.app import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", code],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        )

    overrides = settings([*tiny, "rounds=12"])
    with start("run", "quickstart", "--out", tmp_path / "whole", *overrides) as whole:
        assert whole.wait(100) == 0, whole.stderr.read()
    folder = tmp_path / "stopped"
    arguments = ["run", "quickstart", "--out", folder, *overrides]
    for rounds in (1, 4, 8):
        with start(*arguments) as process:
            wait_for_rounds(process, folder / "rounds.jsonl", rounds)
            process.send_signal(signal.SIGINT)
            error = process.communicate(timeout=60)[1]
        assert process.returncode == 130, error
        assert f"Continue with: personae resume {folder}" in error
        assert "Traceback" not in error
        arguments = ["resume", folder]
    assert not (folder / "server.safetensors").exists(), "stopped after training was done"
    with start(*arguments) as process:
        assert process.wait(100) == 0, process.stderr.read()
    for name in ("server.safetensors", *(f"clients/c{i}.safetensors" for i in range(5))):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def wait_for_rounds(process, path, rounds):
    end = time.monotonic() + 90
    while time.monotonic() < end and process.poll() is None:
        if path.is_file() and path.read_bytes().count(b"\n") >= rounds:
            return
        time.sleep(0.005)
    raise AssertionError(f"{rounds} rounds were not reached: {process.poll()}")
