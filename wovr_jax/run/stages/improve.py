"""The stage that improves the policy: imagined rollouts, then masked GRPO on them, iteration after iteration."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax import evaluate, learner
from wovr_jax.core import checkpoint, processes, sharding
from wovr_jax.core.log import read_metrics
from wovr_jax.data.starts import Starts, count_keyframes
from wovr_jax.learner import PolicyState
from wovr_jax.nn import lora
from wovr_jax.policy import vla
from wovr_jax.policy.actions import Codec
from wovr_jax.run import programs
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.programs import Improvement
from wovr_jax.run.stages.episodes import Keys
from wovr_jax.run.stages.policy import load_policy
from wovr_jax.run.stages.reward import Judge
from wovr_jax.sim.arena import Acting, Actor, Arena, Groups
from wovr_jax.train import loop, optimizers
from wovr_jax.train.step import ReplayableStep
from wovr_jax.types import Array, Imagined, Params, Start
from wovr_jax.world.model import WorldConfig

Gate = Callable[[Mapping[str, Any], Start, Imagined, Array], Imagined]
"""``gate(parts, start, imagined, key)``: rollouts with every frame, as the policy is to be paid for them.

``parts`` are those of ``programs.dream``, ``key`` is the rollouts'. The frames are given up in the result.
"""

SMOOTHING = 0.5
"""Weight of the past in the smoothed share of paid failures: an iteration has some forty of them, too few to go by."""


@dataclasses.dataclass(frozen=True)
class Imagination:
    """What rollouts are made of; each part is loaded when the first of them begins.

    Attributes:
      arena: the true environment.
      acting: the policy as functions of its weights, for an arena that explores.
      prompt_KL: (tasks, L) prompt tokens of every task.
      codec: gives the codec between actions and tokens.
      starts: where rollouts begin; None where the arena explores.
      vae: the world model's settings, and its VAE; None, as ``world``, in a true world.
      world: the world model.
      reward: the judge; None where the true predicate judges.
      gate: what looks at imagined rollouts before they are paid, if anything does.
    """

    arena: Arena
    acting: Acting
    prompt_KL: Array
    codec: Callable[[], Codec]
    starts: Product[Starts] | None
    vae: Product[tuple[WorldConfig, Params]] | None
    world: Product[Params] | None
    reward: Product[Judge] | None
    gate: Gate | None = None


def improve(
    run: Run,
    cfg: Improvement,
    policies: Sequence[Product[Params]],
    imagine: Callable[[], Imagination],
    key: Keys,
    round_: int,
) -> Product[Params]:
    """The policy after a round of masked GRPO.

    Args:
      run: the run.
      round_: the round in which the policy learns, from 0; the stage has the number of the policy that it makes.
      cfg: settings.
      policies: the base policy, and those after each round so far.
      imagine: gives what rollouts are made of, the newest of each; asked when the stage is made.
      key: of the run, by name.
    """
    name = f"grpo-{round_ + 1}"

    def make(folder: pathlib.Path) -> dict[str, Any]:
        imagination = imagine()
        # With what the round before left over because its refresh was due.
        left = run.facts.get(f"grpo-{round_}", {}).get("left", 0) if cfg.dream.select == "triggered" else 0
        updates = cfg.dream.updates[round_] + left
        choice = _Choice(run, name, cfg, folder, policies[round_].load) if cfg.dream.select != "last" else None
        state, step = begin(cfg, policies, imagination, key, round_, choice and choice.judge)
        # An iteration is minutes long on a real policy, so each of them is logged.
        how = {"log": run.log, "folder": folder, "log_every": 1, "undefined": evaluate.WATCHED}
        state = loop.fit(name, state, step, updates, **how)
        # Adapters are merged: the next round may train others, and evaluation and export know plain weights only.
        params, facts, said, rolled = cfg.network.plain(state.params, policies[round_].load), {}, "", updates
        if choice:
            if not choice.over:
                # The last policy has not acted yet.
                last = jnp.asarray(updates, jnp.int32)
                with contextlib.suppress(loop.Enough):
                    choice.judge(state.params, last, _watch(cfg, step.batch(state, last)[0]))
            params, facts, said = choice.choose(updates)
            rolled = choice.rolled
        checkpoint.save(folder / "policy", params)
        curve = _read_curve(run, name)
        # A judge that always or never says success gives no advantage, and the loss would not show it.
        if remark := " ".join(filter(None, (said, explain_idle(curve)))):
            processes.say(f"{name}: {remark}")
        facts |= _count_steps(cfg, rolled, imagination.arena, curve)
        return facts | {"skipped": sum(line["skipped"] for line in curve), "said": remark}

    return run.stage(name, make, lambda folder: load_policy(cfg.policy, folder)).used_as(vla.for_use(cfg.policy))


def begin(
    cfg: Improvement,
    policies: Sequence[Product[Params]],
    imagination: Imagination,
    key: Keys,
    round_: int,
    judge: Callable[[Params, Array, Mapping[str, Array]], None] | None = None,
) -> tuple[PolicyState, ReplayableStep]:
    """First learner state and ``step(state, i)``: draw starts, roll, score, update, all on the device.

    Args: as for :func:`improve`, and ``judge(params, i, watched)``, which is called with the policy that acted before
      it is updated.
    """
    round_key = key(f"grpo-{round_ + 1}")
    network = cfg.network
    # The policy first: for a moment it is there as it was stored and as it is held, and the world model need not be.
    params = network.begin(policies[round_].load(), key("adapters", round_))
    # Without start states the arena itself begins its episodes.
    rollout = _explore(cfg, imagination) if imagination.starts is None else _dream(cfg, imagination)
    # The regulariser holds the policy to the base policy, not to the one that it was a round ago.
    reference = network.begin(policies[0].value, key("adapters", 0)) if cfg.learner.grpo.kl else None
    update = programs.update(cfg.learner, network.net, cfg.temperature)

    def roll(state: PolicyState, i: Array) -> tuple[Imagined, Array]:
        # By the number of the iteration, so that a resumed round draws what the uninterrupted one would have.
        k_dream, k_update = jax.random.split(jax.random.fold_in(round_key, i))
        return rollout(state.params, i, k_dream), k_update

    groups, table = cfg.dream.groups, imagination.starts
    at_keys = count_keyframes(table.value, groups, cfg.share) if table else 0
    # Of a kind of start from which no group begins there is no success, not even 0.
    absent = tuple(kind for kind, count in (("_start", groups - at_keys), ("_keyframe", at_keys)) if not count)

    def step(state: PolicyState, i: Array) -> tuple[PolicyState, dict[str, Array]]:
        imagined, k_update = roll(state, i)
        # A true reward pays no failure: there is nothing to watch.
        watched = imagined.truth_BNT is not None and cfg.dream.reward == "learned"
        shares = _watch(cfg, imagined) if watched else {}
        if judge:
            judge(state.params, i, shares)
        # The update is not even shown what was only watched.
        state, metrics = update(state, dataclasses.replace(imagined, truth_BNT=None), k_update, reference)
        return state, {name: metric for name, metric in (metrics | shares).items() if not name.endswith(absent)}

    frozen = lora.find_frozen(params) if cfg.learner.lora else optimizers.find_frozen(params, *cfg.frozen)
    # Rounds beyond the list take its last rate.
    rate = cfg.dream.rates[min(round_, len(cfg.dream.rates) - 1)]
    state = learner.create(cfg.learner, params, frozen, rate, vla.AXES)
    # Its batch depends on the state: after a bad update the rollouts can only be made again from the state before it.
    return state, ReplayableStep(step, roll, on_policy=True)


def _dream(cfg: Improvement, given: Imagination) -> Callable[[Params, Array, Array], Imagined]:
    """Rollouts of one compiled program, policy, world and judge in one scan."""
    assert given.starts is not None
    dream = programs.dream(cfg, given.codec(), None if given.vae is None else given.vae.value[0], bool(given.gate))
    table = sharding.whole(jax.device_put(given.starts.value))
    # Arguments of the compiled program, not constants in it.
    parts: dict[str, Any] = {"threshold": jnp.float32(0.5)}
    if given.world is not None:
        parts["world"] = given.world.value
    if given.reward is not None:
        parts |= {"reward": given.reward.value.params, "threshold": jnp.float32(given.reward.value.threshold)}
    states = programs.true_states(table, cfg.sim) if cfg.dream.world != "learned" else None

    def roll(params: Params, key: Array) -> tuple[Array, Imagined]:
        k_draw, k_roll = jax.random.split(key)
        row_B, start = programs.begin(cfg, table, given.prompt_KL, states, k_draw)
        imagined = dream(params, parts, start, k_roll)
        return row_B, given.gate(parts, start, imagined, k_roll) if given.gate else imagined

    # The number of the iteration is for simulators on the host, which take new layouts with it.
    if cfg.dream.world != "learned" or not cfg.dream.watch:
        return lambda params, i, key: roll(params, key)[1]
    follow, starts = given.arena.follow, given.starts.value
    assert follow is not None
    every = cfg.dream.watch_every(cfg.dream.groups * cfg.learner.grpo.group)

    def dream_watched(params: Params, i: Array, key: Array) -> Imagined:
        row_B, imagined = roll(params, key)
        # Afterwards and not in that program: beside the learned world a simulator changes what the compiler fuses
        # there, and so the last bits of what is learned from.
        row_W, action_WNTA = (x[::every] for x in sharding.host((row_B, imagined.action_BNTA)))
        action_WSA = action_WNTA.reshape(len(row_W), -1, action_WNTA.shape[-1])
        # Of the others nothing is known, and ``_watch`` leaves them out.
        truth_BNT = np.zeros(imagined.action_BNTA.shape[:-1], bool)
        truth_BNT[::every] = follow(starts, row_W, action_WSA)[0].reshape(-1, *truth_BNT.shape[1:])
        return dataclasses.replace(imagined, truth_BNT=truth_BNT)

    return dream_watched


def _explore(cfg: Improvement, given: Imagination) -> Callable[[Params, Array, Array], Imagined]:
    """Rollouts of a simulator on the host (online RL)."""
    explore, groups = given.arena.explore, Groups(cfg.dream.groups, cfg.learner.grpo.group, cfg.dream.chunks)
    assert explore is not None
    return lambda params, i, key: explore(int(i), Actor(given.acting, lambda: params, key, cfg.temperature), groups)


def is_good(shares: Sequence[float | None], most: float) -> bool:
    """Whether the smoothed share of paid failures is at most ``most`` after the last of ``shares``.

    A share of None is of an iteration without a failure, which says nothing; before any failure nothing was paid.
    """
    smooth = None
    for share in shares:
        if share is not None:
            smooth = share if smooth is None else SMOOTHING * smooth + (1 - SMOOTHING) * share
    return smooth is None or smooth <= most


def _read_curve(run: Run, name: str) -> list[dict[str, Any]]:
    """Returns the metrics of each iteration; those of a try that ended before its first checkpoint are there twice."""
    return list({line["step"]: line for line in read_metrics(run.folder) if line["stage"] == name}.values())


@dataclasses.dataclass
class _Choice:
    """The policy that a round ends with, as the simulator judges it (``DreamConfig.select``).

    It is judged by the log, so a round that is taken up where it was cut keeps the same policies as one that was not.

    Attributes:
      run, name, cfg, folder: of the stage.
      before: gives the policy that the round began with.
      rolled: policies that have acted.
      over: whether the newest of them ended the round (``DreamConfig.select``).
    """

    run: Run
    name: str
    cfg: Improvement
    folder: pathlib.Path
    before: Callable[[], Params]
    rolled: int = 0
    over: bool = False

    def judge(self, params: Params, i: Array, watched: Mapping[str, Array]) -> None:
        """Keeps the policy that has just acted, after ``i`` updates, in place of the one before, if it is good.

        Raises:
          Enough: it is not, and the refresh is triggered by that.
        """
        done, now = int(i), float(watched["false_success"])

        def read_shares() -> list[float | None]:
            # Line ``s`` is of the policy that acted before update ``s``; lines beyond were written by a try that was
            # cut.
            return [line["false_success"] for line in _read_curve(self.run, self.name) if line["step"] <= done]

        before = processes.once(read_shares, f"read the curve of {self.name}")
        self.rolled = done + 1
        if is_good([*before, None if math.isnan(now) else now], self.cfg.dream.false_success):
            checkpoint.save(self.folder / "good", self.cfg.network.plain(params, self.before), {"iteration": done})
        elif self.cfg.dream.select == "triggered":
            self.over = True
            raise loop.Enough

    def choose(self, updates: int) -> tuple[Params, dict[str, Any], str]:
        """Returns the last good policy of a round, after how many updates it was that, and what to tell the user."""
        paid = f"at most {self.cfg.dream.false_success:.0%} of the true failures (smoothed) were paid as successes"
        params, good, said = self.before(), None, f"At no time {paid}: the policy is the one from before this round."
        if checkpoint.exists(self.folder / "good"):
            params = load_policy(self.cfg.policy, self.folder, "good")
            good = checkpoint.meta(self.folder / "good")["iteration"]
            said = f"Kept is the policy after {good} of {updates} updates, the last when {paid}." * (good < updates)
        return params, {"good": good, "left": updates - (good or 0)}, said


def _watch(cfg: Improvement, imagined: Imagined) -> dict[str, Array]:
    """Returns the shares of ``evaluate.WATCHED`` among the rollouts whose truth is known."""
    every = cfg.dream.watch_every(len(imagined.task_B))
    return evaluate.watch_rewards(jax.tree.map(lambda leaf: leaf[::every], imagined))


def _count_steps(cfg: Improvement, rolled: int, arena: Arena, curve: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``rolled`` iterations consumed: imagined frames, and true steps where the world is the truth, or selects."""
    group = cfg.dream.groups * cfg.learner.grpo.group
    rollouts, steps = rolled * group, rolled * group * cfg.dream.chunks * cfg.policy.chunk
    if cfg.dream.world == "learned":
        # A step of a chunk is a frame, and the world model makes all of them, also those after a success.
        # What selects decides something, and is paid for as any true episode.
        followed = len(range(0, group, cfg.dream.watch_every(group)))
        true = rolled * followed * cfg.dream.chunks * cfg.policy.chunk
        selects = {"episodes": rolled * followed, "true_steps": true}
        watched = {"watched_steps": true} if cfg.dream.select == "last" else selects
        return {"imagined_frames": steps} | (watched if cfg.dream.watch else {})
    if arena.explore and curve:  # there, episodes end at their first success
        steps = round(steps * arena.hold * sum(line["length"] for line in curve) / len(curve))
    return {"episodes": rollouts, "true_steps": steps}


def explain_idle(curve: Sequence[Mapping[str, float]]) -> str:
    """Returns what to tell the user about iterations that changed nothing; empty when every one took a step.

    ``curve`` holds the metrics of each iteration.
    """
    skipped = [line["success"] for line in curve if line["skipped"]]
    if not skipped:
        return ""
    whole = "The policy is as it was. " * (len(skipped) == len(curve))
    return (
        f"{len(skipped)} of {len(curve)} iterations changed nothing: judged success was {np.mean(skipped):.0%} and no "
        f"group of rollouts from one start had enough of both outcomes to learn from. {whole}Look at the reward's "
        "threshold and errors, and at the policy's true success; then try more groups (dream.groups), larger ones "
        "(learner.grpo.group) or a wider filter (learner.grpo.filter_low, filter_high)."
    )
