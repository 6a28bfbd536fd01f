"""What recorders, merges and downloads leave behind: read, or refused by name, and nothing is believed silently."""

from __future__ import annotations

import io
import json
import os
import sys
import threading

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
PIL = pytest.importorskip("PIL.Image")
import pyarrow.parquet as pq  # noqa: E402

from data_prep import lerobot, rlinf_starts  # noqa: E402
from data_prep.columns import choose, not_colour  # noqa: E402
from data_prep.demos import SourceError, find_success, gripper_to_environment  # noqa: E402
from tests.data_prep import test_lerobot as sets  # noqa: E402
from wovr_jax.core import disk as core_disk  # noqa: E402
from wovr_jax.data import episodes as disk  # noqa: E402

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
LISTING = "meta/episodes/chunk-000/file-000.parquet"
FIRST, SECOND = "data/chunk-000/file-000.parquet", "data/chunk-000/file-001.parquet"


def convert(monkeypatch, folder, *arguments):
    """Returns the episodes and the manifest's facts of what was read."""
    sets.run(monkeypatch, folder, "--out", folder.parent / "ours", "--overwrite", *arguments)
    return disk.read(folder.parent / "ours"), disk.manifest(folder.parent / "ours")["meta"]


def change(path, **columns):
    """Changes columns of a table, each by a function of its values."""
    table = pq.read_table(path).to_pydict()
    table |= {name.replace("__", "."): make(table.get(name.replace("__", "."))) for name, make in columns.items()}
    pq.write_table(pa.table(table), path)


def describe(folder, make):
    path = folder / "meta/info.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    make(info)
    path.write_text(json.dumps(info), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """Three episodes of 5, 7 and 6 steps; the first two share a table."""
    return sets.write(tmp_path / "set", "v3.0", "image")


# ---------------------------------------------------------------- one bad episode, and no other


def test_rows_are_found_where_they_lie(folder, monkeypatch):
    listing = pq.read_table(folder / LISTING).to_pydict()
    pq.write_table(pa.table(listing | {"data/file_index": [0, 0, 0]}), folder / LISTING)
    made, meta = convert(monkeypatch, folder)
    assert [len(episode.action_SA) for episode in made] == [5, 7, 6]
    assert any("1 episodes lie in another table than the listing says" in text for text in meta["warnings"])


def test_a_count_of_episodes_that_is_too_high_costs_none(folder, monkeypatch):
    describe(folder, lambda info: info.update(total_episodes=5))
    with pytest.raises(SystemExit, match=r"keeps the other 3 episodes\.\n.*3 episodes listed, info.json counts 5"):
        convert(monkeypatch, folder)
    made, meta = convert(monkeypatch, folder, "--skip")
    assert len(made) == 3 and len(meta["skipped"]) == 1


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: pq.write_table(pq.read_table(path).slice(1), path), r"episode 0: 4 rows, its listing counts 5"),
        (lambda path: change(path, frame_index=lambda rows: [9, *rows[1:]]), "episode 0: its frames are not numbered"),
        (lambda path: change(path, task_index=lambda rows: [7, *rows[1:]]), "episode 0: its rows name task 7"),
        (lambda path: change(path, action=lambda rows: [[np.nan] * 7, *rows[1:]]), "episode 0: action_TA holds NaN"),
    ],
)
def test_an_episode_is_skipped_and_not_its_table(folder, monkeypatch, harm, message):
    harm(folder / FIRST)
    with pytest.raises(SystemExit, match=message):
        convert(monkeypatch, folder)
    made, _ = convert(monkeypatch, folder, "--skip")
    assert [len(episode.action_SA) for episode in made] == [7, 6]
    assert [episode.seed for episode in made] == [0, 1]


def test_pictures_of_another_size_cost_their_episode(folder, monkeypatch):
    small = [sets.png(np.zeros((8, 8, 3), np.uint8))] * 6
    change(folder / SECOND, observation__images__image=lambda _: small)
    made, meta = convert(monkeypatch, folder, "--skip")
    assert len(made) == 2 and "those of the episodes before it" in meta["skipped"][0]


