"""LIBERO's HDF5 files, written here with their exact layout, to episodes and no further than they are sound."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from data_prep import convert, demos
from data_prep.demos import Conventions, Demo, SourceError
from wovr_jax.data import episodes as disk
from wovr_jax.data import normalize
from wovr_jax.data.episodes import EpisodesError

h5py = pytest.importorskip("h5py")
from data_prep import libero_hdf5  # noqa: E402

BOWL, MUG = "pick_up_the_black_bowl", "LIVING_ROOM_SCENE5_put_the_red_mug_on_the_plate"
STEPS, SIZE = 12, 6


def trajectory(seed):
    """STEPS + 1 moments and the actions between them; step 5 is a no-op, step 8 closes the gripper."""
    rng = np.random.default_rng(seed)
    action_TA = rng.uniform(-1, 1, (STEPS, 7))
    action_TA[:, 6] = np.where(np.arange(STEPS) < 8, -1.0, 1.0)
    action_TA[5, :6] = 0.0
    joint_MJ = np.cumsum(rng.normal(size=(STEPS + 1, 7)), axis=0)
    frame_MHWC = rng.integers(0, 256, (STEPS + 1, SIZE, SIZE, 3), np.uint8)
    return action_TA, joint_MJ, frame_MHWC, 255 - frame_MHWC, rng.normal(size=(STEPS + 1, 8))


def write(path, count=2, anew=False):
    """``anew``: as OpenVLA's script writes them, images before their actions; otherwise as LIBERO does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_name"] = "Libero_Tabletop_Manipulation"
        data.attrs["problem_info"] = json.dumps({"language_instruction": "another sentence"})
        data.attrs["num_demos"], data.attrs["total"] = count, count * STEPS
        for number in range(count):
            action_TA, joint_MJ, frame_MHWC, wrist_MHWC, state_MD = trajectory(number)
            seen = slice(0, STEPS) if anew else slice(1, STEPS + 1)
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = STEPS
            ends = np.eye(STEPS, dtype=np.uint8)[-1]
            state_TS = np.zeros((STEPS, 92))
            state_TS[:, 1:8] = joint_MJ[:STEPS]
            for key, value in {"actions": action_TA, "states": state_TS, "rewards": ends, "dones": ends}.items():
                demo.create_dataset(key, data=value)
            obs = demo.create_group("obs")
            obs.create_dataset("agentview_rgb", data=frame_MHWC[seen])
            obs.create_dataset("eye_in_hand_rgb", data=wrist_MHWC[seen])
            obs.create_dataset("joint_states", data=joint_MJ[seen])
            obs.create_dataset("ee_states", data=state_MD[seen, :6])
            obs.create_dataset("gripper_states", data=state_MD[seen, 6:])
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["libero_hdf5", *map(str, arguments)])
    libero_hdf5.main()


def test_liberos_own_files_hold_the_image_after_the_action(tmp_path):
    reading = libero_hdf5.read(write(tmp_path / f"{BOWL}_demo.hdf5"))
    first = next(reading)
    assert first.pairing == "after" and first.instruction == "pick up the black bowl"
    episode = demos.to_episode(first, 0, 0, Conventions("turn", drop_noops=False))
    action_TA, _, frame_MHWC, wrist_MHWC, state_MD = trajectory(0)
    # Action 0 has no image before it; pairing row by row would show action t the frame that it led to.
    assert np.allclose(episode.action_SA, action_TA[1:])
    assert np.array_equal(episode.frame_SHWC, frame_MHWC[1:, ::-1, ::-1])
    assert np.array_equal(episode.wrist_SHWC, wrist_MHWC[1:, ::-1, ::-1])
    assert np.allclose(episode.state_SD, state_MD[1:])
    assert episode.success_S.tolist() == [False] * (STEPS - 1) + [True]
    assert episode.origin["last_frame"] == "recorded"


def test_files_made_anew_hold_the_image_before_the_action(tmp_path):
    reading = libero_hdf5.read(write(tmp_path / f"{BOWL}_demo.hdf5", anew=True))
    first = next(reading)
    assert first.pairing == "before"
    episode = demos.to_episode(first, 0, 0, Conventions("turn", drop_noops=False))
    action_TA, _, frame_MHWC, *_ = trajectory(0)
    assert np.allclose(episode.action_SA, action_TA)
    assert np.array_equal(episode.frame_SHWC[:-1], frame_MHWC[:-1, ::-1, ::-1])
    assert np.array_equal(episode.frame_SHWC[-1], episode.frame_SHWC[-2])
    assert episode.success_S.tolist() == [False] * STEPS + [True] and episode.origin["last_frame"] == "repeated"


