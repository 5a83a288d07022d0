"""Two halves are the whole in the same bits, whoever samples; a packet that is not what it has to be is refused."""

from dataclasses import replace

import pytest
import torch

from personae.artefact.save import state_bytes
from personae.backbone.schedule import schedule
from personae.backbone.text2image import TextToImage
from personae.core import State, nothing, stream
from personae.errors import ConfigError, RefusedPacket
from personae.infer.sample import sample
from personae.infer.samplers import SAMPLERS
from personae.infer.split import SplitPlan, begin, begin_together, calls_of, finish, sealed, unsealed
from personae.personal.lora import Lora
from personae.testing.tiny_pipeline import SCHEDULE, tiny_networks

CAPTIONS = ("a dog", "a drawing of a cat")
STEPS = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return TextToImage(tiny_networks(tmp_path_factory.mktemp("split") / "tokenizer"), SCHEDULE)


def whole(model, sampler):
    return sample(model, 2, stream(1), sampler=sampler, steps=STEPS, guidance=3.0, captions=CAPTIONS)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_two_halves_are_the_whole_in_the_same_bits(model, sampler):
    calls, expected = calls_of(model, sampler, STEPS), whole(model, sampler)
    for at in range(calls + 1):
        plan = SplitPlan(sampler, STEPS, at)
        packet = unsealed(sealed(begin(model, CAPTIONS, plan, stream(1))))
        assert torch.equal(finish(model, CAPTIONS, plan, packet), expected), at


@pytest.mark.parametrize("share", [0.2, 0.3])
def test_the_client_saves_its_share_of_calls(model, monkeypatch, share):
    plan, seen = SplitPlan("dpmsolver++", 20, round(20 * share), guidance=1.0), []
    packet = begin(model, CAPTIONS, plan, stream(1))
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *given: seen.append(1) or forward(*given))
    finish(model, CAPTIONS, plan, packet)
    assert len(seen) == 20 * (1 - share)


LATENT = 2 * 4 * 4 * 4 * 4
GENERATOR = {"generator": 5056}
OUTPUT = {"history.model_outputs.1": LATENT}
BESIDE = {
    "ddpm": GENERATOR,
    "ddim": {},
    "ddim_eta1": GENERATOR,
    "euler": {},
    "euler_ancestral": GENERATOR,
    "heun": {"history.prev_derivative": LATENT, "history.sample": LATENT, "history.dt": 4},
    "lms": {f"history.derivatives.{number}": LATENT for number in range(4)},
    "pndm": {f"history.ets.{number}": LATENT for number in range(4)},
    "lcm": GENERATOR,
    "deis": OUTPUT,
    "unipc": {**OUTPUT, "history.model_outputs.0": LATENT, "history.last_sample": LATENT},
    "dpmsolver++": OUTPUT,
    "dpmsolver++_karras": OUTPUT,
    "dpmsolver++_2s": {**OUTPUT, "history.sample": LATENT},
    "dpmsolver++_3m": {**OUTPUT, "history.model_outputs.2": LATENT},
    "sde-dpmsolver++": {**OUTPUT, **GENERATOR},
}
"""What travels beside two pictures' latents, in bytes."""


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_little_travels_beside_latents_and_history_and_no_words(model, sampler):
    plan = SplitPlan(sampler, 40, 15)
    packet = begin(model, ("a secret",) * 2, plan, stream(1))
    assert {name: value.nbytes for name, value in packet.extras.items()} == {"latent": LATENT, **BESIDE[sampler]}
    data = sealed(packet, lambda content: b"x" * 64)
    assert len(data) <= LATENT + sum(BESIDE[sampler].values()) + 1024
    assert b"secret" not in data


def test_the_late_half_is_ones_own(model, tmp_path):
    """The server's adapter draws the first steps, the client's the rest, from the client's own words."""
    personal = TextToImage(tiny_networks(tmp_path / "tokenizer"), SCHEDULE, nothing, lora=Lora(2))
    personal.load({n: 0.3 * torch.randn(v.shape, generator=stream(2, n)) for n, v in personal.params().items()})
    plan = SplitPlan("dpmsolver++", STEPS, 3)
    packet = begin(model, ("a dog", "a cat"), plan, stream(1))
    own = finish(personal, CAPTIONS, plan, packet)
    assert not torch.allclose(own, finish(model, CAPTIONS, plan, packet), atol=1e-3)
    assert not torch.allclose(own, whole(personal, "dpmsolver++"), atol=1e-3)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmsolver++", "unipc", "heun", "euler_ancestral"])