def test_a_damaged_table_costs_its_own_episodes(folder, monkeypatch):
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:100])
    made, meta = convert(monkeypatch, folder, "--skip")
    assert len(made) == 1 and "episodes 0 to 1 are listed in it" in meta["skipped"][0]


def test_a_listing_that_ends_in_mid_line_costs_one(tmp_path, monkeypatch):
    folder = sets.write(tmp_path / "set", "v2.1", "image")
    path = folder / "meta/episodes.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    made, meta = convert(monkeypatch, folder, "--skip")
    assert len(made) == 2
    assert any("line 3 is not JSON" in text for text in meta["skipped"])
    assert any("[2] have rows" in text and "are not listed" in text for text in meta["skipped"])


def test_what_was_mended_is_read_again(folder, monkeypatch):
    whole = (folder / FIRST).read_bytes()
    change(folder / FIRST, task_index=lambda rows: [7, *rows[1:]])
    with pytest.raises(SystemExit, match="task 7"):
        convert(monkeypatch, folder)
    (folder / FIRST).write_bytes(whole)
    assert len(convert(monkeypatch, folder)[0]) == 3


def test_one_file_of_start_states_costs_itself(tmp_path, monkeypatch):
    from tests.data_prep.test_rlinf_starts import frame, write

    for number in range(2):
        write(tmp_path / "in" / f"seed_{number}_traj.npy", [frame(10)])
    (tmp_path / "in" / "seed_9_traj.npy").write_text(POINTER, encoding="utf-8")
    arguments = ["rlinf_starts", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match=r"keeps the other 2\.\n.*Git LFS"):
        rlinf_starts.main()
    monkeypatch.setattr(sys, "argv", [*arguments, "--skip"])
    rlinf_starts.main()
    assert (tmp_path / "out").is_dir()


# ---------------------------------------------------------------- what is said is looked at


def test_a_gripper_position_is_not_a_command(folder, monkeypatch):
    for path in (FIRST, SECOND):
        change(
            folder / path,
            action=lambda rows: [[*row[:6], 0.02 if i % 2 else 0.97] for i, row in enumerate(rows)],
        )
    with pytest.raises(SystemExit, match=r"from 0.02 to 0.97 never reach -1.*--gripper: position"):
        convert(monkeypatch, folder, "--skip")
    made, meta = convert(monkeypatch, folder, "--gripper", "position")
    assert np.allclose(made[0].action_SA[:, 6], [0.94, -0.96] * 2 + [0.94], atol=1e-6)
    assert "position (0 open, 1 closed): raw values 0.02 to 0.97" in meta["believed"]["gripper"]
    # As OpenVLA stores it, 1 would be open: said by where the episodes begin.
    assert any("closed in the first step" in text for text in meta["warnings"])


def test_an_analogue_gripper_may_stay_on_one_side_in_one_episode_and_not_in_all(folder, monkeypatch):
    for path in (FIRST, SECOND):
        change(folder / path, action=lambda rows: [[*row[:6], 0.3 + 0.01 * i] for i, row in enumerate(rows)])
    with pytest.raises(SystemExit, match="all 3 episodes: gripper values from 0.3 to 0.41 never reach -1"):
        convert(monkeypatch, folder, "--skip")
    change(folder / SECOND, action=lambda rows: [[*row[:6], 0.2 * i - 0.8] for i, row in enumerate(rows)])
    assert len(convert(monkeypatch, folder)[0]) == 3


def test_the_conventions_of_a_gripper():
    for name, values, expected in (
        ("position", [0, 1, 0.5], [-1, 1, 0]),
        ("position", [-0.01, 1.02], [-1, 1]),
        ("reversed", [1, -1], [-1, 1]),
        ("environment", [1, 1], [1, 1]),
    ):
        assert np.allclose(gripper_to_environment(np.array(values, float), name, "here"), expected)
    with pytest.raises(SourceError, match="values from -0.01 to 0.97 never reach -1, which is closed"):
        gripper_to_environment(np.array([-0.01, 0.97]), "reversed", "here")