def test_noops_go_and_every_frame_stays_with_its_action(tmp_path):
    reading = libero_hdf5.read(write(tmp_path / f"{BOWL}_demo.hdf5", anew=True))
    episode = demos.to_episode(next(reading), 0, 0, Conventions("none"))
    action_TA, _, frame_MHWC, *_ = trajectory(0)
    kept = [step for step in range(STEPS) if step != 5]
    assert np.allclose(episode.action_SA, action_TA[kept])
    assert np.array_equal(episode.frame_SHWC[:-1], frame_MHWC[kept])
    assert episode.success_S.sum() == 1 and episode.success_S[-1]


def test_what_counts_as_a_noop():
    still, move = [0.0] * 6, [0.5] + [0.0] * 5
    # still at the start; a gripper that closes; the same again; motion; still with the gripper as before
    rows = [[*still, -1], [*move, -1], [*still, 1], [*still, 1], [*move, 1], [*still, 1], [*still, -1]]
    assert demos.find_commanded(np.array(rows)).tolist() == [False, True, True, False, True, False, True]


def test_a_folder_becomes_episodes_statistics_and_a_table(tmp_path, monkeypatch, capsys):
    for name in (BOWL, MUG):
        write(tmp_path / "libero_x" / f"{name}_demo.hdf5")
    run(monkeypatch, tmp_path / "libero_x", "--out", tmp_path / "ours")
    shown = capsys.readouterr().out
    assert "put the red mug on the plate" in shown and "statistics 'libero_x_no_noops'" in shown
    facts = disk.manifest(tmp_path / "ours")
    assert facts["episodes"] == 4 and facts["successes"] == 4 and facts["wrist"] == [SIZE, SIZE, 3]
    assert facts["tasks"]["1"]["instruction"] == "put the red mug on the plate"
    entry = normalize.load(tmp_path / "ours", "libero_x")["action"]
    assert len(entry["q01"]) == 7 and entry["max"][6] == 1.0  # 1 is open in OpenVLA's file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["libero_x", "ours"]
    with pytest.raises(SystemExit, match="exists already"):
        run(monkeypatch, tmp_path / "libero_x", "--out", tmp_path / "ours")


def test_an_interruption_costs_one_file(tmp_path, monkeypatch):
    source = tmp_path / "libero_x"
    for name in (BOWL, MUG):
        write(source / f"{name}_demo.hdf5")
    real, seen = libero_hdf5.read, []

    def until_the_second(path):
        seen.append(path.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(libero_hdf5, "read", until_the_second)
    with pytest.raises(SystemExit, match="the same command continues"):
        run(monkeypatch, source, "--out", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    run(monkeypatch, source, "--out", tmp_path / "ours")
    assert seen == [f"{MUG}_demo.hdf5", f"{BOWL}_demo.hdf5", f"{BOWL}_demo.hdf5"]
    assert disk.manifest(tmp_path / "ours")["episodes"] == 4


def damage(path, how):
    with h5py.File(path, "a") as file:
        how(file["data"]["demo_1"])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda demo: demo.pop("actions"), r"demo_1: actions is missing"),
        (lambda demo: demo["obs"].pop("agentview_rgb"), r"demo_1: obs/agentview_rgb is missing"),
        (lambda demo: demo["obs"].pop("joint_states"), r"demo_1: obs/joint_states is missing"),
        (lambda demo: demo.attrs.update(num_samples=99), r"12 actions, its header counts 99; cut short"),
        (lambda demo: demo["actions"].write_direct(np.full((STEPS, 7), np.nan)), "action_TA holds NaN"),
        (lambda demo: demo["actions"].write_direct(np.full((STEPS, 7), 3.0)), "gripper commands from 3 to 3"),
        (lambda demo: demo["states"].write_direct(np.zeros((STEPS, 92))), "cannot tell whether images come before"),
    ],
)
def test_a_damaged_demonstration_is_named_and_nothing_is_half_imported(tmp_path, monkeypatch, how, message):
    source = tmp_path / "libero_x"
    damage(write(source / f"{BOWL}_demo.hdf5"), how)
    write(source / f"{MUG}_demo.hdf5")
    with pytest.raises(SystemExit, match=message) as caught:
        run(monkeypatch, source, "--out", tmp_path / "ours")
    assert f"{BOWL}_demo.hdf5" in str(caught.value) and not (tmp_path / "ours").exists()
    run(monkeypatch, source, "--out", tmp_path / "ours", "--skip")
    facts = disk.manifest(tmp_path / "ours")
    assert facts["episodes"] == 3 and len(facts["meta"]["skipped"]) == 1


