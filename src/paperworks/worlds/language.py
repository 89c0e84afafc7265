"""Sentences about scenes with their programs: referring expressions of any number of hops, and statements.

A program is a chain of steps on sets of things, as in CLEVR: it starts with everything, ``filter`` keeps those with a
value, ``relate`` goes to those that stand in a relation to the one thing of a set, ``unique`` demands that there be
one, ``count`` and ``exist`` end a statement. Left, right, before and behind are those of the camera.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from paperworks.errors import UserError, unknown
from paperworks.worlds.scene import Camera, Scene, Thing

Step = tuple[str, ...]
Program = tuple[Step, ...]

ATTRIBUTES: dict[str, Callable[[Thing], str]] = {
    "material": lambda thing: thing.material,
    "colour": lambda thing: thing.colour,
    "shape": lambda thing: thing.shape,
}
"""In the order of words in a sentence."""
RELATIONS = {"left": "left of", "right": "right of", "before": "in front of", "behind": "behind"}
MARGIN = 0.25
"""Metres by which a thing is left of another before sentences say so."""
TRIES = 400
_PLURALS = {"box": "boxes", "torus": "tori"}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Expression:
    """A phrase that is true of one thing alone.

    Attributes:
        text: In words.
        program: Its steps.
        target: Place of the thing.
        hops: How many other things it goes by.
    """

    text: str
    program: Program
    target: int
    hops: int


@dataclass(frozen=True)
class Statement:
    """A sentence that is true or false of a scene."""

    text: str
    program: Program
    truth: bool


def execute(program: Program, scene: Scene, camera: Camera | None = None) -> list[int] | bool:
    """Run a program: the places of the things that are left, or the truth of a statement.

    Raises:
        UserError: For an unknown step, or if ``unique`` finds none or several.
    """
    return _run(program, scene, _relations(scene, camera or scene.cameras[0]))


def refer(
    scene: Scene, *, hops: int = 0, count: int = 1, seed: int = 0, camera: Camera | None = None
) -> list[Expression]:
    """Draw referring expressions, no two alike.

    A hop is needed: without it, what is said of the thing would be true of others as well.

    Args:
        scene: Of whose things they speak.
        hops: Other things that they go by: 0 for "the red box", 1 for "the box behind the green cone".
        count: How many, at most; fewer if the scene has no more that are found.
        seed: Decides which.
        camera: Whose left and right; the scene's first by default.
    """
    if hops < 0 or count < 1:
        raise UserError(f"hops must be at least 0 and count at least 1, got {hops} and {count}")
    draw, relations = np.random.default_rng(seed), _relations(scene, camera or scene.cameras[0])
    found: dict[Program, Expression] = {}
    for _ in range(TRIES if scene.things else 0):
        if len(found) == count:
            break
        expression = _expression(scene, relations, hops, draw)
        if expression:
            found[expression.program] = expression
    return list(found.values())


def state(scene: Scene, *, count: int = 1, seed: int = 0, camera: Camera | None = None) -> list[Statement]:
    """Draw statements, no two alike, as near to half of them true as is found: that there are so many of a kind, or
    that one stands somewhere from another."""
    draw, relations = np.random.default_rng(seed), _relations(scene, camera or scene.cameras[0])
    found: dict[Program, Statement] = {}
    for _ in range(TRIES):
        if len(found) == count:
            break
        made = _relation(scene, draw) if scene.things and draw.uniform() < 0.5 else _count(scene, draw)
        if made is None:
            continue
        text, program = made
        truth = _run(program, scene, relations)
        assert isinstance(truth, bool)
        so_far = Counter(statement.truth for statement in found.values())
        if so_far[truth] < (count + 1) // 2:
            found[program] = Statement(text, program, truth)
    return list(found.values())


def _relations(scene: Scene, camera: Camera) -> dict[str, Tensor]:
    """For each relation, whether the row's thing stands in it to the column's: ``[n, n]``."""
    centres = torch.tensor([thing.position for thing in scene.things]).view(-1, 3)
    local = (centres - torch.tensor(camera.position)) @ camera.rotation
    across, away = (local[:, None, axis] - local[None, :, axis] for axis in (0, 2))
    return {
        "left": across < -MARGIN,
        "right": across > MARGIN,
        "before": away < -MARGIN,
        "behind": away > MARGIN,
    }


def _run(program: Program, scene: Scene, relations: dict[str, Tensor]) -> list[int] | bool:
    chosen = list(range(len(scene.things)))
    for step in program:
        match step:
            case ("filter", attribute, value) if attribute in ATTRIBUTES:
                chosen = [k for k in chosen if ATTRIBUTES[attribute](scene.things[k]) == value]
            case ("relate", relation) if relation in RELATIONS:
                (anchor,) = chosen
                chosen = relations[relation][:, anchor].nonzero()[:, 0].tolist()
            case ("unique",):
                if len(chosen) != 1:
                    raise UserError(f"unique needs one thing, and there are {len(chosen)}")
            case ("count", number):
                return len(chosen) == int(number)
            case ("exist",):
                return bool(chosen)
            case _:
                raise unknown("step", " ".join(step), ("filter", "relate", "unique", "count", "exist"))
    return chosen


def _expression(scene: Scene, relations: dict[str, Tensor], hops: int, draw: np.random.Generator) -> Expression | None:
    """One that says no more than it needs, or nothing if this draw leads nowhere."""
    if not hops:
        target = int(draw.integers(len(scene.things)))
        for kind in _kinds(scene.things[target], draw):
            if _run(kind, scene, relations) == [target]:
                return Expression(f"the {words(kind)}", (*kind, ("unique",)), target, 0)
        return None
    anchor = _expression(scene, relations, hops - 1, draw)
    if anchor is None:
        return None
    relation = str(draw.choice(list(RELATIONS)))
    near = relations[relation][:, anchor.target].nonzero()[:, 0].tolist()
    if not near:
        return None
    target = int(draw.choice(near))
    for kind in _kinds(scene.things[target], draw):
        program: Program = (*anchor.program, ("relate", relation), *kind)
        if _run(program, scene, relations) == [target] and _run(kind, scene, relations) != [target]:
            that = " that is" if hops > 1 else ""
            text = f"the {words(kind)}{that} {RELATIONS[relation]} {anchor.text}"
            return Expression(text, (*program, ("unique",)), target, hops)
    return None


def _kinds(thing: Thing, draw: np.random.Generator) -> Iterator[Program]:
    """Descriptions of a thing by ever more of its attributes, in random order among equally many."""
    for size in range(1, len(ATTRIBUTES) + 1):
        for names in draw.permutation(list(combinations(ATTRIBUTES, size))).tolist():
            yield tuple(("filter", name, ATTRIBUTES[name](thing)) for name in names)


def words(kind: Sequence[Step]) -> str:
    """Filters as a phrase: ``metal red box``, or ``red thing`` where the shape is left open."""
    values = [value for name, _, value in kind if name == "filter"]
    return " ".join([*values] if any(step[1] == "shape" for step in kind) else [*values, "thing"])


def _count(scene: Scene, draw: np.random.Generator) -> tuple[str, Program]:
    """That there are so many of the kind of some thing, or one more or one less."""
    if not scene.things:
        return "there are no things", (("count", "0"),)
    thing = scene.things[int(draw.integers(len(scene.things)))]
    kinds = list(_kinds(thing, draw))
    kind = kinds[int(draw.integers(len(kinds)))]
    number = sum(all(ATTRIBUTES[name](other) == value for _, name, value in kind) for other in scene.things)
    number = max(0, number + int(draw.choice([0, 0, 1, -1])))
    said = _NUMBERS[number] if number < len(_NUMBERS) else str(number)
    is_are = "is" if number == 1 else "are"
    noun = words(kind)
    if number != 1:
        head, _, last = noun.rpartition(" ")
        noun = f"{head} {_PLURALS.get(last, f'{last}s')}".strip()
    return f"there {is_are} {said} {noun}", (*kind, ("count", str(number)))


def _relation(scene: Scene, draw: np.random.Generator) -> tuple[str, Program] | None:
    """That something of a kind stands somewhere from a thing that is named without ambiguity."""
    anchor = _expression(scene, {}, 0, draw)
    if anchor is None:
        return None
    thing = scene.things[int(draw.integers(len(scene.things)))]
    kinds = list(_kinds(thing, draw))
    kind, relation = kinds[int(draw.integers(len(kinds)))], str(draw.choice(list(RELATIONS)))
    text = words(kind)
    article = "an" if text[0] in "aeiou" else "a"
    program = (*anchor.program, ("relate", relation), *kind, ("exist",))
    return f"there is {article} {text} {RELATIONS[relation]} {anchor.text}", program
