"""A picture that one machine begins and another finishes: what travels between them, and what the second one refuses.

Between two calls of the model a sampler holds the latents and whatever its scheduler remembers of earlier calls. Both
travel, with the noise generator's state where steps draw noise; then the two halves together are the whole, in the same
bits where both run the same code on the same processor in batches of the same size.

Who takes over goes through the first half's steps with nothing in hand, and so knows what a scheduler of this kind
remembers by then: a packet that lacks some of it, or holds anything else, is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float32
from torch import Tensor

from personae.artefact.save import digest, state_bytes, state_from_bytes
from personae.core import Batch, Denoiser, State, device_of
from personae.errors import ArtefactError, ConfigError, RefusedPacket
from personae.infer.samplers import Kind, Sampler, check_steps, kind_of, scheduler_for, times_of, walk

VERSION = "2"
LATENT, GENERATOR, HISTORY = "latent", "generator", "history."
REQUEST, SIGNATURE = "request", "signature"

REMEMBERED = (
    "_begin_index",
    "_step_index",
    "counter",
    "cur_model_output",
    "cur_sample",
    "derivatives",
    "dt",
    "ets",
    "is_scale_input_called",
    "last_sample",
    "lower_order_nums",
    "model_outputs",
    "prev_derivative",
    "sample",
    "sigma_data",
    "this_order",
    "timestep_list",
)
"""What schedulers of diffusers change from step to step. Nothing else of a packet is ever set on one."""

FARTHEST, FARTHEST_HISTORY = 8.0, 100.0
"""The largest number of a latent, and of what a scheduler remembers, in standard deviations of latents at this step."""


@dataclass(frozen=True)
class SplitPlan:
    """How a picture is drawn, and after how many calls of the model it changes hands. Both sides know it."""

    sampler: Sampler
    steps: int
    calls: int
    guidance: float = 3.0


def sealed(packet: State, sign: Callable[[bytes], bytes] | None = None) -> bytes:
    """A packet as one safetensors file, with a signature of all that is in it where there is a key to sign with."""
    if sign is None:
        return state_bytes(packet)
    return state_bytes(replace(packet, facts={**packet.facts, SIGNATURE: sign(state_bytes(packet)).hex()}))


def unsealed(data: bytes, verify: Callable[[bytes, bytes], None] | None = None) -> State:
    """The packet in a file. `verify`, given content and signature, raises anything when one does not fit the other.

    Raises: RefusedPacket, when the file is damaged, or, with `verify`, unsigned or changed.
    """
    try:
        packet = state_from_bytes(data, "the packet")
    except ArtefactError as error:
        raise RefusedPacket(str(error)) from error
    facts = dict(packet.facts)
    signature = facts.pop(SIGNATURE, None)
    packet = replace(packet, facts=facts)
    if verify is not None:
        if signature is None:
            raise RefusedPacket("the packet is not signed, so that nobody knows who sent it")
        try:
            verify(state_bytes(packet), bytes.fromhex(str(signature)))
        except Exception as error:
            raise RefusedPacket("the packet's signature does not fit what is in it; it was changed") from error
    return packet


def begin(model: Denoiser, captions: Sequence[str], plan: SplitPlan, rng: torch.Generator) -> State:
    """The first calls of the model, for one picture of each caption.

    Raises: ConfigError, when the plan is out of range.
    """
    return begin_together(model, [captions], plan, [rng])[0]


@torch.no_grad()
def begin_together(
    model: Denoiser, requests: Sequence[Sequence[str]], plan: SplitPlan, rngs: Sequence[torch.Generator]
) -> list[State]:
    """The same for several requests in one batch, each from its own generator: what it would get alone, up to rounding.

    Requests of one batch are for as many pictures each. Samplers that count their steps while they draw noise take one
    request after the other.

    Raises: ConfigError, when the plan is out of range, or requests are for different numbers of pictures.
    """
    kind, device, each = kind_of(plan.sampler), device_of(model), len(requests[0])
    if any(len(captions) != each for captions in requests):
        raise ConfigError("requests of one batch are for as many pictures each")
    if kind.alone and len(requests) > 1:
        return [begin(model, captions, plan, rng) for captions, rng in zip(requests, rngs, strict=True)]
    scheduler = _scheduler(model, plan)
    noise = torch.cat([torch.randn(each, *model.sample_shape, generator=rng) for rng in rngs])
    x_t = noise.to(device) * scheduler.init_noise_sigma
    conds = _conds(model, [caption for captions in requests for caption in captions], plan, device)
    x_t = walk(model, kind, scheduler, x_t, conds, plan.guidance, rngs, slice(plan.calls))
    history, form = _remembered(scheduler)
    facts = {**_expected(model, plan), "form": _digest_of(form)}
    packets = []
    for number, rng in enumerate(rngs):
        rows = slice(number * each, (number + 1) * each)
        own = {HISTORY + name: value[rows].cpu() if value.dim() else value.cpu() for name, value in history.items()}
        drawn = {GENERATOR: rng.get_state()} if kind.draws else {}
        packets.append(State({}, {LATENT: x_t[rows].cpu(), **own, **drawn}, facts))
    return packets


@torch.no_grad()
def finish(model: Denoiser, captions: Sequence[str], plan: SplitPlan, packet: State) -> Float32[Tensor, "N ..."]:
    """The other calls. Captions are one's own, and so are the model's parts. Returned on the CPU, in the model's range.

    Raises: ConfigError, when the plan is out of range; RefusedPacket, when the packet is of another base, schedule,
    plan or number of pictures, lacks what the scheduler remembers, or its numbers cannot be.
    """
    kind, scheduler, device = kind_of(plan.sampler), _scheduler(model, plan), device_of(model)
    known = _expected(model, plan)
    if more := sorted(map(str, [*packet.params, *(packet.facts.keys() - known.keys() - {"form"})])):
        raise RefusedPacket(f"the packet holds {', '.join(more)[:200]}, which belongs to no hand-off")
    for what, expected in known.items():
        if packet.facts.get(what) != expected:
            raise RefusedPacket(
                f"the packet's {what} is {_quoted(packet.facts.get(what))}, here it is {expected!r}; both sides need "
                "the same pipeline and the same plan"
            )
    x_t = packet.extras.get(LATENT)
    shape = (len(captions), *model.sample_shape)
    if x_t is None or tuple(x_t.shape) != shape or x_t.dtype != torch.float32:
        raise RefusedPacket(f"the packet's latent is {_said(x_t)}, expected float32 {list(shape)}")
    generator = _generator(packet, kind.draws)
    if not x_t.isfinite().all():
        raise RefusedPacket(f"the packet's latent is {_said(x_t)} with numbers that are not finite")
    spread = _spread(scheduler, plan)
    _take(scheduler, packet, shape, plan, kind, spread, device)
    if (largest := x_t.abs().max().item()) > FARTHEST * spread:
        raise RefusedPacket(
            f"the packet's latent reaches {largest:.1f} where {spread:.2f} is usual; it is not from this step"
        )
    conds = _conds(model, captions, plan, device)
    x_0 = walk(model, kind, scheduler, x_t.to(device), conds, plan.guidance, [generator], slice(plan.calls, None))
    return model.decode(x_0).float().cpu()


def calls_of(model: Denoiser, sampler: Sampler, steps: int) -> int:
    """How often the sampler calls the model: as many times as steps, or about twice for Heun."""
    check_steps(sampler, steps, model.schedule.num_timesteps)
    return len(times_of(scheduler_for(sampler, model.schedule, steps)))


# --- what both sides know ------------------------------------------------------------------------------------------


def _scheduler(model: Denoiser, plan: SplitPlan) -> Any:
    check_steps(plan.sampler, plan.steps, model.schedule.num_timesteps)
    scheduler = scheduler_for(plan.sampler, model.schedule, plan.steps)
    most = len(times_of(scheduler))
    if not 0 <= plan.calls <= most:
        raise ConfigError(f"the plan changes hands after {plan.calls} calls of the model, of {most}")
    model.train(False)
    return scheduler


def _expected(model: Denoiser, plan: SplitPlan) -> dict[str, str]:
    scheduler = scheduler_for(plan.sampler, model.schedule, plan.steps)
    grid = {"timesteps": scheduler.timesteps}
    if getattr(scheduler, "sigmas", None) is not None:
        grid["sigmas"] = torch.as_tensor(scheduler.sigmas)
    config = {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}
    return {
        "version": VERSION,
        "base": base_digest(model),
        "scheduler": f"{type(scheduler).__name__} {_short(json.dumps(config, sort_keys=True, default=str).encode())}",
        "grid": f"{plan.calls} of {plan.steps} {digest(grid)}",
        "guidance": float(plan.guidance).hex(),
    }


def request_digest(captions: Sequence[str], plan: SplitPlan, seed: int) -> str:
    """By which a client knows that a packet answers its own request, and not another of the same plan."""
    return _short(json.dumps([list(captions), list(astuple(plan)), seed]).encode())


_BASES: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def base_digest(model: Denoiser) -> str:
    """Of all that both sides must have alike: the frozen weights, which never change, and the autoencoder's."""
    if model not in _BASES:
        vae = getattr(model, "vae", None)
        arrays = {} if vae is None else {f"vae.{name}": value for name, value in vae.state_dict().items()}
        scale = {} if vae is None else {"vae.scale": torch.tensor(float(vae.config.scaling_factor))}
        _BASES[model] = digest({**model.base(), **arrays, **scale})
    return _BASES[model]


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _conds(model: Denoiser, captions: Sequence[str], plan: SplitPlan, device: torch.device) -> list[Any]:
    blank = torch.zeros(len(captions), *model.sample_shape, device=device)
    nulls = [False] if plan.guidance == 1.0 else [False, True]
    return [
        model.condition(Batch(blank, torch.full((len(captions),), null, device=device), tuple(captions)))
        for null in nulls
    ]


