"""One continual method per file: what a client does around each concept, so that it does not forget the others."""

from personae.continual.c_lora import CLora
from personae.continual.contract import Continual, Parts
from personae.continual.dreambooth import DreamBooth
from personae.continual.dsc import Dsc
from personae.continual.ewc import Ewc
from personae.continual.learning import Learned, learn
from personae.continual.merged_lora import MergedLora
from personae.continual.orthogonal import Orthogonal
from personae.continual.sequential_lora import SequentialLora
from personae.continual.textual_inversion import TextualInversion

CONTINUAL = {
    "textual_inversion": TextualInversion,
    "sequential_lora": SequentialLora,
    "merged_lora": MergedLora,
    "dreambooth": DreamBooth,
    "ewc": Ewc,
    "dsc": Dsc,
    "c_lora": CLora,
    "orthogonal": Orthogonal,
}
"""By the name that a recipe uses."""

__all__ = [
    "CONTINUAL",
    "CLora",
    "Continual",
    "DreamBooth",
    "Dsc",
    "Ewc",
    "Learned",
    "MergedLora",
    "Orthogonal",
    "Parts",
    "SequentialLora",
    "TextualInversion",
    "learn",
]
