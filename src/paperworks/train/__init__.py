"""One training loop, and the protocol by which a method intervenes in it."""

from .batches import Batches, Stream
from .intervention import Intervention, RandomIntervention, State
from .trainer import History, NonFiniteLoss, Trainer

__all__ = ["Batches", "History", "Intervention", "NonFiniteLoss", "RandomIntervention", "State", "Stream", "Trainer"]
