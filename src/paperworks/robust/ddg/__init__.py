"""DDG: invariance by swapping semantics within a class, enforced by a primal-dual loop.

Zhang et al., "Towards Principled Disentanglement for Domain Generalization", CVPR 2022.
"""

from .constraint import partners, reconstruction_violation, swap
from .discriminator import MultiScaleDiscriminator
from .dual import DualVariable
from .intervention import SwapConstraint
from .model import DDG
from .networks import AdaINDecoder, SemanticEncoder, SwapDecoder, VariationEncoder
from .pairs import same_class_positives
from .penalties import coral_penalty, irm_penalty, jensen_shannon
from .stages import Stage0, Stage1, stage0_terms, stage1_terms

__all__ = [
    "DDG",
    "AdaINDecoder",
    "DualVariable",
    "MultiScaleDiscriminator",
    "SemanticEncoder",
    "Stage0",
    "Stage1",
    "SwapConstraint",
    "SwapDecoder",
    "VariationEncoder",
    "coral_penalty",
    "irm_penalty",
    "jensen_shannon",
    "partners",
    "reconstruction_violation",
    "same_class_positives",
    "stage0_terms",
    "stage1_terms",
    "swap",
]
