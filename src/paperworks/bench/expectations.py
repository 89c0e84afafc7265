"""What a claim expects of its arms, and verdicts by t-intervals over seeds."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from paperworks.errors import UserError

Judgement = Literal["holds", "undecided", "fails"]
Unit = Literal["difference", "ratio", "value"]
Table = dict[str, dict[str, NDArray[np.float64]]]
"""Measured values ``table[arm][metric]``, one a seed, in the same order of seeds everywhere."""


def t_interval(values: Sequence[float] | NDArray[np.float64], level: float = 0.95) -> tuple[float, float, float]:
    r"""Mean and Student's t-interval $\bar x \pm t_{n-1} s / \sqrt n$; unbounded for fewer than two values."""
    x = np.asarray(values, dtype=float)
    mean = float(x.mean())
    if len(x) < 2:
        return mean, -math.inf, math.inf
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Verdict:
    """An expectation as measured: the estimate with its 95 % interval, beside the bar."""

    name: str
    verdict: Judgement
    estimate: float
    low: float
    high: float
    bar: float
    direction: Literal["at least", "at most"]
    unit: Unit


@dataclass(frozen=True, kw_only=True)
class Expectation(ABC):
    """A bar for one quantity of the measured table.

    The verdict is *holds* if the whole interval is past the bar, *fails* if it lies wholly short of it, else
    *undecided*. For a metric of which less is better, give ``at_most`` or swap the arms.
    """

    unit: ClassVar[Unit]
    default_bar: ClassVar[float | None] = None

    at_least: float | None = None
    at_most: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None:
            object.__setattr__(self, "at_least", self.default_bar)
        if (self.at_least is None) == (self.at_most is None):
            raise UserError(f"{type(self).__name__} needs at_least or at_most, and not both")

    @property
    @abstractmethod
    def label(self) -> str:
        """Names the quantity, e.g. ``accuracy: logitclip − ce``."""

    @property
    @abstractmethod
    def arms(self) -> tuple[str, ...]:
        """The arms it looks at."""

    @abstractmethod
    def estimate(self, table: Table) -> tuple[float, float, float]:
        """Estimate, lower and upper end of the interval."""

    def judge(self, table: Table) -> Verdict:
        """Hold the quantity against the bar."""
        estimate, low, high = self.estimate(table)
        label = self.name or self.label
        if self.at_least is not None:
            verdict: Judgement = "holds" if low >= self.at_least else "fails" if high < self.at_least else "undecided"
            return Verdict(label, verdict, estimate, low, high, self.at_least, "at least", self.unit)
        assert self.at_most is not None
        verdict = "holds" if high <= self.at_most else "fails" if low > self.at_most else "undecided"
        return Verdict(label, verdict, estimate, low, high, self.at_most, "at most", self.unit)


@dataclass(frozen=True)
class Gain(Expectation):
    """Paired difference ``arm − over`` over seeds, by default at least 0."""

    unit = "difference"
    default_bar = 0.0
    metric: str
    arm: str
    over: str = field(kw_only=True)

    @property
    def label(self) -> str:
        return f"{self.metric}: {self.arm} − {self.over}"

    @property
    def arms(self) -> tuple[str, ...]:
        return self.arm, self.over

    def estimate(self, table: Table) -> tuple[float, float, float]:
        return t_interval(_column(table, self.arm, self.metric) - _column(table, self.over, self.metric))


@dataclass(frozen=True)
class Ratio(Expectation):
    """Paired ratio ``arm / over`` over seeds, by default at least 1. The interval is that of the logarithm."""

    unit = "ratio"
    default_bar = 1.0
    metric: str
    arm: str
    over: str = field(kw_only=True)

    @property
    def label(self) -> str:
        return f"{self.metric}: {self.arm} / {self.over}"

    @property
    def arms(self) -> tuple[str, ...]:
        return self.arm, self.over

    def estimate(self, table: Table) -> tuple[float, float, float]:
        above, below = (_column(table, arm, self.metric) for arm in self.arms)
        if not ((above > 0).all() and (below > 0).all()):
            raise UserError(f"{self.label}: a ratio needs positive values")
        with np.errstate(over="ignore"):
            estimate, low, high = np.exp(t_interval(np.log(above / below)))
        return float(estimate), float(low), float(high)


@dataclass(frozen=True)
class Bound(Expectation):
    """One arm's metric against a figure."""

    unit = "value"
    metric: str
    arm: str

    @property
    def label(self) -> str:
        return f"{self.metric}: {self.arm}"

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.arm,)

    def estimate(self, table: Table) -> tuple[float, float, float]:
        return t_interval(_column(table, self.arm, self.metric))


def Close(metric: str, arm: str, *, to: str, within: float, name: str = "") -> Gain:  # noqa: N802
    """No worse than another arm by more than a margin: ``arm − to ≥ −within``."""
    if within < 0:
        raise UserError(f"within must not be negative, got {within}")
    return Gain(metric, arm, over=to, at_least=-within, name=name)


def _column(table: Table, arm: str, metric: str) -> NDArray[np.float64]:
    if metric not in table[arm]:
        raise UserError(f"the claim expects the metric {metric!r}, but arm {arm!r} gave {', '.join(table[arm])}")
    return table[arm][metric]


def overall(verdicts: Sequence[Verdict]) -> Judgement | None:
    """A claim *holds* if all of it does and *fails* if any part does; of nothing there is no verdict."""
    seen = {verdict.verdict for verdict in verdicts}
    if not seen:
        return None
    return "fails" if "fails" in seen else "undecided" if "undecided" in seen else "holds"
