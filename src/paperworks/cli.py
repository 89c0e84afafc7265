"""The command line. Nothing heavy is imported before a command needs it: ``list``, ``show`` and help answer at once."""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any, NoReturn

import click

from paperworks import __version__
from paperworks.catalog import FAMILIES, SCALES, Card, catalog, find
from paperworks.errors import MissingExtra, UserError, nearest, unknown

if TYPE_CHECKING:
    from paperworks.bench.check import Plan, Records
    from paperworks.bench.claim import Claim


class Commands(click.Group):
    """Our own commands, then those of the methods that are tools, which are imported when they are called.

    A mistyped command is answered with the nearest one.
    """

    def list_commands(self, context: click.Context) -> list[str]:
        return [*self.commands, *_tools()]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return super().get_command(context, name) or Tool.of(name)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        commands = ((name, self.get_command(context, name)) for name in self.list_commands(context))
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(300)) for name, command in commands if command])

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        names = self.list_commands(context)
        if args and not args[0].startswith("-") and args[0] not in names:
            raise unknown("command", args[0], names)
        return super().resolve_command(context, args)


class Tool(click.Command):
    """The command of a method that is a tool: its card's line in the help, its module when it runs."""

    @classmethod
    def of(cls, slug: str) -> Tool | None:
        return cls(slug, help=f"{_tools()[slug].summary}.") if slug in _tools() else None

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        module, _, attribute = _tools()[str(self.name)].command.rpartition(".")
        command: click.Command = getattr(import_module(module), attribute)
        return command.make_context(info_name, args, parent, **extra)


def _tools() -> dict[str, Card]:
    return {card.slug: card for card in catalog().values() if card.command}


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "--version", message="paperworks %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Published machine-learning methods that work: import them, check their claims, combine and scale them."""


@cli.command("list")
@click.option("--family", help="Only this family, e.g. robust.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(family: str | None, as_json: bool) -> None:
    """List the methods."""
    families = list(dict.fromkeys([*FAMILIES, *(card.family for card in catalog().values())]))
    if family is not None and family not in families:
        raise unknown("family", family, families)
    cards = [card for card in catalog().values() if family in (None, card.family)]
    if as_json:
        click.echo(json.dumps([_card_json(card) for card in cards], indent=1))
        return
    width = max(len(card.slug) for card in cards)
    for group in families:
        members = [card for card in cards if card.family == group]
        if not members:
            continue
        about = f": {FAMILIES[group]}" if group in FAMILIES else ""
        click.echo(click.style(group, bold=True) + about)
        for card in members:
            state = "" if card.built else click.style("  (planned)", dim=True)
            click.echo(f"  {card.slug:<{width}}  {card.summary}{state}")
    built = sum(card.built for card in cards)
    click.echo(f"\n{len(cards)} methods, {built} built. `paperworks show SLUG` tells more of one.")


@cli.command()
@click.argument("slug")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Folder of results.",
)
@click.option("--settings", "with_settings", is_flag=True, help="Only list the settings of its claim, for --set.")
def show(slug: str, as_json: bool, results: Path, with_settings: bool) -> None:
    """Show a method: its problem, paper, API, claim and last result."""
    card = find(slug)
    if with_settings:
        from paperworks.bench.claim import load_claim
        from paperworks.bench.report import settings_table

        _console().print(settings_table(load_claim(slug).settings))
        return
    measured = _last_result(slug, results)
    if as_json:
        click.echo(json.dumps(_card_json(card) | {"result": measured}, indent=1))
        return
    click.echo(click.style(f"{card.name}", bold=True) + f" ({card.slug}, {card.family})")
    click.echo(f"{card.summary}.\n")
    click.echo(_wrapped(card.problem))
    paper = card.paper
    click.echo(_wrapped(f"\nPaper: {paper.title}. {', '.join(paper.authors)}. {paper.published}. {paper.url}"))
    if card.reconstruction:
        click.echo(_wrapped("\nParts inside are reconstructed: no reference code could be read."))
    if not card.built:
        click.echo("\nPlanned: not built yet.")
        return
    click.echo("\nImport:")
    click.echo(indent(card.imports(78), "  "))
    if card.extra:
        click.echo(f"  needs: pip install 'paperworks[{card.extra}]'")
    click.echo(_wrapped(f"\nClaim: {card.claim_sentence}"))
    for scales, arms in card.claim_arms.items():
        at = "" if len(scales) == len(SCALES) else f" at {' and '.join(scales)}"
        click.echo(_wrapped(f"Arms{at}: {', '.join(arms)}"))
    if measured:
        seeds = f"{measured['seeds']} seed{'s' * (measured['seeds'] != 1)}"
        click.echo(f"Measured at {measured['scale']} with {seeds}: {measured['verdict']}")
        for found in measured["expectations"]:
            low = "−∞" if found["low"] is None else f"{found['low']:.4g}"
            high = "∞" if found["high"] is None else f"{found['high']:.4g}"
            click.echo(f"  {found['name']}: {found['estimate']:.4g} ({low} … {high}): {found['verdict']}")
        for left in measured.get("unjudged", []):
            click.echo(f"  {', '.join(left['names'])}: not judged (needs {', '.join(left['missing'])})")
    click.echo(f"Check: paperworks check {card.slug}; its settings: paperworks show {card.slug} --settings")


