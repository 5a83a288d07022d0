"""What every test stands on."""

import datetime
import ipaddress

import beartype
import jaxtyping
import pytest
import torch

from personae import core

CHECKED = (
    "aggregate.cluster",
    "aggregate.low_rank",
    "aggregate.newcomers",
    "attack",
    "continual",
    "data.mixture",
    "data.partition",
    "data.sources",
    "personal",
    "backbone",
    "objective",
    "infer",
    "evaluate",
    "local.fit",
    "theory",
    "sequence",
    "study",
)
"""Rooms and files whose annotations say shapes. Here every call in them is checked against these."""


def shapes(function):
    """What jaxtyping checks a call with: beartype, on tensors alone, so that a double may stand in for the rest."""
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if "Tensor" in str(hint)}
    return beartype.beartype(function)


jaxtyping.install_import_hook([f"personae.{name}" for name in CHECKED], f"{__name__}.shapes")
for record in (core.Images, core.Batch, core.Noised):  # the whole of core, asked about every name, would be slow
    jaxtyping.jaxtyped(record, typechecker=shapes)

# One thread: sums come out the same on every machine, and two processors are not fought over.
torch.set_num_threads(1)

TINY = (
    "rounds=2",
    "cohort=2",
    "data.partition.num_clients=5",
    "data.partition.num_new=1",
    "method.adapt.steps=2",
    "sampling.steps=2",
    "evaluation.num_images=8",
    "evaluation.loss_grid=2",
    "evaluation.loss_draws=1",
    "evaluation.kid_subsets=2",
    "machine.threads=1",
    "machine.checkpoint_every=1",
)
"""Overrides that make a few seconds of the quickstart."""


@pytest.fixture(scope="session")
def checked():
    return CHECKED


@pytest.fixture(scope="session")
def tiny():
    """The overrides themselves, for tests that run something of their own."""
    return TINY


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A finished run of the quickstart, made once. Only read it: `copy_of` gives one that may be changed."""
    import personae

    return personae.run("quickstart", tmp_path_factory.mktemp("tiny") / "run", overrides=TINY)


@pytest.fixture
def copy_of(tmp_path):
    """A function from a run to the path of its copy."""
    import shutil

    def copied(run, name="copy"):
        return shutil.copytree(run.folder, tmp_path / name)

    return copied


@pytest.fixture
def photos(tmp_path):
    """A folder of six grey pictures, as somebody new may bring them."""
    import numpy as np
    from PIL import Image

    folder = tmp_path / "photos" / "anna"
    folder.mkdir(parents=True)
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def command(capsys, monkeypatch):
    """A function that does what the console script does, in this process: (exit code, stdout, stderr)."""
    import signal
    import sys

    from personae.cli import app

    before = signal.getsignal(signal.SIGINT)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["personae", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app.main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    yield call
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """Of 127.0.0.1, signed by itself: (certificate, key)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder, key = tmp_path_factory.mktemp("tls"), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    )
    return folder / "cert.pem", folder / "key.pem"
