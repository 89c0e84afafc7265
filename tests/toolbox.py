"""A tool's command, as a card names it."""

import click


@click.group()
def tool() -> None:
    """Arithmetic."""


@tool.command()
@click.argument("number", type=int)
def double(number: int) -> None:
    """Twice the number."""
    click.echo(2 * number)
