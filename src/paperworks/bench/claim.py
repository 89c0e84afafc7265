"""How a claim is written down: arms, expectations, and the function that measures one trial."""

from __future__ import annotations

import ast
import hashlib
import importlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_type_hints

from paperworks import __version__, catalog
from paperworks.catalog import SCALES
from paperworks.errors import MissingExtra, UserError, unknown
from paperworks.train import Intervention

from .expectations import Expectation
from .settings import Settings

if TYPE_CHECKING:
    from .run import Run

SEEDS: Mapping[str, int] = {"smoke": 1, "quick": 5, "full": 5}
"""Seeds 0, 1, … that a scale measures unless the claim says otherwise."""


@dataclass(frozen=True)
class Task:
    """What a claim's training offers to interventions from elsewhere."""

    num_classes: int
    input_shape: tuple[int, ...]
    train_size: int
    epochs: int
    seed: int = 0


class Host(Protocol):
    """Trains on the claim's data with whatever interventions it is given, and returns the metrics."""

    def __call__(
        self, run: Run, settings: Any, interventions: Callable[[Task], list[Intervention]]
    ) -> dict[str, float]: ...


Joins = Callable[[Task], Intervention]


@dataclass
class Claim:
    """A claim as its file defines it; made by the decorator ``claim``.

    Attributes:
        arms: What is compared at ``full``, baseline first.
        arms_at: Those of them that a scale measures.
    """

    slug: str
    arms: tuple[str, ...]
    arms_at: Mapping[str, tuple[str, ...]]
    expects: tuple[Expectation, ...]
    seeds: Mapping[str, int]
    settings: type[Settings]
    trial: Callable[[Run, str, Any], dict[str, float]]
    _host: Host | None = field(default=None, repr=False)
    _joins: Joins | None = field(default=None, repr=False)

    def host(self, function: Host) -> Host:
        """Decorator: lets ``combine … --on`` this claim train with other methods' interventions."""
        self._host = function
        return function

    def intervention(self, function: Joins) -> Joins:
        """Decorator: how this method joins another claim's training."""
        self._joins = function
        return function

    def check_host(self) -> None:
        """Raises ``UserError`` if this claim's training cannot take others in."""
        if self._host is None:
            raise UserError(f"{self.slug} has no training that others can join: choose another claim for --on")

    def check_joins(self) -> None:
        """Raises ``UserError`` if this method cannot join another's training."""
        if self._joins is None:
            raise UserError(f"{self.slug} is not an intervention in training, so it cannot be combined")

    def train(
        self, run: Run, settings: Settings, interventions: Callable[[Task], list[Intervention]]
    ) -> dict[str, float]:
        """Train on this claim's data with others' interventions."""
        self.check_host()
        assert self._host is not None
        return self._host(run, settings, interventions)

    def join(self, task: Task) -> Intervention:
        """This method's intervention for a task."""
        self.check_joins()
        assert self._joins is not None
        return self._joins(task)

    def choose(self, arms: Collection[str]) -> tuple[str, ...]:
        """Some of the arms, in the claim's order.

        Raises:
            UserError: For one that is not there.
        """
        for arm in arms:
            if arm not in self.arms:
                raise unknown("arm", arm, self.arms)
        return tuple(arm for arm in self.arms if arm in arms)

    def judged(self, arms: Collection[str]) -> list[Expectation]:
        """The expectations that can be judged by these arms: those that name no other."""
        return [expectation for expectation in self.expects if set(expectation.arms) <= set(arms)]

    @property
    def code(self) -> str:
        """Fingerprint of the code that measures; comments and docstrings do not count."""
        tree = ast.parse(Path(importlib.import_module(self.trial.__module__).__file__ or "").read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value = ast.Constant(None)  # a docstring
        return hashlib.sha256(f"{__version__} {ast.dump(tree)}".encode()).hexdigest()[:16]


def claim(
    slug: str,
    *,
    arms: Sequence[str] | Mapping[str, Sequence[str]],
    expects: Sequence[Expectation],
    seeds: Mapping[str, int] | None = None,
) -> Callable[[Callable[[Run, str, Any], dict[str, float]]], Claim]:
    """Declare the claim of a method; the decorated function measures one trial.

    Args:
        slug: The method's slug.
        arms: What is compared, baseline first; or, by scale, what each compares, of what ``full`` does.
        expects: What must hold of the arms. A scale judges those expectations all of whose arms it measures.
        seeds: How many seeds each scale measures; see ``SEEDS`` for those not given.

    Example:
        >>> @claim("logitclip", arms=["ce", "logitclip"], expects=[Gain("accuracy", "logitclip", over="ce")])
        ... def trial(run: Run, arm: str, settings: LogitClipSettings) -> dict[str, float]: ...
    """
    arms_at = arms if isinstance(arms, Mapping) else dict.fromkeys(SCALES, arms)
    if set(arms_at) != set(SCALES):
        raise UserError(f"arms must name the scales {', '.join(SCALES)}, got {', '.join(arms_at) or 'none'}")
    arms = arms_at["full"]
    for arm in arms:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9+._-]*", arm):
            raise UserError(f"arm {arm!r} must consist of letters, digits and + . _ -")
    if not expects:
        raise UserError(f"the claim of {slug} expects nothing")
    for expectation in expects:
        for arm in expectation.arms:
            if arm not in arms:
                raise unknown("arm", arm, arms)
    for scale, some in arms_at.items():
        if list(some) != [arm for arm in arms if arm in some]:
            raise UserError(f"arms of scale {scale} must be among full's and in their order, {', '.join(arms)}")
        if not any(set(expectation.arms) <= set(some) for expectation in expects):
            raise UserError(f"the claim of {slug} expects nothing of the arms of scale {scale}")

    def declare(function: Callable[[Run, str, Any], dict[str, float]]) -> Claim:
        settings = get_type_hints(function)["settings"]
        by_scale = {scale: tuple(some) for scale, some in arms_at.items()}
        return Claim(slug, tuple(arms), by_scale, tuple(expects), {**SEEDS, **(seeds or {})}, settings, function)

    return declare


def load_claim(slug: str) -> Claim:
    """The claim of a built method.

    Raises:
        UserError: If there is no such method, it is only planned, or it needs an extra that is missing.
    """
    card = catalog.find(slug)
    if not card.claim:
        raise UserError(f"{slug} is planned and not built yet: there is no claim to check")
    try:
        module = importlib.import_module(card.claim)
    except MissingExtra:
        raise
    except ModuleNotFoundError as error:
        if card.extra and not (error.name or "").startswith(card.claim.split(".")[0]):
            raise MissingExtra(error.name or "a package", card.extra, slug) from error
        raise
    for value in vars(module).values():
        if isinstance(value, Claim) and value.slug == slug:
            return value
    raise UserError(f"{card.claim} declares no claim for {slug}")