def test_files_cut_short_and_foreign_files_are_named(tmp_path):
    path = write(tmp_path / f"{BOWL}_demo.hdf5")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(SourceError, match=r"_demo\.hdf5: damaged or cut short"):
        list(libero_hdf5.read(path))
    path.write_text("not HDF5")
    with pytest.raises(SourceError, match="damaged or cut short"):
        list(libero_hdf5.read(path))
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file.create_group("episodes")
    with pytest.raises(SourceError, match="it has no group 'data'"):
        list(libero_hdf5.read(tmp_path / "other.hdf5"))
    with pytest.raises(SourceError, match="no folder with .* the folder does not exist"):
        libero_hdf5.find(tmp_path / "nowhere")


def test_tasks_are_numbered_as_asked(tmp_path, monkeypatch):
    source = tmp_path / "libero_x"
    write(source / f"{BOWL}_demo.hdf5")
    (tmp_path / "tasks.txt").write_text("open the drawer\npick up the black bowl\n")
    run(monkeypatch, source, "--out", tmp_path / "ours", "--tasks", tmp_path / "tasks.txt")
    assert list(disk.manifest(tmp_path / "ours")["tasks"]) == ["1"]
    (tmp_path / "tasks.txt").write_text("open the drawer\n")
    with pytest.raises(SystemExit, match="'pick up the black bowl' is not among the 1 tasks"):
        run(monkeypatch, source, "--out", tmp_path / "more", "--tasks", tmp_path / "tasks.txt")


@pytest.mark.parametrize(
    ("convention", "values", "expected"),
    [("environment", [-1, 1], [-1, 1]), ("openvla", [1, 0], [-1, 1]), ("openvla", [0.25], [0.5])],
)
def test_gripper_conventions(convention, values, expected):
    assert demos.gripper_to_environment(np.array(values, float), convention, "here").tolist() == expected


def test_a_gripper_of_the_other_convention_is_refused():
    with pytest.raises(SourceError, match="look like 1 = open; name it with --gripper openvla"):
        demos.gripper_to_environment(np.array([0.0, 1.0]), "environment", "here")
    with pytest.raises(SourceError, match="the convention 'openvla' has 0 to 1"):
        demos.gripper_to_environment(np.array([-1.0, 1.0]), "openvla", "here")


def test_the_rotations():
    frame = np.arange(2 * 3 * 2 * 3, dtype=np.uint8).reshape(2, 3, 2, 3)
    assert np.array_equal(demos.turn_frames(frame, "turn"), np.rot90(frame, 2, axes=(1, 2)))
    assert np.array_equal(
        demos.turn_frames(frame, "flip"), np.flipud(frame.transpose(1, 0, 2, 3)).transpose(1, 0, 2, 3)
    )
    assert np.array_equal(demos.turn_frames(frame, "none"), frame)
    with pytest.raises(ValueError, match="none, turn, flip, got 'left'"):
        Conventions(rotation="left")


def test_arrays_that_do_not_fit_are_refused():
    good = {
        "name": "here",
        "frame_THWC": np.zeros((3, 2, 2, 3), np.uint8),
        "action_TA": np.ones((3, 7)),
        "success_T": np.zeros(3, bool),
        "instruction": "x",
    }
    for change, message in (
        ({"frame_THWC": np.zeros((2, 2, 2, 3), np.uint8)}, "3 actions and 2 rows of frame_THWC"),
        ({"frame_THWC": np.zeros((3, 2, 2, 3))}, r"expected frame_THWC as uint8 \(T, H, W, 3\), got float64"),
        ({"action_TA": np.ones((3, 6))}, r"actions of 7 numbers, got \(3, 6\)"),
        ({"state_TD": np.full((3, 8), np.inf)}, "state_TD holds NaN"),
        ({"pairing": "around"}, "pairing is one of before, after"),
    ):
        with pytest.raises(SourceError, match=message):
            demos.to_episode(Demo(**{**good, **change}), 0, 0, Conventions())


def test_other_conventions_never_go_on_with_older_parts(tmp_path):
    names = {convert._part_name("a.hdf5", {"how": vars(Conventions(rotation))}) for rotation in ("none", "turn")}
    assert len(names) == 2


def test_an_existing_folder_is_kept(tmp_path):
    (tmp_path / "ours").mkdir()
    with pytest.raises(EpisodesError, match="add --overwrite"):
        convert.convert([], iter, [], tmp_path / "ours", Conventions(), key="x", meta={})
