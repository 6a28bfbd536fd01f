"""Can a run's world models be trusted: to rank policies, to pay them, and up to which horizon?

Asked on request (``launch/audit.py RUN --rank``, ``--ladder`` or ``--signs``), for it takes true and imagined episodes
of many policies. What is made lies in a run folder of its own, ``<run>/trust/``: the stages of the run stay as they
are, and what the ladder costs is not what the run cost. ``trust.json`` in it is the part ``trust`` of the results.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Annotated, Any

from wovr_jax.audit import lies, ranking
from wovr_jax.audit.closed_loop import find_starts
from wovr_jax.audit.horizon import measure_horizon
from wovr_jax.audit.known import know
from wovr_jax.audit.ladder import climb
from wovr_jax.audit.lies import Rollouts, find_lies, summarize_lies
from wovr_jax.audit.ranking import Count
from wovr_jax.audit.trial import try_policy
from wovr_jax.audit.witnesses import open_witness
from wovr_jax.core import config, keys, processes
from wovr_jax.core.config import Between, ConfigError, Faults, checked
from wovr_jax.core.disk import read_json, write_json
from wovr_jax.data import episodes as disk
from wovr_jax.evaluate import summarize_outcomes
from wovr_jax.report.comparisons import training_world
from wovr_jax.report.results import name_policy
from wovr_jax.run.bind import Products, bind_stages, improvement
from wovr_jax.run.folder import Product, Run, RunError
from wovr_jax.run.recipe import Recipe, SomeLayouts
from wovr_jax.run.stages.episodes import join_rounds
from wovr_jax.sim.arena import Actor
from wovr_jax.sim.witness import Witness
from wovr_jax.types import Episode, Params

FOLDER, FILE = "trust", "trust.json"
TWINS = "twins"
LEVELS = ("sampled", "greedy")
CLOSE = 0.1
"""Policies whose true success differs by less are hard to tell apart; their pairs are counted by themselves."""


@checked
@dataclasses.dataclass(frozen=True)
class TrustConfig:
    """How the question is asked.

    Attributes:
      episodes: start states of each policy, at the temperature of training and greedily; the first of the evaluation.
      shares: of the demonstrations, in ascending order, that the policies of a ladder imitate.
    """

    episodes: SomeLayouts = 256
    shares: tuple[Annotated[float, Between(0, 1, low_open=True)], ...] = (0.1, 0.2, 0.3, 0.5, 1.0)

    def faults(self) -> Faults:
        """Yields shares that are none, or not in order: each rung holds the demonstrations of the one below."""
        if list(self.shares) != sorted(set(self.shares)) or not self.shares:
            yield "shares", f"expected some in ascending order, each once, got {list(self.shares)}"


class _Asked(Run):
    """The folder of the question; another question is refused in words of its own."""

    def _compare(self, mark: pathlib.Path, allow_change: bool) -> None:
        del allow_change
        if different := config.diff(read_json(mark), self.settings):
            lines = "; ".join(f"{name}: {old} there, {new} asked" for name, (old, new) in different.items())
            raise RunError(
                f"{self.folder} holds answers to another question ({lines}). Ask with the same --episodes and "
                "--shares, or remove that folder; the run itself is not touched by either."
            )


def ask(
    recipe: Recipe,
    run: Run,
    made: Products,
    asked: TrustConfig,
    *,
    ladder: bool,
    signs: bool = False,
    twins: bool = False,
) -> None:
    """Tries every policy of a finished run in every world of it, and measures how far each world can be followed.

    Args:
      recipe: of the run.
      run: the finished run, whose audit is done.
      made: what it made.
      asked: how many episodes, and which shares.
      ladder: whether policies that imitate shares of the demonstrations are made, and ranked too.
      signs: whether it is asked what tells a lie of each world, see ``lies``.
      twins: the same, and a second world model of each round, of other draws, is asked too.

    Raises:
      ConfigError: a ladder where there is nothing to imitate.
      RunError: answers to another question are there, or a robot that nobody simulates.
    """
    assert made.vae is not None
    if recipe.recorded:
        raise RunError(
            f"{run.folder}: --rank, --ladder and --signs try policies on a simulator, and of a robot there are "
            "recordings only. The replay of its recorded evaluation is part of every audit."
        )
    inner = _Asked(run.folder / FOLDER, config.to_dict(asked))
    # Under other names than those of the run, in the folder of the question, and with the keys of the run.
    do, key = bind_stages(recipe, inner, made), functools.partial(keys.key, recipe.seed)
    rungs = climb(recipe, do.fine_tune, made.demonstrations, asked.shares) if ladder else []
    rl, learned = improvement(recipe), (made.vae, made.worlds, made.rewards)
    witness = open_witness(recipe, do.env)

    def act_as(name: str, policy: Product[Params]) -> Callable[[float], Actor]:
        # Common draws: all policies are tried as the base is.
        return lambda t: dataclasses.replace(do.act(0, "evaluate", t), load=lambda: policy.value, name=name)

    names = ["base", *(f"grpo-{k}" for k in range(1, len(made.policies)))]
    policies = {rung.policy.name: rung.policy for rung in rungs} | dict(zip(names, made.policies, strict=True))
    for name, policy in policies.items():
        try_policy(inner, name, witness, asked.episodes, act_as(name, policy), rl, do.codec, *learned, key)
    for w, world in enumerate(made.worlds):
        actor = act_as(names[-1], made.policies[-1])(recipe.temperature)
        measure_horizon(inner, w, witness, asked.episodes, actor, made.vae, world, key)
    if signs or twins:
        _look_for_lies(recipe, made, inner, witness, asked.episodes, do, twins=twins)
    trust = summarize(recipe, run.facts, inner.facts, asked.episodes)
    if answers := _summarize_lies(inner, len(made.worlds)):
        for world, answer in zip(trust["worlds"], answers, strict=True):
            world["lies"] = answer
    if processes.first():
        write_json(inner.folder / FILE, trust | {"ledger": inner.ledger()})
    inner.close()


def _look_for_lies(
    recipe: Recipe, made: Products, inner: Run, witness: Witness, count: int, do: SimpleNamespace, *, twins: bool
) -> None:
    """Has the last policy that learned in each world play there, and reads the signs of its rollouts."""
    assert made.vae is not None
    key, retold = functools.partial(keys.key, recipe.seed), {}
    if twins:
        retold = dict(enumerate(train_twins(recipe, made, inner.folder / TWINS)))
    for w, world in enumerate(made.worlds):
        taught = [k for k in range(len(made.policies)) if k and training_world(k, recipe.pace) == w] or [0]

        def read_truth(rounds: int = w + 1) -> Sequence[Episode]:
            return disk.join([made.demonstrations.value.train, join_rounds(made.rollouts[:rounds])])

        known = know(inner, w, made.vae, read_truth, key)
        others = {lies.TWIN: retold[w]} if twins else {}
        others |= {lies.REFRESHED: made.worlds[w + 1]} if w + 1 < len(made.worlds) else {}
        how = (witness, count, recipe.collect.batch, improvement(recipe), do.codec, do.env.prompt_KL)
        learned = (find_starts(w, recipe, made), made.vae, world, made.rewards[w])
        find_lies(inner, taught[-1], w, *how, made.policies[taught[-1]], *learned, known, others, key)


def train_twins(recipe: Recipe, made: Products, folder: pathlib.Path) -> list[Product[Params]]:
    """Trains every world model of a run again, on the same episodes and from other draws, in a folder of their own.

    Raises:
      ConfigError: a run that trained none, whose twin would be the world model itself.
    """
    if not recipe.world_train.steps:
        raise ConfigError(
            "--twins trains the world models of a run a second time, and this run was given its world model and "
            "trained none (world_train.steps is 0); ask with --signs."
        )
    other = dataclasses.replace(recipe, seed=recipe.seed ^ 1)
    run = Run(folder, config.to_dict(other))
    do, twins = bind_stages(other, run, made), []
    for w in range(len(made.worlds)):
        twins.append(do.fit_world(w, made.vae, twins, made.rollouts[: w + 1], made.demonstrations))
    run.close()
    return twins


def _summarize_lies(inner: Run, worlds: int) -> list[dict[str, Any]]:
    """Returns what tells a lie of each world; nothing where that was never asked."""
    # Those with a twin come later in the order of names, and say more.
    names = sorted(name for name in inner.facts if name.startswith("lies-"))
    asked = {name.removesuffix("-with-twin").rsplit("-", 1)[-1]: name for name in names}
    if len(asked) < worlds:
        return []
    told = [Rollouts.load(inner.folder / "stages" / asked[str(w)] / lies.FILE) for w in range(worlds)]
    return [summarize_lies(rollouts, before) for rollouts, before in zip(told, [None, *told], strict=False)]


def read(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what ``ask`` found out about the run in ``folder``, as a part of its results; nothing if it did not."""
    path = folder / FOLDER / FILE
    return {"trust": read_json(path)} if path.exists() else {}


