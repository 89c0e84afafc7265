"""Gradient filtering as a change to anybody's training."""

from paperworks.train import Intervention, State

from .conv import check_patch
from .layers import Layers, apply_gradient_filter, remove_gradient_filter


class GradientFilter(Intervention):
    """Filters the gradients of a model's convolutions while it trains; plain convolutions come back afterwards.

    What learns is not changed: to train some layers only, call ``freeze_except`` on the model first.

    Args:
        layers, patch, stride_correction: As for ``apply_gradient_filter``.

    Raises:
        UserError: If ``patch`` is out of range; in ``setup``, if the model has no such convolutions.

    Example:
        >>> Trainer(epochs=5, interventions=[GradientFilter("last:2", patch=2)])
    """

    def __init__(self, layers: Layers = "last:2", patch: int = 2, *, stride_correction: bool = True) -> None:
        check_patch(patch)
        self.layers, self.patch, self.stride_correction = layers, patch, stride_correction

    def setup(self, state: State) -> None:
        correction = self.stride_correction
        self.filtered = apply_gradient_filter(state.module, self.layers, self.patch, stride_correction=correction)

    def teardown(self, state: State) -> None:
        remove_gradient_filter(state.module, self.filtered)
