"""The page in a real browser: keys move the gripper, the policy drives, a film is saved, and the console is silent."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from tests.play.browser import Tab, chromium, find
from tests.play.test_server import Served
from wovr_jax.play.programs import Programs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find() is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]

# Where the dark gripper of the true picture is, in pixels; its fingers are open.
GRIPPER = """(() => {
  // Of a copy: a canvas that is read again and again is one that Chromium warns of.
  const canvas = $("true"), { width, height } = canvas;
  const copy = Object.assign(document.createElement("canvas"), { width, height });
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(canvas, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  let x = 0, y = 0, count = 0;
  for (let i = 0; i < data.length; i += 4) if (data[i] + data[i + 1] + data[i + 2] < 240) {
    x += (i / 4) % width; y += Math.floor(i / 4 / width); count++;
  }
  return count ? [x / count, y / count] : null;
})()"""
MIDDLE = "(({{ x, y, width, height }}) => [x + width / 2, y + height / 2])($('{}').getBoundingClientRect())"
PICTURES = "[$('true'), $('imagined')].map((canvas) => canvas.toDataURL())"
STILL = "play.episode && !play.queue.length && !play.asked && play.timer === null"


@pytest.fixture(scope="module")
def tab(programs: Programs, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("profile")
    program = find()
    assert program is not None
    with Served(programs) as served, chromium(program, folder) as tab:
        tab.url = f"http://127.0.0.1:{served.port}/"
        yield tab


@pytest.fixture
def page(tab: Tab) -> Tab:
    tab.said.clear()
    tab.open(tab.url)
    tab.wait("typeof play === 'object' && document.querySelector('#starts button')")
    tab.wait(STILL)
    # One layout for every test: seed 3 has the gripper in the middle.
    tab.ask("begin({ layout: 3 }, 1)")
    return tab


def test_keys_move_the_gripper(page: Tab) -> None:
    for key, axis, way in (("ArrowLeft", 0, -1), ("ArrowRight", 0, 1), ("ArrowUp", 1, -1), ("s", 1, 1)):
        page.ask("begin({ layout: 3 }, 1)")
        before, pictures = page.ask(GRIPPER), page.ask(PICTURES)
        page.press(key, 0.3)
        page.wait(f"play.episode.imagined.length >= 9 && {STILL}")
        after = page.ask(GRIPPER)
        assert way * (after[axis] - before[axis]) > 1, (key, before, after)
        assert abs(after[1 - axis] - before[1 - axis]) < 0.5, (key, before, after)
        assert all(new != old for new, old in zip(page.ask(PICTURES), pictures))
    assert page.ask("$('instruction').textContent").startswith("pick up the ")
    assert page.said == []


def test_a_tap_is_one_step_and_nothing_moves_without_a_command(page: Tab) -> None:
    before = page.ask(GRIPPER)
    page.press("d")
    page.wait(f"play.episode.imagined.length === 9 && {STILL}")
    # A step is 0.75 of 0.08 of the table, of 16 pixels.
    assert page.ask(GRIPPER)[0] - before[0] == pytest.approx(0.75 * 0.08 * 16, abs=0.3)
    page.ask("new Promise((done) => setTimeout(done, 600))")
    assert page.ask("play.episode.imagined.length") == 9 and page.said == []


def test_the_space_bar_closes_the_fingers(page: Tab) -> None:
    page.press(" ")
    page.wait(f"play.episode.imagined.length >= 9 && {STILL}")
    assert page.ask("$('fingers').getAttribute('aria-pressed')") == "true"
    assert page.ask("play.now.every((action) => action[6] === 1)")
    assert page.ask(GRIPPER) is None  # closed fingers are yellow
    page.press("r")
    page.wait(f"play.episode.imagined.length === 1 && {STILL}")
    assert page.ask(GRIPPER) is not None and page.said == []


def test_the_pad_pushes(page: Tab) -> None:
    before = page.ask(GRIPPER)
    x, y = page.ask(MIDDLE.format("pad"))
    mouse = {"button": "left", "buttons": 1, "clickCount": 1}
    page.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, **mouse)
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x - 50, y=y, **mouse)
    page.wait("play.episode.imagined.length >= 9")
    page.call("Input.dispatchMouseEvent", type="mouseReleased", x=x - 50, y=y, **mouse)
    page.wait(STILL)
    assert page.ask(GRIPPER)[0] < before[0] - 2 and page.ask("play.push") is None and page.said == []


def test_the_policy_drives_to_the_end_of_an_episode(page: Tab) -> None:
    page.ask("$('policy').click()")
    page.wait(f"play.episode.imagined.length > 16 && {STILL}")
    assert page.ask("play.episode.imagined.length") == 17 and page.ask("play.driver") == "person"
    # The same moves again, under other noise: the true course is the same.
    truth = page.ask("play.episode.true.map((frame) => frame.join())")
    dream = page.ask("play.episode.imagined.map((frame) => frame.join())")
    page.ask("$('again').click()")
    page.wait(f"play.episode.before && play.episode.imagined.length > 16 && {STILL}")
    assert page.ask("play.episode.true.map((frame) => frame.join())") == truth
    assert page.ask("play.episode.imagined.map((frame) => frame.join())") != dream
    assert page.ask("document.querySelectorAll('#chart .before').length") == 1 and page.said == []


def test_a_film_is_saved(page: Tab) -> None:
    page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(page.folder))
    page.press("ArrowUp", 0.2)
    page.wait(f"play.episode.imagined.length >= 9 && {STILL}")
    page.ask("$('film').click()")
    page.wait("!$('film').disabled")
    saved = pathlib.Path(page.folder) / "small-two-worlds.mp4"
    for _ in range(200):
        if saved.exists() and saved.stat().st_size:
            break
        page.ask("new Promise((done) => setTimeout(done, 50))")
    assert saved.read_bytes()[4:8] == b"ftyp" and page.said == []


def test_a_start_is_picked_and_a_look_back(page: Tab) -> None:
    page.ask("$('tab-keyframe').click()")
    page.wait("document.querySelectorAll('#starts button').length === 12")
    page.ask("document.querySelector('#starts button').click()")
    page.wait("play.place.row === 6 && play.episode.offset > 0")
    page.press("ArrowUp", 0.2)
    page.wait(f"play.episode.imagined.length >= 9 && {STILL}")
    latest = page.ask(PICTURES)
    x, y = page.ask("(({ x, y, height }) => [x + 36, y + height / 2])($('chart').getBoundingClientRect())")
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    page.wait("play.shown === 0")
    assert page.ask(PICTURES) != latest
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=5)
    page.wait("play.shown === play.episode.imagined.length - 1")
    assert page.ask(PICTURES) == latest and page.said == []


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_screen(page: Tab, width: int) -> None:
    page.open(page.url, width, 844, phone=width < 500)
    page.wait(f"typeof play === 'object' && {STILL}")
    assert page.ask("document.documentElement.scrollWidth <= innerWidth")
    # Both worlds and what drives them are seen at once, without scrolling.
    assert page.ask("$('drive').getBoundingClientRect().bottom <= innerHeight")
    side, shown = page.ask("[$('true').width, $('true').getBoundingClientRect().width * devicePixelRatio]")
    assert shown % side == 0, "pixels of a frame are as large as each other"
    assert page.said == []


def test_what_the_server_refuses_is_shown(page: Tab) -> None:
    page.ask("begin({ row: 1000 })")
    page.wait("$('trouble').open")
    assert "expected 0 to 17" in page.ask("$('trouble-said').textContent")
    page.ask("play.socket.close()")
    page.wait("$('trouble-said').textContent.includes('has ended')")
    page.ask("$('trouble-again').click()")
    page.wait(f"play.socket.readyState === WebSocket.OPEN && {STILL}")
    assert page.said == []


def test_a_pointer_leaves_the_keys_to_the_driver(page: Tab) -> None:
    x, y = page.ask(MIDDLE.format("temperature"))
    mouse = {"button": "left", "clickCount": 1, "x": x, "y": y}
    for kind in ("mousePressed", "mouseReleased"):
        page.call("Input.dispatchMouseEvent", type=kind, **mouse)
    warmth = page.ask("$('warmth').textContent")
    assert warmth == "1.0"
    page.ask("new Promise((done) => setTimeout(done, 50))")
    page.press("ArrowLeft", 0.2)
    page.wait(f"play.episode.imagined.length >= 9 && {STILL}")
    assert page.ask("$('warmth').textContent") == warmth and page.said == []


def test_without_a_simulator_the_world_model_is_played_alone(tab: Tab, programs: Programs) -> None:
    source = dataclasses.replace(programs.source, sim=None)
    with Served(Programs(source)) as served:
        tab.open(f"http://127.0.0.1:{served.port}/")
        tab.wait(f"typeof play === 'object' && document.querySelector('#starts button') && {STILL}")
        assert "LIBERO cannot be played" in tab.ask("$('absent').textContent")
        assert tab.ask("$('true').hidden && $('random').disabled && play.place.row === 0")
        before = tab.ask("$('imagined').toDataURL()")
        tab.press("ArrowLeft", 0.3)
        tab.wait(f"play.episode.imagined.length >= 9 && {STILL}")
        assert tab.ask("$('imagined').toDataURL()") != before and tab.said == []
