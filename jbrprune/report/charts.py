"""Line charts as SVG to be put into a page: colours come from its style sheet, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 44


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: What the legend calls it.
        style: Class of the style sheet: such as ``measured``; ``level`` has no dots.
        points: (x, y), both in percent.
        ranges: (x, low, high) of error bars.
    """

    name: str
    style: str
    points: tuple[tuple[float, float], ...]
    ranges: tuple[tuple[float, float, float], ...] = ()


def line_chart(series: Sequence[Series], xlabel: str, ylabel: str) -> str:
    """Percentages over percentages; the cost falls from left to right, as pruning goes on.

    Args:
        series: The lines; points that are not finite are left out.
        xlabel: Name of the horizontal axis.
        ylabel: Name of the vertical axis.

    Returns:
        An ``<svg>`` element with its legend below it, or an empty string if there is nothing to draw.
    """
    drawn = [Series(s.name, s.style, _finite(s.points), s.ranges) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return ""
    lowest = min(x for s in drawn for x, _ in s.points)
    frame = _Frame(min(lowest, 99.0), max(100.0, *(y for s in drawn for _, y in s.points)))
    body = "".join((_grid(frame), *(_line(s, frame) for s in drawn), _labels(xlabel, ylabel)))
    legend = "".join(f'<li class="{s.style}">{escape(s.name)}</li>' for s in drawn)
    title = escape(f"{ylabel} over {xlabel}", quote=True)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{body}</svg>'
        f'<ul class="legend">{legend}</ul>'
    )


@dataclass(frozen=True)
class _Frame:
    """From percent to pixels."""

    lowest: float
    highest: float

    def x(self, value: float) -> float:
        share = (100 - value) / (100 - self.lowest)
        return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - _BOTTOM - value / self.highest * (HEIGHT - _TOP - _BOTTOM), 1)


def _finite(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    return tuple((x, y) for x, y in points if math.isfinite(x) and math.isfinite(y))


def _grid(frame: _Frame) -> str:
    parts = []
    for value in range(0, int(frame.highest) + 1, 20):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4}" text-anchor="end">{value}</text>')
    step = next(step for step in (1, 2, 5, 10, 20) if (100 - frame.lowest) / step <= 9 or step == 20)
    for value in range(100, math.ceil(frame.lowest) - 1, -step):
        x = frame.x(value)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{x}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{value}</text>')
    return "".join(parts)


def _line(series: Series, frame: _Frame) -> str:
    places = [(frame.x(x), frame.y(y)) for x, y in series.points]
    path = " ".join(f"{x},{y}" for x, y in places)
    dots = "" if series.style == "level" else "".join(f'<circle cx="{x}" cy="{y}" r="3.2"/>' for x, y in places)
    bars = "".join(
        f'<line x1="{frame.x(x)}" x2="{frame.x(x)}" y1="{frame.y(low)}" y2="{frame.y(high)}"/>'
        for x, low, high in series.ranges
        if math.isfinite(low) and math.isfinite(high)
    )
    return f'<g class="{series.style}"><polyline points="{path}"/>{bars}{dots}</g>'


def _labels(xlabel: str, ylabel: str) -> str:
    middle = (HEIGHT - _BOTTOM + _TOP) / 2
    return (
        f'<text class="axis" x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(xlabel)}</text>'
        f'<text class="axis" x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        f"{escape(ylabel)}</text>"
    )
