"""The pages in a real browser: nothing is cut off on a phone, themes follow the reader, films can be stopped."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import numpy as np
import pytest

from tests.play.browser import Tab, chromium, find
from tests.report.test_compare import make_run
from tests.report.test_page import results
from wovr_jax.core import pixels
from wovr_jax.report import compare, page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find() is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    program = find()
    assert program
    with chromium(program, tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / name, seed=seed) for seed, name in enumerate(("a_run_with_a_rather_long_name", "b", "c"))]
    for row in results()["comparison"]:
        for film in row["videos"]:
            (runs[0] / film["path"]).parent.mkdir(exist_ok=True)
            pixels.video(runs[0] / film["path"], np.zeros((16, 32, 66, 3), np.uint8), fps=10)
    return {"run": page.write(runs[0]), "comparison": compare.write(compare.read(runs), folder / "comparison.html")}


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["run", "comparison"])
def test_it_fits_and_follows_the_theme(tab: Tab, pages, name: str, width: int, dark: bool) -> None:
    tab.open(f"file://{pages[name]}", width, 900, dark=dark, phone=width < 640)
    tab.wait("document.readyState == 'complete'")
    assert tab.ask("document.documentElement.scrollWidth <= innerWidth")
    # Whatever is wider than the page lies in a box of its own that can be moved.
    wide = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.wide, pre, svg')
        && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    assert tab.ask(wide) == []
    paper, ink = tab.ask("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    light = [sum(map(int, colour[4:-1].split(","))) for colour in (paper, ink)]
    assert (light[0] < 100 and light[1] > 600) if dark else (light[0] > 700 and light[1] < 150)
    # The answer is on the first screen.
    assert tab.ask("document.querySelector('.lead').getBoundingClientRect().bottom < innerHeight")
    assert tab.said == []


def test_films_have_controls_beside_the_picture(tab: Tab, pages) -> None:
    tab.open(f"file://{pages['run']}", 390, 900, phone=True)
    tab.wait("document.readyState == 'complete'")
    tab.wait("[...document.querySelectorAll('video')].every(v => v.videoWidth)")
    films = tab.ask(
        "[...document.querySelectorAll('video')].map(v => "
        "[v.controls, v.clientHeight - v.clientWidth * v.videoHeight / v.videoWidth])"
    )
    assert films and all(shown and strip >= 50 for shown, strip in films)


def test_the_line_to_play_is_there(tab: Tab, pages) -> None:
    tab.open(f"file://{pages['run']}")
    tab.wait("document.readyState == 'complete'")
    assert tab.ask("document.querySelector('.play code').innerText").endswith(f" {pages['run'].parent} --open")
