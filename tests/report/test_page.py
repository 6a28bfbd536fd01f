"""The page of a run and its tables of text, from made-up results."""

from __future__ import annotations

import contextlib
import fnmatch
import html.parser
import json
import pathlib
import re
import tomllib

import numpy as np
import pytest

from wovr_jax.core import pixels, stats
from wovr_jax.core.log import Log
from wovr_jax.report import page as report
from wovr_jax.report import tables


def rate(successes: int, n: int = 512) -> dict:
    low, high = stats.wilson(successes, n)
    return {"n": n, "successes": successes, "rate": successes / n, "low": low, "high": high}


def gain(won: int, lost: int, n: int = 512) -> dict:
    base = [True] * lost + [False] * (n - lost)
    ours = [False] * lost + [True] * won + [False] * (n - lost - won)
    return dict(zip(("gain", "low", "high"), stats.paired_difference(ours, base), strict=True))


def judged(seed: int) -> dict:
    count = [9120, 610, 240, 0, 95, 80, 77, 102, 230, 2900]
    table = {"predicted": np.arange(0.05, 1, 0.1).tolist(), "observed": np.linspace(0, 1, 10).tolist(), "count": count}
    rates = {"tpr": 0.943 - seed / 10, "fpr": 0.012}
    return {"frame": rates, "episode": rates, "reliability": table | {"error": 0.031}}


def compared(policy: str, world: int, counts: tuple[int, int, int, int], bias: dict, films: list | None = None) -> dict:
    facts = {"policy": policy, "world": f"world model of round {world}", "bias": bias, "psnr": [28.8, 25.4, 23.9]}
    return facts | dict(zip(("tp", "fp", "fn", "tn"), counts, strict=True)) | {"videos": films or []}


def closed(policy: str, world: int, **kinds: tuple[int, int, int, int]) -> dict:
    """A closed loop of these counts (tp, fp, fn, tn) by kind of start."""
    every = tuple(map(sum, zip(*kinds.values(), strict=True)))

    def summary(counts: tuple[int, int, int, int]) -> dict:
        tp, fp, fn, tn = counts
        shares = {
            "false_success": (fp, fp + tn),
            "forced_false_success": (fp // 2, fp + tn),
            "precision": (tp, tp + fp),
        }
        shares |= {"imagined": (tp + fp, sum(counts)), "true": (tp + fn, sum(counts))}
        rates = {name: rate(*share) if share[1] else None for name, share in shares.items()}
        return dict(zip(("tp", "fp", "fn", "tn"), counts, strict=True)) | rates

    parts = {"all": summary(every), "episode_start": None, "keyframe": None}
    parts |= {kind: summary(counts) for kind, counts in kinds.items()}
    return {"policy": policy, "world": f"world model of round {world}"} | parts


def results() -> dict:
    rng = np.random.default_rng(0)
    phases = [("base", 211, 170, None), ("after imagined GRPO", 274, 268, 0.61), ("after PACE", 321, 330, 0.66)]
    loose = {"open_fingers": 0.19, "dropped": 0.3}
    films = [
        {"path": "videos/one.mp4", "true": 0, "imagined": 1},
        {"path": "videos/lost.mp4", "true": 1, "imagined": 1},
    ]
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
                "subgoals": {"carried": 0.6 + i / 10, "reached": 0.96, "released": true / 512, "wrong_object": 0.0},
            }
            | ({"gain": gain(true - 211 + 20, 20)} if i else {})
            for i, (name, true, greedy, imagined) in enumerate(phases)
        ],
        "comparison": [
            compared("after imagined GRPO", 1, (121, 23, 15, 97), gain(23, 15, 256)),
            compared("after PACE", 2, (148, 61, 14, 33), gain(61, 14, 256), films) | loose,
        ],
        "closed_loop": [
            closed("after imagined GRPO", 1, episode_start=(100, 10, 6, 12)),
            closed("after PACE", 2, episode_start=(90, 12, 6, 20), keyframe=(60, 30, 8, 30)),
        ],
        "reward": {"reward-0": {"threshold": 0.8, "real": judged(0), "imagined": judged(1)}},
        "keyframes": {
            "starts-0": {
                "steps": rng.integers(6, 22, 300).tolist(),
                "rules": {"before_failure": 240, "gripper_event": 60},
            }
        },
        "remarks": ["grpo-1: 3 of 12 updates had nothing to learn from"],
        "ledger": {
            "pretrained": {"true_steps": 0, "pretrained_frames": 486400, "imagined_frames": 0, "seconds": 0.1},
            "demonstrations": {"episodes": 800, "true_steps": 19200, "imagined_frames": 0, "seconds": 8.0},
            "sft": {"true_steps": 0, "imagined_frames": 0, "seconds": 131.0},
            "collect-0": {"true_steps": 9216, "imagined_frames": 0, "seconds": 9.9},
            "world-0": {"true_steps": 0, "imagined_frames": 0, "seconds": 311.0},
            "reward-0": {"true_steps": 0, "imagined_frames": 0, "seconds": 62.0},
            "grpo-1": {"true_steps": 0, "imagined_frames": 27648, "seconds": 244.0},
        },
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with everything a report reads."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "results.json").write_text(json.dumps(results()))
    (folder / "config.json").write_text(json.dumps({"job": "pace", "world": {"chunk": 8}}))
    rng = np.random.default_rng(1)
    with contextlib.closing(Log(folder, tensorboard=False)) as log:
        for step in range(600):
            noise = rng.normal()
            log.scalars("world-0", step, {"loss": 2 / (1 + step / 40) + 0.05 * noise, "grad_norm": 1 + 0.1 * noise})
        for step in range(24):
            success = 0.45 + step / 110 + 0.03 * rng.normal()
            ratio = float("nan") if step == 9 else 1.0
            values = {"success": success, "loss": -0.01, "kl": step * 1e-4, "ratio": ratio, "kept": 14 + step % 3}
            log.scalars("grpo-1", step, values)
    frames = rng.integers(0, 255, (8, 32, 64, 3), dtype=np.uint8)
    pixels.video(folder / "videos" / "one.mp4", frames)
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
    assert not list(run.glob("report.html?*")), "nothing is left beside it"
    return path.read_text(encoding="utf-8")


