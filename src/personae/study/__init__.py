"""Questions that many measurements answer: theory, comparisons, ablations."""

from collections.abc import Mapping
from typing import Any

from personae.study.adaptation import Adaptation
from personae.study.advantage import Advantage
from personae.study.collaboration import Collaboration
from personae.study.components import Components
from personae.study.concept_pictures import ConceptPictures
from personae.study.drawing import Drawing
from personae.study.embeddings import Embeddings
from personae.study.handover import Handover
from personae.study.imperfect_backbone import ImperfectBackbone
from personae.study.leakage import Leakage
from personae.study.learning import Learning
from personae.study.mixing_weight import MixingWeight
from personae.study.mixture_federation import MixtureFederation
from personae.study.newcomers import Newcomers
from personae.study.parts import Parts
from personae.study.pretraining import Pretraining
from personae.study.streams import Streams
from personae.study.variants import Variants

STUDIES: Mapping[str, Any] = {
    "adaptation": Adaptation,
    "advantage": Advantage,
    "collaboration": Collaboration,
    "components": Components,
    "concept_pictures": ConceptPictures,
    "drawing": Drawing,
    "embeddings": Embeddings,
    "handover": Handover,
    "imperfect_backbone": ImperfectBackbone,
    "leakage": Leakage,
    "learning": Learning,
    "mixing_weight": MixingWeight,
    "mixture_federation": MixtureFederation,
    "newcomers": Newcomers,
    "parts": Parts,
    "pretraining": Pretraining,
    "streams": Streams,
    "variants": Variants,
}
"""By the name that a recipe uses."""