def test_a_gripper_that_never_moves_is_said(folder, monkeypatch):
    for path in (FIRST, SECOND):
        change(folder / path, action=lambda rows: [[*row[:6], 1.0] for row in rows])
    _, meta = convert(monkeypatch, folder)
    assert any("the gripper is closed in every step of every episode" in text for text in meta["warnings"])


def test_depth_is_no_camera(folder, monkeypatch):
    file = io.BytesIO()
    PIL.fromarray(np.full((64, 64), 900, np.uint16)).save(file, "PNG")
    deep = {"bytes": file.getvalue(), "path": None}
    for path in (FIRST, SECOND):
        change(folder / path, observation__front=lambda _, path=path: [deep] * pq.read_table(folder / path).num_rows)
    camera = {"dtype": "image", "shape": [64, 64, 1], "names": ["height", "width", "channel"]}
    describe(folder, lambda info: info.update(features={"observation.front": camera, **info["features"]}))
    made, meta = convert(monkeypatch, folder)
    assert np.array_equal(made[0].frame_SHWC[0], sets.frame(0, 0))
    assert "left: observation.front (1 channel)" in meta["believed"]["cameras"]
    with pytest.raises(SystemExit, match=r"observation.front is no camera of colour \(1 channel\)"):
        convert(monkeypatch, folder, "--image", "observation.front")
    # Where the set says nothing, the pictures themselves do.
    describe(folder, lambda info: info["features"]["observation.front"].update(shape=[64, 64, 3]))
    with pytest.raises(SystemExit, match="got depth or the like"):
        convert(monkeypatch, folder)


def test_cameras_that_are_none_of_colour():
    video = {"dtype": "video", "shape": [3, 480, 640]}
    assert not_colour("observation.images.front", video | {"info": {"video.is_depth_map": True}}) == "a depth map"
    assert not_colour("observation.images.front", video | {"info": {"video.pix_fmt": "gray12le"}})
    assert not_colour("observation.images.front_segm", video) and not_colour("observation.ir.left", video)
    assert not not_colour("observation.images.first_person", video)


def test_two_cameras_that_could_be_the_one_are_said(folder, monkeypatch):
    view = {"dtype": "image", "shape": [64, 64, 3]}
    describe(folder, lambda info: info["features"].update({"observation.images.side": view}))
    _, meta = convert(monkeypatch, folder)
    assert any("2 cameras could be the image" in text for text in meta["warnings"])


def test_numbers_of_an_action_are_read_by_their_names():
    features = {"image": {"dtype": "image"}, "action": {"dtype": "float32", "shape": [7]}}
    features["action"]["names"] = {"motors": ["gripper", "x", "y", "z", "roll", "pitch", "yaw"]}
    with pytest.raises(SourceError, match="the gripper is number 0 of action by its names"):
        choose(features, {}, "here")
    features["action"]["names"] = [f"joint_{i}" for i in range(6)] + ["gripper"]
    told = lerobot.Told()
    choose(features, {}, "here", told)
    assert any("joints, where motions of the hand are expected" in text for text in told.warnings)


def add_columns(folder, **columns):
    """Adds columns of success: each a function of (frame, frames of the episode)."""
    lengths = dict(enumerate(sets.LENGTHS))
    for path in (FIRST, SECOND):
        table = pq.read_table(folder / path).to_pydict()
        places = list(zip(table["frame_index"], table["episode_index"], strict=True))
        table |= {name: [make(t, lengths[e]) for t, e in places] for name, make in columns.items()}
        pq.write_table(pa.table(table), folder / path)
    kind = {"dtype": "float32", "shape": [1]}
    describe(folder, lambda info: info["features"].update(dict.fromkeys(columns, kind)))


def test_the_column_of_success_that_speaks_is_believed(folder, monkeypatch):
    ends = {"next.reward": lambda t, n: float(t == n - 1), "next.success": lambda t, n: False}
    add_columns(folder, **ends)
    made, meta = convert(monkeypatch, folder)
    assert all(episode.success_S[-1] for episode in made)
    assert "column next.reward, which says yes in 3 of 3" in meta["believed"]["success"]
    assert any("next.success says yes in 0 episodes and next.reward in 3" in text for text in meta["warnings"])
    made, _ = convert(monkeypatch, folder, "--success", "next.success")
    assert not any(episode.success_S.any() for episode in made)


