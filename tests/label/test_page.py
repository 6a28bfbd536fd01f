"""The page of labels in a real browser: keys mark, marks are on the disk, undo takes them back."""

from __future__ import annotations

import numpy as np
import pytest

from tests.label.small import STEPS, Served, record
from tests.play.browser import Tab, chromium, find
from wovr_jax.data.recordings import read_labels
from wovr_jax.label.messages import Scores

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find() is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]

READY = "typeof label === 'object' && label.told && label.films.get(label.item)?.frame.length === last() + 1"
# The brightness of what is seen, of a copy: a canvas that is read again and again is one that Chromium warns of.
SHADE = """(() => {
  const copy = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage($("frame"), 0, 0);
  return context.getImageData(0, 0, 1, 1).data[0];
})()"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with chromium(str(find()), tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def served(tmp_path):
    record(tmp_path / "recordings", 4)
    with Served(tmp_path / "recordings") as running:
        yield running


@pytest.fixture
def page(tab: Tab, served: Served) -> Tab:
    tab.said.clear()
    tab.open(f"http://127.0.0.1:{served.port}/")
    tab.wait(READY)
    return tab


def outcomes(served: Served) -> dict[int, tuple]:
    labels = read_labels(served.store.folder)
    return {
        int(name.split("-")[2]): (label.outcome, label.first_success, label.lies_from)
        for (name, _), label in labels.items()
    }


def test_a_film_plays_and_keys_go_through_it(page: Tab) -> None:
    page.wait(f"label.timer === null && label.at === {STEPS}")  # it plays once when it is opened
    assert page.ask(SHADE) == 10 * STEPS
    for key, frame in (("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", STEPS)):
        page.press(key)
        page.wait(f"label.at === {frame}")
        assert page.ask(SHADE) == 10 * frame
    assert page.ask("$('step').textContent").startswith("Frame 6 of 6")
    page.press(" ")  # at the end: from the beginning
    page.wait("label.timer !== null && label.at < 3")
    page.press(" ")
    assert page.ask("label.timer") is None
    page.press("+")
    assert page.ask("$('step').textContent").endswith("20 frames a second") and page.said == []


def test_keys_mark_and_go_on_and_undo_comes_back(page: Tab, served: Served) -> None:
    assert page.ask("$('left').textContent") == "4 of 4 left"
    page.press("f")
    page.wait("label.item === 1")
    assert outcomes(served) == {0: ("failure", None, None)}
    for key in ("Home", "ArrowRight", "ArrowRight", "m"):
        page.press(key)
    page.wait("label.told.items[1].label")
    assert page.ask("label.item") == 1 and outcomes(served)[1] == ("success", 2, None)
    assert page.ask("$('verdict').textContent") == "A success from frame 2 on."
    page.press("s")  # keeps the moment, and goes on
    page.wait("label.item === 2")
    assert outcomes(served)[1] == ("success", 2, None)
    page.press("d")
    page.wait("label.item === 3")
    assert page.ask("$('left').textContent") == "1 of 4 left"
    page.press("u")
    page.wait("label.item === 2 && !label.told.items[2].label")
    assert 2 not in outcomes(served) and page.ask("$('left').textContent") == "2 of 4 left"
    page.press("u")
    page.press("u")
    page.wait("label.item === 1 && !label.told.items[1].label")
    assert outcomes(served) == {0: ("failure", None, None)} and page.said == []


def test_where_it_lies(page: Tab, served: Served) -> None:
    for key in ("End", "ArrowLeft", "l"):
        page.press(key)
    page.wait("label.told.items[0].label")
    assert outcomes(served)[0] == ("success", None, STEPS - 1)
    assert page.ask("!$('lies').hidden && $('verdict').textContent.includes('It lies from frame 5 on')")
    page.press("l")  # at the same frame: it does not
    page.wait("label.told.items[0].label.lies_from === null")
    assert page.ask("$('lies').hidden") and page.said == []


def test_the_pointer_does_what_the_keys_do(page: Tab, served: Served) -> None:
    page.ask("$('go-on').click()")
    x, y, width = page.ask(
        "(({ x, y, width, height }) => [x, y + height / 2, width])($('line').getBoundingClientRect())"
    )
    mouse = {"button": "left", "buttons": 1, "clickCount": 1, "x": x + 0.5 * width, "y": y}
    page.call("Input.dispatchMouseEvent", type="mousePressed", **mouse)
    page.call("Input.dispatchMouseEvent", type="mouseReleased", **mouse)
    page.wait("label.at === 3 && label.timer === null")
    page.ask("$('moment').click()")
    page.wait("label.told.items[0].label")
    page.ask("document.querySelector('#list [data-item=\"2\"]').click()")
    page.wait("label.item === 2")
    page.ask("$('failure').click()")
    page.wait("label.told.items[2].label")
    page.ask("new Promise((done) => setTimeout(done, 700))")
    assert page.ask("label.item") == 2, "it goes on only where that is wanted"
    page.press("n")
    page.wait("label.item === 3")
    assert outcomes(served) == {0: ("success", 3, None), 2: ("failure", None, None)} and page.said == []


def test_all_are_labelled_and_the_page_opens_again_with_them(page: Tab, served: Served) -> None:
    for number in range(4):
        page.wait(f"label.item === {number}")
        page.press("s")
        page.wait(f"label.told.items[{number}].label")
    page.wait("$('verdict').textContent.includes('All of them are labelled')")
    page.open(page.ask("location.href"))
    page.wait(READY)
    assert page.ask("$('left').textContent") == "All 4 labelled"
    assert page.ask("$('success').getAttribute('aria-pressed')") == "true" and page.said == []


def test_what_is_refused_is_shown(page: Tab, served: Served) -> None:
    page.press("u")
    page.wait("$('trouble').open")
    assert "nothing to undo" in page.ask("$('trouble-said').textContent")
    page.ask("$('trouble-again').click()")
    page.ask("label.socket.close()")
    page.wait("$('trouble').open && $('trouble-said').textContent.includes('has ended')")
    page.ask("$('trouble-again').click()")
    page.wait(f"label.socket.readyState === WebSocket.OPEN && {READY}")
    assert page.said == []


def test_what_the_classifier_contradicts_stands_first(tab: Tab, tmp_path) -> None:
    record(tmp_path / "recordings", 3)
    probs = {number: np.linspace(0, 0.4, STEPS + 1, dtype=np.float32) for number in range(3)}
    probs[1] = np.linspace(0, 0.9, STEPS + 1, dtype=np.float32)  # a failure
    with Served(tmp_path / "recordings", Scores("robot, round 0", 0.3, probs)) as served:
        tab.said.clear()
        tab.open(f"http://127.0.0.1:{served.port}/")
        tab.wait(READY)
        assert tab.ask("label.item") == 1 and tab.ask("label.order") == [1, 0, 2]
        assert tab.ask("document.querySelectorAll('#list .against').length") == 1
        assert tab.ask("document.querySelectorAll('#curve path').length") == 2
        tab.press("End")
        assert "classifier 0.90" in tab.ask("$('step').textContent")
        assert "classifier of robot, round 0" in tab.ask("$('facts').textContent") and tab.said == []


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_screen(page: Tab, width: int) -> None:
    page.open(page.ask("location.href"), width, 844, phone=width < 500)
    page.wait(READY)
    assert page.ask("document.documentElement.scrollWidth <= innerWidth")
    # Film and marks are seen at once, without scrolling.
    assert page.ask("$('undo').getBoundingClientRect().bottom <= innerHeight")
    side, shown = page.ask("[$('frame').width, $('frame').getBoundingClientRect().width * devicePixelRatio]")
    assert shown % side == 0, "pixels of a frame are as large as each other"
    assert page.said == []
