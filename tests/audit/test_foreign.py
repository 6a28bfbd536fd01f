"""Rollouts of any program, written with numpy alone; and what is said of a folder that is not as it should be."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np
import pytest

from wovr_jax.audit import foreign
from wovr_jax.audit.foreign import ForeignError

STEPS, SIDE = 20, 12


def film(seed: int) -> np.ndarray:
    """A bright square that walks over a dark ground, a pixel every second step."""
    frame_SHWC = np.zeros((STEPS + 1, SIDE, SIDE, 3), np.uint8)
    for step in range(STEPS + 1):
        frame_SHWC[step, seed % 8 : seed % 8 + 4, step // 2 % 9 : step // 2 % 9 + 3] = 200
    return frame_SHWC


def write(folder: pathlib.Path, number: int, astray: int = STEPS + 1, **more: object) -> None:
    """An episode whose imagination shows something else from the step ``astray`` on."""
    true = film(number)
    imagined = true.copy()
    imagined[astray:] = 255 - imagined[astray:]
    action = np.zeros((STEPS, 7), np.float32)
    np.savez_compressed(folder / f"episode-{number:03d}.npz", true=true, imagined=imagined, action=action, **more)


def test_a_folder_of_rollouts_is_audited_from_end_to_end(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "rollouts"
    folder.mkdir()
    # Three policies of four episodes, true success 0, 2 and 4 of them, imagined 1, 2 and 4; one of four goes astray.
    true, imagined = ([0] * 4, [1, 1, 0, 0], [1] * 4), ([1, 0, 0, 0], [1, 1, 0, 0], [1] * 4)
    for p, policy in enumerate(("base", "better", "best")):
        for e in range(4):
            flags = {
                "true_success": np.bool_(true[p][e]),
                "imagined_success": np.arange(STEPS + 1) * imagined[p][e] > 9,
            }
            write(folder, 4 * p + e, 12 if e == 3 else STEPS + 1, policy=policy, chosen_in="imagination", **flags)
    results, page = foreign.audit(folder, tmp_path / "out")
    world = results["trust"]["worlds"][0]
    horizon, ranking = world["horizon"], world["ranking"]["all"]
    # Twenty steps are three chunks, the last of four; the three that go astray do so in the second.
    assert (horizon["n"], horizon["first"], horizon["never"], horizon["horizon"]) == ([12] * 3, [0, 3, 0], 9, 1)
    assert [alive["rate"] for alive in horizon["with_truth"]] == [1.0, 0.75, 0.75]
    assert horizon["psnr"][0] > 100 > 20 > horizon["psnr"][1] and horizon["ssim"][0] == pytest.approx(1.0, abs=1e-4)
    assert {name: world["verdicts"][name] for name in ("tp", "fp", "fn", "tn")} == {"tp": 6, "fp": 1, "fn": 0, "tn": 5}
    assert ranking["policies"] == 3 and ranking["spearman"]["value"] == 1.0 and ranking["mmrv"]["value"] == 0.0
    assert ranking["gap"]["value"] == pytest.approx(0.25 / 3) and ranking["inverted"]["value"] == 0.0
    assert world["paid"]["false_success"]["rate"] == pytest.approx(1 / 6)
    text = page.read_text()
    assert "Can this world model be trusted?" in text and "1 of 3 chunks (8 steps)" in text
    assert "LPIPS, FID and FVD: they take networks" in text and "the ranking: it takes" not in text
    assert text.count("<svg") == 2 and (tmp_path / "out" / "results.json").exists()


def test_what_the_files_do_not_say_is_said_on_the_page(tmp_path: pathlib.Path) -> None:
    write(tmp_path, 0)
    write(tmp_path, 1, true_success=True, imagined_success=False, chosen_in="truth")
    results, page = foreign.audit(tmp_path, tmp_path / "audit")
    answers, text = results["trust"], page.read_text()
    assert answers["policies"] == [] and answers["worlds"][0]["ranking"] == {"all": None}
    assert answers["worlds"][0]["paid"] is None and answers["worlds"][0]["verdicts"]["fn"] == 1
    for said in (
        "success of 1 of 2 episodes",
        "takes 3 policies with both successes, got 0",
        "Can it pay them? Not asked",
    ):
        assert said in text
    # The page lies in the folder, and is no episode of the next audit.
    assert foreign.audit(tmp_path, tmp_path / "audit")[0]["trust"] == answers


def test_episodes_of_other_lengths_count_up_to_their_ends(tmp_path: pathlib.Path) -> None:
    short = {name: film(0)[:9] for name in ("true", "imagined")}
    np.savez(tmp_path / "episode-a.npz", **short)
    write(tmp_path, 1, 18)
    horizon = foreign.audit(tmp_path, tmp_path / "audit", chunk=4)[0]["trust"]["worlds"][0]["horizon"]
    assert horizon["n"] == [2, 2, 1, 1, 1] and horizon["first"] == [0, 0, 0, 0, 1] and horizon["never"] == 1


def test_the_folder_itself_may_be_wrong(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ForeignError, match="nowhere: expected a folder of episode-.*there is no such folder"):
        foreign.read_pairs(tmp_path / "nowhere")
    with pytest.raises(ForeignError, match="expected files episode-.*got nothing"):
        foreign.read_pairs(tmp_path)
    (tmp_path / "rollout-0.npz").write_bytes(b"")
    with pytest.raises(ForeignError, match=r"got rollout-0.npz. docs/trust.md has the format"):
        foreign.read_pairs(tmp_path)


FRAMES = np.zeros((5, 12, 12, 3), np.uint8)
GOOD = {"true": FRAMES, "imagined": FRAMES}


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"true": FRAMES}, "expected imagined, got true"),
        (GOOD | {"reward": 1}, "expected no other keys than true, .*got reward"),
        (
            GOOD | {"true": FRAMES / 255},
            r"true: expected uint8 frames \(S \+ 1, H, W, 3\).*got float64 \(5, 12, 12, 3\)",
        ),
        (GOOD | {"imagined": FRAMES[:, 0]}, r"imagined: expected uint8 frames.*got uint8 \(5, 12, 3\)"),
        (GOOD | {"imagined": FRAMES[1:]}, r"expected the shape of true, \(5, 12, 12, 3\), got \(4, 12, 12, 3\)"),
        (dict.fromkeys(GOOD, FRAMES[:1]), "at least one step"),
        (dict.fromkeys(GOOD, FRAMES[:, :8]), r"at least 11 pixels on a side, got \(8, 12\)"),
        (GOOD | {"action": np.zeros((5, 7))}, r"action: expected finite numbers \(S, A\) = \(4, A\) for 5 frames"),
        (GOOD | {"action": np.full((4, 7), np.nan)}, "with NaN or infinity"),
        (GOOD | {"true_success": np.zeros(3, bool)}, r"true_success: expected one bool, or one for each of 5 frames"),
        (GOOD | {"imagined_success": 0.7}, "imagined_success: expected one bool"),
        (GOOD | {"imagined_success": 2}, "imagined_success: expected one bool"),
        (GOOD | {"policy": 3}, "policy: expected a text, got 3"),
        (GOOD | {"chosen_in": "dreams"}, "chosen_in: expected 'truth' or 'imagination', got 'dreams'"),
    ],
)
def test_a_file_that_is_not_as_the_format_says_is_named(tmp_path: pathlib.Path, arrays: dict, says: str) -> None:
    np.savez(tmp_path / "episode-7.npz", **arrays)
    with pytest.raises(ForeignError, match=f"episode-7.npz.*{says}"):
        foreign.read_pairs(tmp_path)


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"no archive"), lambda path: path.write_bytes(b"")])
def test_a_file_that_numpy_did_not_write_is_named(tmp_path: pathlib.Path, spoil: Callable) -> None:
    spoil(tmp_path / "episode-7.npz")
    with pytest.raises(ForeignError, match="episode-7.npz: expected a file that numpy.savez wrote"):
        foreign.read_pairs(tmp_path)


def test_the_door_prints_the_answers_or_says_what_is_wrong(
    tmp_path: pathlib.Path, opened: Callable[..., tuple]
) -> None:
    status, out, err = opened("audit.py", "--foreign", tmp_path / "nowhere")
    assert "there is no such folder" in str(status) and not out
    write(tmp_path, 0, true_success=True, imagined_success=True)
    status, out, err = opened("audit.py", "--foreign", tmp_path, "--out", tmp_path / "page", "--chunk", 5)
    assert status == 0, err
    assert "All 4 chunks (20 steps)" in out and out.strip().endswith(str(tmp_path / "page" / "report.html"))
