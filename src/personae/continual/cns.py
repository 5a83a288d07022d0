"""CNS: every concept trains a few weights that matter for it, and not for pictures in general."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from weakref import ReferenceType, ref

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from personae.continual.contract import Need, Parts, draw_with, may_move
from personae.continual.sequential_lora import rate_of_words
from personae.core import Arrays, Client, Denoiser, Images, Plan, State, Task, device_of, pick, stream
from personae.errors import ConfigError
from personae.infer.sample import draw
from personae.objective.dc_score import candidate_errors, noise_bank
from personae.objective.importance import first_order
from personae.objective.sparse import from_base, on_owned
from personae.personal.delta import DELTA, Delta, is_delta
from personae.personal.lora import UNET
from personae.personal.neurons import AT, NEURONS, Neurons, is_neuron, packed, placed, settled, unpacked

OWNED, GENERAL, MASK = "owned.", "general.", "mask."
"""Before the names of bitmaps: of all concepts so far, of what none may have, and "mask.<concept>/<weight>"."""

NUM_NEURONS, NUM_SHARED = "neurons", "shared"
"""How many weights the last concept trained, and how many of these an earlier one had trained before."""


@dataclass(frozen=True)
class Cns:
    """Only a few weights train for a concept: those that matter for it and for little else.

    A neuron is one weight of keys and values of cross-attention. Those of a concept are base and not general; of
    them the most important `budget`, as a share of the U-Net's weights.

        base        in every layer the `base_share` with the largest E |w dL/dw| on the concept's images
        general     among the `general_share` with the largest for `agreement` of the calibration prompts, on what the
                    untaught model draws of them; found with the first concept, and kept
        loss        denoising + overlap_weight * mean_O d^2 + distance_weight * mean_M (w - w_0)^2

    d is what the concept adds to its neurons M, of which O were earlier ones', too. It joins the changes of weights, so
    that one model has all concepts. `draws` noises, for a prompt `general_draws`, are always the same ones: others
    choose other weights. With `keep_masks`, `jaccard` tells how many neurons two concepts have in common.

    Source: Liao et al. 2025, arXiv:2510.02296: base, general, and training what is base alone. Departures: importance,
    shares, what a neuron is, and form and weight of both penalties are ours, since the paper's are not known here; its
    budget, 0.13 %, is known at second hand. Calibration prompts have no pictures, so the untaught model draws some: a
    score of prompts alone would give all concepts of one noun the same neurons, since this is what words start as.
    """

    budget: float = 0.0013
    base_share: float = 0.1
    general_share: float = 0.1
    agreement: float = 0.5
    draws: int = 100
    general_draws: int = 4
    drawing_steps: int = 20
    overlap_weight: float = 1.0
    distance_weight: float = 1.0
    word_rate: float = 1.0
    keep_masks: bool = False

    def __post_init__(self) -> None:
        for name in ("budget", "base_share", "general_share", "agreement"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"cns: {name} is {getattr(self, name)}, expected a share, above 0 and at most 1")

    @property
    def parts(self) -> Parts:
        return Parts(delta=Delta("cross_kv"), neurons=Neurons("cross_kv"))

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration_prompts"})

    def said(self, task: Task) -> str:
        return task.word

    def begin(self, client: Client, kept: State) -> Plan:
        model = client.model
        scores = importances(model, client.data.train, self.draws)
        general = _masks(self._general(client, kept), GENERAL, model)
        chosen = concept_mask(scores, general, self.base_share, int(self.budget * _num_weights(model)))
        if not any(mask.any() for mask in chosen.values()):
            raise ConfigError(
                f"concept {client.task.name!r} has no neurons: all that matter for it are general, or the budget of "
                f"{self.budget:g} is less than one; raise base_share or the budget, or lower general_share"
            )
        model.load({**model.params(), **placed(chosen)})
        owned = _masks(kept.extras, OWNED, model)
        penalties = on_owned(owned, self.overlap_weight), from_base(self.distance_weight)
        return Plan(may_move(client.task, is_neuron), penalties, rate_of_words(self.word_rate))

    def _general(self, client: Client, kept: State) -> Arrays:
        """Bitmaps, as extras have them."""
        return pick(kept.extras, _is_general) or general_bitmaps(self, ref(client.model), client.given.prompts)

    def end(self, client: Client, kept: State) -> State:
        params = client.model.params()
        before, own = _masks(kept.extras, OWNED, client.model), mask_of(params)
        extras = {OWNED + name: packed(own[name] | before[name]) for name in own}
        if self.keep_masks:
            extras |= pick(kept.extras, lambda name: name.startswith(MASK))
            extras |= {f"{MASK}{client.task.name}/{name}": packed(mask) for name, mask in own.items()}
        facts = {
            NUM_NEURONS: sum(int(mask.sum()) for mask in own.values()),
            NUM_SHARED: sum(int((own[name] & before[name]).sum()) for name in own),
        }
        return State(settled(params), {**extras, **self._general(client, kept)}, facts)

    def compose(self, model: Denoiser, kept: State, concepts: Sequence[str]) -> None:
        draw_with(model, kept)


# --- which weights ----------------------------------------------------------------------------------------------------


def importances(model: Denoiser, images: Images, draws: int) -> dict[str, Tensor]:
    """E |w dL/dw| of every weight that has a change, by its name; over one bank of noises, each on the next image."""
    changes, device = {name: value for name, value in model.live().items() if is_delta(name)}, device_of(model)
    bank, base = noise_bank(model, draws, stream(0, "neurons")), model.base()
    model.train(False)
    with torch.no_grad():
        x_0 = model.encode(images.floats().to(device))
    order = iter(range(draws))

    def draw_one() -> Tensor:
        at = next(order)
        row, one = at % len(images), slice(at, at + 1)
        t, noise = bank.t[one].to(device), bank.noise[one].to(device)
        return candidate_errors(model, x_0[row : row + 1], t, noise, [images.captions[row]])[0, 0]

    found = first_order(changes, draw_one, draws, {name: base[name.removeprefix(DELTA)] for name in changes})
    return {name.removeprefix(DELTA): score for name, score in found.items()}


def top(score: Float[Tensor, " *W"], share: float) -> Bool[Tensor, " *W"]:
    """The share with the largest scores, and at least one; of what scores nothing, none."""
    largest = score.flatten().topk(max(1, round(share * score.numel()))).indices
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[largest] = True
    return mask.view_as(score) & (score > 0)


def concept_mask(scores: Arrays, general: Arrays, share: float, most: int) -> dict[str, Tensor]:
    """The weights in every layer's top share that are not general; of all layers' together the `most` largest scores.

    Shapes: scores[n], general[n] and the masks, bool, like weight n. On the CPU.
    """
    own = {name: score.cpu() for name, score in scores.items()}
    left = {name: top(score, share) & ~general[name] for name, score in own.items()}
    ranked = torch.cat([score.where(left[name], -1.0).flatten() for name, score in own.items()])
    chosen = torch.zeros(len(ranked), dtype=torch.bool)
    chosen[ranked.topk(min(most, sum(int(mask.sum()) for mask in left.values()))).indices] = True
    parts = chosen.split([score.numel() for score in own.values()])
    return {name: part.view_as(score) for (name, score), part in zip(own.items(), parts, strict=True)}


@lru_cache(maxsize=1)
def general_bitmaps(method: Cns, model_of: ReferenceType[Denoiser], prompts: tuple[str, ...]) -> Arrays:
    """What the untaught model finds important for enough of these prompts, as bitmaps. Leaves the model as it is.

    Remembered, since it is asked for at both ends of the first lesson, and whenever that is taken up again; it depends
    on nothing that a lesson changes.
    """
    model = model_of()
    assert model is not None, "whoever asks holds the model"
    if not prompts:
        raise ConfigError("cns needs calibration prompts, and was given none")
    params = model.params()
    model.load(model.initial(stream(0, "untaught")))
    drawn = draw(model, prompts, stream(0, "calibration pictures"), steps=method.drawing_steps)
    votes: dict[str, Tensor] = {}
    for picture, said in zip(drawn, prompts, strict=True):
        for name, score in importances(model, Images(picture[None], captions=(said,)), method.general_draws).items():
            votes[name] = votes.get(name, torch.zeros((), device=score.device)) + top(score, method.general_share)
    model.load(params)
    return {GENERAL + name: packed((count >= method.agreement * len(prompts)).cpu()) for name, count in votes.items()}


# --- bitmaps ----------------------------------------------------------------------------------------------------------


def mask_of(params: Arrays) -> dict[str, Tensor]:
    """Which weights have neurons, by their names."""
    masks = {}
    for name in filter(is_neuron, params):
        bare = name.removeprefix(NEURONS)
        mask = torch.zeros(params[DELTA + bare].shape, dtype=torch.bool)
        mask.view(-1)[params[AT + bare]] = True
        masks[bare] = mask
    return masks


def jaccard(kept: State, one: str, other: str) -> float:
    """How many neurons are both concepts', over those that are either's. Raises: ConfigError, without their masks."""
    masks = []
    for name in (one, other):
        bits = [kept.extras[key] for key in sorted(kept.extras) if key.startswith(f"{MASK}{name}/")]
        if not bits:
            raise ConfigError(f"the mask of concept {name!r} was not kept; teach it with keep_masks")
        masks.append(torch.cat([unpacked(part, torch.Size([8 * len(part)])) for part in bits]))
    return int((masks[0] & masks[1]).sum()) / int((masks[0] | masks[1]).sum())


def _masks(extras: Arrays, front: str, model: Denoiser) -> dict[str, Tensor]:
    """By the weight's name; empty ones, where there are no bitmaps yet."""
    shapes = {name.removeprefix(DELTA): value.shape for name, value in model.live().items() if is_delta(name)}
    return {
        name: unpacked(extras[front + name], shape) if front + name in extras else torch.zeros(shape, dtype=torch.bool)
        for name, shape in shapes.items()
    }


def _is_general(name: str) -> bool:
    return name.startswith(GENERAL)


def _num_weights(model: Denoiser) -> int:
    """Of the U-Net."""
    return sum(value.numel() for name, value in {**model.base(), **model.live()}.items() if name.startswith(UNET))
