"""Flat pictures of named shapes in named colours, and phrases of any number of hops that single one thing out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product
from random import Random
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.errors import UserError, unknown
from paperworks.worlds import COLOURS, FLAT_SHAPES, Expression
from paperworks.worlds.language import Program, words

Relations = Literal["half-plane", "beside", "next"]
RELATIONS: tuple[Relations, ...] = ("half-plane", "beside", "next")
WAYS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
SAID = {**WAYS, "next": "next to"}
MARGIN = 6.0
"""Pixels by which a thing is left of another before phrases say so."""
TRIES = 20


@dataclass(frozen=True)
class FlatThing:
    """A shape in the plane; its box is the square around it.

    Attributes:
        shape: One of ``FLAT_SHAPES``.
        colour: One of ``COLOURS``.
        x, y: Centre in pixels, y down.
        radius: In pixels.
    """

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class FlatScene:
    """What one picture shows.

    Attributes:
        things: In any order.
        size: Pixels a side.
        grid: Cells a side, at most one thing in each.
    """

    things: tuple[FlatThing, ...]
    size: int = 64
    grid: int = 3

    @property
    def boxes(self) -> Float[Tensor, "things 4"]:
        """Centre x, centre y, width and height as shares of the picture."""
        rows = [(thing.x, thing.y, 2 * thing.radius, 2 * thing.radius) for thing in self.things]
        return torch.tensor(rows).view(-1, 4) / self.size

    @property
    def cells(self) -> list[tuple[int, int]]:
        """Column and row of each thing."""
        pitch = self.size / self.grid
        return [(int(thing.x // pitch), int(thing.y // pitch)) for thing in self.things]


def labelled_scenes(
    count: int,
    *,
    size: int = 64,
    cells: int = 3,
    things: tuple[int, int] = (6, 8),
    shapes: Sequence[str] = ("disc", "square", "cross"),
    colours: Sequence[str] = ("red", "green", "blue"),
    seed: int = 0,
) -> list[FlatScene]:
    """Scatter things over the cells of a grid, at most one a cell and none over its edge.

    Args:
        count: Scenes.
        size: Pixels a side.
        cells: Of the grid, a side.
        things: Fewest and most a scene.
        shapes, colours: To draw from, each as likely.
        seed: Decides everything.

    Raises:
        UserError: For an unknown shape or colour, or more things than cells.
    """
    if count < 1:
        raise UserError(f"count must be at least 1, got {count}")
    for kind, names, known in (("shape", shapes, FLAT_SHAPES), ("colour", colours, COLOURS)):
        for name in names:
            if name not in known:
                raise unknown(kind, name, known)
    if not 1 <= things[0] <= things[1] <= cells**2:
        raise UserError(f"things must be the fewest and most, within the {cells**2} cells, got {things}")
    if size < 8 * cells:
        raise UserError(f"size must be at least 8 pixels a cell, got {size} for {cells} cells")
    draw, cell = np.random.default_rng(seed), size / cells
    found = []
    for number in draw.integers(things[0], things[1] + 1, count):
        places = draw.permutation(cells**2)[:number]
        radii = draw.uniform(0.32, 0.44, number) * cell
        shift = draw.uniform(-1, 1, (2, number)) * (cell / 2 - radii)
        kinds = draw.integers((len(shapes), len(colours)), size=(number, 2)).tolist()
        found.append(
            FlatScene(
                tuple(
                    FlatThing(
                        shapes[shape],
                        colours[colour],
                        float((place % cells + 0.5) * cell + dx),
                        float((place // cells + 0.5) * cell + dy),
                        float(radius),
                    )
                    for place, radius, dx, dy, (shape, colour) in zip(places, radii, *shift, kinds, strict=True)
                ),
                size,
                cells,
            )
        )
    return found


def draw_scenes(
    scenes: Sequence[FlatScene], *, noise: float = 0.03, seed: int = 0
) -> Float[Tensor, "scenes 3 size size"]:
    """RGB pictures in [0, 1]: things on a pale ground with Gaussian noise.

    Args:
        scenes: All of one size.
        noise: Standard deviation of each pixel.
        seed: Of ground and noise.
    """
    if not scenes:
        raise UserError("there is no scene to draw")
    size, generator = scenes[0].size, torch.Generator().manual_seed(seed)
    images = (0.75 + 0.2 * torch.rand(len(scenes), 3, 1, 1, generator=generator)).repeat(1, 1, size, size)
    grid, flat = torch.arange(size) + 0.5, [(k, thing) for k, scene in enumerate(scenes) for thing in scene.things]
    for name, inside in FLAT_SHAPES.items():
        mine = [(k, thing) for k, thing in flat if thing.shape == name]
        for start in range(0, len(mine), 1024):
            part = mine[start : start + 1024]
            x, y, radius = torch.tensor([(thing.x, thing.y, thing.radius) for _, thing in part]).T[..., None, None]
            u = ((grid - x) / radius).expand(-1, size, -1)
            v = ((grid[:, None] - y) / radius).expand(-1, -1, size)
            thing, row, column = inside(u, v).nonzero().T
            colours = torch.tensor([COLOURS[thing.colour] for _, thing in part])
            images[torch.tensor([k for k, _ in part])[thing], :, row, column] = colours[thing]
    images += noise * torch.randn(images.shape, generator=generator)
    return images.clamp_(0, 1)


def expressions2d(
    scene: FlatScene, hops: int, *, count: int = 1, relations: Relations = "beside", seed: int = 0
) -> list[Expression]:
    """Draw phrases such as "the square left of the ring above the star", no two alike.

    Each is true of one thing alone, which without its relation would not be. Programs are those of
    ``paperworks.worlds``: chains of ``filter``, ``relate`` and ``unique``.

    ``half-plane``: Left is the whole half-plane but for a margin, as in ``paperworks.worlds.refer``. That is easier
    than it looks: the leftmost square is mostly right, whatever it is left of.

    ``beside``: A thing is left of another if it is beside it: at most half as far up or down as to the left, and
    without room between them for a third. These phrases need all of their chain: with other things at its end the same
    words would mean other squares, and which of these squares is meant was drawn with equal chances, so that nobody who
    does not follow the chain to its end is right in more than half of the cases.

    ``next``: "The red thing next to the blue thing next to the green thing", where next is any of the four neighbouring
    cells, and things have colours alone. Nothing but the chain leads to the target, neither a direction nor the colours
    alone: from two hops on, another red thing is also next to some blue thing, and as many cells from the green one.

    Args:
        scene: Of whose things they speak.
        hops: Other things that they go by: 0 for "the red disc".
        count: How many, at most; fewer if no more are found.
        relations: ``half-plane``, ``beside`` or ``next``.
        seed: Decides which.
    """
    if hops < 0 or count < 1:
        raise UserError(f"hops must be at least 0 and count at least 1, got {hops} and {count}")
    if relations not in RELATIONS:
        raise unknown("relations", relations, RELATIONS)
    draw = Random(seed)
    chains = _walks(scene, hops) if relations == "next" else _chains(scene, hops, relations)
    found: dict[Program, Expression] = {}
    for _ in range(TRIES * count if chains else 0):
        if len(found) == count:
            break
        chain, ends = draw.choice(chains)
        target = draw.choice(list(ends))
        program = kind = draw.choice(ends[target])
        text = f"the {words(kind)}"
        for relation, wanted in chain:
            program = (*program, ("relate", relation), *wanted)
            text = f"the {words(wanted)} {SAID[relation]} {text}"
        program = (*program, ("unique",))
        found[program] = Expression(text, program, target, hops)
    return list(found.values())


def locate(program: Program, scene: FlatScene, *, relations: Relations = "beside") -> int:
    """Run a program that ends in ``unique``: the place of the one thing that it is about.

    Args:
        program: Its steps.
        scene: Of whose things they speak.
        relations: What left of is; see ``expressions2d``. ``next`` is the same for all.

    Raises:
        UserError: For an unknown step, or if a set that must hold one thing holds none or several.
    """
    chosen = list(range(len(scene.things)))
    for step in (*program, ("unique",)):
        match step:
            case ("filter", ("colour" | "shape") as name, value):
                chosen = [k for k in chosen if getattr(scene.things[k], name) == value]
            case ("relate", "next"):
                chosen = _neighbours(scene)[_only(chosen)]
            case ("relate", relation) if relation in WAYS:
                place = _only(chosen)
                chosen = [
                    k
                    for k, thing in enumerate(scene.things)
                    if k != place and relation in _ways(thing, scene.things[place], relations)
                ]
            case ("unique",):
                _only(chosen)
            case _:
                raise unknown("step", " ".join(step), ("filter colour", "filter shape", "relate", "unique"))
    return _only(chosen)


def _only(chosen: Sequence[int]) -> int:
    if len(chosen) != 1:
        raise UserError(f"the phrase is ambiguous: it must single one thing out, and fits {len(chosen)}")
    return chosen[0]


def _neighbours(scene: FlatScene) -> list[list[int]]:
    """What lies in the four cells next to each thing's own."""
    at = {cell: place for place, cell in enumerate(scene.cells)}
    around = ((-1, 0), (1, 0), (0, -1), (0, 1))
    return [[at[there] for dx, dy in around if (there := (x + dx, y + dy)) in at] for x, y in scene.cells]


