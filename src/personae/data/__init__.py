"""Where images come from, and which client holds which of them."""

from collections.abc import Callable, Mapping

from personae.data.emoji import emoji, scenes, thing
from personae.data.faces import faces
from personae.data.folder import client_folders, image_folder
from personae.data.identities import identity
from personae.data.mixture import gaussian_mixture
from personae.data.partition import by_attribute, by_label, dirichlet, fixed_new, iid, split, unseen
from personae.data.sources import Source, digits, fashion, mnist5k

SOURCES: Mapping[str, Callable[..., Source]] = {
    "digits": digits,
    "mnist5k": mnist5k,
    "fashion": fashion,
    "faces": faces,
    "emoji": emoji,
    "scenes": scenes,
    "identity": identity,
    "thing": thing,
}
"""By the name that a recipe uses."""

__all__ = [
    "SOURCES",
    "Source",
    "by_attribute",
    "by_label",
    "client_folders",
    "digits",
    "dirichlet",
    "emoji",
    "faces",
    "fashion",
    "fixed_new",
    "gaussian_mixture",
    "identity",
    "iid",
    "image_folder",
    "mnist5k",
    "scenes",
    "split",
    "thing",
    "unseen",
]