def placing(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say where trials, results and data lie."""
    options = [
        click.option(
            "--store",
            default="paperworks-runs",
            show_default=True,
            envvar="PAPERWORKS_STORE",
            metavar="URL",
            help="Where trials are kept: a folder or any fsspec URL.",
        ),
        click.option(
            "--results",
            type=click.Path(path_type=Path),
            default=Path("results"),
            show_default=True,
            metavar="DIR",
            help="Where verdicts and figures go.",
        ),
        click.option(
            "--data-root",
            type=click.Path(path_type=Path),
            envvar="PAPERWORKS_DATA",
            metavar="DIR",
            help="Folder of the data sets.",
        ),
    ]
    return _decorated(command, options)


def measuring(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say how trials are measured."""
    options = [
        click.option("--scale", default="quick", show_default=True, metavar="|".join(SCALES), help="How much work."),
        click.option("--seeds", type=int, metavar="N", help="Seeds 0 … N-1.  [default: the claim's own]"),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting; repeatable."),
        click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where to train."),
        click.option(
            "--executor",
            default="processes",
            show_default=True,
            metavar="serial|processes|ray",
            help="How trials are spread.",
        ),
        click.option("--workers", type=int, metavar="N", help="Trials at a time.  [default: one a core]"),
        click.option("--threads", type=int, default=1, show_default=True, metavar="N", help="Threads a trial."),
        click.option("--fresh", is_flag=True, help="Measure again what is stored."),
    ]
    return placing(_decorated(command, options))


def _decorated(command: Callable[..., None], options: Sequence[Callable[..., Any]]) -> Callable[..., None]:
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@click.argument("slugs", nargs=-1)
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Every built method; also updates the table of methods in README.md if there is one here.",
)
@click.option("--arms", metavar="A,B,…", help="Of one method, only these arms.  [default: the scale's]")
@measuring
def check(slugs: Sequence[str], everything: bool, arms: str | None, results: Path, **options: Any) -> None:
    """Measure claims: method beside baseline, same data, same seeds, with a verdict."""
    if everything == bool(slugs):
        raise UserError("name the methods to check, or give --all")
    if arms is not None and (everything or len(set(slugs)) > 1):
        raise UserError("--arms goes with one method, as each has arms of its own")
    if everything:
        slugs = [card.slug for card in catalog().values() if card.built and card.claim]
    cards = [find(slug) for slug in dict.fromkeys(slugs)]
    plan = _plan(options)
    from paperworks.bench.claim import load_claim
    from paperworks.bench.report import BEGIN, publish, update_readme, verdict_table
    from paperworks.bench.results import read_all

    console = _console()
    claims = [load_claim(card.slug) for card in cards]
    chosen = claims[0].choose([arm.strip() for arm in arms.split(",")]) if arms is not None else None
    records = _measure(plan, claims, [trial for claim in claims for trial in plan.trials(claim, chosen)])
    published = [publish(claim, records, results) for claim in claims]
    if any(summary.expectations for summary, _ in published):
        console.print(verdict_table(summary for summary, _ in published))
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    for summary, page in published:
        if summary.left_out:
            say(f"{summary.slug}: not judged: {summary.left_out}")
        say(f"{summary.slug} ({summary.size}): {summary.verdict_text}. Report: {page}")
    readme = Path("README.md")
    if everything and plan.scale != "smoke" and readme.exists() and BEGIN in readme.read_text("utf-8"):
        update_readme(readme, read_all(results))


