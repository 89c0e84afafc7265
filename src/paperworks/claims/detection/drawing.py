"""What detectors find, drawn over pictures."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from paperworks.detection.core import Targets

SURE = 0.3
"""Score from which on a detection is drawn; the surest of a picture always is."""


def found(
    axes: Axes,
    image: Float[Tensor, "3 height width"],
    truth: Targets,
    prediction: tuple[Float[Tensor, "queries classes"], Float[Tensor, "queries 4"]],
    classes: Sequence[str],
    sure: float = SURE,
) -> None:
    """A picture with what is there, dashed in white, and what was found, in its class's colour.

    Args:
        axes: To draw on; from 0 to 1 both ways afterwards, as boxes are.
        image: Without padding, in [0, 1].
        truth: What is there.
        prediction: Logits and boxes of one picture.
        classes: Names.
        sure: Score from which on a detection is drawn; the surest is, whatever its score.
    """
    height, width = image.shape[1:]
    axes.imshow(image.permute(1, 2, 0).cpu().numpy(), extent=(0, 1, 1, 0), aspect=height / width)
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
    for box in truth.boxes:
        frame(axes, box, "white", "--")
    logits, boxes = prediction
    scores, labels = logits.sigmoid().max(-1)
    order = scores.argsort().tolist()  # the surest on top
    for query in [*(query for query in order[:-1] if scores[query] >= sure), order[-1]]:
        label = int(labels[query])
        frame(axes, boxes[query], colour(label))
        x, y, w, h = boxes[query].tolist()
        axes.text(
            min(max(x - w / 2, 0.0), 1.0),
            min(max(y - h / 2, 0.06), 1.0),  # within the picture, where a box begins above it
            f"{classes[label]} {scores[query]:.2f}",
            fontsize=6,
            color="white",
            va="bottom",
            clip_on=True,
            bbox={"facecolor": colour(label), "edgecolor": "none", "pad": 0.8},
        )


def frame(axes: Axes, box: Float[Tensor, "4"], colour: Any, style: str = "-") -> None:
    """A box (centre, width and height) on axes of the same unit."""
    x, y, w, h = box.tolist()
    axes.add_patch(
        Rectangle(
            (x - w / 2, y - h / 2),
            w,
            h,
            fill=False,
            edgecolor=colour,
            linestyle=style,
            path_effects=[withStroke(linewidth=2.5, foreground=(0, 0, 0, 0.4))],
        )
    )


def colour(label: int) -> Any:
    """Of a class."""
    return mpl.colormaps["tab10"](label % 10)
