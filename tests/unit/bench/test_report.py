"""What the benchmarks make of their samples."""

from __future__ import annotations

import dataclasses
import json
from xml.etree import ElementTree

import pytest

from bench.plot import SPAN, share, svg
from bench.report import Curve, Result, Series


def result(ratio: float, *, reach: float = 1.5, at_most: bool = True) -> Result:
    samples = Series("one", "ms", (1.0, 3.0, 2.0))
    return Result(
        "b<1>", ratio, of="this", reach=reach, at_most=at_most, series=(samples,), facts={"pods": 3}
    )


@pytest.mark.parametrize(
    ("samples", "q", "expected"),
    [
        ((5.0,), 0.99, 5.0),
        (tuple(float(n) for n in range(1, 101)), 0.99, 99.0),
        (tuple(float(n) for n in range(1, 101)), 0.5, 50.0),
        (tuple(float(n) for n in range(100, 0, -1)), 1.0, 100.0),
        ((1.0, 2.0), 0.0, 1.0),
    ],
)
def test_a_quantile_is_a_sample_by_nearest_rank(
    samples: tuple[float, ...], q: float, expected: float
) -> None:
    assert Series("s", "ms", samples).quantile(q) == expected


def test_the_median_of_an_even_number_lies_between() -> None:
    assert Series("s", "ms", (4.0, 1.0, 2.0, 3.0)).median == 2.5


@pytest.mark.parametrize(
    ("ratio", "at_most", "reached"),
    [(1.5, True, True), (1.51, True, False), (1.5, False, True), (1.49, False, False)],
)
def test_a_bound_is_upper_or_lower(ratio: float, at_most: bool, reached: bool) -> None:
    found = result(ratio, at_most=at_most)
    assert found.reached is reached
    assert (share(found) <= 1) is reached


def test_the_last_line_is_json_with_the_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    result(1.23456).print()
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last) == {
        "bench": "b<1>",
        "ratio": 1.2346,
        "reach": 1.5,
        "reached": True,
        "p50": {"one": 2.0},
        "pods": 3,
    }


def test_the_picture_has_a_bar_for_each_result_and_stays_inside() -> None:
    root = ElementTree.fromstring(svg([result(0.1), result(99.0)], "a & b"))
    bars = [float(bar.attrib["width"]) for bar in root.findall("{*}rect")[1:]]
    assert len(bars) == 2
    assert bars[1] / bars[0] == pytest.approx(SPAN / (0.1 / 1.5), rel=0.01)
    assert bars[1] < float(root.attrib["width"])


def test_curves_are_drawn_below_the_bars() -> None:
    with_curves = dataclasses.replace(
        result(1.0),
        curves=(Curve("ours", ((100, 4.0), (5000, 6.0))), Curve("floor", ((100, 2.0), (5000, 2.0)))),
    )
    picture = ElementTree.fromstring(svg([with_curves], "machine"))
    lines = [element for element in picture.iter() if element.tag.endswith("polyline")]
    assert [len(line.attrib["points"].split()) for line in lines] == [2, 2]
    heights = [float(point.split(",")[1]) for point in lines[0].attrib["points"].split()]
    assert heights[1] < heights[0]  # more is further up


def test_what_else_is_demanded_counts() -> None:
    assert not dataclasses.replace(result(1.0), besides=False).reached