def summarize(
    recipe: Recipe, facts: Mapping[str, Any], trials: Mapping[str, Any], episodes: int, seed: int = 0
) -> dict[str, Any]:
    """Returns the answers, ready for JSON.

    Args:
      recipe: of the run.
      facts: of the run's stages: what each world pays.
      trials: of the stages of the question.
      episodes: of each policy at each temperature.
      seed: of the intervals' resampling.

    Returns:
      ``levels``, what a reader calls the temperatures; ``policies``, true and imagined success of each at either;
      ``worlds``, for each of them ``ranking`` at either temperature, ``paid`` and ``horizon``.
    """
    about = {"rounds": recipe.rounds, "pace": recipe.pace, "online": recipe.dream.world == "true"}
    policies = []
    for stage, fact in sorted(trials.items(), key=lambda item: _place(item[0])):
        if (name := stage.removeprefix("trial-")) == stage:
            continue
        policy = {"name": _name_policy(name, recipe, about), "ladder": name.startswith("ladder-")}
        for how, level in zip(LEVELS, fact["levels"], strict=True):
            rates = [summarize_outcomes(outcomes) for outcomes in (level["true"], *level["imagined"])]
            policy[how] = {"true": rates[0], "imagined": rates[1:]}
        policies.append(policy)
    worlds = [
        {
            "name": f"world model of round {w + 1}",
            "ranking": {how: rank(policies, how, w, seed) for how in LEVELS},
            "paid": _find_paid(facts, w, about),
            "horizon": trials[f"horizon-in-world-{w}"],
        }
        for w in range(sum(name.startswith("horizon-") for name in trials))
    ]
    levels = dict(zip(LEVELS, (f"sampled, T = {recipe.temperature:g}", "greedy"), strict=True))
    return {"episodes": episodes, "levels": levels, "policies": policies, "worlds": worlds}


