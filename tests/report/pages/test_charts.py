import math
import re
from xml.etree import ElementTree

import pytest

from vlcpt.report.pages.charts import MEANS, POINTS, Curve, _shape, draw, thinned


def noisy(count):
    return [(float(step), float(step % 7)) for step in range(count)]


def paths(chart):
    """For each path in the picture that a curve's colour has, its number of points."""
    root = ElementTree.fromstring(chart.svg)
    lines = [one for one in root.iter("path") if re.search(r"stroke-c\d", one.get("class", ""))]
    return [
        len(re.findall(r"[ML]", one.get("d"))) for one in lines if one.get("clip-path") or "L" in one.get("d")
    ]


def test_a_curve_has_all_its_points():
    chart = draw("a", "Loss", "nats", [Curve("loss", [(float(n), math.sqrt(n)) for n in range(50)])])

    assert paths(chart) == [50]


def test_a_long_curve_is_drawn_as_its_means_over_its_extremes():
    chart = draw("a", "Loss", "nats", [Curve("loss", noisy(100_000))])

    extremes, means = paths(chart)
    assert means == MEANS
    assert MEANS < extremes <= POINTS + 2
    assert "lowest and highest" in chart.note
    assert len(chart.svg) < 15_000


def test_thinning_keeps_the_lowest_and_the_highest():
    points = noisy(50_000)
    points[12_345], points[40_001] = (12_345.0, 99.0), (40_001.0, -99.0)

    found = thinned(points)

    assert {(12_345.0, 99.0), (40_001.0, -99.0), points[0], points[-1]} <= {*found}
    assert len(found) <= POINTS + 2


def test_values_that_are_not_finite_are_left_out():
    chart = draw(
        "a", "Loss", "nats", [Curve("loss", [(1.0, 2.0), (2.0, math.nan), (3.0, math.inf), (4.0, 1.0)])]
    )

    assert paths(chart) == [2]


def test_there_is_no_chart_without_a_point():
    assert draw("a", "Loss", "nats", [Curve("loss", []), Curve("other", [(1.0, math.nan)])]) is None


def test_a_picture_is_the_same_each_time():
    curves = [Curve("a", noisy(50)), Curve("b", noisy(40))]

    assert draw("a", "Loss", "nats", curves).svg == draw("a", "Loss", "nats", curves).svg


def test_a_picture_has_no_style_colour_or_font_of_its_own():
    """The page's policy lets no style in, and its style sheet knows light, dark and print."""
    svg = draw("a", "Loss", "nats", [Curve("a", noisy(500)), Curve("b", noisy(40))]).svg

    assert not re.search(r"style=|<style|font|#0[0-9a-f]{5}|rgb", svg)
    assert "stroke-c1" in svg and "stroke-c2" in svg


def test_ids_of_two_pictures_do_not_meet_and_references_lead_to_ids():
    curves = [Curve("a", noisy(50)), Curve("b", noisy(40))]
    text = "".join(draw(key, "Loss", "nats", curves).svg for key in ("one", "two"))

    ids = re.findall(r' id="([^"]+)"', text)
    used = re.findall(r'(?:url\(|href=")#([^)"]+)', text)
    assert len(ids) == len({*ids})
    assert {*used} <= {*ids}
    assert used


def test_a_screen_reader_hears_what_a_picture_shows():
    root = ElementTree.fromstring(draw("a", "Loss", "nats", [Curve("held", [(0.0, 4.0), (9.0, 1.5)])]).svg)

    assert root.get("role") == "img"
    assert root.get("aria-labelledby").split() == [root.find("title").get("id"), root.find("desc").get("id")]
    assert "from 4 at step 0 to 1.5 at step 9" in root.find("desc").text


def test_lines_differ_in_more_than_colour():
    """For who cannot tell colours apart, and on grey paper."""
    shapes = [_shape(style) for style in range(24)]

    assert len({(dashes, marker) for _, dashes, marker in shapes[:5]}) == 5
    assert len({*shapes}) == 24


@pytest.mark.parametrize("name", ["$x^2$", "a<b>&", "扫描报告", "$\\frac{"])
def test_names_are_never_read_as_formulas_or_markup(name):
    chart = draw("a", name, "nats", [Curve(name, [(0.0, 1.0), (1.0, 2.0)]), Curve("b", [(0.0, 1.0)])])

    assert [one for _, one in chart.keys] == [name, "b"]
    assert ElementTree.fromstring(chart.svg).find("title").text == name
