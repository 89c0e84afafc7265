"""The loss of features that should tell a discriminator nothing."""

from jaxtyping import Float
from torch import Tensor


def confusion_loss(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, ""]:
    r"""Mean squared distance of the predicted probabilities from uniform: $\frac{1}{BK} \sum (p_{ik} - 1/K)^2$.

    At most $(K-1)/K^2$, so small beside a cross entropy: small models need it weighted up.
    """
    return (logits.softmax(-1) - 1 / logits.shape[-1]).square().mean()
