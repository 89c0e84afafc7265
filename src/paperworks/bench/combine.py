"""How methods interact: the 2^k factorial of interventions on one claim's training."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import BaseModel
from rich.markup import escape
from rich.table import Table as RichTable

from paperworks.errors import UserError, unknown

from .check import Records
from .claim import Claim
from .expectations import t_interval
from .figures import CYCLE
from .measure import COMBINE
from .report import Cell, Grid, Part, Picture, figure_png, number, render, spread, write
from .results import assignments, changed_settings, file_name

Cells = dict[frozenset[str], NDArray[np.float64]]
"""Values of one metric, one a seed, under each subset of the methods."""


class Effect(BaseModel):
    """A main effect (one method) or an interaction (several), with its 95 % interval over seeds."""

    methods: list[str]
    estimate: float
    low: float | None
    high: float | None

    @property
    def name(self) -> str:
        """``logitclip × rmix``."""
        return " × ".join(self.methods)


class Combination(BaseModel):
    """All that a factorial found on one metric."""

    on: str
    methods: list[str]
    scale: str
    seeds: int
    metric: str
    settings: dict[str, Any]
    changed: dict[str, Any] = {}
    cells: dict[str, list[float]]
    effects: list[Effect]

    @property
    def stem(self) -> str:
        """Name of its files in ``results/combine/``."""
        stem = f"{self.on}--{'+'.join(self.methods)}-{self.scale}-{self.metric.replace('/', '-')}"
        return f"{stem}-{file_name(assignments(self.changed))}" if self.changed else stem

    @property
    def command(self) -> str:
        """The command line that measures it."""
        command = ["paperworks", "combine", *self.methods, "--on", self.on, "--scale", self.scale]
        command += ["--seeds", str(self.seeds), "--metric", self.metric]
        return shlex.join([*command, *(part for text in assignments(self.changed) for part in ("--set", text))])


def effects(methods: Sequence[str], cells: Cells) -> list[Effect]:
    r"""Main effects and interactions of a two-level factorial, from paired contrasts within each seed.

    The effect of a set $T$ of methods is

    $$\frac{2}{2^k} \sum_{S} \Big(\prod_{t \in T} \pm 1\Big)\, y_S ,$$

    with $+1$ where $t \in S$ and $-1$ otherwise: for one method, the mean with it minus the mean without it; for two,
    half the change in one's effect when the other is present.
    """
    found = []
    for size in range(1, len(methods) + 1):
        for term in combinations(methods, size):
            contrast = np.zeros_like(next(iter(cells.values())))
            for subset, values in cells.items():
                contrast = contrast + np.prod([1 if method in subset else -1 for method in term]) * values
            estimate, low, high = t_interval(2 * contrast / len(cells))
            finite = bool(np.isfinite(low))
            found.append(
                Effect(
                    methods=list(term),
                    estimate=estimate,
                    low=low if finite else None,
                    high=high if finite else None,
                )
            )
    return found


def combined(claim: Claim, methods: Sequence[str], records: Records, metric: str | None) -> Combination:
    """Analyse the records of a factorial; the metric is the first of the claim's expectations unless given."""
    rows = records.of(claim)
    metrics = list(rows[0]["metrics"])
    preferred = [e.metric for e in claim.expects if getattr(e, "metric", None) in metrics]  # type: ignore[attr-defined]
    chosen = metric or (preferred or metrics)[0]
    if chosen not in metrics:
        raise unknown("metric", chosen, metrics)
    cells: Cells = {}
    for present in product((False, True), repeat=len(methods)):
        subset = [method for method, there in zip(methods, present, strict=True) if there]
        arm = COMBINE + ("+".join(subset) or "none")
        values = sorted((row["seed"], row["metrics"][chosen]) for row in rows if row["arm"] == arm)
        cells[frozenset(subset)] = np.array([value for _, value in values])
    return Combination(
        on=claim.slug,
        methods=list(methods),
        scale=records.plan.scale,
        seeds=len(next(iter(cells.values()))),
        metric=chosen,
        settings=rows[0]["settings"],
        changed=changed_settings(claim, records.plan.scale, rows[0]["settings"]),
        cells={_label(methods, subset): values.tolist() for subset, values in cells.items()},
        effects=effects(methods, cells),
    )


