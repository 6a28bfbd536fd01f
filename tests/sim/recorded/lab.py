"""A laboratory in the process of a test: it shows, drives an exported policy on the embedded table, records, labels.

It knows the run by what the run says alone: ``wanted.json`` and the exported policy.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from wovr_jax.core.disk import read_json, write_json
from wovr_jax.core.pixels import to_uint8
from wovr_jax.data import episodes as disk
from wovr_jax.data.recordings import FORMAT, LABELS
from wovr_jax.export.robot import Robot
from wovr_jax.sim import embedded
from wovr_jax.sim.tabletop import table as tabletop
from wovr_jax.sim.tabletop.expert import ExpertConfig
from wovr_jax.sim.tabletop.table import TabletopConfig
from wovr_jax.types import Episode

TABLE = TabletopConfig.fake()
BATCH = 16


def show(folder: pathlib.Path, count: int, first: int = 0) -> None:
    """Demonstrations, half of which let go too early, as one recording."""
    seeds = np.arange(first, first + count)
    disk.write(folder, embedded.play_demonstrations(seeds, jax.random.key(0), ExpertConfig(flawed_share=0.5), TABLE))


def serve(wanted: dict[str, Any], wrong: float = 0.0, most: int | None = None) -> None:
    """Records what is wanted, or the first ``most`` of it, and labels it, a share ``wrong`` of it wrongly."""
    folder, policy = pathlib.Path(wanted["folder"]), wanted["policy"]
    robot, first = Robot.load(policy["bundle"]), 9_000_000 if wanted["stage"].startswith("evaluate") else 1_000_000
    origin = {"policy": robot.about["policy"], "weights": robot.hash_weights(), "temperature": policy["temperature"]}
    made = []
    for task, facts in enumerate(wanted["tasks"]):
        layouts = [one for one in range(first, first + 200) if _task_of(one) == task][facts["there"] : facts["wanted"]]
        made += list(_play(robot, layouts, policy["temperature"], origin))
    path, rng = folder / LABELS, np.random.default_rng(0)
    labels = read_json(path)["labels"] if path.exists() else []
    for episode in made[:most]:
        name = f"{len(labels):03d}"
        disk.write(folder / name, [episode])
        won = bool(episode.success_S.any()) != (rng.random() < wrong)
        labels.append({"recording": name, "episode": 0, "outcome": "success" if won else "failure"})
    write_json(path, {"format": FORMAT, "schema": 1, "labels": labels})


def _task_of(layout: int) -> int:
    return int(tabletop.task_of(embedded.reset_batch(np.array([layout], np.int32), TABLE))[0])


def _play(robot: Robot, layouts: list[int], temperature: float, origin: dict[str, Any]) -> Iterator[Episode]:
    if not layouts:
        return
    padded_B = np.resize(np.array(layouts, np.int32), BATCH)
    state = embedded.reset_batch(padded_B, TABLE)
    texts = [tabletop.INSTRUCTIONS[task] for task in np.asarray(tabletop.task_of(state)).tolist()]
    frames, actions, wins = [_look(state)], [], [np.zeros(BATCH, bool)]
    for done in range(0, TABLE.horizon, 8):
        seed_B = padded_B.astype(np.int64) + done
        action_BTA = robot.act(frames[-1], texts, seeds=seed_B, temperature=temperature).action_BTA
        for step in range(8):
            state = _step(state, action_BTA[:, step])
            frames.append(_look(state))
            actions.append(action_BTA[:, step])
            wins.append(np.asarray(jax.vmap(lambda one: tabletop.success(one, TABLE))(state)))
    frame_BSHWC, action_BSA, won_BS = (np.stack(column, axis=1) for column in (frames, actions, wins))
    for b, layout in enumerate(layouts):
        # The recorder knows no task by our number, and calls the actor by the policy's name.
        yield Episode(
            frame_BSHWC[b], action_BSA[b], won_BS[b], texts[b], 0, layout, "somebody", action_BSA[b], origin=origin
        )


@jax.jit
def _step(state: Any, action_BA: np.ndarray) -> Any:
    return jax.vmap(lambda one, action_A: tabletop.step(one, action_A, TABLE))(state, action_BA)


def _look(state: Any) -> np.ndarray:
    return to_uint8(jax.vmap(lambda one: tabletop.render(one, TABLE))(state))
