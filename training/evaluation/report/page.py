"""The frame of a report: one self-contained HTML page, readable on a phone, in dark and in light.

Promises: no scripts, nothing fetched from elsewhere; the title is escaped. The sections are what the caller makes them,
see `markup`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from training.evaluation.report.markup import anchor, escaped, isolated, section

CSS = Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def page(title: str, opening: str, sections: Mapping[str, str]) -> str:
    """The page: title, opening, links to the sections, and these by their names; one without a body is left out."""
    links = "".join(f'<a href="#{anchor(name)}">{name}</a>' for name, body in sections.items() if body)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n"
        f"<h1>{isolated(title)}</h1>\n{opening}<nav>{links}</nav>\n"
        + "\n".join(section(name, body) for name, body in sections.items())
        + "\n</body>\n</html>\n"
    )


def banner(text: str) -> str:
    """A line that nobody overlooks."""
    return f'<p class="banner">{escaped(text)}</p>\n'


def config(values: dict[str, Any]) -> str:
    """The configuration of a run, as YAML."""
    return f"<pre>{escaped(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))}</pre>"