def test_a_set_in_which_nothing_succeeds_is_said(folder, monkeypatch):
    add_columns(folder, **{"next.reward": lambda t, n: 0.0, "next.done": lambda t, n: t == n - 1})
    made, meta = convert(monkeypatch, folder)
    assert not any(episode.success_S.any() for episode in made)
    assert any("no episode succeeds" in text for text in meta["warnings"])


def test_a_success_that_is_assumed_is_said(folder, monkeypatch):
    made, meta = convert(monkeypatch, folder)
    assert made[0].success_S[-1] and meta["believed"]["success"].startswith("assumed")
    assert any("no column tells of success" in text for text in meta["warnings"])
    made, meta = convert(monkeypatch, folder, "--success", "none")
    assert not made[0].success_S.any() and not any("tells of success" in text for text in meta["warnings"])


def test_a_success_that_only_the_listing_tells_is_read(folder, monkeypatch):
    change(folder / LISTING, success=lambda _: [True, False, True])
    made, _ = convert(monkeypatch, folder)
    assert [bool(episode.success_S.any()) for episode in made] == [True, False, True]


def test_a_shaped_reward_is_no_success():
    odd = []
    assert find_success([0.2, 0.7, 1.0], "here", odd).tolist() == [False, False, True] and "not 0 or 1" in odd[0]
    assert not find_success([-1.0, -1.0, 0.0], "here", odd).any()
    assert find_success([0, 1, 1], "here", []).tolist() == [False, True, True]
    with pytest.raises(SourceError, match="rewards hold NaN"):
        find_success([0, np.nan], "here", [])


def test_an_empty_instruction_is_refused_and_can_be_given(folder, monkeypatch):
    pq.write_table(pa.table({"task_index": [0, 1], "task": ["  ", "open the drawer"]}), folder / "meta/tasks.parquet")
    change(folder / LISTING, tasks=lambda rows: [[] for _ in rows])
    with pytest.raises(SystemExit, match="episode 0: its instruction is empty; --instruction TEXT"):
        convert(monkeypatch, folder)
    made, _ = convert(monkeypatch, folder, "--instruction", "pick up the mug")
    assert [episode.instruction for episode in made] == ["pick up the mug", "open the drawer", "pick up the mug"]


def test_instructions_that_look_odd_are_said(folder, monkeypatch):
    texts = ["Open the drawer.", "open the drawer"]
    pq.write_table(pa.table({"task_index": [0, 1], "task": texts}), folder / "meta/tasks.parquet")
    _, meta = convert(monkeypatch, folder)
    assert any("2 instructions are alike" in text for text in meta["warnings"])
    assert any("its rows say" in text and "its listing" in text for text in meta["warnings"])


def test_rare_turns_without_room_are_said(folder, monkeypatch):
    for path in (FIRST, SECOND):
        # x moves in one step of all, y is spread.
        change(folder / path, action=lambda rows: [[0.5 * (i == 3), 0.1 * i, 0, 0, 0, 0, -1] for i in range(len(rows))])
    monkeypatch.setattr(lerobot.convert.normalize.np, "quantile", lambda *_, **__: np.array([[0.0] * 7, [0.01] * 7]))
    _, meta = convert(monkeypatch, folder)
    assert any("no room for rare motions" in text and "x (0 to 0.01 of 0 to 0.5)" in text for text in meta["warnings"])
    assert any("dimensions that never move: z" in text for text in meta["warnings"])


def test_positions_in_place_of_changes_are_said(folder, monkeypatch):
    for path in (FIRST, SECOND):
        change(folder / path, action=lambda rows: [[2.5, *row[1:]] for row in rows])
    _, meta = convert(monkeypatch, folder)
    assert any("motions beyond -1 to 1 in 100.0% of the steps" in text for text in meta["warnings"])


