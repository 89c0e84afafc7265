"""``paperworks mrclens scan FILE``: the audit on the command line."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paperworks.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from paperworks.audit.mrclens.report import AuditReport


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def mrclens() -> None:
    """Find out which cues solve a reading-comprehension set, before a reader is trained."""


@mrclens.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--format", metavar="squad|race|mrqa", help="What FILE is.  [default: what it looks like]")
@click.option("--cue", "cues", multiple=True, metavar="NAME", help="Only this cue; repeatable.")
@click.option("--n", default=400, show_default=True, metavar="N", help="Questions that probes are fitted on.")
@click.option("--seed", default=0, show_default=True, metavar="N", help="Draws folds, samples and permutations.")
@click.option("--repair", is_flag=True, help="Look up answers that do not stand where FILE says.")
@click.option("--json", "as_json", type=click.Path(path_type=Path), metavar="FILE", help="Write all of it as JSON.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page that stands alone.")
@click.option("--markdown", type=click.Path(path_type=Path), metavar="FILE", help="Write the tables as Markdown.")
@click.option(
    "--export",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write biased, anti-biased and balanced splits, and a table of every question's cues.",
)
@click.option("--examples", default=5, show_default=True, metavar="N", help="Questions to show that a cue solves.")
def scan(
    file: Path,
    format: str | None,
    cues: tuple[str, ...],
    n: int,
    seed: int,
    repair: bool,
    as_json: Path | None,
    html: Path | None,
    markdown: Path | None,
    export: Path | None,
    examples: int,
) -> None:
    """Audit FILE: SQuAD v1.1 or v2.0 JSON, RACE (a file or folder), or MRQA JSON lines.

    It says how much of the task each cue solves by itself, whether that is more than chance, and which questions carry
    it. Nothing is changed in FILE.
    """
    from rich.console import Console

    from paperworks.audit.mrclens.auditing import audit
    from paperworks.audit.mrclens.data import MRCDataset

    console = Console() if sys.stdout.isatty() else Console(width=140)  # files and pipes do not wrap
    for target in (as_json, html, markdown):
        if target and not target.absolute().parent.is_dir():
            raise UserError(f"there is no folder {target.absolute().parent} to write {target.name} to")
    data = MRCDataset.load(file, format, repair=repair)
    with _progress() as progress:
        report = audit(data, cues or None, n, seed, progress=progress)
    _print(report, console, examples)
    for target, content in ((as_json, report.to_json), (html, report.to_html), (markdown, report.to_markdown)):
        if target:
            _write(target, content())
            click.echo(f"Written: {target}")
    if export:
        for path in report.export(export):
            click.echo(f"Written: {path}")


@contextmanager
def _progress() -> Iterator[Callable[[float, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        BarColumn(30),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=1.0)
        yield lambda fraction, text: bar.update(task, completed=fraction, description=text)


def _print(report: "AuditReport", console: "Console", examples: int) -> None:
    from rich.table import Table
    from rich.text import Text

    from paperworks.audit.mrclens.report import HEADER, cells

    table = Table(*HEADER)
    for finding in report.findings:
        table.add_row(*map(Text, cells(finding)), style="bold" if finding.biased else "")
    console.print(table)
    for sentence in report.sentences():
        click.echo(sentence)
    shown = [row for row in report.rows() if row["biased"]][:examples]
    for row in shown:
        click.echo(f"  {row['id']}: {row['question'].strip()} → {row['answer']}  [{', '.join(row['cues'])}]")


def _write(path: Path, content: str) -> None:
    try:
        path.write_text(content, "utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
