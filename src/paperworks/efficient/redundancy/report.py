"""What the profiler found, as a table, a picture, a recommendation and a page."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from paperworks.errors import UserError

from .taxonomy import TAXONOMY

INPUT = "(input)"
"""The name under which the model's own input stands."""


class Row(NamedTuple):
    """One class of redundancy in one place.

    Attributes:
        layer: Name of the layer, or ``(input)``.
        kind: Class, R1 to R9.
        value: How redundant, from 0 to 1.
        cost: Predicted cost of the technique over the dense one.
        bytes: Size of all inputs seen here.
        macs: Multiply-accumulates of the layer on them.
        error: Relative error that sharing centroids makes in the layer's input (R2), or nothing.
    """

    layer: str
    kind: str
    value: float
    cost: float
    bytes: int
    macs: int
    error: float | None = None


class RedundancyReport:
    """What the profiler found.

    Attributes:
        model: The model's type.
        examples: How many were seen.
        rows: The findings.
    """

    def __init__(self, model: str, examples: int, rows: Sequence[Row]) -> None:
        self.model, self.examples, self.rows = model, examples, list(rows)

    def to_frame(self) -> pd.DataFrame:
        """One row a layer and class; see ``Row``, whose ``kind`` is the column ``class``."""
        table = pd.DataFrame(self.rows, columns=["layer", "class", "value", "cost", "bytes", "macs", "error"])
        table.insert(2, "name", [TAXONOMY[row.kind].name for row in self.rows])
        return table

    def recommend(self, min_gain: float = 1.2) -> pd.DataFrame:
        r"""Which techniques are worth trying, the most promising first.

        A technique of single layers is predicted to make a layer $1/c$ times as fast, with the cost $c$ of the row, and
        the model $1 / (1 - \sum_l w_l (1 - c_l))$ times, with the share $w_l$ of the multiply-accumulates, over the
        layers where $1/c$ is at least ``min_gain``. What accuracy it costs is for ``measure_tradeoff`` to say.

        Args:
            min_gain: Least gain worth the trouble, of a layer and of the model.

        Returns:
            One row a class: ``class``, ``name``, ``technique``, ``layers`` (names) and ``gain`` (of the model).

        Raises:
            UserError: If ``min_gain`` is below 1.
        """
        if not min_gain >= 1:
            raise UserError(f"min_gain must be at least 1, got {min_gain}")
        total = sum({row.layer: row.macs for row in self.rows}.values())
        found = []
        for kind in TAXONOMY.values():
            rows = [row for row in self.rows if row.kind == kind.id]
            if kind.scope == "report" or not rows:
                continue
            if kind.scope == "layer":
                rows = [row for row in rows if row.cost * min_gain <= 1]
                cost = 1 - sum(row.macs / total * (1 - row.cost) for row in rows) if total else 1.0
            else:  # one place, or all attention alike: the whole model has as many tokens fewer
                cost = float(np.mean([row.cost for row in rows]))
                rows = rows if cost * min_gain <= 1 else []
            gain = 1 / max(cost, 1e-3)
            if rows and gain >= min_gain:
                found.append((kind.id, kind.name, kind.technique, [row.layer for row in rows], gain))
        table = pd.DataFrame(found, columns=["class", "name", "technique", "layers", "gain"])
        return table.sort_values("gain", ascending=False, ignore_index=True)

    def plot(self) -> Figure:
        """A picture of all values: a row a layer, a column a class."""
        layers = list(dict.fromkeys(row.layer for row in self.rows))
        values = np.full((len(layers), len(TAXONOMY)), math.nan)
        for row in self.rows:
            values[layers.index(row.layer), list(TAXONOMY).index(row.kind)] = row.value
        figure = Figure(figsize=(9, 1.6 + 0.32 * len(layers)), layout="constrained")
        axes = figure.subplots()
        picture = axes.imshow(values, vmin=0, vmax=1, cmap="YlGnBu", aspect="auto")
        names = [f"{kind.id}\n{kind.name.replace(' ', chr(10), 1)}" for kind in TAXONOMY.values()]
        axes.set_xticks(range(len(TAXONOMY)), names, fontsize=7)
        axes.set_yticks(range(len(layers)), layers, fontsize=8)
        for (i, j), value in np.ndenumerate(values):
            if not math.isnan(value):
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="w" if value > 0.6 else "k")
        axes.set_title(f"Redundancy of {self.model} on {self.examples} examples", fontsize=10)
        figure.colorbar(picture, ax=axes, label="share that is redundant")
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Model, examples, rows and recommendation in plain types."""
        advice = self.recommend()
        return {
            "model": self.model,
            "examples": self.examples,
            "rows": [row._asdict() for row in self.rows],
            "recommended": advice.to_dict("records"),
        }

    def to_html(self) -> str:
        """A page that stands alone: recommendation, picture and table."""
        picture = io.BytesIO()
        self.plot().savefig(picture, format="png", dpi=110)
        image = base64.b64encode(picture.getvalue()).decode()
        advice = self.recommend()
        advice["layers"] = advice["layers"].map(", ".join)
        title = html.escape(f"Redundancy of {self.model} on {self.examples} examples")
        tables = [
            table.to_html(index=False, float_format="{:.3g}".format, na_rep="", border=0)
            for table in (advice, self.to_frame())
        ]
        return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1d2430}}
table{{border-collapse:collapse;margin:1rem 0}}
td,th{{padding:.25rem .7rem;text-align:left;border-bottom:1px solid #dde1e7}}
img{{max-width:100%}}</style>
<h1>{title}</h1>
<p>The classes are an operational taxonomy after Chen et al. 2023. Gains are predicted; <code>measure_tradeoff</code>
measures them, with the accuracy they cost.</p>
<h2>Worth trying</h2>{tables[0] if len(advice) else "<p>Nothing: no technique is predicted to gain a fifth.</p>"}
<h2>What was found</h2><img alt="{title}" src="data:image/png;base64,{image}">{tables[1]}</html>
"""

    def save(self, path: str | Path) -> None:
        """Write the page to ``*.html``, or everything as JSON to ``*.json``.

        Raises:
            UserError: If the path ends otherwise.
        """
        path = Path(path)
        if path.suffix not in (".html", ".json"):
            raise UserError(f"a report is written to .html or .json, got {path.name!r}")
        text = self.to_html() if path.suffix == ".html" else json.dumps(self.to_dict(), indent=1)
        path.write_text(text, "utf-8")