def rank(policies: Sequence[Mapping[str, Any]], how: str, world: int, seed: int) -> dict[str, Any] | None:
    """Returns how well a world ranks policies; None where they are too few.

    Args:
      policies: with ``true`` and ``imagined`` success, a rate for each world, under ``how``.
      how: at which temperature.
      world: which one.
      seed: of the intervals' resampling.
    """
    if len(policies) < ranking.FEWEST:
        return None
    true = [policy[how]["true"] for policy in policies]
    imagined = [policy[how]["imagined"][world] for policy in policies]
    counts = ([Count(rate["successes"], rate["n"]) for rate in side] for side in (true, imagined))
    pairs = itertools.combinations(zip((r["rate"] for r in true), (r["rate"] for r in imagined), strict=True), 2)
    close = [(a - c) * (b - d) < 0 for (a, b), (c, d) in pairs if 0 < abs(a - c) < CLOSE - 1e-9]
    return ranking.rank_policies(*counts, seed=seed) | {
        "close": {"within": CLOSE, "pairs": len(close), "inverted": sum(close)}
    }


def _place(stage: str) -> tuple[bool, float]:
    """Sorts trials: the ladder by its shares, then the policies of the run by their rounds."""
    ladder, number = "ladder-" in stage, stage.rsplit("-", 1)[-1]
    return not ladder, float(number) if number.replace(".", "", 1).isdigit() else 0.0


def _name_policy(name: str, recipe: Recipe, about: Mapping[str, Any]) -> str:
    """Returns what a reader calls a policy."""
    if name.startswith("ladder-"):
        percent = float(name.removeprefix("ladder-"))
        count = max(round(percent / 100 * recipe.collect.demonstrations), 1)
        return f"imitation of {percent:g} % ({count} demonstrations)"
    return name_policy(0 if name == "base" else int(name.removeprefix("grpo-")), about)


def _find_paid(facts: Mapping[str, Any], world: int, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns what a world paid the last policy whose closed loop was run in it; None where nobody's was."""
    met = [k for k in range(about["rounds"] + 1) if f"closed-{k}-in-world-{world}" in facts]
    if not met or not (row := facts[f"closed-{met[-1]}-in-world-{world}"]["all"]):
        return None
    return {"policy": name_policy(met[-1], about)} | {name: row[name] for name in ("false_success", "precision")}
