"""What the success classifier of a run says of every frame of some recordings."""

from __future__ import annotations

import os
import pathlib
import re

import jax
import numpy as np

from wovr_jax.core.disk import read_json
from wovr_jax.core.pixels import to_float
from wovr_jax.data import episodes as disk
from wovr_jax.data.recordings import plain
from wovr_jax.label.messages import Scores
from wovr_jax.label.store import LabelError, Store
from wovr_jax.reward import classifier
from wovr_jax.run.folder import MARK
from wovr_jax.run.reader import read_recipe
from wovr_jax.run.stages.reward import load_reward

AT_ONCE = 64
"""Frames of a call; a last one is filled up, so that there is one program."""


def score(store: Store, run: str | os.PathLike) -> Scores:
    """Returns the probabilities of the newest finished classifier of a run.

    Args:
      store: the recordings; each is read once.
      run: the run folder, which is only read.

    Raises:
      LabelError: no run folder, no finished classifier in it, an instruction that its episodes do not have, or frames
        of another size than theirs.
      ConfigError: settings that this version does not know.
    """
    folder = pathlib.Path(run).expanduser().absolute()
    try:
        recipe = read_recipe(read_json(folder / "config.json"))
    except OSError as error:
        raise LabelError(f"{folder} is not a run folder: its config.json cannot be read ({error}).") from error
    rounds = [re.fullmatch(r"reward-(\d+)", mark.parent.name) for mark in folder.glob(f"stages/reward-*/{MARK}")]
    newest = max((int(found[1]) for found in rounds if found), default=None)
    if newest is None:
        raise LabelError(
            f"{folder}: no finished classifier (stages/reward-K) in it. Let the run go on, or leave --run."
        )
    stage, (tasks, size) = folder / "stages" / f"reward-{newest}", _list_tasks(folder)
    # Before the first is scored: of hundreds the last one may be the odd one.
    for item in store.items:
        if plain(item.instruction) not in tasks:
            known = "; ".join(sorted(tasks))
            raise LabelError(f"{item.recording}: {folder.name} does not know {item.instruction!r}; it knows: {known}.")
    judge = jax.jit(classifier.score(recipe.reward, load_reward(recipe.reward, stage)))
    probs = {}
    for number, item in enumerate(store.items):
        frame_SHWC = store.read(number).frame_SHWC
        if list(frame_SHWC.shape[1:]) != size:
            raise LabelError(
                f"{item.recording}: frames of {list(frame_SHWC.shape[1:])}, those of {folder.name} {size}."
            )
        parts = []
        for low in range(0, len(frame_SHWC), AT_ONCE):
            part = frame_SHWC[low : low + AT_ONCE]
            filled = np.concatenate([part, np.repeat(part[-1:], AT_ONCE - len(part), axis=0)])
            prob_1T = judge(to_float(filled)[None], np.asarray([tasks[plain(item.instruction)]]), None)
            parts.append(np.asarray(prob_1T)[0, : len(part)])
        probs[number] = np.concatenate(parts)
    return Scores(f"{folder.name}, round {newest}", float(read_json(stage / MARK)["threshold"]), probs)


def _list_tasks(folder: pathlib.Path) -> tuple[dict[str, int], list[int]]:
    """Returns the numbers of the instructions of the run's episodes, by their plain text, and a frame's shape."""
    tasks: dict[str, int] = {}
    size: list[int] = []
    for path in sorted(folder.glob(f"stages/*/episodes/{disk.MANIFEST}")):
        facts = disk.manifest(path.parent)
        tasks |= {plain(about["instruction"]): int(task) for task, about in facts["tasks"].items()}
        size = facts["frame"]
    if not tasks:
        raise LabelError(f"{folder}: no episodes in it whose instructions its classifier could know.")
    return tasks, size
