"""Model cards out of the templates beside this file.

Promise: whatever a text holds, it stays text: no link, no mark of Markdown, no other cell of a table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader

from training.report.templates import PAGES, writable

_MARKS = re.compile(r"[\\`*\[\]<|]")  # of Markdown


def render(template: str, data: Mapping[str, Any]) -> str:
    """The model card that `template` makes of `data`: Markdown with the header that the Hugging Face Hub reads."""
    return writable(_CARDS.get_template(template).render(data))


def _in_markdown(value: object) -> object:
    """`value` on one line, Markdown's marks in it being plain characters; JSON and what is marked as safe stay."""
    return value if hasattr(value, "__html__") else _MARKS.sub(r"\\\g<0>", re.sub(r"[\r\n]+", " ", str(value)))


_CARDS = PAGES.overlay(
    loader=FileSystemLoader(Path(__file__).resolve().parent), autoescape=False, finalize=_in_markdown
)
