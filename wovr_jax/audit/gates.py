"""A gate of GRPO: of the rollouts that the judge would pay, only the least suspicious are paid.

The signs of a lie (``signs``) are read off each iteration's rollouts, and the paid ones are ranked by the mean of their
ranks in each sign, so that nothing is fitted and no true rollout is needed. The most suspicious are then worth as much
as a failure, or are left out of their groups. A gate that draws at random pays as few, and tells what fewer payments
alone do.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wovr_jax.audit import signs
from wovr_jax.audit.known import know
from wovr_jax.core import keys
from wovr_jax.core.config import ConfigError, Faults, Share, checked
from wovr_jax.data import episodes as disk
from wovr_jax.grpo import GRPOConfig, returns
from wovr_jax.run.bind import Products
from wovr_jax.run.folder import Run
from wovr_jax.run.recipe import Recipe
from wovr_jax.run.stages.episodes import join_rounds
from wovr_jax.run.stages.improve import Gate
from wovr_jax.types import Array, Episode, Imagined, Start


@checked
@dataclasses.dataclass(frozen=True)
class GateConfig:
    """Which payments are withheld.

    Attributes:
      signs: names of ``signs.NAMES`` whose ranks are averaged; none draws at random.
      coverage: share of the paid rollouts of an iteration that stay paid.
      drop: the others are left out of their groups, and nothing is learned from them; else they are failures.
    """

    signs: tuple[str, ...] = ("distance", "inverse", "by_motion")
    coverage: Share = 0.5
    drop: bool = False

    def faults(self) -> Faults:
        """Yields signs that there are none of."""
        if unknown := set(self.signs) - set(signs.NAMES):
            yield "signs", f"expected names out of {', '.join(signs.NAMES)}; got {', '.join(sorted(unknown))}"


def prepare(recipe: Recipe, run: Run, cfg: GateConfig | None = None) -> Callable[[Products], Gate]:
    """Returns what gives the gate of the newest world; what its signs compare with is a stage of the run.

    Args:
      recipe: of the run.
      run: the open run folder.
      cfg: the gate; its defaults where there is none.

    Raises:
      ConfigError: rollouts in the true simulator, which tells no lie.
    """
    if recipe.dream.world == "true":
        raise ConfigError("config.dream.world: expected a learned world, whose payments a gate can doubt; got 'true'.")
    key, cfg, grpo = functools.partial(keys.key, recipe.seed), cfg or GateConfig(), recipe.learner.grpo

    def open_gate(made: Products) -> Gate:
        assert made.vae is not None

        def read_truth() -> Sequence[Episode]:
            return disk.join([made.demonstrations.value.train, join_rounds(made.rollouts)])

        if not cfg.signs:
            return functools.partial(_compile(cfg, grpo, _read_nothing), None)
        known_cfg, known = know(run, len(made.worlds) - 1, made.vae, read_truth, key).value
        return functools.partial(_compile(cfg, grpo, signs.read(made.vae.value[0], known_cfg)), known)

    return open_gate


def _read_nothing(*_: Any) -> dict[str, Array]:
    return {}


@functools.cache
def _compile(cfg: GateConfig, grpo: GRPOConfig, read: Callable[..., dict[str, Array]]) -> Callable[..., Imagined]:
    """One program for all rounds: what the signs that are not asked for alone would cost, the compiler leaves out."""

    @jax.jit
    def gate(known: Any, parts: Mapping[str, Any], start: Start, imagined: Imagined, key: Array) -> Imagined:
        paid_BN = imagined.success_BNT.any(axis=2)
        # A rollout is as suspicious as its worst chunk up to the first payment.
        counts_BN = jnp.cumsum(paid_BN, axis=1) - paid_BN == 0
        sign_BN = read(parts["world"], known, start, imagined.action_BNTA, imagined.video_BNTHWC, key)
        sign_CB = [jnp.where(counts_BN, sign_BN[name], -jnp.inf).max(axis=1) for name in cfg.signs]
        # Not the key of the rollouts itself, from which their noise comes.
        drawn_B = jax.random.uniform(jax.random.fold_in(key, len(paid_BN)), (len(paid_BN),))
        paid_B = paid_BN.any(axis=1)
        keep_B = keep_least(jnp.stack(sign_CB or [drawn_B]), paid_B, cfg.coverage)
        paid_BNT = imagined.success_BNT & keep_B[:, None, None]
        imagined = dataclasses.replace(imagined, success_BNT=paid_BNT, video_BNTHWC=None)
        return drop(imagined, paid_B & ~keep_B, grpo) if cfg.drop else imagined

    return gate


def drop(imagined: Imagined, dropped_B: Array, cfg: GRPOConfig) -> Imagined:
    """Returns rollouts of which some are no part of their groups: means and deviations are of the others alone.

    A group of which fewer than two are left teaches nothing.
    """
    kept_PG = ~dropped_B.reshape(-1, cfg.group)
    return_B = returns(imagined.success_BNT, cfg.gamma, cfg.coef, cfg.flicker, _live(imagined))
    return_PG = return_B.reshape(kept_PG.shape)

    def mean(x_PG: Array, less: int = 0) -> Array:
        count_P1 = jnp.maximum(kept_PG.sum(axis=1, keepdims=True) - less, 1)
        return jnp.where(kept_PG, x_PG, 0.0).sum(axis=1, keepdims=True) / count_P1

    advantage_PG = return_PG - mean(return_PG)
    if cfg.normalise == "mean_std":
        advantage_PG = advantage_PG / (jnp.sqrt(mean(jnp.square(advantage_PG), cfg.ddof)) + cfg.eps)
    differ_P1 = jnp.where(kept_PG, return_PG, -jnp.inf).max(1) > jnp.where(kept_PG, return_PG, jnp.inf).min(1)
    advantage_B = jnp.where(kept_PG & differ_P1[:, None], advantage_PG, 0.0).reshape(-1)
    advantage_BN = jnp.repeat(advantage_B[:, None], imagined.success_BNT.shape[1], axis=1)
    # Without a step that counts they have no part in the regularisers either.
    live_BNT = _live(imagined) & ~dropped_B[:, None, None]
    return dataclasses.replace(imagined, advantage_BN=advantage_BN, live_BNT=live_BNT)


def _live(imagined: Imagined) -> Array:
    return jnp.ones_like(imagined.success_BNT) if imagined.live_BNT is None else imagined.live_BNT


def keep_least(sign_CB: Array, paid_B: Array, coverage: float) -> Array:
    """Returns (B,) bool: the ``coverage`` of the paid rollouts whose mean rank in C signs is least.

    Of equals the first are kept. Ranks are among the paid ones alone, whatever the others look like.
    """

    def rank(score_B: Array) -> Array:
        # The paid ones come first in the order, and equal scores as they lie.
        order_B = jnp.argsort(jnp.where(paid_B, score_B, jnp.inf), stable=True)
        return jnp.zeros(len(paid_B), jnp.int32).at[order_B].set(jnp.arange(len(paid_B)))

    return paid_B & (rank(jax.vmap(rank)(sign_CB).sum(axis=0)) < jnp.round(coverage * paid_B.sum()))
