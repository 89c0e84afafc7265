"""What mixing is said to improve besides accuracy: calibration, and robustness to attack."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

from paperworks.errors import UserError
from paperworks.robust.mixing import Images

Labels = Int[Tensor, " batch"]


def expected_calibration_error(logits: Float[Tensor, "batch classes"], labels: Labels, bins: int = 15) -> float:
    r"""Expected calibration error (Guo et al. 2017, eq. 3) over equally wide bins of the confidence.

    $$\mathrm{ECE} = \sum_m \frac{|B_m|}{n} \left| \mathrm{acc}(B_m) - \mathrm{conf}(B_m) \right|$$
    """
    # Probabilities, as logits that happen to lie in [0, 1] would be taken for them.
    return float(multiclass_calibration_error(logits.softmax(1), labels, logits.shape[1], n_bins=bins, norm="l1"))


def fgsm(model: nn.Module, x: Images, labels: Labels, epsilon: float) -> Images:
    r"""Fast gradient sign attack (Goodfellow et al. 2015).

    $$x' = \mathrm{clip}_{[0, 1]}(x + \varepsilon\,\mathrm{sign}(\partial \ell / \partial x))$$

    Args:
        model: Images to logits, in evaluation mode.
        x: Images with values in [0, 1]; so are the attacked ones.
        labels: Class indices.
        epsilon: Change of each value, e.g. 8/255.
    """
    if not epsilon >= 0:
        raise UserError(f"epsilon must not be negative, got {epsilon}")
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(model(x), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    return (x + epsilon * gradient.sign()).clamp(0, 1).detach()
