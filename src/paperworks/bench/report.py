"""Reports: a page that stands alone, pictures and JSON in ``results/``, tables for terminal and README."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table as RichTable

from paperworks.catalog import SCALES, Card, catalog
from paperworks.errors import UserError
from paperworks.files import write_whole

from . import figures
from .check import Records
from .claim import Claim
from .expectations import Judgement
from .results import Found, Summary, assignments, largest, summarise
from .settings import Settings

COLOURS = {"holds": "green", "undecided": "yellow", "fails": "red"}


@dataclass(frozen=True)
class Cell:
    """A cell of an HTML table; its text is escaped by the template."""

    text: str
    number: bool = False
    verdict: bool = False


@dataclass(frozen=True)
class Grid:
    """A titled HTML table."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    remark: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG with its caption."""

    name: str
    caption: str
    png: bytes

    @property
    def data(self) -> str:
        """Base64, for an inline image."""
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Part:
    """One section of a page."""

    slug: str
    command: str
    footer: str
    heading: str = ""
    card: Card | None = None
    sentence: str = ""
    verdict: Judgement | None = None
    tables: Sequence[Grid] = ()
    figures: Sequence[Picture] = ()
    settings: Sequence[Grid] = ()
    notes: Sequence[str] = ()


def figure_png(figure: Figure) -> bytes:
    """A figure as PNG bytes, the same for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def render(title: str, parts: Sequence[Part], digest: str = "") -> str:
    """A page that stands alone: no script, no request, everything that was named by people shown as text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string(files("paperworks.bench").joinpath("report.html").read_text("utf-8"))
    return template.render(title=title, parts=parts, digest=digest)


def publish(claim: Claim, records: Records, results: Path) -> tuple[Summary, Path]:
    """Judge a claim and write its JSON, pictures and page into ``results/<slug>/``, those of chosen arms into a folder
    of their own in it; nothing is drawn twice.

    Returns:
        The summary and the path of the page.
    """
    rows = records.of(claim)
    scale = records.plan.scale
    summary = summarise(claim, scale, rows)
    page = summary.folder(results) / f"{scale}.html"
    if _digest_of(page) == summary.digest and (published := summary.published(results)):
        return published, page
    pictures = _pictures(summary, rows, records)
    write(summary.path(results), summary.model_dump_json(indent=1).encode() + b"\n")
    for old in page.parent.glob(f"{scale}-*.png"):
        old.unlink(missing_ok=True)
    for picture in pictures:
        write(page.parent / f"{scale}-{picture.name}.png", picture.png)
    title = f"paperworks: {claim.slug} at scale {scale}"
    write(page, render(title, [claim_part(summary, pictures)], summary.digest).encode())
    return summary, page


def claim_part(summary: Summary, pictures: Sequence[Picture]) -> Part:
    """The section of one claim."""
    card = catalog().get(summary.slug)
    notes = card.claim_text.split("\n\n")[1:] if card else []
    settings = [[Cell(name), Cell(str(value))] for name, value in summary.settings.items()]
    versions = ", ".join(f"{name} {version}" for name, version in summary.versions.items())
    machine = summary.machine.get("gpu") or f"{summary.machine.get('processor')}, {summary.machine.get('cores')} cores"
    command = ["paperworks", "check", summary.slug, "--scale", summary.scale, "--seeds", str(summary.seeds)]
    command += ["--arms", ",".join(summary.chosen)] if summary.chosen else []
    for assignment in assignments(summary.changed):
        command += ["--set", assignment]
    return Part(
        slug=summary.slug,
        card=card,
        heading=summary.slug,
        sentence=card.claim_sentence if card else "",
        verdict=summary.verdict,
        tables=[
            Grid(
                "Expectations",
                ["what", "bar", "estimate", "95 % interval", "verdict"],
                _verdict_rows(summary),
                f"Not judged: {summary.left_out}." if summary.left_out else "",
            ),
            Grid("Arms: mean ± standard deviation over seeds", *_arm_rows(summary)),
        ],
        settings=[Grid("Settings", ["setting", "value"], settings)],
        figures=pictures,
        notes=[" ".join(note.split()) for note in notes],
        command=shlex.join(command),
        footer=f"{summary.cpu_seconds:g} CPU-seconds on {machine}. {versions}. Measured {summary.measured}.",
    )


def _pictures(summary: Summary, rows: Sequence[dict[str, Any]], records: Records) -> list[Picture]:
    names = list(dict.fromkeys(name for metrics in summary.arms.values() for name in metrics))
    drawn = []
    if summary.expectations:
        drawing = figures.forest(summary.expectations)
        drawn.append(
            Picture("expectations", "Expectations with 95 % intervals, beside their bars", figure_png(drawing))
        )
    drawing = figures.metrics(summary.arms, names)
    drawn.append(Picture("metrics", "Metrics by arm: a dot a seed, a stroke at the mean", figure_png(drawing)))
    if (curves := figures.curves(rows)) is not None:
        drawn.append(Picture("curves", "Curves: mean and standard deviation over seeds", figure_png(curves)))
    for record in rows:
        for name in record["artefacts"]:
            if name.endswith(".png"):
                stem = f"{record['arm']}-{name.removesuffix('.png')}-seed{record['seed']}"
                caption = f"{name.removesuffix('.png').replace('-', ' ')} ({record['arm']}, seed {record['seed']})"
                drawn.append(Picture(stem, caption, records.artefact(record, name)))
    return drawn


