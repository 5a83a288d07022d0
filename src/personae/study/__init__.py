"""Questions that many measurements answer: theory, comparisons, ablations."""

from collections.abc import Mapping
from typing import Any

from personae.study.adaptation import Adaptation
from personae.study.components import Components
from personae.study.drawing import Drawing
from personae.study.embeddings import Embeddings
from personae.study.imperfect_backbone import ImperfectBackbone
from personae.study.mixing_weight import MixingWeight
from personae.study.mixture_federation import MixtureFederation
from personae.study.parts import Parts
from personae.study.pretraining import Pretraining
from personae.study.variants import Variants

STUDIES: Mapping[str, Any] = {
    "adaptation": Adaptation,
    "components": Components,
    "drawing": Drawing,
    "embeddings": Embeddings,
    "imperfect_backbone": ImperfectBackbone,
    "mixing_weight": MixingWeight,
    "mixture_federation": MixtureFederation,
    "parts": Parts,
    "pretraining": Pretraining,
    "variants": Variants,
}
"""By the name that a recipe uses."""
