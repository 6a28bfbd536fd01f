"""Small figures, read back from their HTML and SVG."""

from __future__ import annotations

import re

import pytest

from wovr_jax.report import figures


def test_curves_break_where_a_value_is_missing_and_stay_small():
    drawn = figures.draw_curve([(0, 1.0), (1, 2.0), (2, None), (3, 1.0), (4, 2.0)], "ratio")
    assert re.search(r'class="line" d="M[^M]+M[^M]+"', drawn)
    assert figures.draw_curve([(0, None)], "nothing") == ""
    long = figures.draw_curve([(i, float(i % 7)) for i in range(50_000)], "long")
    assert long.count("L") <= figures.MOST_POINTS
    assert figures.draw_curve([(0, 5.0), (1, 5.0)], "flat")


@pytest.mark.parametrize(
    ("value", "says"), [(0, "0"), (0.5, "0.5"), (3.1e-5, "3.1e-05"), (1234, "1234"), (12345, "12.3k"), (-2e6, "-2M")]
)
def test_short_numbers(value, says):
    assert figures.shorten(value) == says


def test_the_bar_of_agreement_shows_both_rates():
    drawn = figures.draw_agreement([("one <policy>", {"tp": 30, "fp": 20, "fn": 10, "tn": 40}, "")])
    assert drawn.count("<div") == drawn.count("</div>")
    assert 'class="span imagined" style="width:50.00%"' in drawn
    assert 'class="span true" style="margin-left:20.00%;width:40.00%"' in drawn
    assert "imagined success only: 20 of 100" in drawn


def test_rates_lie_where_their_numbers_are_on_either_axis():
    points = [(100.0, 0.0, 0.0, 0.0), (200.0, 0.5, 0.4, 0.6), (400.0, 1.0, 1.0, 1.0)]
    for log, middle in ((False, 193.3), (True, 268.0)):
        drawn = figures.draw_rates([("one <policy>", points), ("other", points[:1])], "episodes", log=log)
        assert [float(x) for x in re.findall(r'circle class="dot series s0" cx="([\d.]+)"', drawn)] == [44, middle, 492]
        assert "one &lt;policy&gt;, episodes 200: 50.0%, 95% between 40.0% and 60.0%" in drawn
        assert "episodes 100: 0.0%<" in drawn, "no interval where there is none"


def test_an_interval_is_where_its_numbers_are():
    drawn = figures.draw_intervals([("gain", [("true", 0.1, 0.0, 0.2)], "+10.0")], -0.1, 0.3)
    assert 'left:25.0%;width:50.0%"' in drawn
    assert 'title="10.0, 95% between 0.0 and 20.0"' in drawn
    assert drawn.count('<s class="zero" style="left:25.0%">') == 1, "the line of no gain"


def test_a_dot_stands_where_both_rates_are_with_both_intervals():
    drawn = figures.draw_scatter([("one <policy>", 2, (0.0, 0.5, 0.25, 0.75), (0.0, 1.0, 0.5, 1.0))], "true, imagined")
    # 216 pixels across from 34 on, 200 up from 210 on.
    assert 'circle class="dot series s2" cx="142.0" cy="10.0"' in drawn
    assert 'class="line series s2" x1="88.0" y1="10.0" x2="196.0" y2="10.0"' in drawn
    assert 'class="line series s2" x1="142.0" y1="110.0" x2="142.0" y2="10.0"' in drawn
    assert "one &lt;policy&gt;: 50.0% across (95% between 25.0% and 75.0%), 100.0% up" in drawn