def stored_pictures(summary: Summary, results: Path) -> list[Picture]:
    """The pictures that ``publish`` left beside a summary."""
    order = ("expectations", "metrics", "curves")
    found = []
    for path in sorted(summary.folder(results).glob(f"{summary.scale}-*.png")):
        name = path.stem.removeprefix(f"{summary.scale}-")
        found.append(Picture(name, name.replace("-", " "), path.read_bytes()))
    return sorted(found, key=lambda p: (order.index(p.name) if p.name in order else len(order), p.name))


def write(path: Path, content: bytes) -> None:
    """Write a file of ``results/`` whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _digest_of(page: Path) -> str | None:
    try:
        head = page.read_text("utf-8")[:600]
    except OSError:
        return None
    match = re.search(r'<meta name="digest" content="([^"]*)">', head)
    return match.group(1) if match else None


# Numbers as people read them.


def number(value: float, unit: str = "value") -> str:
    """Three significant digits; differences with their sign."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:+.3g}" if unit == "difference" else f"{value:.3g}"
    return text.replace("-", "−")


def interval(found: Found) -> str:
    """``+0.031 … +0.052``."""
    return f"{number(found.low, found.unit)} … {number(found.high, found.unit)}"


def bar(found: Found) -> str:
    """``at least +0.02``."""
    return f"{found.direction} {number(found.bar, found.unit)}"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds."""
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
    return f"{mean:.3g} ± {deviation:.2g}".replace("-", "−")


def _verdict_rows(summary: Summary) -> list[list[Cell]]:
    return [
        [
            Cell(found.name),
            Cell(bar(found), number=True),
            Cell(number(found.estimate, found.unit), number=True),
            Cell(interval(found), number=True),
            Cell(found.verdict, verdict=True),
        ]
        for found in summary.expectations
    ]


def _arm_rows(summary: Summary) -> tuple[list[str], list[list[Cell]]]:
    names = list(dict.fromkeys(name for metrics in summary.arms.values() for name in metrics))
    rows = [
        [Cell(arm), *(Cell(spread(values[name]) if name in values else "–", number=True) for name in names)]
        for arm, values in summary.arms.items()
    ]
    return ["arm", *names], rows


def verdict_table(summaries: Iterable[Summary]) -> RichTable:
    """Verdicts for the terminal."""
    table = RichTable(box=None, header_style="bold", pad_edge=False)
    for header in ("claim", "expectation", "bar", "estimate", "95 % interval", "verdict"):
        right = header in ("bar", "estimate", "95 % interval")
        table.add_column(header, justify="right" if right else "left", overflow="fold")
    for summary in summaries:
        first = [escape(summary.slug), *(f"[dim]{escape(text)}[/]" for text in summary.kind)]  # a row each
        last = len(summary.expectations) - 1
        for index, found in enumerate(summary.expectations):
            colour = COLOURS[found.verdict]
            table.add_row(
                "\n".join(first[index:] if index == last else first[index : index + 1]),
                escape(found.name),
                bar(found),
                number(found.estimate, found.unit),
                interval(found),
                f"[{colour}]{found.verdict}[/]",
            )
    return table


def settings_table(settings: type[Settings]) -> RichTable:
    """A claim's settings for the terminal, with their defaults by scale."""
    table = RichTable(box=None, header_style="bold", pad_edge=False)
    for header in ("setting", *SCALES, "meaning"):
        table.add_column(header, overflow="fold")
    for name, text, defaults in settings.described():
        shown = (value if isinstance(value, str) else json.dumps(value) for value in defaults.values())
        table.add_row(name, *map(escape, shown), escape(text))
    return table


BEGIN, END = "<!-- methods: generated by `paperworks report --readme` -->", "<!-- end of methods -->"


def methods_table(results: Sequence[Summary], link: str = "") -> str:
    """The Markdown table of all methods with their verdicts."""
    found = largest(results)
    lines = ["| method | family | what it does | claim |", "| --- | --- | --- | --- |"]
    for card in catalog().values():
        if card.slug in found:
            summary = found[card.slug]
            of = f", {summary.share}" if summary.unjudged else ""
            verdict = f"{summary.verdict} ({summary.scale}, {summary.seeds} seeds{of})"
        else:
            verdict = "not measured yet" if card.built else "planned"
        name = f"[{card.name}]({link}{card.slug}.md)" if link and card.built else card.name
        lines.append(f"| {name} (`{card.slug}`) | {card.family} | {card.summary} | {verdict} |")
    return "\n".join(lines)


def update_readme(readme: Path, results: Sequence[Summary]) -> None:
    """Put the table of methods between its marks in a README.

    Raises:
        UserError: If the marks are not there.
    """
    text = readme.read_text("utf-8") if readme.exists() else ""
    if BEGIN not in text or END not in text:
        raise UserError(f"{readme} lacks the marks {BEGIN!r} and {END!r}")
    before, rest = text.split(BEGIN, 1)
    write(readme, f"{before}{BEGIN}\n{methods_table(results)}\n{END}{rest.split(END, 1)[1]}".encode())
