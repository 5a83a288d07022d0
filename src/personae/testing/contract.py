"""What a broken contract looks like, and how two states are compared bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from personae.core import Arrays, Denoiser, Images, State, Update, device_of


class ContractBroken(AssertionError):
    """A method or a denoiser does not do what the library relies on. The message says what was expected and found."""


def require(kept: bool, contract: str, found: str) -> None:
    if not kept:
        raise ContractBroken(f"{contract}; {found}")


def same_bits(left: Tensor, right: Tensor) -> bool:
    """True for equal shapes, types and bits; -0.0 differs from 0.0, and nan equals itself."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(_bytes(left), _bytes(right))


def differing(left: Arrays, right: Arrays) -> list[str]:
    """Names that only one side has, or whose bits differ."""
    lonely = left.keys() ^ right.keys()
    return sorted(lonely | {n for n in left.keys() & right.keys() if not same_bits(left[n], right[n])})


def differing_states(left: State, right: State) -> list[str]:
    """Like `differing`, over params, extras and facts."""
    one, other = ({key: (type(value), value) for key, value in state.facts.items()} for state in (left, right))
    return [
        *differing(left.params, right.params),
        *(f"extras/{name}" for name in differing(left.extras, right.extras)),
        *(f"facts/{key}" for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)),
    ]


def differing_updates(left: Update, right: Update) -> list[str]:
    names = differing_states(left.sent, right.sent)
    # By their text, since nan is a usual loss of a client that takes no step.
    if repr((left.num_examples, dict(left.metrics))) != repr((right.num_examples, dict(right.metrics))):
        names.append("num_examples or metrics")
    return names


def cloned(state: State) -> State:
    """A copy that nobody else can change."""
    return State(
        {n: v.clone() for n, v in state.params.items()},
        {n: v.clone() for n, v in state.extras.items()},
        dict(state.facts),
    )


def holds_no_picture(state: State, images: Images, model: Denoiser, what: str) -> None:
    """Of these images no tensor holds one: as floats in the model's range, as bytes, or as the model's latents.

    Every tensor is read as rows of one picture's size, whatever its own shape. `what` the state is, for the error.
    Raises: ContractBroken.
    """
    floats = images.floats()
    with torch.no_grad():
        latents = model.encode(floats.to(device_of(model))).cpu()
    forms = {"floats": floats, "bytes": floats.add(1).mul(127.5).round(), "latents": latents}
    tensors = {**state.params, **{f"extras/{name}": value for name, value in state.extras.items()}}
    pairs = product(tensors.items(), forms.items())
    found = [f"{name} holds one's {form}" for (name, value), (form, pictures) in pairs if _holds(value, pictures)]
    require(not found, f"no tensor of {what} holds a picture", some(found))


def depends_on_what_was_kept(teach: Callable[[], State], discarded: Callable[[], object]) -> None:
    """`teach` comes to the same before and after a lesson that is thrown away. Raises: ContractBroken."""
    before = teach()
    discarded()
    names = differing_states(before, teach())
    require(
        not names,
        "what a concept leaves depends on what was kept alone",
        f"after a lesson on other images that was thrown away, {some(names)} come out otherwise",
    )


def some(names: Sequence[str]) -> str:
    """The first few of many names, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _bytes(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _holds(value: Tensor, pictures: Tensor) -> bool:
    """Up to the rounding of half precision."""
    size = pictures[0].numel()
    if value.numel() % size:
        return False
    rows = value.detach().cpu().float().reshape(-1, size)
    return any(bool(torch.isclose(rows, each.flatten(), rtol=0.01, atol=0.01).all(1).any()) for each in pictures)