def test_several_requests_in_one_batch_are_each_as_alone(model, sampler):
    plan, requests = SplitPlan(sampler, STEPS, 3), [CAPTIONS, CAPTIONS[::-1], ("a tree", "a dog")]
    together = begin_together(model, requests, plan, [stream(seed) for seed in range(3)])
    for seed, captions in enumerate(requests):
        alone = begin(model, captions, plan, stream(seed))
        assert alone.facts == together[seed].facts and alone.extras.keys() == together[seed].extras.keys()
        assert all(torch.allclose(together[seed].extras[n], v, atol=1e-4) for n, v in alone.extras.items())
        pictures = [finish(model, captions, plan, packet) for packet in (alone, together[seed])]
        assert torch.allclose(*pictures, atol=1e-3)
    with pytest.raises(ConfigError, match="as many pictures each"):
        begin_together(model, [CAPTIONS, CAPTIONS[:1]], plan, [stream(0), stream(1)])


# --- what is refused -----------------------------------------------------------------------------------------------

PLAN = SplitPlan("dpmsolver++", STEPS, 4)


@pytest.fixture
def packet(model):
    return begin(model, CAPTIONS, PLAN, stream(1))


def without(packet, *names):
    return replace(packet, extras={n: v for n, v in packet.extras.items() if n not in names})


def test_a_packet_without_history_is_refused_and_not_run(model, packet):
    latent_only = State({}, {"latent": packet.extras["latent"]}, packet.facts)
    with pytest.raises(RefusedPacket, match="lacks model_outputs"):
        finish(model, CAPTIONS, PLAN, latent_only)
    with pytest.raises(RefusedPacket, match="history is of the form"):
        finish(model, CAPTIONS, PLAN, replace(latent_only, facts={**packet.facts, "form": "{"}))
    fresh = begin(model, CAPTIONS, replace(PLAN, calls=0), stream(1))
    with pytest.raises(RefusedPacket, match="look right and are not"):
        finish(model, CAPTIONS, PLAN, replace(latent_only, facts={**packet.facts, "form": fresh.facts["form"]}))


@pytest.mark.parametrize(
    ("plan", "what"),
    [
        (replace(PLAN, steps=11), "grid"),
        (replace(PLAN, calls=5), "grid"),
        (replace(PLAN, guidance=5.0), "guidance"),
        (replace(PLAN, sampler="unipc"), "scheduler"),
        (replace(PLAN, sampler="dpmsolver++_karras"), "scheduler"),
    ],
)
def test_a_packet_of_another_plan_is_refused(model, packet, plan, what):
    with pytest.raises(RefusedPacket, match=f"the packet's {what} is"):
        finish(model, CAPTIONS, plan, packet)


def test_a_packet_of_another_base_or_schedule_is_refused(model, packet, tmp_path):
    other = TextToImage(tiny_networks(tmp_path / "tokenizer"), SCHEDULE)
    with torch.no_grad():
        other.unet.conv_in.bias[0] += 1
    with pytest.raises(RefusedPacket, match="the packet's base is"):
        finish(other, CAPTIONS, PLAN, packet)
    other = TextToImage(tiny_networks(tmp_path / "tokenizer"), SCHEDULE)
    with torch.no_grad():
        other.vae.decoder.conv_in.bias[0] += 1
    with pytest.raises(RefusedPacket, match="the packet's base is"):
        finish(other, CAPTIONS, PLAN, packet)
    other = TextToImage(tiny_networks(tmp_path / "tokenizer"), schedule(clip_sample=False))
    with pytest.raises(RefusedPacket, match="the packet's scheduler is"):
        finish(other, CAPTIONS, PLAN, packet)


