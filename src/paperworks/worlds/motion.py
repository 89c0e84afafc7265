"""Videos: one thing of a scene acts, the others stand still."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from paperworks.errors import UserError, unknown
from paperworks.worlds.scene import Scene, Thing

Motion = Callable[[Thing, float, float, float], Thing]
"""The thing at a time in [0, 1], its heading (radians) and reach (metres)."""


def _slide(thing: Thing, time: float, heading: float, reach: float) -> Thing:
    x, y, z = thing.position
    return _moved(thing, x + reach * time * math.cos(heading), y + reach * time * math.sin(heading), z)


def _return(thing: Thing, time: float, heading: float, reach: float) -> Thing:
    return _slide(thing, 1 - abs(2 * time - 1), heading, reach)


def _jump(thing: Thing, time: float, heading: float, reach: float) -> Thing:
    x, y, z = thing.position
    return _moved(thing, x, y, z + reach * 4 * time * (1 - time))


def _hop(thing: Thing, time: float, heading: float, reach: float) -> Thing:
    moved = _slide(thing, time, heading, reach)
    x, y, z = moved.position
    return _moved(moved, x, y, z + reach / 2 * abs(math.sin(2 * math.pi * time)))


def _spin(thing: Thing, time: float, heading: float, reach: float) -> Thing:
    return thing.model_copy(update={"yaw": thing.yaw + 2 * math.pi * time})


def _circle(thing: Thing, time: float, heading: float, reach: float) -> Thing:
    x, y, z = thing.position
    radius, angle = reach / 2, 2 * math.pi * time
    dx, dy = radius * (math.cos(angle) - 1), radius * math.sin(angle)
    return _moved(
        thing,
        x + dx * math.cos(heading) - dy * math.sin(heading),
        y + dx * math.sin(heading) + dy * math.cos(heading),
        z,
    )


def _grow(thing: Thing, time: float, heading: float, reach: float) -> Thing:
    return _scaled(thing, 1 + 0.6 * time)


def _shrink(thing: Thing, time: float, heading: float, reach: float) -> Thing:
    return _scaled(thing, 1 - 0.5 * time)


ACTIONS: dict[str, Motion] = {
    "slide": _slide,
    "go and return": _return,
    "jump": _jump,
    "hop": _hop,
    "spin": _spin,
    "circle": _circle,
    "grow": _grow,
    "shrink": _shrink,
}
"""Actions by the name that labels use."""


@dataclass(frozen=True)
class Clip:
    """A video as scenes.

    Attributes:
        frames: One scene a frame, with the same things in the same order.
        action: Its name in ``ACTIONS``.
        actor: Place of the thing that acts.
    """

    frames: tuple[Scene, ...]
    action: str
    actor: int


def animate(
    scene: Scene, action: str, *, actor: int | None = None, frames: int = 8, reach: float = 1.5, seed: int = 0
) -> Clip:
    """Let one thing act.

    Args:
        scene: The start.
        action: A name in ``ACTIONS``.
        actor: Place of the thing; drawn if not given. One that spins should not be round.
        frames: Number of pictures; the last one shows the end of the action.
        reach: How far it goes or how high it jumps, in metres.
        seed: Decides the actor and its heading. Things may pass through one another.

    Raises:
        UserError: For an unknown action, no such thing, or fewer than 2 frames.
    """
    if action not in ACTIONS:
        raise unknown("action", action, ACTIONS)
    if frames < 2:
        raise UserError(f"frames must be at least 2, got {frames}")
    draw = np.random.default_rng(seed)
    if actor is None:
        able = [k for k, thing in enumerate(scene.things) if action != "spin" or thing.shape == "box"]
        if not able:
            raise UserError(f"nothing in the scene could be seen to {action}")
        actor = able[int(draw.integers(len(able)))]
    if not 0 <= actor < len(scene.things):
        raise UserError(f"actor must be 0 to {len(scene.things) - 1}, got {actor}")
    heading, start = float(draw.uniform(0, 2 * math.pi)), scene.things[actor]
    shots = []
    for frame in range(frames):
        moved = ACTIONS[action](start, frame / (frames - 1), heading, reach)
        things = (*scene.things[:actor], moved, *scene.things[actor + 1 :])
        shots.append(scene.model_copy(update={"things": things}))
    return Clip(tuple(shots), action, actor)


def _moved(thing: Thing, x: float, y: float, z: float) -> Thing:
    return thing.model_copy(update={"position": (x, y, z)})


def _scaled(thing: Thing, factor: float) -> Thing:
    """About the middle of its base."""
    x, y, z = thing.position
    a, b, c = thing.size
    return thing.model_copy(
        update={"size": (a * factor, b * factor, c * factor), "position": (x, y, z + (factor - 1) * c / 2)}
    )