def test_the_page_is_whole_and_alone(page):
    outline = Outline(page)
    assert all(source.startswith("data:video/mp4;base64,") for source in outline.sources)
    assert len(outline.sources) == 1
    assert "<script" not in page
    assert "http" not in page
    assert "$" not in page, "every slot of the template is filled"
    assert "pace <embedded>" in outline.text, "names are escaped"
    assert page.count("<h2>") == 9


def test_the_page_says_what_the_results_say(page):
    text = re.sub(r"\s+", " ", Outline(page).text)
    assert "from 41.2% (base) to 62.7% (after PACE): +21.5 points" in text
    assert "The policy truly got better. With its most likely actions: 33.2%, then 64.5%." in text
    assert "imagination calls 81.6% of 256 episodes a success, the truth 63.3%" in text
    loose = "It also calls 19.0% with fingers that never close and 30.0% with fingers that let go half way a success."
    bias = "+18.4 points (95% between +12.0 and +24.6)"
    assert f"a difference of {bias}; 75 episodes were misjudged. {loose}" in text
    assert "Recorded actions replayed (after PACE, world model of round 2): imagination calls" in text
    # Of 92 failures 42 are paid, of 192 paid ones 150 are true.
    chosen = "Actions chosen in imagination and followed in truth (after PACE, world model of round 2)"
    split = "(37.5% from episode starts, 50.0% from keyframes)"
    forced = "22.8% where each chunk is imagined from the true frames before it"
    assert f"{chosen}: of 92 rollouts that fail in truth, 45.7% (95% between 35.9% and 55.8%) are paid as" in text
    assert f"successes {split}, {forced}; of 192 paid ones, 78.1% (95% between 71.8% and 83.4%) are true." in text
    assert "after imagined GRPO; world 1, episode starts" in text and "45% of failures paid" in text
    assert text.count("fingers that never close") == 1, "older runs did not ask"
    assert "The collections took 9,216 steps of the true simulator. The learner took 0; it learned from 27,648" in text
    assert "grpo-1: 3 of 12 updates had nothing to learn from" in text
    assert "reward-0: threshold 0.8" in text
    assert "240 before failure, 60 gripper event" in text
    assert "5 min 11 s" in text
    assert "17 min 23 s" in text