def check_methods(methods: Sequence[str]) -> None:
    """Refuse a factorial that makes no sense.

    Raises:
        UserError: For fewer than two methods, a method named twice, or more than five.
    """
    if len(methods) < 2:
        raise UserError("combine needs at least two methods")
    if len(set(methods)) < len(methods):
        raise UserError("combine needs each method once")
    if len(methods) > 5:
        raise UserError(f"{len(methods)} methods make {2 ** len(methods)} trainings a seed; combine takes at most 5")


def figure(found: Combination) -> Figure:
    """Left: the mean of each cell. Right: effects with their intervals."""
    drawing = Figure(figsize=(9.5, 0.4 * max(len(found.cells), len(found.effects)) + 1.2), layout="constrained")
    left, right = drawing.subplots(1, 2)
    for level, values in enumerate(found.cells.values()):
        left.plot(values, [level] * len(values), "o", color=CYCLE[0], alpha=0.45, markersize=4)
        left.plot([float(np.mean(values))], [level], "|", color=CYCLE[0], markersize=16, markeredgewidth=2)
    left.set_yticks(range(len(found.cells)), list(found.cells), fontsize=8)
    left.set_title(f"{found.metric} on {found.on}", fontsize=9)
    for level, effect in enumerate(found.effects):
        colour = CYCLE[0] if len(effect.methods) == 1 else CYCLE[1]
        right.plot([effect.estimate], [level], "o", color=colour)
        if effect.low is not None and effect.high is not None:
            right.plot([effect.low, effect.high], [level, level], color=colour, linewidth=2)
    right.axvline(0, color="#5b6470", linewidth=1, linestyle="--")
    right.set_yticks(range(len(found.effects)), [effect.name for effect in found.effects], fontsize=8)
    right.set_title("effects and interactions, 95 % intervals", fontsize=9)
    for axes in (left, right):
        axes.invert_yaxis()
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    return drawing


def publish(found: Combination, results: Path) -> Path:
    """Write JSON, picture and page into ``results/combine/``; returns the page."""
    folder, stem = results / "combine", found.stem
    png = figure_png(figure(found))
    write(folder / f"{stem}.json", found.model_dump_json(indent=1).encode() + b"\n")
    write(folder / f"{stem}.png", png)
    cells = [[Cell(name), Cell(spread(values), number=True)] for name, values in found.cells.items()]
    rows = [
        [Cell(e.name), Cell(number(e.estimate, "difference"), number=True), Cell(interval(e), number=True)]
        for e in found.effects
    ]
    part = Part(
        slug="combine",
        heading=f"{' × '.join(found.methods)} on {found.on}",
        tables=[
            Grid(f"{found.metric} under each combination", ["methods", "mean ± sd"], cells),
            Grid("Effects", ["effect", "estimate", "95 % interval"], rows),
        ],
        figures=[Picture("combine", "Cells and effects", png)],
        command=found.command,
        footer="A main effect is the mean with a method minus the mean without it; an interaction is half the change "
        "in one's effect when the other is present.",
    )
    page = folder / f"{stem}.html"
    write(page, render("paperworks: combination", [part]).encode())
    return page


def read_all(results: Path) -> list[Combination]:
    """What ``results/combine/`` holds, in the order of the file names."""
    return [Combination.model_validate_json(path.read_bytes()) for path in sorted((results / "combine").glob("*.json"))]


def interval(effect: Effect) -> str:
    """The 95 % interval of an effect, as tables show it."""
    if effect.low is None or effect.high is None:
        return "−∞ … ∞"
    return f"{number(effect.low, 'difference')} … {number(effect.high, 'difference')}"


def effect_table(found: Combination) -> RichTable:
    """Effects for the terminal."""
    table = RichTable(box=None, header_style="bold", pad_edge=False)
    table.add_column(f"effect on {escape(found.metric)}")
    table.add_column("estimate", justify="right")
    table.add_column("95 % interval", justify="right")
    for effect in found.effects:
        table.add_row(escape(effect.name), number(effect.estimate, "difference"), interval(effect))
    return table


def cell_table(found: Combination) -> RichTable:
    """Cell means for the terminal."""
    table = RichTable(box=None, header_style="bold", pad_edge=False)
    table.add_column("methods")
    table.add_column(escape(found.metric), justify="right")
    for name, values in found.cells.items():
        table.add_row(escape(name), spread(values))
    return table


def _label(methods: Sequence[str], subset: frozenset[str]) -> str:
    return " + ".join(method for method in methods if method in subset) or "none"