def _ways(thing: FlatThing, anchor: FlatThing, relations: Relations) -> list[str]:
    """Where the thing is from the anchor."""
    x, y = thing.x - anchor.x, thing.y - anchor.y
    far = {"left": -x, "right": x, "above": -y, "below": y}
    if relations == "half-plane":
        return [relation for relation, way in far.items() if way > MARGIN]
    along, off = max(abs(x), abs(y)), min(abs(x), abs(y))
    if off > along / 2 or along >= 2 * (thing.radius + anchor.radius):
        return []
    return [relation for relation, way in far.items() if way == along]


Link = tuple[str, Program]
"""A relation, and what kind of thing stands in it."""
Ends = dict[int, list[Program]]
"""Where a chain can end, and the starts from which it does."""
Path = tuple[int, int, list[Program]]
"""The thing that a chain has reached, all that it has been at as bits, and the starts."""


def _walks(scene: FlatScene, hops: int) -> list[tuple[tuple[Link, ...], Ends]]:
    """All chains from neighbour to neighbour, from things that are the only ones of their colours."""
    colours, places = [thing.colour for thing in scene.things], range(len(scene.things))
    beside = _neighbours(scene)
    paths = [[place] for place in places if colours.count(colours[place]) == 1]
    for _ in range(hops):
        paths = [
            [*path, place]
            for path in paths
            for place in beside[path[-1]]
            if place not in path
            and colours.count(colours[place]) > 1
            and [colours[k] for k in beside[path[-1]]].count(colours[place]) == 1
        ]
    found: list[tuple[tuple[Link, ...], Ends]] = []
    for path in paths:
        near, fitting = {path[0]}, set(places)  # what is as many cells away, and what the colours alone would allow
        for place in path[1:]:
            near = {k for at in near for k in beside[at]}
            fitting = {k for at in fitting for k in beside[at] if colours[k] == colours[place]}
        if hops < 2 or len(near & fitting) > 1:
            kinds: list[Program] = [(("filter", "colour", colours[place]),) for place in path]
            found.append((tuple(("next", kind) for kind in kinds[1:]), {path[-1]: kinds[:1]}))
    return found