def _spread(scheduler: Any, plan: SplitPlan) -> float:
    """The standard deviation of latents at this step: 1, or sqrt(1 + sigma^2) where noise is added and not mixed."""
    if float(scheduler.init_noise_sigma) == 1.0:
        return 1.0
    return float((1 + scheduler.sigmas[min(plan.calls, len(scheduler.sigmas) - 1)] ** 2) ** 0.5)


# --- what a scheduler remembers ------------------------------------------------------------------------------------


def _remembered(scheduler: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and everything else with the tensors' names in their places."""
    tensors: dict[str, Tensor] = {}

    def put(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, list | tuple):
            return [put(f"{name}.{place}", each) for place, each in enumerate(value)]
        return value

    form = {name: put(name, value) for name, value in _needed(vars(scheduler)).items() if name in REMEMBERED}
    return tensors, form


def _needed(known: Mapping[str, Any]) -> Mapping[str, Any]:
    """The oldest output goes before the next step looks at it, but with UniPC, which corrects the last step first."""
    if "model_outputs" not in known or "last_sample" in known:
        return known
    return {**known, "model_outputs": [None, *known["model_outputs"][1:]]}


def _digest_of(form: Mapping[str, Any]) -> str:
    return _short(json.dumps(form, sort_keys=True).encode())


def _take(
    scheduler: Any,
    packet: State,
    shape: Sequence[int],
    plan: SplitPlan,
    kind: Kind,
    spread: float,
    device: torch.device,
) -> None:
    """Put the packet's history into the scheduler, if it is of the form that it has to be.

    Raises: RefusedPacket.
    """
    rehearsed = _rehearsed(scheduler, shape, plan, kind)
    tensors, form = _remembered(rehearsed)
    if packet.facts.get("form") != _digest_of(form):
        raise RefusedPacket(
            f"the packet's history is of the form {_quoted(packet.facts.get('form'))}, expected {_digest_of(form)!r}, "
            f"which is {_quoted(form)}: pictures from a history that lacks something look right and are not"
        )
    came = {name.removeprefix(HISTORY): v for name, v in packet.extras.items() if name.startswith(HISTORY)}
    if lacking := sorted(tensors.keys() - came.keys()):
        raise RefusedPacket(f"the packet lacks {', '.join(lacking)} of the scheduler's history")
    if more := sorted(packet.extras.keys() - {LATENT, GENERATOR} - {HISTORY + name for name in tensors}):
        raise RefusedPacket(f"the packet holds {', '.join(more)}, which belongs to no step")
    for name, like in tensors.items():
        value = came[name]
        if value.shape != like.shape or value.dtype != like.dtype or not value.isfinite().all():
            raise RefusedPacket(f"the packet's {name} is {_said(value)}, expected finite {_said(like)}")
        fixed = not value.dim()  # a time or a step, which does not depend on the picture
        if (fixed and not torch.equal(value, like)) or value.abs().max().item() > max(FARTHEST_HISTORY * spread, 1000):
            raise RefusedPacket(f"the packet's {name} cannot be from this step")

    def get(value: Any) -> Any:
        if isinstance(value, dict):
            own = came[value["tensor"]]
            return own.to(device) if own.dim() else own
        return [get(each) for each in value] if isinstance(value, list) else value

    for name, value in form.items():
        setattr(scheduler, name, get(value))


def _rehearsed(scheduler: Any, shape: Sequence[int], plan: SplitPlan, kind: Kind) -> Any:
    """A scheduler that has gone through the first half with nothing in hand."""
    other = type(scheduler).from_config(dict(scheduler.config))
    other.set_timesteps(plan.steps)
    x_t = torch.zeros(*shape)
    for t in times_of(other)[: plan.calls]:
        options = {**kind.step, "generator": torch.Generator()} if kind.draws else dict(kind.step)
        x_t = other.step(other.scale_model_input(x_t, t), t, x_t, **options).prev_sample
    return other


def _generator(packet: State, draws: bool) -> torch.Generator:
    state, rng = packet.extras.get(GENERATOR), torch.Generator()
    if draws != (state is not None):
        raise RefusedPacket(
            "the packet lacks the generator's state, and the steps that are left draw noise"
            if draws
            else "the packet holds a generator's state, and no step draws noise"
        )
    if state is not None:
        try:
            rng.set_state(state)
        except (RuntimeError, TypeError) as error:
            raise RefusedPacket(f"the packet's generator has no state that can be taken: {error}") from error
    return rng


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _said(value: Tensor | None) -> str:
    return "missing" if value is None else f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
