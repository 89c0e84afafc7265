"""Pictures of results: expectations against their bars, metrics by arm, curves with bands over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .results import Found

COLOURS = {"holds": "#2a9d5c", "undecided": "#c98a00", "fails": "#c8414b"}
CYCLE = (
    "#3465c0",
    "#d9772b",
    "#2a9d5c",
    "#b04fb8",
    "#c8414b",
    "#5b6470",
    "#00a0a8",
    "#9a8400",
    "#7a5230",
    "#e07ba0",
)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def forest(expectations: Sequence[Found]) -> Figure:
    """Each expectation's estimate and 95 % interval beside its bar, on an axis of its own."""
    figure = Figure(figsize=(7.5, 0.85 * len(expectations) + 0.3), layout="constrained")
    panels = figure.subplots(len(expectations), 1, squeeze=False)[:, 0]
    for axes, found in zip(panels, expectations, strict=True):
        ends = [end for end in (found.low, found.high) if math.isfinite(end)]
        points = [found.estimate, found.bar, *ends] + ([0.0] if found.unit == "difference" else [])
        margin = 0.12 * ((max(points) - min(points)) or abs(found.estimate) or 1.0)
        left, right = min(points) - margin, max(points) + margin
        shade = (found.bar, right) if found.direction == "at least" else (left, found.bar)
        axes.axvspan(*shade, color="#2a9d5c", alpha=0.08, linewidth=0)
        axes.axvline(found.bar, color="#5b6470", linestyle="--", linewidth=1)
        colour = COLOURS[found.verdict]
        axes.plot([max(found.low, left), min(found.high, right)], [0, 0], color=colour, linewidth=2.5)
        axes.plot([found.estimate], [0], "o", color=colour)
        axes.set_xlim(left, right)
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_title(f"{found.name}  ({found.direction} {found.bar:g}): {found.verdict}", fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
    return figure


def metrics(arms: dict[str, dict[str, list[float]]], names: Sequence[str]) -> Figure:
    """One panel a metric: a dot a seed, a line at the mean, arm by arm."""
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    height = 0.32 * len(arms) + 0.7
    figure = Figure(figsize=(3.6 * columns, height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    order = list(arms)[::-1]
    for axes, name in zip(panels, names, strict=False):
        for level, arm in enumerate(order):
            if name not in arms[arm]:
                continue
            values = arms[arm][name]
            colour = CYCLE[list(arms).index(arm) % len(CYCLE)]
            axes.plot(values, [level] * len(values), "o", color=colour, alpha=0.55, markersize=4)
            axes.plot([float(np.mean(values))], [level], "|", color=colour, markersize=16, markeredgewidth=2)
        axes.set_title(name, fontsize=9)
        axes.set_yticks(range(len(order)), order, fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        _plain(axes)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    return figure


def curves(records: Sequence[dict[str, Any]]) -> Figure | None:
    """Logged curves: the mean over seeds of each arm with a band of one standard deviation."""
    names = sorted({name for record in records for name in record["curves"]})
    if not names:
        return None
    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.6 * columns, 2.7 * rows + 0.4), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    arms = list(dict.fromkeys(record["arm"] for record in records))
    for axes, name in zip(panels, names, strict=False):
        for index, arm in enumerate(arms):
            runs = [np.array(r["curves"][name]) for r in records if r["arm"] == arm and name in r["curves"]]
            if not runs:
                continue
            length = min(len(run) for run in runs)
            steps, values = runs[0][:length, 0], np.stack([run[:length, 1] for run in runs])
            colour = CYCLE[index % len(CYCLE)]
            mean, spread = values.mean(0), values.std(0)
            axes.plot(steps, mean, color=colour, label=arm, linewidth=1.5)
            axes.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=8)
        _plain(axes)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    for axes in figure.axes[1:]:
        more = [pair for pair in zip(*axes.get_legend_handles_labels(), strict=True) if pair[1] not in labels]
        handles += [handle for handle, _ in more]
        labels += [label for _, label in more]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), fontsize=8, frameon=False)
    return figure
