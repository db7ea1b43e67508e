"""Report pages: what they hold, and what must not come into them."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import fields
from html.parser import HTMLParser
from typing import Any

from training.evaluation.translations.report import Example

HOSTILE = "</td></pre></svg></style><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & ]]> \x00\u202e"


class Page(HTMLParser):
    """Collects the tags, attributes and text of a page; void elements aside, tags must nest."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def assert_fenced(html: str) -> None:
    """Asserts that the page's policy, which stands before all else, allows its own style and script, and pictures
    within it."""
    head = html.partition("</head>")[0]
    style, script = (
        base64.b64encode(
            hashlib.sha256(text.partition(f"<{name}>")[2].partition(f"</{name}>")[0].encode()).digest()
        ).decode()
        for name, text in (("style", head), ("script", html))
    )
    scripts = f" script-src 'sha256-{script}';" if "<script>" in html else ""
    wanted = (
        f"default-src 'none'; style-src 'sha256-{style}';{scripts} img-src data:; base-uri 'none'; form-action 'none'"
    )
    assert html.count("<script") <= 1
    assert f'<meta http-equiv="Content-Security-Policy" content="{wanted}">' in head.partition("<style>")[0]
    assert html.count("<style>") == html.count("Content-Security-Policy") == 1
    assert not re.search(r"<[^>]*\sstyle=", html)


def make_session(number: int, from_step: int, step: int, reason: str, **more: Any) -> dict[str, Any]:
    return {
        "number": number,
        "host": "node7",
        "job": "4711",
        "world_size": 2,
        "device": "cuda",
        "started": f"2026-01-0{number}T03:04:05+0000",
        "from_step": from_step,
        "step": step,
        "seen": f"2026-01-0{number}T05:04:05+0000",
        "ended": f"2026-01-0{number}T05:04:05+0000",
        "reason": reason,
        "seconds": 7200.0,
        **more,
    }


class Poison:
    """Hostile texts, each with a mark that tells which field it stands in."""

    def __init__(self):
        self.places: list[str] = []

    def text(self, place: str) -> str:
        self.places.append(place)
        return f"{HOSTILE} <{len(self.places) - 1}>"

    def into(self, value: Any, place: str) -> Any:
        """`value` with a hostile text for every text in it; keys that name fields stay."""
        if isinstance(value, str):
            return value if value in ("train", "validation") and place == "metrics.kind" else self.text(place)
        if isinstance(value, Example):
            return Example(*(self.text(f"{place}.{field.name}") for field in fields(value)))
        if isinstance(value, dict):
            return {key: self.into(item, f"{place}.{key}") for key, item in value.items()}
        return type(value)(self.into(item, place) for item in value) if isinstance(value, list | tuple) else value

    def missing_in(self, text: str) -> set[str]:
        """The places whose text is not in `text` as it is."""
        shown = {int(number) for number in re.findall(re.escape(HOSTILE.replace("\0", "\ufffd")) + r" <(\d+)>", text)}
        return {place for number, place in enumerate(self.places) if number not in shown}


def brightness(colour: str) -> int:
    return sum(map(int, re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", colour).groups()))
