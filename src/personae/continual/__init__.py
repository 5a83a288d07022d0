"""One continual method per file: what a client does around each concept, so that it does not forget the others."""

from personae.continual.c_lora import CLora
from personae.continual.cns import Cns
from personae.continual.contract import Continual, Parts
from personae.continual.custom_diffusion import CustomDiffusion
from personae.continual.dreambooth import DreamBooth
from personae.continual.dsc import Dsc
from personae.continual.ewc import Ewc
from personae.continual.learning import learn
from personae.continual.merged_lora import MergedLora
from personae.continual.mix_of_show import MixOfShow
from personae.continual.orthogonal import Orthogonal
from personae.continual.over_tasks import OverTasks
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
    "cns": Cns,
    "custom_diffusion": CustomDiffusion,
    "mix_of_show": MixOfShow,
}
"""By the name that a recipe uses."""

__all__ = [
    "CONTINUAL",
    "CLora",
    "Cns",
    "Continual",
    "CustomDiffusion",
    "DreamBooth",
    "Dsc",
    "Ewc",
    "MergedLora",
    "MixOfShow",
    "Orthogonal",
    "OverTasks",
    "Parts",
    "SequentialLora",
    "TextualInversion",
    "learn",
]