def test_time_that_was_lost_is_said(folder, monkeypatch):
    change(folder / SECOND, timestamp=lambda rows: [*rows[:3], *(row + 0.5 for row in rows[3:])])
    describe(folder, lambda info: info["features"][sets.IMAGE].update(info={"video.fps": 30}))
    _, meta = convert(monkeypatch, folder)
    assert any("its timestamps do not keep 10 frames in a second" in text for text in meta["warnings"])
    assert any("30 frames in a second by its description, the set 10" in text for text in meta["warnings"])


def test_rows_in_another_order_are_put_in_theirs(folder, monkeypatch):
    table = pq.read_table(folder / SECOND)
    pq.write_table(table.take([5, 4, 3, 2, 1, 0]), folder / SECOND)
    made, meta = convert(monkeypatch, folder)
    assert np.allclose(made[2].action_SA[:, 0], 0.1 * np.arange(1, 7))
    assert np.array_equal(made[2].frame_SHWC[1], sets.frame(2, 1))
    assert any("not in the order of their frames" in text for text in meta["warnings"])


def test_episodes_that_are_there_twice_are_said(folder, monkeypatch):
    table = pq.read_table(folder / FIRST).to_pydict()
    # The last episode as long as the first, and the same in every number.
    pq.write_table(pq.read_table(folder / SECOND).slice(0, 5), folder / SECOND)
    change(folder / SECOND, action=lambda _: table["action"][:5])
    change(folder / LISTING, length=lambda _: [5, 7, 5])
    _, meta = convert(monkeypatch, folder)
    assert any("1 episodes are there more than once, with equal actions" in text for text in meta["warnings"])


def test_strict_makes_warnings_refusals_and_the_summary_is_printed(folder, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"--strict: nothing was written.*\n.*no column tells of success"):
        convert(monkeypatch, folder, "--strict")
    assert not (folder.parent / "ours").exists()
    shown = capsys.readouterr().out
    for part in ("What was believed:", "cameras", "gripper", "success", "instructions", "frame rate", "3 kept"):
        assert part in shown
    _, meta = convert(monkeypatch, folder)
    assert {"cameras", "gripper", "success", "instructions", "frame rate", "statistics", "steps"} <= set(
        meta["believed"]
    )


def test_columns_that_were_named_anew_never_go_on_with_older_parts(folder, monkeypatch):
    with pytest.raises(SystemExit, match="--strict"):
        convert(monkeypatch, folder, "--strict")
    made, _ = convert(monkeypatch, folder, "--image", sets.WRIST, "--wrist", "none")
    assert np.array_equal(made[0].frame_SHWC[0], sets.frame(0, 0, True)) and made[0].wrist_SHWC is None


@pytest.mark.parametrize("lacking", ["features", "fps", "data_path"])
def test_a_description_without_what_is_needed_is_no_traceback(folder, monkeypatch, lacking):
    describe(folder, lambda info: info.pop(lacking))
    with pytest.raises(SystemExit, match=rf"info.json: expected '{lacking}' as .*, got nothing"):
        convert(monkeypatch, folder)


# ---------------------------------------------------------------- whose folder it is, and where


def test_a_folder_that_another_process_converts_into_is_refused(folder, monkeypatch, tmp_path):
    living = f"filelock/2\npid={os.getppid()}\nhost=elsewhere\nmode=lease\ntoken={'a' * 32}\nduration=30.0\nstart=7\n"
    mark, ended = tmp_path / "ours.parts.owner", threading.Event()
    mark.write_text(living, encoding="utf-8")
    monkeypatch.setattr(core_disk, "BEAT_S", 0.2)

    def live():
        while not ended.wait(0.1):
            mark.touch()

    threading.Thread(target=live, daemon=True).start()
    with pytest.raises(SystemExit, match="ours is in use by process .* on elsewhere"):
        sets.run(monkeypatch, folder, "--out", tmp_path / "ours")
    ended.set()
    assert not (tmp_path / "ours").exists() and not (tmp_path / "ours.parts").exists()


def test_home_is_where_the_user_means_it(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(folder)
    sets.run(monkeypatch, "~/set", "--out=~/ours")
    assert len(disk.read(tmp_path / "ours")) == 3 and not (folder / "~").exists()
    assert not list(tmp_path.glob("ours.*")), "neither parts nor an owner are left"
