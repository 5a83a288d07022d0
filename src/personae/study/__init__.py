"""Questions that many measurements answer: theory, comparisons, ablations."""

from collections.abc import Mapping
from typing import Any

from personae.study.adaptation import Adaptation
from personae.study.components import Components
from personae.study.embeddings import Embeddings
from personae.study.imperfect_backbone import ImperfectBackbone
from personae.study.mixing_weight import MixingWeight
from personae.study.mixture_federation import MixtureFederation
from personae.study.pretraining import Pretraining
from personae.study.variants import Variants

STUDIES: Mapping[str, Any] = {
    "adaptation": Adaptation,
    "components": Components,
    "embeddings": Embeddings,
    "imperfect_backbone": ImperfectBackbone,
    "mixing_weight": MixingWeight,
    "mixture_federation": MixtureFederation,
    "pretraining": Pretraining,
    "variants": Variants,
}
"""By the name that a recipe uses."""