def with_temperatures() -> dict:
    shown = results()
    for phase, counts in zip(shown["phases"], ((211, 400, 300), (274, 350, 268), (321, 410, 330)), strict=True):
        phase["temperatures"] = [{"temperature": t} | rate(k) for t, k in zip((1.0, 0.3, 0.0), counts, strict=True)]
    shown["phases"][-1] |= {"greedy_gain": gain(50, 20), "best_gain": gain(30, 20)}
    return shown


def test_success_is_held_against_temperature():
    page, text = report.render(with_temperatures()), tables.render_text(with_temperatures())
    said = " ".join(text.split())
    assert "With its most likely actions: 33.2%, then 64.5%, +5.9 points (95% between" in said
    best = "At the temperature that suits each best (chosen on these layouts)"
    assert f"{best}: 78.1% (T = 0.3), then 80.1% (T = 0.3), +2.0 points" in said
    rows = [line.split() for line in text.splitlines()]
    assert ["true", "success", "at", "T", "=", "1", "T", "=", "0.3", "greedy"] in rows
    assert ["base", "41.2%", "78.1%", "58.6%"] in rows
    outline = Outline(page)
    assert "after PACE, temperature 0.3: 80.1%, 95% between" in outline.text
    assert page.count('class="dot series') == 9, "three policies at three temperatures"


def test_a_film_says_who_acts_and_marks_the_wrong_verdict(page):
    text = Outline(page).text
    assert "policy: after PACE; true left, imagined right (world model of round 2)" in text
    assert '<b class="true">true: failure</b><b class="imagined lies">imagined: success</b>' in page
    assert "lost.mp4 is not there" in text
    silent = compared("base", 1, (1, 1, 1, 1), gain(1, 1, 4), [{"path": "videos/one.mp4", "true": 0, "imagined": None}])
    assert "lies" not in report.render({"comparison": [silent]}).split("</style>")[1]


def test_a_difference_within_its_interval_is_not_called_one():
    def page(change):
        shown = results()
        shown["phases"][-1]["gain"] = change
        return report.render(shown)

    assert "That may be chance." in page(gain(24, 20))
    assert "truly got worse" in page(gain(10, 60))


@pytest.mark.parametrize("bias", [gain(60, 8, 256), gain(9, 8, 256), gain(8, 60, 256)])
def test_a_replay_of_recorded_actions_passes_no_verdict_on_a_world(bias):
    shown = results()
    shown["comparison"][-1]["bias"] = bias
    del shown["closed_loop"]
    text = " ".join([report.render(shown).split("</style>")[1], tables.render_text(shown)])
    assert "Recorded actions replayed" in text and not re.search("strict|honest|flatter|believed", text)


def test_a_closed_loop_without_a_case_says_so():
    shown = {"closed_loop": [closed("base", 1, episode_start=(0, 0, 0, 8))]}
    said = " ".join(tables.render_text(shown).split())
    assert (
        "of 8 rollouts that fail in truth, 0.0% (95% between 0.0% and 32.4%) are paid as successes, 0.0% where" in said
    )
    assert "the true frames before it; none was paid" in said
    rows = tables.closed_rows(shown["closed_loop"])
    assert [row[1] for row in rows] == ["starts", "all", "episode starts"] and rows[1][-2:] == ("-", "-")
    won = {"closed_loop": [closed("base", 1, keyframe=(8, 0, 0, 0))]}
    assert "no rollout fails in truth; of 8 paid ones, 100.0%" in " ".join(tables.render_text(won).split())
    assert "no failure" in report.render(won)


@pytest.mark.parametrize("absent", [*results(), "everything"])
def test_what_is_absent_is_left_out(absent):
    shown = {} if absent == "everything" else {name: value for name, value in results().items() if name != absent}
    Outline(report.render(shown))
    tables.render_text(shown)


def test_what_is_empty_is_left_out():
    hollow = {
        "phases": [],
        "tables": [],
        "closed_loop": [],
        "comparison": [],
        "reward": {},
        "keyframes": {},
        "ledger": {},
    }
    assert "<h2>" not in report.render(hollow)
    assert tables.render_text(hollow) == ""


