"""A picture of ratios and their bounds, as SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from bench.report import Curve, Result

ROW, LEFT, WIDTH, SPAN = 34, 130, 720, 2.5
"""Pixels of a row, of the names, of the whole; and the ratio at the right end, in bounds."""
CHART = 220
"""Pixels of the curves."""


def svg(results: Sequence[Result], caption: str) -> str:
    """One bar per benchmark: its ratio as a share of its bound, which is the line in the middle.

    A ratio that must not fall below its bound is drawn inverted, so that shorter is better everywhere.
    """
    curves = [curve for result in results for curve in result.curves]
    bars = ROW * (len(results) + 2)
    height = bars + (CHART + 3 * ROW if curves else 0)
    scale = (WIDTH - LEFT - 150) / SPAN
    bound_x = LEFT + scale
    rows = [_row(result, number, scale) for number, result in enumerate(results, 1)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            'font-family="sans-serif" font-size="13">',
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            '<text x="10" y="20">ratio to the floor, bound = 1 (shorter is better)</text>',
            *rows,
            f'<line x1="{bound_x}" y1="{ROW * 0.8}" x2="{bound_x}" y2="{bars - ROW}" stroke="black"/>',
            *(_chart(curves, bars) if curves else ()),
            f'<text x="10" y="{height - 10}" font-size="10">{escape(caption)}</text>',
            "</svg>\n",
        ]
    )


def _chart(curves: Sequence[Curve], top: int) -> list[str]:
    """Milliseconds over nodes, both by powers: a straight line of slope 1 is what grows as the fleet does."""
    points = [point for curve in curves for point in curve.points]
    low_x, high_x = (math.log(pick(x for x, _ in points)) for pick in (min, max))
    low_y, high_y = (math.log(pick(y for _, y in points)) for pick in (min, max))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - low_x) / (high_x - low_x or 1)
        up = (math.log(y) - low_y) / (high_y - low_y or 1)
        return LEFT + across * (WIDTH - LEFT - 150), top + CHART - up * (CHART - ROW)

    drawn = [f'<text x="10" y="{top}">milliseconds of the machine for one, by nodes</text>']
    for curve, colour in zip(curves, itertools.cycle(("#37a", "#999", "#a73")), strict=False):
        at = [place(x, y) for x, y in curve.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn.append(f'<text x="{at[-1][0] + 8:.1f}" y="{at[-1][1] + 4:.1f}">{escape(curve.name)}</text>')
        drawn += [
            f'<text x="{x:.1f}" y="{y - 6:.1f}" font-size="10">{cost:.2g}</text>'
            for (x, y), (_, cost) in zip(at, curve.points, strict=True)
        ]
    below = top + CHART + ROW // 2
    drawn += [
        f'<text x="{place(x, points[0][1])[0]:.1f}" y="{below}" font-size="10">{x:g}</text>'
        for x, _ in curves[0].points
    ]
    return drawn


def share(result: Result) -> float:
    """The ratio in bounds: at most 1 when the bound is kept."""
    return result.ratio / result.reach if result.at_most else result.reach / result.ratio


def _row(result: Result, number: int, scale: float) -> str:
    y = ROW * number
    length = min(share(result), SPAN) * scale
    colour = "#3a7" if result.reached else "#c53"
    bound = f"{'≤' if result.at_most else '≥'} {result.reach:g}"
    return (
        f'<text x="10" y="{y + 15}">{escape(result.bench)}</text>'
        f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="20" fill="{colour}"/>'
        f'<text x="{LEFT + length + 6:.1f}" y="{y + 15}">{result.ratio:.2f} ({escape(bound)})</text>'
    )
