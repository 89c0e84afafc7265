"""Which classes an episode asks for, and what then is to be found."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2

from paperworks.detection.core import Shot, Targets
from paperworks.errors import UserError

TRIES = 100
"""Times that an augmentation may lose the object."""
LEAST_SHARE = 0.2
"""Of an object's area that an augmentation must leave."""


def sample_episode(present: Sequence[int], classes: Sequence[int], size: int, generator: torch.Generator) -> list[int]:
    """Classes in the order of their slots: a random number of those present, filled up with others, shuffled.

    The number of present classes is uniform from the least that fills the episode to the most that fits.

    Args:
        present: Classes that the pictures show.
        classes: All that may be asked for.
        size: C.
        generator: Decides.

    Raises:
        UserError: If there are fewer classes than slots.
    """
    if len(classes) < size:
        raise UserError(f"an episode of {size} classes needs as many, and there is support for {len(classes)}")
    positive = [label for label in classes if label in set(present)]
    negative = [label for label in classes if label not in set(present)]
    least, most = max(0, size - len(negative)), min(len(positive), size)
    wanted = int(torch.randint(least, most + 1, (), generator=generator))
    chosen = _some(positive, wanted, generator) + _some(negative, size - wanted, generator)
    return _some(chosen, size, generator)


def _some(labels: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
    return [labels[place] for place in torch.randperm(len(labels), generator=generator)[:count].tolist()]


def episode_targets(targets: Targets, classes: Sequence[int]) -> Targets:
    """The objects of an episode's classes, labelled by slot; all others are background."""
    slots = targets.labels[:, None] == torch.tensor(classes, device=targets.labels.device)
    mine = slots.any(1).nonzero()[:, 0]  # the one wait for the device
    ids = tuple(targets.ids[row] for row in mine.tolist()) if targets.ids else ()
    return replace(targets, labels=slots[mine].int().argmax(1), boxes=targets.boxes[mine], ids=ids)


def inference_episodes(count: int, size: int) -> Iterator[tuple[list[int], list[int]]]:
    """Classes of each episode, and those of them that no earlier episode had: its last ones.

    Example:
        >>> list(inference_episodes(7, 5))
        [([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]), ([2, 3, 4, 5, 6], [5, 6])]
    """
    for start in range(0, count, size):
        end = min(start + size, count)
        yield list(range(max(0, end - size), end)), list(range(start, end))


def augmented(shot: Shot, augment: v2.Transform | None, generator: torch.Generator) -> Shot:
    """A shot after a transform of picture and box, drawn anew until a fifth of the object's pixels or more is left.

    Args:
        shot: As it is.
        augment: Of ``torchvision.transforms.v2``; gets the picture and its ``BoundingBoxes``. Published are random
            flips, colour jitter, and crops that are scaled back.
        generator: Seeds the transform, which draws from PyTorch's global generator.

    Raises:
        UserError: If the object is lost again and again.
    """
    if augment is None:
        return shot
    picture, corners = tv_tensors.Image(shot.image), _pixels(shot.box, shot.image)
    box = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=shot.image.shape[1:])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        for _ in range(TRIES):
            image, moved = augment(picture, box)
            moved = v2.functional.clamp_bounding_boxes(moved).as_subclass(Tensor)
            if _area(moved) >= LEAST_SHARE * _area(corners):
                height, width = image.shape[1:]
                shares = box_convert(moved, "xyxy", "cxcywh") / moved.new_tensor([width, height, width, height])
                return replace(shot, image=image.as_subclass(Tensor), box=shares[0])
    what = f"{LEAST_SHARE:.0%} of the pixels of an object of class {shot.label}"
    raise UserError(f"the augmentation left less than {what}, {TRIES} times")


def _pixels(box: Tensor, image: Tensor) -> Tensor:
    height, width = image.shape[1:]
    return box_convert(box[None] * box.new_tensor([width, height, width, height]), "cxcywh", "xyxy")


def _area(corners: Tensor) -> float:
    return float((corners[:, 2:] - corners[:, :2]).clamp(min=0).prod(1).sum())
