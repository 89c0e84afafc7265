"""How an attack plugs into a distiller."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class DistillationHook(Protocol):
    """What a distiller calls. An attack keeps the tensors it returned and re-pastes its trigger into them in place.

    It must draw from a generator of its own, so that a hook which changes nothing leaves a distillation as it was.
    """

    def start(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Before distillation: return the images and labels to distil. They are read anew at every step."""

    def on_network_updated(self, net: nn.Module) -> None:
        """After each training of a network on the synthetic images; must leave its weights alone."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a killed distillation, as tensors, numbers and containers of them."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it, after ``start``."""
