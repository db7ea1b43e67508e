"""The picture of a run's page that the README shows, light and dark: its head, its curves, its sessions.

    python -m tests.support.picture runs/gpt-sample docs

It needs Chromium, as the tests of pages do.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.browser import browser

WIDTH = 900
_KEEP = """(() => {
  const rest = 'nav, section:not(#training, #sessions), #training > :not(h2, .curves), #sessions > p'
  document.querySelectorAll(rest + ', figure:nth-of-type(n + 5)').forEach(element => element.remove())
  document.documentElement.style.overflow = 'hidden'  // without a scroll bar
})()"""


def main(run_dir: Path, folder: Path) -> list[Path]:
    """Writes page-light.webp and page-dark.webp to `folder`."""
    made = []
    with browser() as chromium:
        for name in ("light", "dark"):
            chromium.open(run_dir / "report.html", width=WIDTH, dark=name == "dark")
            chromium.run(_KEEP)
            made.append(folder / f"page-{name}.webp")
            chromium.shoot(made[-1])
    return made


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
