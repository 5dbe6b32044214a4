"""Lines over the shifts of a stream as an SVG file, by hand: it needs nothing installed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 860, 400
LEFT, RIGHT, TOP, BOTTOM = 50, 170, 34, 100
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Okabe and Ito's palette, which readers with any colour vision can tell apart."""
DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 5", "1 2")


def drawn(lines: Mapping[str, Sequence[float]], places: Sequence[str], title: str) -> str:
    """An SVG document.

    Args:
        lines: name -> one value for each place.
        places: names along the stream.
        title: above the picture.
    """
    values = [value for line in lines.values() for value in line]
    unit = 1.0 if max(values) - min(values) < 12 else 5.0
    low, high = (unit * bound(edge(values) / unit) for bound, edge in ((math.floor, min), (math.ceil, max)))

    def x_of(index: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * index / max(1, len(places) - 1)

    def y_of(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="11" fill="#1b1f24"><title>{escape(title)}</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fffffe"/>',
        f'<text x="{LEFT}" y="18" font-size="13">{escape(title)}</text>',
    ]
    for tick in range(round((high - low) / unit) + 1):
        value = low + unit * tick
        colour = "#1b1f24" if value == 0 else "#d6dae0"
        y = y_of(value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{colour}" stroke-width="0.7"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:+g}</text>')
    for index, place in enumerate(places):
        x, y = x_of(index), HEIGHT - BOTTOM + 14
        parts.append(
            f'<text transform="translate({x:.1f} {y}) rotate(-40)" text-anchor="end">'
            f"{escape(place.replace('_', ' '))}</text>"
        )
    for number, (name, line) in enumerate(lines.items()):
        points = " ".join(f"{x_of(index):.1f},{y_of(value):.1f}" for index, value in enumerate(line))
        look = (
            f'fill="none" stroke="{COLOURS[number]}" stroke-width="1.8" stroke-dasharray="{DASHES[number]}"'
        )
        parts.append(f'<polyline points="{points}" {look}/>')
        x, y = WIDTH - RIGHT + 14, TOP + 18 * number + 6
        parts.append(f'<path d="M{x} {y}h26" {look}/><text x="{x + 32}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])
