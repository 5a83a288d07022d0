"""A server and its clients as processes of their own, over HTTPS, by the commands that a user types."""

import os
import signal
import socket
import subprocess
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi")

from personae.evaluate.grids import save_grid
from personae.infer.split import SplitPlan
from personae.serve.client import Server
from personae.testing.tiny_pipeline import tiny_pipeline

ROOT = Path(__file__).resolve().parents[2]
COMMAND = Path(sysconfig.get_path("scripts")) / "personae"
TOKENS = {name: f"a-token-of-{name}-0" for name in ("anna", "ben", "cleo")}
LITTLE = ("rounds=1", "method.training.steps=2", "sampling.steps=6", "evaluation.num_images=2", "machine.threads=1")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def own(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **more}


def personae(*arguments, **environment):
    done = subprocess.run(
        [COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=200, env=own(**environment)
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a run of one client, who has a word and adapters of its own."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "photos").mkdir()
    for number in range(4):
        save_grid(
            folder / "photos" / f"{number}.png",
            torch.full((1, 3, 8, 8), 60 * number, dtype=torch.uint8),
            columns=1,
            scale=1,
        )
    tiny_pipeline(folder / "model")
    told = [part for change in LITTLE for part in ("--set", change)]
    what = ("--data", folder / "photos", "--method", "lora+tokens", "--noun", "dog", "--name", "rex")
    code, _, error = personae("personalize", folder / "model", *what, "--out", folder / "run", *told)
    assert code == 0, error
    return folder


@pytest.fixture(scope="module")
def server(folder, certificate):
    """(its address, its process)."""
    (folder / "tokens").write_text("".join(f"{name} {token}\n" for name, token in TOKENS.items()), "utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = ("--certificate", certificate[0], "--certificate-key", certificate[1], "--tokens", folder / "tokens")
    command = [COMMAND, "serve", folder / "run", *files, "--port", str(port), "--signing-key", folder / "signing"]
    with (
        (folder / "said").open("wb") as said,
        subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=own()) as process,
    ):
        try:
            end = time.monotonic() + 120
            while time.monotonic() < end and process.poll() is None:
                with socket.socket() as trial:
                    if trial.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.2)
            assert process.poll() is None, (folder / "said").read_text("utf-8")
            yield f"https://127.0.0.1:{port}", process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def resident(process):
    """Megabytes of memory."""
    (line,) = (x for x in Path(f"/proc/{process.pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def test_a_picture_begins_in_one_process_and_ends_in_another(folder, server, certificate):
    url, process = server
    ask = ("sample", folder / "run", "--client", "rex", "--prompt", "a <rex>", "-n", 2, "--seed", 3)
    there = (*ask, "--server", url, "--server-steps", 0.3, "--authority", certificate[0])
    for name in ("one", "two"):
        code, out, error = personae(*there, "--out", folder / name, PERSONAE_TOKEN=TOKENS["anna"])
        assert code == 0 and "wrote 2 images" in out, error
    pictures = sorted(path.name for path in (folder / "one").glob("0*.png"))
    assert len(pictures) == 2
    assert all((folder / "one" / p).read_bytes() == (folder / "two" / p).read_bytes() for p in pictures)
    code, _, error = personae(*there, "--out", folder / "none", PERSONAE_TOKEN="another-token-than-hers")
    assert code == 8 and "refused (401)" in error and not (folder / "none").exists()
    code, _, error = personae(*ask, "--server", url, "--out", folder / "none", PERSONAE_TOKEN=TOKENS["anna"])
    assert code == 8 and "certificate" in error, "nobody vouches for it"
    assert process.poll() is None


def test_a_hundred_at_once_again_and_again_and_the_server_does_not_grow(folder, server, certificate):
    url, process = server
    key = (folder / "said").read_text("utf-8").split("signed by ")[1].split()[0]
    plan, grown = SplitPlan("dpmsolver++", 6, 2, 3.0), []
    asked = [(["a dog", "a dog left of a tree"][: 1 + number % 2], number) for number in range(100)]
    answers = []
    for token in TOKENS.values():
        who = Server(url, token, certificate[0], key)
        with ThreadPoolExecutor(100) as pool:
            answers.append(list(pool.map(lambda what, who=who: who.begin(what[0], plan, what[1]), asked)))
        grown.append(resident(process))
    for packets in zip(*answers, strict=True):
        first, *others = (packet.extras for packet in packets)
        for other in others:  # the same request in other batches; each packet was checked to answer its own request
            assert first.keys() == other.keys()
            assert all(torch.allclose(first[name], other[name], atol=1e-4) for name in first)
    assert grown[-1] - grown[0] < 32, f"megabytes after each hundred: {grown}"


def test_it_says_nothing_of_what_it_was_asked_and_ends_when_it_is_told_to(folder, server, certificate):
    url, process = server
    Server(url, TOKENS["anna"], certificate[0]).begin(["a dog left of a tree"], SplitPlan("dpmsolver++", 6, 2, 3.0), 0)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    said = (folder / "said").read_text("utf-8")
    assert "packets are signed by" in said and "Traceback" not in said
    assert not [secret for secret in (*TOKENS.values(), "tree", "<rex>") if secret in said]
