"""The stage that improves the policy: imagined rollouts, then masked GRPO on them, iteration after iteration."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wovr_jax import learner
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
from wovr_jax.types import Array, Imagined, Params
from wovr_jax.world.model import WorldConfig


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
    """

    arena: Arena
    acting: Acting
    prompt_KL: Array
    codec: Callable[[], Codec]
    starts: Product[Starts] | None
    vae: Product[tuple[WorldConfig, Params]] | None
    world: Product[Params] | None
    reward: Product[Judge] | None


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
    name, updates = f"grpo-{round_ + 1}", cfg.dream.updates[round_]

    def make(folder: pathlib.Path) -> dict[str, Any]:
        imagination = imagine()
        state, step = begin(cfg, policies, imagination, key, round_)
        # An iteration is minutes long on a real policy, so each of them is logged.
        state = loop.fit(name, state, step, updates, log=run.log, folder=folder, log_every=1)
        # Adapters are merged: the next round may train others, and evaluation and export know plain weights only.
        checkpoint.save(folder / "policy", cfg.network.plain(state.params))
        curve = [line for line in read_metrics(run.folder) if line["stage"] == name]
        # A judge that always or never says success gives no advantage, nor does a start from which all ends alike; the
        # loss would show neither.
        flat = average_flat(curve)
        if remark := " ".join(filter(None, (explain_idle(curve), explain_flat(*flat)))):
            processes.say(f"{name}: {remark}")
        facts = _count_steps(cfg, updates, imagination.arena, curve)
        facts |= {"skipped": sum(line["skipped"] for line in curve), "said": remark}
        return facts | ({"flat_keyframes": sum(flat)} if flat else {})

    return run.stage(name, make, lambda folder: load_policy(cfg.policy, folder))


def begin(
    cfg: Improvement, policies: Sequence[Product[Params]], imagination: Imagination, key: Keys, round_: int
) -> tuple[PolicyState, Callable]:
    """First learner state and ``step(state, i)``: draw starts, roll, score, update, all on the device.

    Args: as for :func:`improve`.
    """
    round_key = key(f"grpo-{round_ + 1}")
    network = cfg.network
    # Without start states the arena itself begins its episodes.
    rollout = _explore(cfg, imagination) if imagination.starts is None else _dream(cfg, imagination)
    params = network.begin(policies[round_].value, key("adapters", round_))
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
        state, metrics = update(state, *roll(state, i), reference)
        return state, {name: metric for name, metric in metrics.items() if not name.endswith(absent)}

    trainable = optimizers.all_but(*cfg.frozen) if cfg.frozen else None
    # Rounds beyond the list take its last rate.
    rate = cfg.dream.rates[min(round_, len(cfg.dream.rates) - 1)]
    state = learner.create(cfg.learner, params, lora.mask if cfg.learner.lora else trainable, rate, vla.AXES)
    # Its batch depends on the state: after a bad update the rollouts can only be made again from the state before it.
    return state, ReplayableStep(step, roll, on_policy=True)


def _dream(cfg: Improvement, given: Imagination) -> Callable[[Params, Array, Array], Imagined]:
    """Rollouts of one compiled program, policy, world and judge in one scan."""
    assert given.starts is not None
    world = None if given.vae is None else given.vae.value[0]
    dream = programs.dream(cfg, given.codec(), world)
    table = sharding.whole(jax.device_put(given.starts.value))
    # Arguments of the compiled program, not constants in it.
    parts: dict[str, Any] = {"starts": table, "prompt_KL": given.prompt_KL, "threshold": jnp.float32(0.5)}
    if given.world is not None:
        parts["world"] = given.world.value
    if given.reward is not None:
        parts |= {"reward": given.reward.value.params, "threshold": jnp.float32(given.reward.value.threshold)}
    if cfg.dream.world != "learned":
        parts["sim"] = programs.true_states(table, cfg.sim)
    # The number of the iteration is for simulators on the host, which take new layouts with it.
    return lambda params, i, key: dream(params, parts, key)


def _explore(cfg: Improvement, given: Imagination) -> Callable[[Params, Array, Array], Imagined]:
    """Rollouts of a simulator on the host (online RL)."""
    explore, groups = given.arena.explore, Groups(cfg.dream.groups, cfg.learner.grpo.group, cfg.dream.chunks)
    assert explore is not None
    return lambda params, i, key: explore(int(i), Actor(given.acting, lambda: params, key, cfg.temperature), groups)


def _count_steps(cfg: Improvement, updates: int, arena: Arena, curve: list[dict[str, Any]]) -> dict[str, Any]:
    """What the round consumed: imagined frames, or true steps where the world is the truth."""
    steps = updates * cfg.dream.groups * cfg.learner.grpo.group * cfg.dream.chunks * cfg.policy.chunk
    if cfg.dream.world == "learned":
        # A step of a chunk is a frame, and the world model makes all of them, also those after a success.
        return {"imagined_frames": steps}
    if arena.explore and curve:  # there, episodes end at their first success
        steps = round(steps * arena.hold * sum(line["length"] for line in curve) / len(curve))
    return {"true_steps": steps}


def explain_idle(curve: Sequence[Mapping[str, float]]) -> str:
    """Returns what to tell the user about iterations that changed nothing; empty when every one took a step.

    ``curve`` holds the metrics of each iteration.
    """
    skipped = [line for line in curve if line["skipped"]]
    if not skipped:
        return ""
    success = sum(line["success"] for line in skipped) / len(skipped)
    return (
        f"{len(skipped)} of {len(curve)} iterations changed nothing: judged success was {success:.0%} in them, and no "
        "group of rollouts from one start had enough of both outcomes to learn from. "
        + ("The policy is as it was. " if len(skipped) == len(curve) else "")
        + "Look at the reward's threshold and errors, and at the policy's true success; then try more groups "
        "(dream.groups), larger ones (learner.grpo.group) or a wider filter (learner.grpo.filter_low, filter_high)."
    )


def average_flat(curve: Sequence[Mapping[str, float]]) -> tuple[float, ...]:
    """Returns the mean shares of groups from keyframes that all failed and that all succeeded; empty without such."""
    lines = [line for line in curve if "lost_keyframe" in line]
    return tuple(sum(line[f"{end}_keyframe"] for line in lines) / len(lines) for end in ("lost", "won") if lines)


def explain_flat(lost: float = 0.0, won: float = 0.0) -> str:
    """Returns what to tell the user where most groups from keyframes had nothing to teach; else nothing."""
    if lost + won <= 0.5:
        return ""
    return (
        f"{lost + won:.0%} of the groups from keyframes ended alike and taught nothing, {lost:.0%} in failures and "
        f"{won:.0%} in successes: try others (starts.rule, starts.before, starts.room), or fewer (starts.share)."
    )
