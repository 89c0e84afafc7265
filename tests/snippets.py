"""The code that Markdown pages print, so that tests can run it."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import click

from paperworks.catalog import find
from paperworks.cli import cli

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)(?: (?P<info>[^\n]*))?\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what stands beside it, and its text."""

    language: str
    info: str
    text: str

    @property
    def title(self) -> str:
        """The ``title="…"`` of the block: for a file, its path."""
        found = re.search(r'title="([^"]+)"', self.info)
        return found.group(1) if found else ""


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = FENCE.finditer(page.read_text("utf-8"))
    every = [Block(match["language"], match["info"] or "", match["text"]) for match in found]
    return [block for block in every if language in (None, block.language)]


def run_python(page: Path) -> None:
    """Run a page's Python blocks one after another, as pasted into one session. Files' blocks are not pasted."""
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python"), 1):
        if not block.title:
            exec(compile(block.text, f"{page.name}, block {number}", "exec"), names)


def check_commands(page: Path) -> int:
    """Hold a page's shell blocks against what there is: make's targets, commands, options, slugs.

    Returns:
        How many commands were held against it.
    """
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    lines = [line for block in blocks(page, "sh") for line in block.text.replace("\\\n", "").splitlines()]
    commands = [words for line in lines if (words := shlex.split(line, comments=True))]
    checked = 0
    for program, *arguments in commands:
        if program == "make":
            assert arguments, f"{page.name}: make without a target"
            assert arguments[0] in targets, f"{page.name}: no target {arguments[0]!r}"
        elif program == "paperworks":
            _check_command(*arguments)
        else:
            continue
        checked += 1
    return checked


def _check_command(name: str, *arguments: str) -> None:
    if name.startswith("-"):
        assert any(name in parameter.opts for parameter in cli.params) or name in ("--help", "--version")
        return
    command = cli.get_command(click.Context(cli), name)
    assert command, f"no command {name!r}"
    if "--help" in arguments:
        return
    context = command.make_context(name, list(arguments))
    assert isinstance(context, click.Context)
    slugs = (context.params.get(key) for key in ("slugs", "slug", "on"))
    for found in slugs:
        for slug in (found,) if isinstance(found, str) else found or ():
            find(slug)