def _chains(scene: FlatScene, hops: int, relations: Relations) -> list[tuple[tuple[Link, ...], Ends]]:
    """All chains of links from starts that are the only ones of their kinds; of ``beside``, those of several ends."""
    things = list(enumerate(scene.things))
    kinds: dict[Program, int] = {}  # sets of things as bits
    related = dict.fromkeys(product(WAYS, range(len(things))), 0)
    for k, thing in things:
        colour, shape = ("filter", "colour", thing.colour), ("filter", "shape", thing.shape)
        said: tuple[Program, ...] = ((colour,), (shape,), (colour, shape))
        for kind in said:
            kinds[kind] = kinds.get(kind, 0) | 1 << k
    for (k, thing), (anchor, other) in permutations(things, 2):
        for relation in _ways(thing, other, relations):
            related[relation, anchor] |= 1 << k
    ends: Ends = {}
    for kind, bits in kinds.items():
        if bits.bit_count() == 1 and (len(kind) == 1 or bits.bit_length() - 1 not in ends):  # no word too many
            ends.setdefault(bits.bit_length() - 1, []).append(kind)
    several = [kind for kind, bits in kinds.items() if bits.bit_count() > 1]
    links, fewest = list(product(WAYS, several)), 2 if relations == "beside" else 1
    level: list[tuple[tuple[Link, ...], list[Path]]]
    level = [((), [(place, 1 << place, starts) for place, starts in ends.items()])]
    for _ in range(hops):
        level = [
            ((*chain, (relation, wanted)), longer)
            for chain, paths in level
            for relation, wanted in links
            if (longer := _follow(paths, related, relation, kinds[wanted], fewest))
        ]
    return [(chain, _ends(paths)) for chain, paths in level if paths]


def _follow(
    paths: list[Path], related: dict[tuple[str, int], int], relation: str, wanted: int, fewest: int
) -> list[Path]:
    """The paths that go on to one thing and not back, if they end at enough things."""
    longer = []
    for place, been, starts in paths:
        bits = related[relation, place] & wanted
        if bits.bit_count() == 1 and not bits & been:
            longer.append((bits.bit_length() - 1, been | bits, starts))
    return longer if len({place for place, _, _ in longer}) >= fewest else []


def _ends(paths: list[Path]) -> Ends:
    ends: Ends = {}
    for place, _, starts in paths:
        ends.setdefault(place, []).extend(starts)
    return ends
