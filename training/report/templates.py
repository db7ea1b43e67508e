"""Pages out of templates, which stand beside this file.

Promises: whatever a text holds, it stays text. Data, options, host names and reasons come from elsewhere; nothing of
theirs becomes an element, an attribute, a link, or a character that a browser drops or that UTF-8 cannot write. A page
is one file that fetches nothing, and has no script but its own; if a text came through all the same, the page's policy
keeps browsers from running or fetching anything for it. The same data gives the same bytes, and data that a template
asks for and does not get is an error.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from training.base.durations import format_duration

# What XML or HTML cannot hold: control characters but tab and line feed, half surrogate pairs, non-characters.
_UNWRITABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def page(template: str, data: Mapping[str, Any]) -> str:
    """The HTML page that `template` makes of `data`; its "script", if any, is a file beside this one."""
    return writable(PAGES.get_template(template).render({"script": None, **data}))


def escaped(value: object) -> str:
    """`value` as text for an element of SVG or a quoted attribute; what cannot be written becomes U+FFFD."""
    return html.escape(writable(str(value)))


def writable(text: str) -> str:
    return _UNWRITABLE.sub("\ufffd", text)


def _sha256(text: str) -> str:
    """As a page's policy names what it allows."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).resolve().parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
PAGES.filters |= {"number": format, "duration": format_duration, "yaml": _yaml, "sha256": _sha256}
PAGES.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