def test_a_packet_that_holds_more_is_refused(model, packet):
    for odd in (replace(packet, params={"x": torch.zeros(1)}), replace(packet, facts={**packet.facts, "x": 1})):
        with pytest.raises(RefusedPacket, match="holds x, which belongs to no hand-off"):
            finish(model, CAPTIONS, PLAN, odd)
    deep = replace(packet, facts={**packet.facts, "form": "[" * 200_000})
    with pytest.raises(RefusedPacket, match="history is of the form") as found:
        finish(model, CAPTIONS, PLAN, deep)
    assert len(str(found.value)) < 1000


def test_a_time_that_a_scheduler_remembers_is_what_it_has_to_be(model):
    plan = replace(PLAN, sampler="heun", calls=3)
    packet = begin(model, CAPTIONS, plan, stream(1))
    changed = {**packet.extras, "history.dt": packet.extras["history.dt"] * 50}
    with pytest.raises(RefusedPacket, match="dt cannot be from this step"):
        finish(model, CAPTIONS, plan, replace(packet, extras=changed))


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_second_half_on_a_gpu(model, sampler):
    plan = SplitPlan(sampler, STEPS, 4)
    packet = begin(model, CAPTIONS, plan, stream(1))
    there = finish(model.to("cuda"), CAPTIONS, plan, packet)
    assert torch.allclose(finish(model.to("cpu"), CAPTIONS, plan, packet), there, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"latent": p["latent"][:1]}, r"latent is float32 \[1, 4, 4, 4\], expected float32 \[2, 4, 4, 4\]"),
        (lambda p: {"latent": p["latent"] * float("nan")}, "not finite"),
        (lambda p: {"latent": p["latent"] * 100}, "it is not from this step"),
        (lambda p: {"history.model_outputs.1": torch.full((2, 4, 4, 4), float("inf"))}, "expected finite float32"),
        (lambda p: {"history.model_outputs.1": torch.zeros(2, 4, 4, 4, dtype=torch.float64)}, "is float64"),
        (lambda p: {"history.sigmas": torch.zeros(3)}, "holds history.sigmas, which belongs to no step"),
        (lambda p: {"generator": torch.Generator().get_state()}, "no step draws noise"),
        (lambda p: {"latent": p["latent"].half()}, "latent is float16"),
        (lambda p: {"latent": p["latent"].double()}, "latent is float64"),
        (lambda p: {"history.model_outputs.1": torch.full((2, 4, 4, 4), 1e30)}, "cannot be from this step"),
    ],
)
def test_a_packet_with_other_numbers_is_refused(model, packet, change, message):
    with pytest.raises(RefusedPacket, match=message):
        finish(model, CAPTIONS, PLAN, replace(packet, extras={**packet.extras, **change(packet.extras)}))


def test_noise_needs_its_generator(model):
    plan = replace(PLAN, sampler="euler_ancestral")
    packet = begin(model, CAPTIONS, plan, stream(1))
    with pytest.raises(RefusedPacket, match="lacks the generator's state"):
        finish(model, CAPTIONS, plan, without(packet, "generator"))
    with pytest.raises(RefusedPacket, match="no state that can be taken"):
        finish(model, CAPTIONS, plan, replace(packet, extras={**packet.extras, "generator": torch.zeros(3)}))


def test_a_signature_covers_all_that_travels(packet):
    def sign(content):
        return bytes([sum(content) % 251])

    def verify(content, signature):
        assert sign(content) == signature

    data = sealed(packet, sign)
    assert unsealed(data, verify).facts == packet.facts
    with pytest.raises(RefusedPacket, match="not signed"):
        unsealed(sealed(packet), verify)
    changed = replace(packet, extras={**packet.extras, "latent": packet.extras["latent"] + 1})
    with pytest.raises(RefusedPacket, match="it was changed"):
        unsealed(sealed(changed, lambda _: sign(state_bytes(packet))), verify)
    with pytest.raises(RefusedPacket, match="no State of personae"):
        unsealed(data[:-3])


def test_a_plan_out_of_range_is_refused(model):
    for plan in (replace(PLAN, calls=11), replace(PLAN, calls=-1), replace(PLAN, steps=0)):
        with pytest.raises(ConfigError):
            begin(model, CAPTIONS, plan, stream(1))
    assert begin(model, CAPTIONS, replace(PLAN, calls=10), stream(1)).facts["form"]
