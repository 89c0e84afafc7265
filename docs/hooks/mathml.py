"""Turns the TeX between dollar signs into MathML when the site is built, so that browsers need no script for it."""

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.plugins import get_plugin_logger

# What pymdownx.arithmatex leaves of $…$ and $$…$$.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
log = get_plugin_logger("mathml")


def mathml(tex: str, *, block: bool) -> str:
    r"""MathML of a formula.

    Raises:
        ValueError: For a command that is not known, which would be shown as it is written: ``\foo``.
    """
    found = convert(tex, display="block" if block else "inline")
    if unknown := re.search(r">(\\[A-Za-z]+)", found):
        raise ValueError(f"{unknown.group(1)} is not known in {tex!r}")
    return found


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Replace every formula of a page."""

    def replace(match: re.Match[str]) -> str:
        tag, tex = match.groups()
        try:
            return mathml(html.unescape(tex), block=tag == "div")
        except Exception as error:  # latex2mathml's own errors say little: name the place
            log.warning(f"{page.file.src_uri}: formula {html.unescape(tex)!r}: {type(error).__name__}: {error}")
            return match.group()

    return FORMULA.sub(replace, content)