def test_a_judge_that_met_no_success_has_no_rate():
    judge = judged(0) | {"episode": {"tpr": float("nan"), "fpr": 0.0}}
    assert "<td>successful episodes found</td><td>-</td>" in report.render(
        {"reward": {"reward-0": {"threshold": 0.5, "real": judge}}}
    )


def test_the_table_of_the_terminal():
    lines = tables.render_text(results()).splitlines()
    assert lines[2].split() == ["base", "41.2%", "37.0%", "-", "45.5%", "-", "-", "33.2%", "-"]
    assert lines[4].split()[:7] == ["after", "PACE", "62.7%", "58.4%", "-", "66.8%", "+21.5"]
    assert lines[8].split()[-4:] == ["90.9%", "84.1%", "-", "95.0%"]
    assert lines[9].startswith("after PACE; world 2 ") and lines[9].split()[4:7] == ["75.0%", "64.1%", "45.7%"]
    assert lines[13].split()[-3:] == ["28.8", "25.4", "23.9"]
    assert lines[14].startswith("after PACE; world 2 ") and lines[14].split()[4:8] == ["148", "61", "14", "33"]
    # The whole of it, with the kinds of starts, is on the page; a terminal has no room for it.
    assert max(map(len, lines[:9])) < 120 and "keyframes" not in "\n".join(lines[:12])
    assert re.search(r"(?m)^all +800 +28,416 +486,400 +27,648 +12 min 46 s$", "\n".join(lines))
    assert len({len(line) for line in lines[:5]}) == 1
    assert any(line.startswith("The collections took 9,216 steps") for line in lines)


def test_true_steps_that_were_only_watched_have_a_column_and_a_sentence():
    ledger = results()["ledger"]
    ledger["grpo-1"]["watched_steps"] = 27648
    text = tables.render_text({"ledger": ledger})
    assert re.search(
        r"(?m)^stage +episodes +true steps +watched steps +pretrained frames +imagined frames +time$", text
    )
    assert re.search(r"(?m)^all +800 +28,416 +27,648 +486,400 +27,648 ", text)
    assert "Another 27,648 true steps only drew its curves" in " ".join(text.split())


def test_a_run_with_a_world_model_says_how_to_play_in_it(monkeypatch):
    shown = results()
    # Where the one command is not installed, the clone's script is named.
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "python launch/play.py &#x27;runs/my pace&#x27; --open" in report.render(shown, folder="runs/my pace")
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert "wovr play &#x27;runs/my pace&#x27; --open" in report.render(shown, folder="runs/my pace")
    assert "wovr play" not in report.render(shown)  # nobody said where it lies
    shown["ledger"] = {"demonstrations": shown["ledger"]["demonstrations"]}
    assert "wovr play" not in report.render(shown, folder="runs/pace")


def test_no_results_no_report(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the job first"):
        report.write(tmp_path)


def test_templates_and_assets_are_part_of_an_installation():
    root = pathlib.Path(__file__).resolve().parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["wovr_jax"]
    package = root / "wovr_jax"
    data = [path.relative_to(package).as_posix() for path in package.rglob("*.*") if path.suffix not in (".py", ".pyc")]
    assert {"report/page.html", "report/compare.html", "report/page.css"} <= set(data)
    assert not [name for name in data if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def test_flat_groups_from_keyframes_are_counted_and_told() -> None:
    lines = [(0.5, 0.25), (0.75, 0.0), (0.25, 0.25)]
    curve = [{"lost_keyframe": lost, "won_keyframe": won, "mixed_keyframe": 1 - lost - won} for lost, won in lines]
    said = tables.explain_flat(curve)
    assert said.startswith("67% of the groups from keyframes ended alike")
    assert "50% in failures and 17% in successes" in said
    assert tables.explain_flat([{"lost_keyframe": 0.25, "won_keyframe": 0.25}]) == ""
    # Without keyframes there is nothing to count, and lines of before do not know.
    assert tables.explain_flat([{"success": 0.5}]) == tables.explain_flat([]) == ""
    page = report.render(
        {"keyframes": {"starts-0": {"rules": {"last_chance": 3}, "steps": [1, 2, 3]}}},
        [{"stage": "grpo-1", "step": step, **line} for step, line in enumerate(curve, 1)],
    )
    assert "grpo-1: 67% of the groups from keyframes" in page
