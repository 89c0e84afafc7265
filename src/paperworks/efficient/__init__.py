"""Less work per step."""

from .gradfilter import (
    FilteredConv2d,
    GradientFilter,
    apply_gradient_filter,
    backward_cost,
    filtered_conv2d,
    freeze_except,
    gradient_agreement,
    remove_gradient_filter,
)

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
