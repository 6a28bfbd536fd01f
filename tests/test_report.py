"""The page of a run and its figures, from made-up results."""

from __future__ import annotations

import html.parser
import json
import re

import numpy as np
import pytest

from wovr_jax import figures, metrics, report


def rate(successes: int, n: int = 512) -> dict:
    low, high = metrics.wilson(successes, n)
    return {"n": n, "successes": successes, "rate": successes / n, "low": low, "high": high}


def results() -> dict:
    rng = np.random.default_rng(0)
    return {
        "name": "pace <embedded>",
        "job": "pace",
        "seed": 3,
        "versions": {"python": "3.11.7", "jax": "0.10.2", "flax": "0.12.8"},
        "device": "cpu, 2 cores",
        "seconds": 1043.0,
        "peak_rss_gb": 3.42,
        "phases": [
            {
                "name": name,
                "true_success": rate(true),
                "greedy": rate(greedy),
                "imagined_success": imagined,
                "subgoals": {"reached": 0.96, "grasped": 0.8 + i / 20, "carried": 0.6 + i / 10, "released": true / 512},
            }
            for i, (name, true, greedy, imagined) in enumerate(
                [("base", 211, 170, None), ("after imagined GRPO", 274, 268, 0.61), ("after PACE", 321, 330, 0.66)]
            )
        ],
        "comparison": [
            {"phase": "after imagined GRPO", "tp": 121, "fp": 23, "fn": 15, "tn": 97},
            {"phase": "after PACE", "tp": 148, "fp": 11, "fn": 14, "tn": 83},
        ],
        "reward": {
            "bins": [
                {
                    "low": i / 10,
                    "high": (i + 1) / 10,
                    "mean_prob": i / 10 + 0.05,
                    "frequency": (i / 9) ** 1.4,
                    "count": c,
                }
                for i, c in enumerate([9120, 610, 240, 0, 95, 80, 77, 102, 230, 2900])
            ],
            "threshold": 0.8,
            "frame_tpr": 0.943,
            "frame_fpr": 0.012,
        },
        "keyframes": {
            "steps": rng.integers(6, 22, 300).tolist(),
            "rules": {"before_failure": 240, "gripper_event": 60},
        },
        "ledger": {
            "demonstrations": {"true_steps": 18432, "imagined_frames": 0, "seconds": 8.1},
            "sft": {"true_steps": 0, "imagined_frames": 0, "seconds": 131.0},
            "collect-0": {"true_steps": 9216, "imagined_frames": 0, "seconds": 9.9},
            "world-0": {"true_steps": 0, "imagined_frames": 0, "seconds": 311.0},
            "reward-0": {"true_steps": 0, "imagined_frames": 0, "seconds": 62.0},
            "grpo-1": {"true_steps": 0, "imagined_frames": 27648, "seconds": 244.0},
        },
        "videos": [
            {"title": "Pick up the red block: imagined left, true right", "path": "videos/one.mp4"},
            {"title": "A strip of frames", "path": "videos/strip.png"},
            {"title": "One that was lost", "path": "videos/lost.mp4"},
        ],
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with everything a report reads."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "results.json").write_text(json.dumps(results()))
    (folder / "config.json").write_text(json.dumps({"job": "pace", "world": {"chunk": 8}}))
    rng = np.random.default_rng(1)
    with metrics.Log(folder, tensorboard=False) as log:
        for step in range(600):
            noise = rng.normal()
            log.scalars("world-0", step, {"loss": 2 / (1 + step / 40) + 0.05 * noise, "grad_norm": 1 + 0.1 * noise})
        for step in range(24):
            success = 0.45 + step / 110 + 0.03 * rng.normal()
            ratio = float("nan") if step == 9 else 1.0
            values = {"success": success, "loss": -0.01, "kl": step * 1e-4, "ratio": ratio, "kept": 14 + step % 3}
            log.scalars("grpo-1", step, values)
    frames = rng.integers(0, 255, (8, 32, 64, 3), dtype=np.uint8)
    metrics.video(folder / "videos" / "one.mp4", frames)
    (folder / "videos" / "strip.png").write_bytes(b"a picture is only carried over")
    return folder


class Outline(html.parser.HTMLParser):
    """Checks that tags close in order, and keeps text and attributes."""

    EMPTY = ("meta", "img", "circle", "line", "path", "rect", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.sources = [], "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.EMPTY or tag in ("circle", "path", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(run):
    path = report.write(run)
    assert path == run / "report.html"
    assert not (run / "report.html.tmp").exists()
    return path.read_text(encoding="utf-8")


def test_the_page_is_whole_and_alone(page):
    outline = Outline(page)
    assert all(source.startswith("data:") for source in outline.sources)
    assert len(outline.sources) == 2
    assert "<script" not in page
    assert "pace <embedded>" in outline.text, "names are escaped"
    assert page.count("<h2>") == 8


def test_the_page_says_what_the_results_say(page):
    text = re.sub(r"\s+", " ", Outline(page).text)
    assert "from 41.2% (base) to 62.7% (after PACE): +21.5 points" in text
    assert "The policy truly got better." in text
    assert "agree 85.2%, hits 89.0%, false alarms 19.2%" in text
    assert "27,648" in text
    assert "5 min 11 s" in text
    assert "lost.mp4 is not there" in text
    assert "17 min 23 s" in text


def test_a_gain_within_its_interval_is_not_called_one():
    phases = [{"name": "base", "true_success": rate(100, 200)}, {"name": "after", "true_success": rate(104, 200)}]
    assert "no certain change" in report.page({"phases": phases})
    assert "truly got worse" in report.page({"phases": phases, "gain": {"gain": -0.1, "low": -0.2, "high": -0.01}})


@pytest.mark.parametrize("absent", [*results(), "everything"])
def test_what_is_absent_is_left_out(absent):
    shown = {} if absent == "everything" else {name: value for name, value in results().items() if name != absent}
    Outline(report.page(shown))
    report.table(shown)


def test_what_is_empty_is_left_out():
    phase = {"name": "base", "true_success": None, "imagined_success": None, "greedy": None, "subgoals": {}}
    hollow = {"phases": [phase], "comparison": [], "reward": {"bins": []}, "keyframes": {"steps": []}, "ledger": {}}
    text = Outline(report.page(hollow)).text
    assert "Keyframes" not in text
    assert "What it cost" not in text
    assert report.table(hollow).splitlines()[-1].split() == ["base", "-", "-", "-", "-"]


def test_the_table_of_the_terminal():
    lines = report.table(results()).splitlines()
    assert lines[2].split() == ["base", "41.2%", "37.0%", "-", "45.5%", "33.2%", "-"]
    assert "gain +21.5 points, 95% between +15.4 and +27.3" in lines
    assert lines[-1].split() == ["all", "27,648", "27,648", "12", "min", "46", "s"]
    assert len({len(line) for line in lines if line.startswith(("base", "after"))}) == 1


def test_no_results_no_report(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the job first"):
        report.write(tmp_path)


def test_curves_break_where_a_value_is_missing_and_stay_small():
    drawn = figures.curve([(0, 1.0), (1, 2.0), (2, None), (3, 1.0), (4, 2.0)], "ratio")
    assert re.search(r'class="line" d="M[^M]+M[^M]+"', drawn)
    assert figures.curve([(0, None)], "nothing") == ""
    long = figures.curve([(i, float(i % 7)) for i in range(50_000)], "long")
    assert long.count("L") <= figures.MOST_POINTS
    assert figures.curve([(0, 5.0), (1, 5.0)], "flat")


@pytest.mark.parametrize(
    ("value", "says"), [(0, "0"), (0.5, "0.5"), (3.1e-5, "3.1e-05"), (1234, "1234"), (12345, "12.3k"), (-2e6, "-2M")]
)
def test_short_numbers(value, says):
    assert figures.short(value) == says
