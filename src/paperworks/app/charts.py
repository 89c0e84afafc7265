"""Where the marks of a chart stand, in percent of its width and height; the templates draw them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from paperworks.bench.combine import Combination
from paperworks.bench.expectations import t_interval
from paperworks.bench.report import bar, interval, number, spread
from paperworks.bench.results import Found

from .runs import Points, mean_curve

MOST_POINTS = 160
SEPARATOR = " · "  # between an arm and the letter of its run, where runs are compared


@dataclass(frozen=True)
class Interval:
    """A row of a forest: estimate and interval beside the bar. ``good`` is the side where the claim holds."""

    name: str
    verdict: str
    estimate: str
    interval: str
    bar: str
    at: float
    low: float
    high: float
    bar_at: float
    good: tuple[float, float]
    zero_at: float | None = None


def forest(expectations: Sequence[Found], *, shared: bool = False) -> list[Interval]:
    """Each expectation on an axis of its own, on which interval and bar fit, or all on one that is ``shared``."""
    rows = []
    for found in expectations:
        place = _axis([end for one in (expectations if shared else [found]) for end in _ends(one)])
        at_bar = place(found.bar)
        rows.append(
            Interval(
                name=found.name,
                verdict=found.verdict,
                estimate=number(found.estimate, found.unit),
                interval=interval(found),
                bar=bar(found),
                at=place(found.estimate),
                low=place(found.low),
                high=place(found.high),
                bar_at=at_bar,
                good=(at_bar, 100.0) if found.direction == "at least" else (0.0, at_bar),
                zero_at=place(0.0) if found.unit == "difference" else None,
            )
        )
    return rows


def effects(found: Combination) -> list[Interval]:
    """Main effects and interactions, all on one axis around zero."""
    ends = [end for e in found.effects for end in (e.low, e.estimate, e.high) if end is not None]
    place = _axis([0.0, *ends])
    rows = []
    for effect in found.effects:
        low = -math.inf if effect.low is None else effect.low
        high = math.inf if effect.high is None else effect.high
        verdict = "clear" if low > 0 or high < 0 else "open"
        between = f"{number(low, 'difference')} … {number(high, 'difference')}"
        rows.append(
            Interval(
                name=effect.name,
                verdict=verdict,
                estimate=number(effect.estimate, "difference"),
                interval=between,
                bar="",
                at=place(effect.estimate),
                low=place(low),
                high=place(high),
                bar_at=place(0.0),
                good=(0.0, 0.0),
            )
        )
    return rows


def advantages(findings: Sequence[Mapping[str, Any]], bar_at: float) -> list[Interval]:
    """What each cue gains over chance, all on one axis, beside what counts as solvable; those without a probe last."""
    measured = [found for found in findings if found["advantage"] is not None]
    place = _axis([0.0, bar_at, *(found[end] for found in measured for end in ("low", "advantage", "high"))])
    rows = []
    for found in measured:
        rows.append(
            Interval(
                name=found["cue"],
                verdict="biased" if found["biased"] else "open",
                estimate=number(found["advantage"], "difference"),
                interval=f"{number(found['low'], 'difference')} … {number(found['high'], 'difference')}",
                bar="",
                at=place(found["advantage"]),
                low=place(found["low"]),
                high=place(found["high"]),
                bar_at=place(bar_at),
                good=(0.0, 0.0),
                zero_at=place(0.0),
            )
        )
    return rows


@dataclass(frozen=True)
class Strip:
    """The values of one arm for one metric: a dot a seed, a stroke at the mean."""

    text: str
    dots: tuple[float, ...]
    mean: float


def strips(arms: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, Strip]]:
    """``[arm][metric]``; a metric has the same axis for every arm."""
    found: dict[str, dict[str, Strip]] = {arm: {} for arm in arms}
    for name in metric_names(arms):
        place = _axis([value for values in arms.values() for value in values.get(name, ())])
        for arm, metrics in arms.items():
            if values := metrics.get(name):
                mean, _, _ = t_interval(values)
                dots = tuple(place(value) for value in values)
                found[arm][name] = Strip(spread(values), dots, place(mean))
    return found


def metric_names(arms: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """The metrics of all arms, in their order."""
    return list(dict.fromkeys(name for metrics in arms.values() for name in metrics))


@dataclass(frozen=True)
class Line:
    """One arm's curve; ``band`` is its standard deviation over seeds, ``dash`` tells compared runs apart."""

    label: str
    colour: int
    dash: int
    points: str
    band: str
    last: str


@dataclass(frozen=True)
class Panel:
    """One quantity over the steps."""

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def panels(curves: Mapping[str, Mapping[str, Sequence[Points]]], order: Sequence[str]) -> list[Panel]:
    """A panel a curve; arms keep their colours, which follow ``order``."""
    return [
        panel(title, {arm: mean_curve(runs) for arm, runs in by_arm.items()}, order)
        for title, by_arm in curves.items()
        if any(by_arm.values())
    ]


