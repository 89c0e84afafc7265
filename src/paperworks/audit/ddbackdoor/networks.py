"""The networks that the paper distils with; both end in a hidden and an output layer, which DOORPING looks for."""

from torch import nn

from paperworks.errors import UserError


def distillation_convnet(
    in_channels: int, num_classes: int, image_size: int, *, width: int = 128, depth: int = 3, hidden: int = 192
) -> nn.Sequential:
    """``depth`` times (3x3 convolution, ReLU, average over 2x2), then a hidden and an output layer; no norms.

    Args:
        in_channels: Channels of an image.
        num_classes: Logits.
        image_size: Side of the images in pixels; halved ``depth`` times, it must not vanish.
        width: Channels of the convolutions. The defaults are the reference implementation's.
        depth: Convolutions.
        hidden: Units of the hidden layer.
    """
    side = image_size >> depth
    if depth < 1 or side < 1:
        raise UserError(f"depth must be at least 1 and leave a pixel of {image_size}, got {depth}")
    layers: list[nn.Module] = []
    for before in [in_channels] + [width] * (depth - 1):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
    head = [nn.Flatten(), nn.Linear(width * side**2, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)]
    return nn.Sequential(*layers, *head)


def distillation_alexnet(in_channels: int, num_classes: int, image_size: int = 32) -> nn.Sequential:
    """The AlexNet for 32x32 images: two 5x5 convolutions with local response norm, layers of 384, 192 and classes.

    Args:
        in_channels: Channels of an image.
        num_classes: Logits.
        image_size: Side of the images in pixels.
    """
    side = (image_size + 1) // 2
    side = (side + 1) // 2

    def norm() -> nn.Module:
        return nn.LocalResponseNorm(4, alpha=0.001 / 9, beta=0.75, k=1)

    return nn.Sequential(
        *(nn.Conv2d(in_channels, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1), norm()),
        *(nn.Conv2d(64, 64, 5, padding=2), nn.ReLU(), norm(), nn.MaxPool2d(3, 2, 1), nn.Flatten()),
        *(nn.Linear(64 * side**2, 384), nn.ReLU(), nn.Linear(384, 192), nn.ReLU(), nn.Linear(192, num_classes)),
    )