@cli.command()
@click.argument("slugs", nargs=-1, required=True)
@click.option("--on", required=True, metavar="SLUG", help="Whose data and training to use.")
@click.option("--metric", metavar="NAME", help="What to analyse.  [default: the claim's first]")
@measuring
def combine(slugs: Sequence[str], on: str, metric: str | None, results: Path, **options: Any) -> None:
    """Measure how methods interact: all subsets of them in one claim's training."""
    cards = [find(slug) for slug in [*slugs, on]]
    plan = _plan(options)
    from paperworks.bench import combine as factorial
    from paperworks.bench.claim import load_claim

    factorial.check_methods(slugs)
    *joining, claim = [load_claim(card.slug) for card in cards]
    claim.check_host()
    for method in joining:
        method.check_joins()
    records = _measure(plan, [claim], plan.factorial(claim, joining))
    found = factorial.combined(claim, slugs, records, metric)
    page = factorial.publish(found, results)
    console = _console()
    console.print(factorial.cell_table(found))
    console.print()
    console.print(factorial.effect_table(found))
    console.print(f"Report: {page}", highlight=False, markup=False, soft_wrap=True)


@cli.command()
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    metavar="DIR",
    help="Folder of results.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write one page of all results.")
@click.option(
    "--readme",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Update the table of methods in this file.",
)
def report(results: Path, as_json: bool, html: Path | None, readme: Path | None) -> None:
    """Report what `check` last measured."""
    from paperworks.bench import report as reports
    from paperworks.bench.results import read_all

    if not results.is_dir():
        raise UserError(f"there is no folder {results}; run `paperworks check SLUG` first or give --results")
    summaries = read_all(results, every=True)
    if html:
        parts = [reports.claim_part(summary, reports.stored_pictures(summary, results)) for summary in summaries]
        reports.write(html, reports.render("paperworks: all results", parts).encode())
    if readme:
        reports.update_readme(readme, read_all(results))
    if as_json:
        click.echo(json.dumps([summary.brief() for summary in summaries], indent=1))
    elif summaries:
        console = _console()
        console.print(reports.verdict_table(summaries))
        for summary in summaries:
            if summary.left_out:
                line = f"{summary.slug} ({', '.join(summary.kind)}): not judged: {summary.left_out}"
                console.print(line, highlight=False, markup=False, soft_wrap=True)
    else:
        click.echo(f"No results in {results} yet.")
    if html:
        click.echo(f"Report: {html}", err=as_json)


@cli.command()
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0 takes a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind; others than this need --auth.")
@click.option("--auth", envvar="PAPERWORKS_AUTH", metavar="USER:PASSWORD", help="Ask for user and password.")
@placing
@click.option(
    "--robustar", type=click.Path(path_type=Path), metavar="DIR", help="Also the page of this Robustar project."
)
@click.option("--robustar-model", metavar="NAME", help="Its classifier, as of `paperworks robustar serve`.")
@click.option("--robustar-weights", type=click.Path(path_type=Path), metavar="FILE", help="The state_dict of that.")
@click.option("--robustar-size", type=int, metavar="N", help="Side to which its images are scaled.")
@click.option("--open/--no-open", "open_browser", default=False, help="Open the page in the browser.")
def serve(
    host: str,
    port: int,
    auth: str | None,
    robustar: Path | None,
    robustar_model: str | None,
    robustar_weights: Path | None,
    robustar_size: int | None,
    open_browser: bool,
    **places: Any,
) -> None:
    """Serve one local page: the methods, their checks, comparisons, combinations and tools."""
    if (robustar is None) != (robustar_model is None):
        raise UserError("--robustar DIR and --robustar-model NAME go together")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for package in ("fastapi", "uvicorn"):
        try:
            import_module(package)
        except ImportError as error:
            raise MissingExtra(package, "app", "paperworks serve") from error
    from paperworks.app.project import Project
    from paperworks.app.serve import serve as start

    opened = None
    if robustar and robustar_model:
        from paperworks.commands.robustar import open_project

        opened = open_project(
            robustar, model=robustar_model, weights=robustar_weights, image_size=robustar_size,
            channels="3", mean="0", std="1", device="cpu",
        )  # fmt: skip
    project = Project(**places)
    start(project, host=host, port=port, auth=auth, robustar=opened, open_browser=open_browser, say=click.echo)


