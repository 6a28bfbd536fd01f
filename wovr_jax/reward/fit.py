"""Episodes -> a trained success classifier with a threshold, judged on episodes it never saw.

It learns from true frames and from the same episodes retold by the world model (imagined
frames under the true labels), so its probability on an imagined frame already discounts
what imagination gets wrong. The threshold is chosen on held-out episodes of both kinds.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from wovr_jax.core.log import Log
from wovr_jax.data import batches
from wovr_jax.reward import calibrate
from wovr_jax.reward import train as training
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.reward.train import RewardTrainConfig
from wovr_jax.train import loop
from wovr_jax.types import Array, Episode, Params

HELD_OUT = 0.15
"""Share of the episodes that judge."""


def fit(
    cfg: RewardConfig,
    train: RewardTrainConfig,
    params: Params,
    real: Sequence[Episode],
    retold: Sequence[Episode],
    key: Array,
    *,
    name: str = "reward",
    log: Log | None = None,
    folder: str | os.PathLike | None = None,
) -> tuple[Params, dict[str, Any]]:
    """Trains, then judges.

    Args:
      cfg, train: network and training; ``train.steps`` steps are taken.
      params: where to start.
      real: true episodes.
      retold: episodes with imagined frames and true labels; an episode is on the same side of
        the split as its true twin. They are the extra pool of a batch.
      key: of the batches.
      name, log, folder: see ``loop.fit``.

    Returns:
      Parameters, and JSON-able facts: threshold, rates by frame and by episode on held-out true
      and imagined frames, reliability of the imagined ones.

    Raises:
      NoDataError: when no episode, or every episode, succeeds.
    """
    given = {"real": real, "imagined": retold} if retold else {"real": real}
    sets = {kind: _frames(episodes, train.stride) for kind, episodes in given.items()}
    learn = [_only(one, ~one["held"]) for one in sets.values()]
    frame, label, task = (np.concatenate([one[part] for one in learn]) for part in ("frame", "label", "task"))
    extra = np.concatenate([np.full(len(one["label"]), i > 0) for i, one in enumerate(learn)])
    data = training.dataset(frame, label, task, extra)
    how = train if retold else dataclasses.replace(train, extra=0.0)
    state, step = training.make(cfg, how, params, data, key)
    state = loop.fit(name, state, step, train.steps, log=log, folder=folder)
    held = {kind: _only(one, one["held"]) for kind, one in sets.items()}
    return state.params, _judge(cfg, train, state.params, held)


def _frames(episodes: Sequence[Episode], stride: int) -> dict[str, np.ndarray]:
    """Every ``stride``-th frame of every episode, with label, task, episode index and side of the split."""
    won_E = np.array([episode.success_S.any() for episode in episodes])
    if won_E.all() or not won_E.any():
        kind = "fails" if won_E.all() else "succeeds"
        raise batches.NoDataError(
            f"none of {len(episodes)} episodes {kind}: the success classifier needs both kinds. Collect more episodes, "
            "or let the demonstrations be better (or worse)."
        )
    held_E = batches.split(episodes, HELD_OUT, won_E)
    count_E = [len(episode.success_S[::stride]) for episode in episodes]
    return {
        "frame": np.concatenate([episode.frame_SHWC[::stride] for episode in episodes]),
        "label": np.concatenate([episode.success_S[::stride] for episode in episodes]),
        "task": np.repeat(np.array([episode.task for episode in episodes], np.int32), count_E),
        "episode": np.repeat(np.arange(len(episodes)), count_E),
        "held": np.repeat(held_E, count_E),
    }


def _only(frames: dict[str, np.ndarray], where: np.ndarray) -> dict[str, np.ndarray]:
    return {name: column[where] for name, column in frames.items()}


def _judge(
    cfg: RewardConfig, train: RewardTrainConfig, params: Params, held: dict[str, dict[str, np.ndarray]]
) -> dict[str, Any]:
    prob = {kind: training.predict(cfg, params, one["frame"], one["task"]) for kind, one in held.items()}
    pairs = {kind: (prob[kind], one["label"]) for kind, one in held.items()}
    whole = {kind: calibrate.by_episode(*pairs[kind], one["episode"]) for kind, one in held.items()}
    # A rollout counts as a success when any of its frames does, so the threshold is chosen on episodes.
    imagined = whole.get("imagined")
    if imagined is not None and not 0 < imagined[1].sum() < len(imagined[1]):
        imagined = None  # a few held-out episodes may lack one kind; true ones have both
    choice = calibrate.choose(*whole["real"], train.rule, max_fpr=train.max_fpr, imagined=imagined)
    facts: dict[str, Any] = {"threshold": choice.threshold, "chosen_on_imagined_too": imagined is not None}
    for kind in held:
        facts[kind] = {
            "frame": dataclasses.asdict(calibrate.rates(*pairs[kind], choice.threshold)),
            "episode": dataclasses.asdict(calibrate.rates(*whole[kind], choice.threshold)),
            "reliability": dataclasses.asdict(calibrate.reliability(*pairs[kind])),
        }
    return facts
