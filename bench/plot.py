"""A picture of ratios and their bounds, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from bench.report import Result

ROW, LEFT, WIDTH, SPAN = 34, 130, 720, 2.5
"""Pixels of a row, of the names, of the whole; and the ratio at the right end, in bounds."""


def svg(results: Sequence[Result], caption: str) -> str:
    """One bar per benchmark: its ratio as a share of its bound, which is the line in the middle.

    A ratio that must not fall below its bound is drawn inverted, so that shorter is better everywhere.
    """
    height = ROW * (len(results) + 2)
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
            f'<line x1="{bound_x}" y1="{ROW * 0.8}" x2="{bound_x}" y2="{height - ROW}" stroke="black"/>',
            f'<text x="10" y="{height - 10}" font-size="10">{escape(caption)}</text>',
            "</svg>\n",
        ]
    )


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
