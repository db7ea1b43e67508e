"""Durations as people write and read them."""

from __future__ import annotations

import contextlib
import math
import re


def format_duration(seconds: float) -> str:
    """Seconds as people read them: 42s, 3m05s, 2h07m, 1d04h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


_UNITS_S = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}


def parse_duration(text: str) -> float:
    """Seconds of `90`, `90s`, `3m05s`, `11h30m`, `1d04h`, `4:00:00` or `1-00:00:00`; raises ValueError on others.

    It reads what `format_duration` writes, and what SLURM does.
    """
    text = text.strip()
    with contextlib.suppress(ValueError):
        seconds = float(text)
        if 0 <= seconds < math.inf:
            return seconds
    parts = re.findall(r"([0-9.]+)([dhms])", text)
    if parts and "".join(number + unit for number, unit in parts) == text:
        return sum(float(number) * _UNITS_S[unit] for number, unit in parts)
    clock = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if clock:
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    raise ValueError(f"{text!r} is no duration: write 90s, 30m, 11h30m or 4:00:00")
