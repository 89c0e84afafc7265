"""Pages that are made of what stands elsewhere: one a method, of its card, claim, last result and docstrings; one a
floor of the house, of its modules' docstrings; CONTRIBUTING and CHANGELOG."""

import ast
import html
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from paperworks.bench import combine, load_claim
from paperworks.bench.report import bar, interval, methods_table, number, spread, stored_pictures
from paperworks.bench.results import Summary, largest, read_all
from paperworks.bench.settings import Settings
from paperworks.catalog import FAMILIES, SCALES, Card, catalog

ROOT = Path(__file__).parents[2]
SOURCE, RESULTS = ROOT / "src" / "paperworks", ROOT / "results"
CARDS = catalog()
BUILT = [card for card in CARDS.values() if card.built]
HOUSE = ("errors", "files", "catalog", "nn", "data", "worlds", "train", *FAMILIES, "bench")
ROOMS = [room for room in HOUSE if (SOURCE / room).is_dir() or (SOURCE / f"{room}.py").is_file()]


def on_config(config: MkDocsConfig) -> None:
    """Put the generated pages into the navigation."""
    sections = {title: pages for entry in config.nav if isinstance(entry, dict) for title, pages in entry.items()}
    for family in FAMILIES:
        members = [{card.name: f"methods/{card.slug}.md"} for card in BUILT if card.family == family]
        sections["Methods"] += [{family: members}] if members else []
    sections["Reference"] += [{f"paperworks.{room}": f"reference/{room}.md"} for room in ROOMS]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the generated pages, and the figures of results."""
    for uri, content in generated(read_all(RESULTS)):
        files.append(File.generated(config, uri, content=content))


def generated(results: Sequence[Summary]) -> Iterator[tuple[str, str | bytes]]:
    """Every generated file, by its place in the site."""
    for name in ("CONTRIBUTING", "CHANGELOG"):
        yield f"{name.lower()}.md", (ROOT / f"{name}.md").read_text("utf-8")
    yield "methods/index.md", f"# Methods\n\n{methods_table(results, link='./')}\n"
    measured = largest(results)
    for card in BUILT:
        summary = measured.get(card.slug)
        pictures = stored_pictures(summary, RESULTS) if summary else []
        figures = [(f"{card.slug}-{picture.name}.png", picture.caption) for picture in pictures]
        yield f"methods/{card.slug}.md", method_page(card, load_claim(card.slug).settings, summary, figures)
        for (name, _), picture in zip(figures, pictures, strict=True):
            yield f"methods/{name}", picture.png
    combinations = combine.read_all(RESULTS)
    yield "concepts/combined.md", combined_page(combinations)
    for found in combinations:
        yield f"concepts/{found.stem}.png", (RESULTS / "combine" / f"{found.stem}.png").read_bytes()
    yield "reference/index.md", reference_index()
    for room in ROOMS:
        yield f"reference/{room}.md", reference_page(room)


def method_page(
    card: Card, settings: type[Settings], summary: Summary | None, figures: Iterable[tuple[str, str]]
) -> str:
    """A method: problem, paper, imports, claim, last result, settings, API."""
    paper = card.paper
    source = f"*{text(paper.title)}*. {text(', '.join(paper.authors))}. {text(paper.published)}."
    link = f" [arXiv:{paper.arxiv}]({paper.url})" if paper.arxiv else ""
    claim, *protocol = [text(" ".join(part.split())) for part in card.claim_text.split("\n\n")]
    parts = [
        f"# {text(card.name)}",
        f"**{text(card.summary)}.**",
        text(" ".join(card.problem.split())),
        f"Paper: {source}{link}",
    ]
    if card.reconstruction:
        parts.append("Parts inside are reconstructed: no reference code could be read.")
    parts += ["## Import", f"```python\n{card.imports(88)}\n```"]
    if card.extra:
        parts.append(f"It needs the extra `{card.extra}`: `pip install 'paperworks[{card.extra}]'`.")
    parts += ["## Claim", claim, f"```sh\npaperworks check {card.slug}\n```"]
    parts += [*result(summary, figures)] if summary else ["Not measured yet."]
    parts += ["### How it is measured", *protocol]
    if len(card.claim_arms) > 1:
        arms = [[" and ".join(scales), ", ".join(arms)] for scales, arms in card.claim_arms.items()]
        parts.append(table(["scale", "arms"], arms))
    parts += [settings_table(settings), "## API"]
    parts += [f"::: {name}" for name in card.api]
    return "\n\n".join(parts) + "\n"


def result(summary: Summary, figures: Iterable[tuple[str, str]]) -> Iterator[str]:
    """What was last measured."""
    verdict = f'<span class="verdict {summary.verdict}">{summary.verdict}</span>'
    yield f"### Result: {verdict} {{ #result }}"
    yield f"Scale `{summary.scale}`, {summary.seeds} seeds, 95 % intervals, measured {summary.measured}."
    yield table(
        ["expectation", "bar", "estimate", "interval", "verdict"],
        [
            [found.name, bar(found), number(found.estimate, found.unit), interval(found), found.verdict]
            for found in summary.expectations
        ],
    )
    if summary.left_out:
        yield text(f"Not judged: {summary.left_out}.")
    names = list(dict.fromkeys(name for metrics in summary.arms.values() for name in metrics))
    yield table(
        ["arm", *names],
        [
            [arm, *(spread(metrics[name]) if name in metrics else "–" for name in names)]
            for arm, metrics in summary.arms.items()
        ],
    )
    for file, caption in figures:
        yield f"<figure markdown>\n![{text(caption)}]({file})\n<figcaption>{text(caption)}</figcaption>\n</figure>"
    machine = summary.machine.get("gpu") or f"{summary.machine['processor']}, {summary.machine['cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in summary.versions.items())
    yield f"{summary.cpu_seconds:g} CPU-seconds on {text(machine)}; {text(versions)}."


def combined_page(combinations: Iterable[combine.Combination]) -> str:
    """Every factorial that was measured: command, picture, cells and effects."""
    parts = ["# Combinations measured", "What `paperworks combine` found, with 95 % intervals over seeds."]
    for found in combinations:
        caption = text(f"Cells and effects: {' × '.join(found.methods)} on {found.on}")
        parts += [
            f"## {' × '.join(found.methods)} on {found.on}",
            f"```sh\n{found.command}\n```",
            f"<figure markdown>\n![{caption}]({found.stem}.png)\n<figcaption>{caption}</figcaption>\n</figure>",
            table([f"{found.metric} with", "mean ± sd"], [[name, spread(cell)] for name, cell in found.cells.items()]),
            table(
                ["effect", "estimate", "interval"],
                [[e.name, number(e.estimate, "difference"), combine.interval(e)] for e in found.effects],
            ),
        ]
    return "\n\n".join(parts) + "\n"


def settings_table(settings: type[Settings]) -> str:
    """The settings with their defaults; where the scales differ, one a scale."""
    rows = [[name, text, *map(shown, defaults.values())] for name, text, defaults in settings.described()]
    return table(["setting", "meaning", *SCALES], rows)


def reference_index() -> str:
    """The rooms, ground up, and what lives in each."""
    rows = [[f"[`paperworks.{room}`]({room}.md)", about(room)] for room in ROOMS]
    floors = (
        "The house from the ground up. A room imports only from floors below it; families do not import one another."
    )
    return f"# Reference\n\n{floors}\n\n{table(['room', ''], rows)}\n"


def reference_page(room: str) -> str:
    """Every public module of a room; a method's own stand on its page."""
    parts = [f"# paperworks.{room}", text(about(room))]
    if methods := [card for card in BUILT if card.family == room]:
        parts.append("\n".join(f"- [{text(c.name)}](../methods/{c.slug}.md): {text(c.summary)}" for c in methods))
    for path in sorted((SOURCE / room).rglob("*.py")) or [SOURCE / f"{room}.py"]:
        names = path.relative_to(SOURCE).with_suffix("").parts
        if not names[-1].startswith("_") and CARDS.keys().isdisjoint(names):
            parts.append(f"::: paperworks.{'.'.join(names)}\n    options:\n      heading_level: 2")
    return "\n\n".join(parts) + "\n"


def about(room: str) -> str:
    """The first line of a room's docstring, read without importing it."""
    package = SOURCE / room / "__init__.py"
    tree = ast.parse((package if package.exists() else SOURCE / f"{room}.py").read_text("utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *([text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(content: str) -> str:
    """Text that stays text: neither HTML nor a cell's end."""
    return html.escape(content, quote=False).replace("|", "&#124;")


def shown(value: object) -> str:
    """A setting's default as one gives it on the command line."""
    return (
        ", ".join(map(shown, value))
        if isinstance(value, tuple | list)
        else f"{value:.4g}"
        if isinstance(value, float)
        else str(value)
    )
