"""Scenes by seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np

from paperworks.errors import UserError, unknown
from paperworks.worlds.scene import COLOURS, RGB, Camera, Light, Material, Scene, Shape, Thing, Vector
from paperworks.worlds.solids import SHAPES

MATERIALS: tuple[Material, ...] = get_args(Material)
TRIES = 200


@dataclass(frozen=True)
class Surroundings:
    """How a place looks, whatever stands in it: for experiments with a shift of domain."""

    sun: RGB = (1.0, 0.98, 0.94)
    ambient: float = 0.35
    ground: RGB = (0.62, 0.60, 0.57)
    sky: RGB = (0.74, 0.82, 0.92)
    fog: float = 0.0


DOMAINS: dict[str, Surroundings] = {
    "day": Surroundings(),
    "dusk": Surroundings(sun=(1.0, 0.62, 0.36), ambient=0.25, ground=(0.52, 0.42, 0.38), sky=(0.86, 0.55, 0.42)),
    "night": Surroundings(sun=(0.35, 0.42, 0.62), ambient=0.22, ground=(0.25, 0.27, 0.33), sky=(0.05, 0.07, 0.14)),
    "fog": Surroundings(sun=(0.75, 0.78, 0.8), ambient=0.6, sky=(0.78, 0.8, 0.82), fog=0.12),
    "meadow": Surroundings(ground=(0.32, 0.52, 0.24), sky=(0.55, 0.75, 0.95)),
}


@dataclass(frozen=True)
class Recipe:
    """What scenes are drawn from.

    Attributes:
        things: Fewest and most of them.
        shapes, colours, materials: What they may be.
        size: Smallest and largest width, in metres.
        radius: Things stand within this many metres of the middle.
        gap: Metres that their footprints keep apart.
        distance: Of the camera from the middle: smallest and largest.
        height: Of the camera above ground: smallest and largest.
        fov: Of the camera, in degrees.
        resolution: Of the camera: width and height in pixels.
        domain: The surroundings, by name.
        cue: A colour for each of some shapes, for experiments with spurious cues.
        cue_strength: The chance that a thing of such a shape has it, rather than any colour.
    """

    things: tuple[int, int] = (3, 6)
    shapes: Sequence[Shape] = SHAPES
    colours: Sequence[str] = tuple(COLOURS)
    materials: Sequence[Material] = MATERIALS
    size: tuple[float, float] = (0.6, 1.1)
    radius: float = 2.2
    gap: float = 0.15
    distance: tuple[float, float] = (6.0, 7.5)
    height: tuple[float, float] = (2.5, 4.5)
    fov: float = 40.0
    resolution: tuple[int, int] = (64, 64)
    domain: str = "day"
    cue: Mapping[Shape, str] = field(default_factory=dict)
    cue_strength: float = 1.0

    def __post_init__(self) -> None:
        for name, pair in (("things", self.things), ("size", self.size)):
            if not 0 < pair[0] <= pair[1]:
                raise UserError(f"{name} must be a positive smallest and largest value, got {pair}")
        for name, chosen, known in (
            ("shape", (*self.shapes, *self.cue), SHAPES),
            ("colour", (*self.colours, *self.cue.values()), tuple(COLOURS)),
            ("material", self.materials, MATERIALS),
            ("domain", (self.domain,), tuple(DOMAINS)),
        ):
            for item in chosen:
                if item not in known:
                    raise unknown(name, item, known)
        if not 0 <= self.cue_strength <= 1:
            raise UserError(f"cue_strength must be in [0, 1], got {self.cue_strength}")


def make_scene(seed: int, recipe: Recipe | None = None, **changes: Any) -> Scene:
    """Draw a scene: things on the ground that do not touch, a lamp, and a camera that looks at them.

    Args:
        seed: Decides everything.
        recipe: What it is drawn from.
        changes: Fields of the recipe to change, e.g. ``things=(5, 5)``.

    Raises:
        UserError: For a bad recipe, or where things do not fit into its radius.
    """
    known = Recipe.__dataclass_fields__
    for name in changes.keys() - known.keys():
        raise unknown("field of a recipe", name, known)
    recipe = replace(recipe or Recipe(), **changes)
    draw = np.random.default_rng(seed)
    things: list[Thing] = []
    for _ in range(int(draw.integers(recipe.things[0], recipe.things[1] + 1))):
        things.append(_place(_thing(draw, recipe), things, draw, recipe))
    place = DOMAINS[recipe.domain]
    turn = draw.uniform(0, 2 * math.pi)
    away, up = draw.uniform(*recipe.distance), draw.uniform(*recipe.height)
    width, height = recipe.resolution
    camera = Camera(
        position=(away * math.cos(turn), away * math.sin(turn), up), fov=recipe.fov, width=width, height=height
    )
    lamp = turn + draw.uniform(0.5, 1.2) * draw.choice([-1, 1])
    return Scene(
        things=tuple(things),
        lights=(Light(position=(25 * math.cos(lamp), 25 * math.sin(lamp), draw.uniform(20, 32)), colour=place.sun),),
        cameras=(camera,),
        ground=place.ground,
        sky=place.sky,
        ambient=place.ambient,
        fog=place.fog,
    )


def make_scenes(count: int, seed: int = 0, recipe: Recipe | None = None, **changes: Any) -> list[Scene]:
    """Several scenes; the k-th is that of a seed of its own, whatever ``count``."""
    return [make_scene(child, recipe, **changes) for child in _seeds(seed, count)]


def rig(
    scene: Scene, count: int, *, height: float = 1.6, fov: float = 70.0, resolution: tuple[int, int] = (96, 64)
) -> Scene:
    """The scene with ``count`` cameras on a mast in its middle that look outwards all around, as on a vehicle."""
    angles = [2 * math.pi * k / count for k in range(count)]
    width, high = resolution
    cameras = tuple(
        Camera(
            position=(0.0, 0.0, height),
            target=(5 * math.cos(angle), 5 * math.sin(angle), height - 0.8),
            fov=fov,
            width=width,
            height=high,
            name=f"camera_{k}",
        )
        for k, angle in enumerate(angles)
    )
    return scene.model_copy(update={"cameras": cameras})


def orbit(
    scene: Scene,
    count: int,
    *,
    distance: float = 6.5,
    elevation: tuple[float, float] = (15.0, 60.0),
    fov: float = 40.0,
    resolution: tuple[int, int] = (64, 64),
    target: Vector = (0.0, 0.0, 0.4),
) -> Scene:
    """The scene with ``count`` posed cameras spread evenly over a band of the sphere around it, for neural fields.

    They lie on a Fibonacci spiral; ``elevation`` is its lowest and highest angle above the ground, in degrees.
    """
    low, high = (math.sin(math.radians(angle)) for angle in elevation)
    cameras = []
    for k in range(count):
        sine = low + (high - low) * (k + 0.5) / count
        angle = k * math.pi * (3 - math.sqrt(5))
        flat = distance * math.sqrt(1 - sine * sine)
        position = (
            target[0] + flat * math.cos(angle),
            target[1] + flat * math.sin(angle),
            target[2] + distance * sine,
        )
        width, down = resolution
        cameras.append(Camera(position=position, target=target, fov=fov, width=width, height=down, name=f"view_{k:03}"))
    return scene.model_copy(update={"cameras": tuple(cameras)})


def _seeds(seed: int, count: int) -> list[int]:
    return [int(child.generate_state(1, np.uint64)[0]) for child in np.random.SeedSequence(seed).spawn(count)]


def _thing(draw: np.random.Generator, recipe: Recipe) -> Thing:
    """Standing in the middle."""
    shape: Shape = recipe.shapes[int(draw.integers(len(recipe.shapes)))]
    width = float(draw.uniform(*recipe.size))
    stretch = float(draw.uniform(0.7, 1.4))
    size = {
        "box": (width, width * float(draw.uniform(0.6, 1.0)), width * stretch),
        "sphere": (width, width, width),
        "cylinder": (width, width, width * stretch),
        "cone": (width, width, width * stretch),
        "torus": (width, width, 0.35 * width),
        "capsule": (0.6 * width, 0.6 * width, 1.2 * width),
    }[shape]
    colour = recipe.colours[int(draw.integers(len(recipe.colours)))]
    if shape in recipe.cue and draw.uniform() < recipe.cue_strength:
        colour = recipe.cue[shape]
    return Thing(
        shape=shape,
        size=size,
        colour=colour,
        material=recipe.materials[int(draw.integers(len(recipe.materials)))],
        position=(0.0, 0.0, size[2] / 2),
        yaw=float(draw.uniform(-math.pi, math.pi)),
    )


def _place(thing: Thing, others: Sequence[Thing], draw: np.random.Generator, recipe: Recipe) -> Thing:
    for _ in range(TRIES):
        away, angle = recipe.radius * math.sqrt(draw.uniform()), draw.uniform(0, 2 * math.pi)
        x, y = away * math.cos(angle), away * math.sin(angle)
        if all(
            math.hypot(x - other.position[0], y - other.position[1]) >= thing.footprint + other.footprint + recipe.gap
            for other in others
        ):
            return thing.model_copy(update={"position": (x, y, thing.size[2] / 2)})
    raise UserError(
        f"{len(others) + 1} things of up to {recipe.size[1]} m do not fit within {recipe.radius} m: "
        "ask for fewer or smaller ones, or a larger radius"
    )
