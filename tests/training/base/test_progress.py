"""The progress line stays on one line of a terminal of any width, and forgets a slow start."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time

import pytest

from tests.support.commands import ROOT
from training.base import progress
from training.base.console import cut
from training.base.progress import Progress

DRAWS = """
import time
from training.base.progress import Progress
with Progress("翻译 translating", 300, "sentences") as line:
    line.note = "损失 loss 2.345 · 12,345 tokens/s"
    for _ in range(3):
        time.sleep(0.11)
        line.advance()
"""


@pytest.mark.parametrize("columns", [20, 80, 200])
def test_line_is_never_wider_than_the_terminal(columns):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    subprocess.run([sys.executable, "-c", DRAWS], cwd=ROOT, stderr=slave, check=True)
    os.close(slave)
    drawn = os.read(master, 1 << 16).decode().split("\r\033[K")
    assert drawn[-1] == "" and len(drawn) == 5  # three lines, and the line taken away
    for line in drawn[1:-1]:
        assert line == cut(line, columns - 1) and line.startswith("翻译 transl")
        assert ("tokens/s" in line) == (columns == 200)


def test_han_characters_take_two_columns():
    assert [cut("ab翻译c", columns) for columns in range(8)] == [
        "",
        "a",
        "ab",
        "ab",
        "ab翻",
        "ab翻",
        "ab翻译",
        "ab翻译c",
    ]
    assert cut("e\u0301e", 1) == "e\u0301"


def test_time_left_is_that_of_the_recent_pace(monkeypatch):
    moment = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: moment)
    shown = []
    monkeypatch.setattr(progress.Progress, "_draw", lambda self, left: shown.append(left))
    line = Progress("training", 1000)
    for step in range(200):
        moment += 600 if step == 0 else 1
        line.advance()
    assert shown[0] == 600 * 999
    assert shown[-1] == pytest.approx(800, rel=0.05)
