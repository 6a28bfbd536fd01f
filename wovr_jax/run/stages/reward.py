"""The stage that trains the success classifier and chooses its threshold, judged on episodes it never saw.

It learns from true frames and from the same episodes replayed by the world model (imagined frames under the true
labels), so its probability on an imagined frame already discounts what imagination gets wrong. The threshold is chosen
on held-out episodes of both kinds.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from wovr_jax.core import checkpoint, sharding
from wovr_jax.core.config import ConfigError
from wovr_jax.data import batches
from wovr_jax.data import episodes as disk
from wovr_jax.reward import calibrate, classifier
from wovr_jax.reward import train as training
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.reward.train import RewardTrainConfig
from wovr_jax.run import programs
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.recipe import CollectConfig
from wovr_jax.run.stages.episodes import Demonstrations, Keys, join_rounds
from wovr_jax.train import loop
from wovr_jax.types import Array, Episode, Params
from wovr_jax.weights import native
from wovr_jax.world.model import WorldConfig


class Judge(NamedTuple):
    """A success classifier.

    Attributes:
      params: its weights.
      threshold: a frame whose probability is above it counts as a success.
    """

    params: Params
    threshold: float


def fit_reward(
    run: Run,
    cfg: RewardConfig,
    train: RewardTrainConfig,
    start: Callable[[], Params],
    collected: CollectConfig,
    prompt_KL: Array,
    steps: int,
    key: Keys,
    round_: int,
    vae: Product[tuple[WorldConfig, Params]],
    world: Product[Params],
    rollouts: Sequence[Product[Sequence[Episode]]],
    demonstrations: Product[Demonstrations],
) -> Product[Judge]:
    """The success classifier of a round; without a step of training the one that it starts from, in every round.

    Args:
      run: the run.
      round_: the round.
      cfg, train: the network and its training.
      start: gives the weights to start from.
      collected: how many episodes the world model replays, and how many at once.
      vae: the world model's settings, and its VAE.
      world: the world model of this round.
      rollouts: true episodes of every round so far.
      demonstrations: scripted episodes.
      prompt_KL: (tasks, L) prompt tokens of every task.
      steps: of a replay: as long as an episode of the true environment may be.
      key: of the run, by name.

    Raises:
      NoDataError: see :func:`fit`.
    """
    if not train.steps:
        return Product(lambda: Judge(start(), train.threshold))
    name = f"reward-{round_}"

    def make(folder: pathlib.Path) -> dict[str, Any]:
        every, demos = join_rounds(rollouts), demonstrations.value.train
        real, newest = disk.join([every, demos]), range(len(every))[-collected.retold :]
        # Demonstrations mostly succeed, so a third as many give successes where the policy has few.
        rows = [*newest, *range(len(every), len(real))[: len(newest) // 3]]
        # A better policy fails less: held-out episodes of earlier rounds bring failures to choose the threshold on.
        judging_E = batches.split(disk.heads(real))[: len(every) - len(rollouts[-1].value)]
        rows = list(dict.fromkeys([*rows, *np.flatnonzero(judging_E).tolist()]))
        episodes = [real[row] for row in rows]

        first, world_cfg = start(), vae.value[0]

        # The program of the comparison, which scores as well; scores of the first weights, which nobody looks at.
        how = {"batch": collected.batch, "steps": steps, "judge": (cfg, first)}
        videos = programs.replay_episodes(world_cfg, world.value, episodes, prompt_KL, key("retold", round_), **how)
        # Imagined frames under the true labels of the episodes whose actions led to them: a classifier that sees them
        # learns how far imagination is to be believed, not only what success looks like.
        pairs, told = zip(rows, videos, strict=True), functools.partial(dataclasses.replace, actor="imagination")
        imagined = {row: told(real[row], frame_SHWC=frames) for row, frames in pairs}
        params, facts = fit(cfg, train, first, real, imagined, key(name), name=name, log=run.log, folder=folder)
        checkpoint.save(folder / "reward", params)
        return facts | {"imagined_frames": sum(len(episode.action_SA) for episode in imagined.values())}

    # The threshold is a fact of the stage: a reader of the run folder needs no weights for it.
    params = run.stage(name, make, lambda folder: load_reward(cfg, folder))
    return Product(lambda: Judge(params.load(), params.facts["threshold"]), name, params.facts)


def start_reward(cfg: RewardConfig, weights: str, instructions: Sequence[str], key: Keys) -> Params:
    """Weights from which the success classifier starts, whole on every device.

    Args:
      cfg: the network.
      weights: a json of imported weights or the folder of a checkpoint; empty for random weights.
      instructions: of the environment, in the order of its task numbers.
      key: of the run, by name.

    Raises:
      ConfigError: nothing there, weights of another network, or a release with other tasks than the environment has.
    """
    network = classifier.network(cfg)
    if not weights:
        return sharding.whole(network.init(key("reward")))
    params = native.load_weights("reward_weights", weights, network.shapes(), sharding.WHOLE)
    if cfg.head == "task" and weights.endswith(".json"):
        # What is imported is RLinf's, who number the instructions of a suite by alphabet; here a suite has an order.
        if cfg.tasks != len(instructions):
            raise ConfigError(
                f"config.reward_weights: {weights} knows {cfg.tasks} tasks, the environment has {len(instructions)}: "
                "nobody can tell which is which. Name the classifier of this suite, or a checkpoint of a run."
            )
        rank_K = np.argsort(np.argsort(instructions))
        params["task"] = sharding.whole(jax.tree.map(lambda embedding_KD: embedding_KD[rank_K], params["task"]))
    return params


def load_reward(cfg: RewardConfig, folder: pathlib.Path) -> Params:
    """The classifier that a stage left in its folder."""
    return checkpoint.restore(folder / "reward", sharding.describe(classifier.network(cfg).shapes(), sharding.WHOLE))


def fit(
    cfg: RewardConfig,
    train: RewardTrainConfig,
    params: Params,
    real: Sequence[Episode],
    imagined: Mapping[int, Episode],
    key: Array,
    *,
    name: str = "reward",
    log: Any = None,
    folder: pathlib.Path | None = None,
) -> tuple[Params, dict[str, Any]]:
    """Trains, then judges.

    Args:
      cfg, train: network and training; ``train.steps`` steps are taken.
      params: where to start.
      real: true episodes, whole collections.
      imagined: row among them -> the episode with imagined frames and true labels, which is on the same side of the
        split as its true twin. They are the extra pool of a batch. No world model was trained on those that judge.
      key: of the batches.
      name, log, folder: see ``loop.fit``.

    Returns:
      Parameters, and JSON-able facts: threshold, rates by frame and by episode on held-out true
      and imagined frames, reliability of the imagined ones.

    Raises:
      NoDataError: when no episode, or every episode, succeeds; of those that judge this is no matter to a fixed
        threshold.
    """
    held_E = batches.split(disk.heads(real))
    frames = {"real": _label_frames(real, held_E, train.stride)}
    if imagined:
        frames["imagined"] = _label_frames(list(imagined.values()), held_E[list(imagined)], train.stride)
    held = {kind: _select(columns, columns["held"]) for kind, columns in frames.items()}
    if train.rule != "fixed":  # now, and not when the training is over
        label_X = held["real"]["label"]
        _check_kinds(calibrate.by_episode(label_X, label_X, held["real"]["episode"])[1], "held-out ")
    learn = [_select(columns, ~columns["held"]) for columns in frames.values()]
    frame, label, task = (np.concatenate([columns[part] for columns in learn]) for part in ("frame", "label", "task"))
    extra = np.concatenate([np.full(len(columns["label"]), i > 0) for i, columns in enumerate(learn)])
    data = training.dataset(frame, label, task, extra)
    # Without imagined frames there is no pool to draw a share of the batch from.
    how = train if imagined else dataclasses.replace(train, extra=0.0)
    state, step = training.make(cfg, how, params, data, key)
    state = loop.fit(name, state, step, train.steps, log=log, folder=folder)
    return state.params, _judge(cfg, train, state.params, held)


def _label_frames(episodes: Sequence[Episode], held_E: np.ndarray, stride: int) -> dict[str, np.ndarray]:
    """Every ``stride``-th frame of every episode, with label, task, episode index and side of the split."""
    _check_kinds(np.array([episode.success_S.any() for episode in episodes]))
    count_E = [len(episode.success_S[::stride]) for episode in episodes]
    return {
        "frame": np.concatenate([episode.frame_SHWC[::stride] for episode in episodes]),
        "label": np.concatenate([episode.success_S[::stride] for episode in episodes]),
        "task": np.repeat(np.array([episode.task for episode in episodes], np.int32), count_E),
        "episode": np.repeat(np.arange(len(episodes)), count_E),
        "held": np.repeat(held_E, count_E),
    }


def _check_kinds(won_E: np.ndarray, which: str = "") -> None:
    """Raises NoDataError unless some of the episodes succeed and some fail."""
    if won_E.all() or not won_E.any():
        kind = "fails" if won_E.all() else "succeeds"
        fixed = " A threshold that is not chosen on them, reward_train.rule='fixed', needs none." if which else ""
        raise batches.NoDataError(
            f"none of {len(won_E)} {which}episodes {kind}: the success classifier needs both kinds. Collect more "
            f"episodes, or let the demonstrations be better (or worse).{fixed}"
        )


def _select(frames: dict[str, np.ndarray], where: np.ndarray) -> dict[str, np.ndarray]:
    return {name: column[where] for name, column in frames.items()}


def _judge(
    cfg: RewardConfig, train: RewardTrainConfig, params: Params, held: dict[str, dict[str, np.ndarray]]
) -> dict[str, Any]:
    # By frame and by episode: the classifier sees frames, and a rollout is believed by the best of its frames.
    prob = {kind: training.predict(cfg, params, frames["frame"], frames["task"]) for kind, frames in held.items()}
    pairs = {kind: (prob[kind], frames["label"]) for kind, frames in held.items()}
    whole = {kind: calibrate.by_episode(*pairs[kind], frames["episode"]) for kind, frames in held.items()}
    # A rollout counts as a success when any of its frames does, so the threshold is chosen on episodes.
    imagined = whole.get("imagined")
    if imagined is not None and (train.rule == "fixed" or not 0 < imagined[1].sum() < len(imagined[1])):
        imagined = None  # a few held-out episodes may lack one kind; true ones have both
    how = {"max_fpr": train.max_fpr, "fixed": train.threshold}
    choice = calibrate.choose(*whole["real"], train.rule, **how, imagined=imagined)
    facts: dict[str, Any] = {"threshold": choice.threshold, "chosen_on_imagined_too": imagined is not None}
    for kind in held:
        facts[kind] = {
            "frame": dataclasses.asdict(calibrate.rates(*pairs[kind], choice.threshold)),
            "episode": dataclasses.asdict(calibrate.rates(*whole[kind], choice.threshold)),
            "reliability": calibrate.reliability(*pairs[kind]),
        }
    return facts