@cli.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("worlds.png"),
    show_default=True,
    metavar="FILE",
    help="Where the sheet goes.",
)
@click.option("--scene", type=click.Path(path_type=Path), metavar="FILE", help="Also write its scene as JSON.")
@click.option("--seed", type=int, default=3, show_default=True, help="Decides the scene.")
def worlds(out: Path, scene: Path | None, seed: int) -> None:
    """Draw a contact sheet of the procedural world: one scene through every sensor."""
    for path in (out, scene):
        if path and not path.parent.is_dir():
            raise UserError(f"there is no folder {path.parent}")
    if out.suffix.lower() not in (".png", ".jpg", ".pdf", ".svg"):
        raise UserError(f"--out takes a .png, .jpg, .pdf or .svg file, got {out}")
    from paperworks.worlds.sheet import contact_sheet, shown_scene

    if scene:
        shown_scene(seed).save(scene)
    contact_sheet(seed).savefig(out, dpi=110)
    click.echo(f"Sheet: {out}")


def _plan(options: dict[str, Any]) -> Plan:
    """Check the options that need no torch first, so that a typo is answered at once."""
    if options["scale"] not in SCALES:
        raise unknown("scale", options["scale"], SCALES)
    if not options["store"]:
        raise UserError("--store must name a folder or URL, got nothing")
    if (root := options["data_root"]) and not Path(root).expanduser().is_dir():
        raise UserError(f"there is no folder {root} (--data-root or PAPERWORKS_DATA)")
    overrides = {}
    for text in options.pop("overrides"):
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"--set takes KEY=VALUE, got {text!r}")
        overrides[key] = value
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin on cores that others use
    from paperworks.bench.check import Plan

    return Plan(overrides=overrides, **options)


def _measure(plan: Plan, claims: Sequence[Claim], trials: list[Any]) -> Records:
    from paperworks.bench.check import Records
    from paperworks.bench.progress import progress_bar

    console = _console(stderr=True)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    records = Records(plan, trials)
    for reason, paths in records.damaged.items():
        more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
        say(f"measuring again: {paths[0]}{more}: {reason}")
    stored = len(trials) - len(records.pending)
    if stored:
        say(f"{stored} of {len(trials)} trials are stored in {plan.store}")
    if records.pending:
        names = ", ".join(claim.slug for claim in claims)
        say(f"measuring {len(records.pending)} trials of {names} ({plan.scale})")
        with progress_bar(records, console):
            for _ in records.measure():
                pass
    return records


def _console(*, stderr: bool = False) -> Any:
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=140)  # files and pipes do not wrap


def _card_json(card: Card) -> dict[str, Any]:
    fields = {name: value for name, value in vars(card).items() if name not in ("paper", "claim")}
    return fields | {"built": card.built, "paper": vars(card.paper), "claim": card.claim_sentence}


def _last_result(slug: str, results: Path) -> dict[str, Any] | None:
    for scale in reversed(SCALES):
        try:
            found = json.loads((results / slug / f"{scale}.json").read_text("utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and found.keys() >= {"scale", "seeds", "verdict", "expectations"}:
            return found
    return None


def _wrapped(text: str) -> str:
    width = min(100, shutil.get_terminal_size().columns)
    lead = "\n" if text.startswith("\n") else ""  # which click would drop
    return lead + click.wrap_text(text, width=width, preserve_paragraphs=True)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 2 bad input, 130 interrupted, 1 a fault of ours.

    ``--debug`` may stand anywhere.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = [argument for argument in given if argument != "--debug"]
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        cli.main(args=args, prog_name="paperworks", standalone_mode=False)
        sys.exit(0)
    except (click.Abort, KeyboardInterrupt):
        stored = "; what was measured is stored" * ({"check", "combine"} & set(args) != set())
        click.echo(f"interrupted{stored}", err=True)
        sys.exit(130)
    except click.exceptions.Exit as exit:
        sys.exit(exit.exit_code)
    except click.NoSuchOption as error:
        options = error.ctx.command.params if error.ctx else []
        known = [name for option in options for name in option.opts if name.startswith("--")]
        click.echo(f"error: no such option {error.option_name}.{nearest(error.option_name, known)}", err=True)
        sys.exit(2)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()}", err=True)
        sys.exit(2)
    except Exception as error:
        if "--debug" in given:
            traceback.print_exception(error)
        if isinstance(error, UserError):
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            sys.exit(2)
        if isinstance(error, OSError) and error.filename:
            click.echo(f"error: {error.filename}: {error.strerror}", err=True)
            sys.exit(2)
        click.echo(f"fault: {type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)", err=True)
        sys.exit(1)
