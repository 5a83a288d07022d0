"""`import personae` loads nothing heavy; names arrive when they are asked for."""

import subprocess
import sys

import pytest

import personae
from personae import errors

HEAVY = ("torch", "numpy", "diffusers", "matplotlib", "pydantic")


def loaded_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter holds after one statement."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    assert not loaded_after("import personae") & set(HEAVY)


def test_an_error_class_needs_no_torch():
    assert "torch" not in loaded_after("from personae import PersonaeError")


def test_a_name_comes_from_its_room():
    assert personae.PersonaeError is errors.PersonaeError


def test_every_exported_name_can_be_listed():
    assert set(personae._EXPORTS) | {"__version__"} == set(personae.__all__)
    assert set(personae.__all__) <= set(dir(personae))


def test_an_unknown_name_is_an_ordinary_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = personae.nonsense
