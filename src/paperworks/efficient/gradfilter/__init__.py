"""GradFilter: a cheap backward pass for convolutions, on gradients averaged over patches.

Yang et al., "Efficient On-device Training via Gradient Filtering", CVPR 2023.
"""

from .agreement import gradient_agreement
from .conv import filtered_conv2d
from .cost import backward_cost
from .freeze import freeze_except
from .intervention import GradientFilter
from .layers import FilteredConv2d, apply_gradient_filter, remove_gradient_filter

__all__ = [
    "FilteredConv2d",
    "GradientFilter",
    "apply_gradient_filter",
    "backward_cost",
    "filtered_conv2d",
    "freeze_except",
    "gradient_agreement",
    "remove_gradient_filter",
]
