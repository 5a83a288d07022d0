"""An autoencoder learns its pictures, goes on from where it was, and ends with latents of unit size."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL

from personae.backbone.autoencoder import autoencoding, fit_autoencoder, fit_decoder, floats, set_scale
from personae.core import Training, stream
from personae.errors import ConfigError, Diverged

PIXELS = (torch.rand(6, 3, 1, 1, generator=stream(0)) * 255).byte().expand(6, 3, 8, 8).contiguous()
HOW = Training(20, 3e-3, 4, optimizer="adamw")


@pytest.fixture
def vae():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
        )


def test_pictures_are_learned(vae):
    first = fit_autoencoder(vae, PIXELS, HOW, stream(1))
    last = fit_autoencoder(vae, PIXELS, HOW, stream(2), first.moments)
    assert last.loss < 0.8 * first.loss and last.error < 0.8 * first.error
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_two_stretches_are_one_that_was_stopped(vae):
    other = copy.deepcopy(vae)
    rng, again = stream(1), stream(1)
    one = fit_autoencoder(vae, PIXELS, Training(6, 3e-3, 4, optimizer="adamw"), rng)
    half = Training(3, 3e-3, 4, optimizer="adamw")
    two = fit_autoencoder(other, PIXELS, half, again, fit_autoencoder(other, PIXELS, half, again).moments)
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(value, two.moments[name]) for name, value in one.moments.items())


def test_a_decoder_is_trained_alone_and_learns_the_latents_that_it_is_given(vae):
    fit_autoencoder(vae, PIXELS, HOW, stream(1))
    set_scale(vae, PIXELS)
    with torch.no_grad():
        latents = vae.encode(floats(PIXELS)).latent_dist.mean * vae.config.scaling_factor
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    first = fit_decoder(vae, latents, PIXELS, HOW, stream(2))
    last = fit_decoder(vae, latents, PIXELS, HOW, stream(3), first.moments)
    assert last.loss < first.loss and last.error < first.error
    changed = {name.split(".")[0] for name, value in vae.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"decoder", "post_quant_conv"}
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_the_loss_sees_pixels_edges_and_means():
    flat, checked = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    checked[..., ::2, 1::2] = checked[..., 1::2, ::2] = -1.0
    assert autoencoding(flat, flat) == 0
    assert autoencoding(flat, flat + 1) == pytest.approx(2.0), "pixels and means, no edges"
    assert autoencoding(flat, checked) == pytest.approx(1.0 + 2.0 + 2.0), "pixels, and edges both ways; means agree"


def test_latents_have_unit_size_after_scaling(vae):
    set_scale(vae, PIXELS)
    with torch.no_grad():
        latents = vae.encode(PIXELS.float() / 127.5 - 1).latent_dist.mean * vae.config.scaling_factor
    assert latents.std() == pytest.approx(1.0, rel=1e-4)


def test_problems_are_named(vae):
    with pytest.raises(ConfigError, match="optimizer 'adamw' at a constant rate"):
        fit_autoencoder(vae, PIXELS, Training(1, 0.1, 1), stream(0))
    with pytest.raises(Diverged, match="lower lr"):
        fit_autoencoder(vae, PIXELS, Training(50, 1e6, 4, optimizer="adamw", max_grad_norm=None), stream(0))