def panel(title: str, curves: Mapping[str, Sequence[tuple[float, float, float]]], order: Sequence[str]) -> Panel:
    """One panel of curves given as step, mean and standard deviation."""
    curves = {label: curve for label, curve in curves.items() if curve}
    steps = [step for curve in curves.values() for step, _, _ in curve]
    heights = [mean + sign * sd for curve in curves.values() for _, mean, sd in curve for sign in (-1, 1)]
    x_ticks, across = _ticks(min(steps), max(steps), tight=True, whole=all(step == int(step) for step in steps))
    y_ticks, up = _ticks(min(heights), max(heights))
    lines = []
    for label in sorted(curves, key=lambda label: (_place(label, order), label)):
        curve = _thinned(curves[label])
        upper = [f"{across(step):.2f},{100 - up(mean + sd):.2f}" for step, mean, sd in curve]
        lower = [f"{across(step):.2f},{100 - up(mean - sd):.2f}" for step, mean, sd in curve]
        lines.append(
            Line(
                label=label,
                colour=colour(label, order),
                dash=max(0, ord(label[-1]) - ord("A")) % 4 if SEPARATOR in label else 0,
                points=" ".join(f"{across(step):.2f},{100 - up(mean):.2f}" for step, mean, _ in curve),
                band=" ".join([*upper, *reversed(lower)]),
                last=number(curve[-1][1]),
            )
        )
    return Panel(title, tuple(lines), x_ticks, y_ticks)


@dataclass(frozen=True)
class Interaction:
    """How two methods meet: the metric without and with the first, a line for the second's absence and presence."""

    first: str
    second: str
    without: tuple[float, float]
    present: tuple[float, float]
    spread: tuple[tuple[float, float], ...]
    y_ticks: tuple[tuple[float, str], ...]


def interactions(found: Combination) -> list[Interaction]:
    """One picture a pair of methods; with more than two methods, means over the others."""
    pictures = []
    for first, second in combinations(found.methods, 2):
        cells: dict[tuple[bool, bool], list[float]] = {}
        for label, values in found.cells.items():
            there = label.split(" + ")
            cells.setdefault((first in there, second in there), []).extend(values)
        means = {key: t_interval(values) for key, values in cells.items()}
        ends = [end for mean in means.values() for end in mean if math.isfinite(end)]
        ticks, up = _ticks(min(ends), max(ends))
        height = {key: 100 - up(mean) for key, (mean, _, _) in means.items()}
        corners = [(False, False), (True, False), (False, True), (True, True)]
        pictures.append(
            Interaction(
                first,
                second,
                without=(height[False, False], height[True, False]),
                present=(height[False, True], height[True, True]),
                spread=tuple(
                    (100 - up(low), 100 - up(high)) if math.isfinite(low) else (height[key], height[key])
                    for key in corners
                    for _, low, high in [means[key]]
                ),
                y_ticks=ticks,
            )
        )
    return pictures


def colour(label: str, order: Sequence[str]) -> int:
    """Number of a colour of the style sheet: the arm's place, the same for all compared runs."""
    return _place(label, order) % 10


def _place(label: str, order: Sequence[str]) -> int:
    arm = label.split(SEPARATOR)[0]
    return order.index(arm) if arm in order else len(order)


def _ends(found: Found) -> list[float]:
    ends = [end for end in (found.low, found.high) if math.isfinite(end)]
    return [found.estimate, found.bar, *ends] + ([0.0] if found.unit == "difference" else [])


class _Axis:
    def __init__(self, low: float, high: float) -> None:
        self.low, self.width = low, (high - low) or 1.0

    def __call__(self, value: float) -> float:
        return round(min(max(100 * (value - self.low) / self.width, 0.0), 100.0), 2)


def _axis(values: Sequence[float]) -> _Axis:
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.08 * ((high - low) or abs(low) or 1.0)
    return _Axis(low - margin, high + margin)


def _ticks(
    low: float, high: float, *, tight: bool = False, whole: bool = False
) -> tuple[tuple[tuple[float, str], ...], _Axis]:
    """Some round values in the range with their places, and the axis."""
    span = (high - low) or abs(low) or 1.0
    axis = _Axis(low, low + span) if tight else _Axis(low - 0.06 * span, high + 0.06 * span)
    size = 10.0 ** math.floor(math.log10(axis.width / 3))
    step = next(size * factor for factor in (1, 2, 5, 10) if axis.width / (size * factor) <= 4)
    step = max(step, 1.0) if whole else step
    first = math.ceil(axis.low / step - 1e-9)
    last = math.floor((axis.low + axis.width) / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    values = [(index * step) for index in range(first, last + 1)]
    return tuple((axis(value), f"{value + 0.0:.{digits}f}".replace("-", "−")) for value in values), axis


def _thinned(curve: Sequence[tuple[float, float, float]]) -> Sequence[tuple[float, float, float]]:
    stride = math.ceil(len(curve) / MOST_POINTS)
    return [*curve[:-1:stride], curve[-1]]
