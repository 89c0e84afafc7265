"""The check that every function taking class labels makes at its door."""

from torch import Tensor

from paperworks.errors import UserError


def check_labels(labels: Tensor, num_classes: int, what: str) -> None:
    """Raise unless ``labels`` is an integer vector with values in 0 to ``num_classes - 1``."""
    if labels.ndim != 1 or labels.is_floating_point():
        raise UserError(f"{what} must be an integer vector, got {labels.dtype} {list(labels.shape)}")
    if (bad := ((labels < 0) | (labels >= num_classes)).nonzero()).numel():
        row = int(bad[0])
        raise UserError(f"{what}[{row}] is {int(labels[row])}, expected 0 to {num_classes - 1}")
