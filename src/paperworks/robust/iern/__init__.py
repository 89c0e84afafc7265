"""IERN: classify every image under the context of every source, and average."""

from paperworks.robust.iern.adjustment import average_strata, backdoor_average, strata_logits, strata_spread
from paperworks.robust.iern.backbones import resnet_base
from paperworks.robust.iern.bank import ConfounderBank
from paperworks.robust.iern.confusion import confusion_loss
from paperworks.robust.iern.model import IERN, Optimizers
from paperworks.robust.iern.networks import Discriminator, Encoder, Head, Reconstructor
from paperworks.robust.iern.training import Disentangle, augmentation, rate_factor

__all__ = [
    "IERN",
    "ConfounderBank",
    "Discriminator",
    "Disentangle",
    "Encoder",
    "Head",
    "Optimizers",
    "Reconstructor",
    "augmentation",
    "average_strata",
    "backdoor_average",
    "confusion_loss",
    "rate_factor",
    "resnet_base",
    "strata_logits",
    "strata_spread",
]
