"""Curves over training steps as inline SVG, for a page in light or dark: all ink is `currentColor`.

Promises: the same points give the same bytes; a curve has at most a few points per pixel, however long the run was, and
none of its peaks is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from training.report.templates import escaped

# User units. On a page a figure is about this wide, on a phone somewhat less: the text is readable in both.
WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 64, 18, 14, 24
BUCKETS = WIDTH - LEFT - RIGHT  # points are thinned to the lowest and the highest within each

Point = tuple[float, float]
SPARK_WIDTH, SPARK_HEIGHT = 120, 28


@dataclass(frozen=True)
class Line:
    """Points (step, value) in the order of steps. style: `strong`, with a dot at each point, or `faint`."""

    points: Sequence[Point]
    style: str = "strong"


def curve(
    lines: Sequence[Line],
    marks: Sequence[tuple[int, str]] = (),
    *,
    about: str,
    until: int = 0,
    from_zero: bool = False,
) -> str:
    """SVG of `lines` over steps. marks: steps with what happened there. about: the figure in words, for who hears it.

    until: the steps go so far at least, so that figures side by side can have the same. from_zero: the values are shown
    from 0 up, so that heights can be compared, else from about the lowest. Values that are not finite leave a gap;
    without a finite one the figure is empty.
    """
    finite = [point for line in lines for point in line.points if math.isfinite(point[1])]
    steps = [0, until, *(x for x, _ in finite), *(step for step, _ in marks)]
    values = [*(y for _, y in finite), *([0] if from_zero or not finite else [])]
    x_axis = _Axis.over(steps, LEFT, WIDTH - RIGHT, 5)
    y_axis = _Axis.over(values, HEIGHT - BOTTOM, TOP, 4, widened=True)
    parts = [f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(about)}">']
    for tick in y_axis.ticks:
        y = number(y_axis(tick))
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y}" dy=".35em" text-anchor="end">{_words(tick)}</text>')
    for tick in x_axis.ticks:
        x = number(x_axis(tick))
        parts.append(f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="middle">{_words(tick)}</text>')
    for step, what in marks:
        x = number(x_axis(step))
        parts.append(f'<path class="mark" d="M{x} {TOP}V{HEIGHT - BOTTOM}"><title>{escaped(what)}</title></path>')
    for line in lines:
        places = [(x_axis(x), y_axis(y)) if math.isfinite(y) else None for x, y in thinned(line.points, x_axis.scale)]
        parts.append(f'<path class="{line.style}" d="{_path(places)}"/>')
        if line.style == "strong" and len(places) <= BUCKETS / 4:
            # Lines of no length with round ends: dots.
            parts.append(
                f'<path class="dots" d="{"".join(f"M{number(p[0])} {number(p[1])}h0" for p in places if p)}"/>'
            )
    return "".join(parts) + "</svg>\n"


def sparkline(lines: Sequence[Sequence[Point]], until: int, low: float, high: float, *, about: str) -> str:
    """A small SVG without axes, the first of two `lines` faint. What is beyond `low` and `high` is at the edge."""
    x_axis = _Axis(0, max(1, until), 1, SPARK_WIDTH - 1, ())
    y_axis = _Axis(low, high if high > low else low + 1, SPARK_HEIGHT - 2, 2, ())
    paths = [
        f'<path class="{style}" d="{_path([(x_axis(x), y_axis(min(max(y, low), high))) for x, y in points])}"/>'
        for style, points in zip(("faint", "strong"), lines, strict=True)
    ]
    box = f'viewBox="0 0 {SPARK_WIDTH} {SPARK_HEIGHT}" role="img" aria-label="{escaped(about)}"'
    return f'<svg class="curve spark" {box}>{"".join(paths)}</svg>'


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` on places from `begin` to `end`, with round values between them as `ticks`."""

    low: float
    high: float
    begin: float
    end: float
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float], begin: float, end: float, wanted: int, *, widened: bool = False) -> _Axis:
        """From the lowest to the highest value, or widened to the ticks around them; about as many ticks as wanted."""
        low, high = min(values), max(values)
        if high <= low:
            low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        rough = (high - low) / wanted
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
        if widened:
            first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
            low, high = first * step, last * step
        else:
            first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return cls(low, high, begin, end, tuple(float(f"{k * step:.12g}") for k in range(first, last + 1)))

    @property
    def scale(self) -> float:
        """Places per value."""
        return (self.end - self.begin) / (self.high - self.low)

    def __call__(self, value: float) -> float:
        return self.begin + (value - self.low) * self.scale


def thinned(points: Sequence[Point], scale: float, few: int = 2 * BUCKETS) -> list[Point]:
    """The points that can be told apart: of those within one place, the lowest and the highest.

    scale: places per step. So `few` points stay as they are.
    """
    if len(points) <= few:
        return list(points)
    buckets: dict[int, list[Point]] = {}
    for point in points:
        buckets.setdefault(int(point[0] * scale), []).append(point)
    kept: list[Point] = []
    for bucket in buckets.values():
        finite = [point for point in bucket if math.isfinite(point[1])]
        if finite:
            lowest, highest = (pick(finite, key=lambda point: point[1]) for pick in (min, max))
            kept += sorted({lowest, highest})
        else:
            kept.append(bucket[0])
    return kept


def _path(places: Sequence[Point | None]) -> str:
    words, pen_down = [], False
    for place in places:
        if place is not None:
            words.append(f"{'L' if pen_down else 'M'}{number(place[0])} {number(place[1])}")
        pen_down = place is not None
    return "".join(words)


def number(value: float) -> str:
    """A coordinate, to a hundredth: enough for the eye, and no more bytes than that."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _words(tick: float) -> str:
    """A tick's value, short: 250, 12k, 0.0005, 5e-05."""
    if abs(tick) >= 1e6:
        return f"{tick / 1e6:g}M"
    if abs(tick) >= 1e4:
        return f"{tick / 1e3:g}k"
    return f"{tick:g}"
