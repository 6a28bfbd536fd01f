"""Masked GRPO as pure array functions: success flags in, weights, advantages and a loss out.

Layout is (B, N, T); the G members of a group are consecutive rows, so B = groups * G with
the groups outermost. A trajectory counts up to and including its first success, and each
trajectory weighs the same however long that took (WoVR, section 4.2):

    loss = - 1/B sum_i 1/T_i sum_{t <= T_i} min(r A_i, clip(r, 1 - low, 1 + high) A_i)

with r the probability ratio of a token to the policy that acted, averaged over the A
tokens of a step. Two presets: ``GRPOConfig.paper()`` and ``GRPOConfig.rlinf()``
(RLinf:rlinf/algorithms/{advantages,losses}.py, rlinf/utils/utils.py). They differ in the
advantage (mean / mean and unbiased deviation), the mask (to the step / to the end of its
chunk), the reward (coefficient 5, a flickering classifier can take a success back), the
upper clip and the group filter; the length normalisation is the same but for its spelling.
The paper states neither its clip range nor whether the ratio is one of tokens or of
actions: 0.2 and tokens here.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from wovr_jax.core import stats

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """How success flags become a policy loss.

    Attributes:
      group: G, rollouts from one start state.
      gamma: discount per step.
      coef: value of a success.
      flicker: rewards are differences of the flag inside a chunk-granular mask, so a flag that
        falls again before the end of its chunk takes the success back (as RLinf does).
      granularity: the mask ends with the step of the first success, or with its chunk; "none" masks nothing.
      normalise: advantage minus the group mean, or that over the group deviation.
      ddof: of that deviation; 1 is torch's default.
      eps: added to the deviation.
      filter: leave out groups whose mean return is outside [filter_low, filter_high].
      filter_low: in units of the return, so it scales with ``coef``.
      filter_high: likewise.
      denominator: rows the loss is divided by: all of them, filtered ones included, or those kept.
      length: ``"valid"`` is 1/T_i; ``"ratio"`` is RLinf's mean over all places of the loss over
        (T_i / horizon), equal to it when the horizon is N * T; ``"horizon"`` is 1/(N * T) for
        every trajectory, no length normalisation.
      horizon: step budget of ``"ratio"``; 0 means N * T.
      ratio: log-ratios of one token, summed over a step, or summed over the valid steps of a chunk.
      clip_low: the ratio is clipped at 1 - clip_low where the advantage is negative.
      clip_high: and at 1 + clip_high where it is positive.
      dual_clip: c > 1 bounds the loss of negative advantages at c * |A|; 0 is off.
      kl: weight of the divergence to a reference policy.
      entropy: weight of the entropy bonus.
    """

    group: int = 8
    gamma: float = 1.0
    coef: float = 1.0
    flicker: bool = False
    granularity: Literal["step", "chunk", "none"] = "step"
    normalise: Literal["mean", "mean_std"] = "mean"
    ddof: int = 1
    eps: float = 1e-6
    filter: bool = False
    filter_low: float = 0.1
    filter_high: float = 0.9
    denominator: Literal["all", "kept"] = "all"
    length: Literal["valid", "ratio", "horizon"] = "valid"
    horizon: int = 0
    ratio: Literal["token", "step", "chunk"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0

    @classmethod
    def paper(cls, **changes: Any) -> GRPOConfig:
        """WoVR, section 4.2: no deviation, no filter, mask to the step of the first success."""
        return dataclasses.replace(cls(clip_high=0.2), **changes)

    @classmethod
    def rlinf(cls, **changes: Any) -> GRPOConfig:
        """RLinf:examples/embodiment/config/wan_libero_spatial_grpo_openvlaoft.yaml, what of it is used."""
        preset = cls(
            coef=5.0,
            flicker=True,
            granularity="chunk",
            normalise="mean_std",
            length="ratio",
            filter=True,
            filter_low=0.5,
            filter_high=4.5,
        )
        return dataclasses.replace(preset, **changes)

    @classmethod
    def fake(cls, **changes: Any) -> GRPOConfig:
        """Groups of two, for tests."""
        return dataclasses.replace(cls(group=2), **changes)

    def __post_init__(self):
        for name, hint in typing.get_type_hints(type(self)).items():
            choices = typing.get_args(hint)
            if choices and getattr(self, name) not in choices:
                raise ValueError(f"GRPOConfig.{name}: expected one of {choices}, got {getattr(self, name)!r}")
        if self.group < 1 or (self.normalise == "mean_std" and self.group <= self.ddof):
            raise ValueError(f"GRPOConfig.group: {self.group} rollouts have no deviation with ddof={self.ddof}")
        if self.dual_clip and self.dual_clip <= 1.0:
            raise ValueError(f"GRPOConfig.dual_clip: expected 0 (off) or more than 1, got {self.dual_clip}")


class Signal(NamedTuple):
    """What the success flags of a batch of rollouts say to the policy.

    Attributes:
      return_B: float32.
      advantage_B: float32, one number a trajectory.
      valid_BNT: bool, up to and including the first success.
      keep_B: bool, False for the rows of filtered groups.
      weight_BNT: float32, the share of a step in the loss; 0 where it does not count.
    """

    return_B: Array
    advantage_B: Array
    valid_BNT: Array
    keep_B: Array
    weight_BNT: Array


def signal(success_BNT: Array, cfg: GRPOConfig) -> Signal:
    """Everything that depends on the success flags only, computed once per batch of rollouts."""
    return_B = returns(success_BNT, cfg.gamma, cfg.coef, cfg.flicker)
    valid_BNT = valid_mask(success_BNT, cfg.granularity)
    keep_B = jnp.ones(return_B.shape, bool)
    if cfg.filter:
        keep_B = group_filter(return_B, cfg.group, cfg.filter_low, cfg.filter_high)
    advantage_B = advantages(return_B, cfg.group, cfg.normalise, cfg.ddof, cfg.eps)
    return Signal(return_B, advantage_B, valid_BNT, keep_B, weights(valid_BNT, keep_B, cfg))


def valid_mask(success_BNT: Array, granularity: str = "step") -> Array:
    """True up to and including the first success, or up to the end of its chunk.

    A trajectory without success is valid throughout.
    """
    if granularity == "none":
        return jnp.ones(success_BNT.shape, bool)
    if granularity == "chunk":
        done_BN = jnp.any(success_BNT, axis=2)
        return jnp.broadcast_to(_none_before(done_BN)[:, :, None], success_BNT.shape)
    return _none_before(success_BNT.reshape(success_BNT.shape[0], -1)).reshape(success_BNT.shape)


def returns(success_BNT: Array, gamma: float = 1.0, coef: float = 1.0, flicker: bool = False) -> Array:
    """Discounted return of each trajectory over its valid steps, the first step undiscounted.

    Without ``flicker`` this is ``coef * gamma**t`` at the first success t, whatever follows
    it. With it, rewards are differences of the flag and the sum runs to the end of the chunk:
    it telescopes to the flag of the last step of that chunk.
    """
    batch = success_BNT.shape[0]
    score_BS = success_BNT.reshape(batch, -1).astype(jnp.float32)
    previous_BS = jnp.pad(score_BS[:, :-1], ((0, 0), (1, 0)))
    reward_BS = score_BS - previous_BS if flicker else score_BS
    valid_BS = valid_mask(success_BNT, "chunk" if flicker else "step").reshape(batch, -1)
    discount_S = jnp.power(jnp.float32(gamma), jnp.arange(score_BS.shape[1], dtype=jnp.float32))
    return coef * stats.masked_sum(discount_S[None, :] * reward_BS, valid_BS, axis=1)


def advantages(return_B: Array, group: int, normalise: str = "mean", ddof: int = 1, eps: float = 1e-6) -> Array:
    """Return minus the mean of its group (``"mean"``), that over deviation + eps (``"mean_std"``).

    A group of equal returns gets exactly 0: rounding in its mean is not divided by eps.
    """
    return_PG = _grouped(return_B, group)
    advantage_PG = return_PG - jnp.mean(return_PG, axis=1, keepdims=True)
    if normalise == "mean_std":
        advantage_PG = advantage_PG / (jnp.std(return_PG, axis=1, ddof=ddof, keepdims=True) + eps)
    differ_P1 = jnp.max(return_PG, axis=1, keepdims=True) > jnp.min(return_PG, axis=1, keepdims=True)
    return jnp.where(differ_P1, advantage_PG, jnp.zeros_like(advantage_PG)).reshape(-1)


def group_filter(return_B: Array, group: int, low: float, high: float) -> Array:
    """True for the rows of groups whose mean return lies in [low, high]."""
    mean_P = jnp.mean(_grouped(return_B, group), axis=1)
    return jnp.repeat((mean_P >= low) & (mean_P <= high), group)


def weights(valid_BNT: Array, keep_B: Array, cfg: GRPOConfig) -> Array:
    """Share of each step in the loss; over kept rows they add up to kept / denominator rows.

    That sum holds for ``length="valid"`` (and ``"ratio"`` with a horizon of N * T).
    """
    rows, places = valid_BNT.shape[0], valid_BNT.shape[1] * valid_BNT.shape[2]
    length_B = jnp.sum(valid_BNT, axis=(1, 2), dtype=jnp.float32)
    per_step_B = {
        "valid": lambda: 1.0 / length_B,
        "ratio": lambda: 1.0 / (length_B / (cfg.horizon or places)) / places,
        "horizon": lambda: jnp.full_like(length_B, 1.0 / places),
    }[cfg.length]()
    if cfg.denominator == "kept":
        per_step_B = per_step_B / jnp.maximum(jnp.sum(keep_B, dtype=jnp.float32), 1.0)
    else:
        per_step_B = per_step_B / rows
    counts_BNT = valid_BNT & keep_B[:, None, None]
    return jnp.where(counts_BNT, per_step_B[:, None, None], 0.0)


class Tally(NamedTuple):
    """Sums over the tokens that counted, so that microbatches can be added; see ``summary``."""

    tokens: Array
    ratio: Array
    clipped: Array
    approx_kl: Array
    kl: Array
    entropy: Array
    ratio_max: Array
    gap_max: Array

    @classmethod
    def zero(cls) -> Tally:
        """The tally of nothing."""
        return cls(*(jnp.zeros((), jnp.float32) for _ in cls._fields))

    def add(self, other: Tally) -> Tally:
        """Sums added, maxima taken."""
        total = jax.tree.map(jnp.add, self, other)
        largest = {name: jnp.maximum(getattr(self, name), getattr(other, name)) for name in ("ratio_max", "gap_max")}
        return total._replace(**largest)

    def summary(self) -> dict[str, Array]:
        """Means over the tokens; the ratio of nothing is 1."""
        tokens = jnp.maximum(self.tokens, 1.0)
        one = jnp.where(self.tokens > 0, 0.0, 1.0)
        means = {name: getattr(self, name) / tokens for name in ("approx_kl", "kl", "entropy")}
        return means | {
            "ratio_mean": self.ratio / tokens + one,
            "ratio_max": jnp.maximum(self.ratio_max, one),
            "clip_fraction": self.clipped / tokens,
        }


def chunk_loss(
    logp_XTA: Array,
    old_logp_XTA: Array,
    advantage_X: Array,
    weight_XT: Array,
    cfg: GRPOConfig,
    kl_XTA: Array | None = None,
    entropy_XTA: Array | None = None,
) -> tuple[Array, Tally]:
    """The weighted loss of a set of chunks, X of them in any order.

    Losses of the parts of a batch add up to the loss of the batch, because ``weight_XT``
    already holds every denominator.

    Args:
      logp_XTA: log-probabilities of the sampled tokens under the policy being trained.
      old_logp_XTA: under the policy that acted.
      advantage_X: of the trajectory that the chunk belongs to.
      weight_XT: from ``weights``; a step of weight 0 contributes nothing.
      cfg: clips, ratio level and the two regularisers.
      kl_XTA: divergence to the reference at each token, wanted when ``cfg.kl`` is not 0.
      entropy_XTA: wanted when ``cfg.entropy`` is not 0.

    Returns:
      The scalar loss and the tally of what was clipped.
    """
    valid_XTA = jnp.broadcast_to((weight_XT > 0)[:, :, None], logp_XTA.shape)
    log_ratio_XTA = jnp.where(valid_XTA, logp_XTA - old_logp_XTA, 0.0)
    axes = {"token": (), "step": (2,), "chunk": (1, 2)}[cfg.ratio]
    ratio_XTA = jnp.broadcast_to(jnp.exp(jnp.sum(log_ratio_XTA, axis=axes, keepdims=True)), logp_XTA.shape)
    objective_XTA, clipped_XTA = clipped(ratio_XTA, advantage_X[:, None, None], cfg)
    loss_XTA = -objective_XTA
    if cfg.kl:
        loss_XTA = loss_XTA + cfg.kl * _wanted(kl_XTA, "kl")
    if cfg.entropy:
        loss_XTA = loss_XTA - cfg.entropy * _wanted(entropy_XTA, "entropy")
    loss_XT = jnp.mean(jnp.where(valid_XTA, loss_XTA, 0.0), axis=2)
    nothing_XTA = jnp.zeros_like(logp_XTA)
    tally = Tally(
        tokens=jnp.sum(valid_XTA, dtype=jnp.float32),
        ratio=stats.masked_sum(ratio_XTA, valid_XTA),
        clipped=stats.masked_sum(clipped_XTA.astype(jnp.float32), valid_XTA),
        approx_kl=stats.masked_sum(k3(log_ratio_XTA), valid_XTA),
        kl=stats.masked_sum(nothing_XTA if kl_XTA is None else kl_XTA, valid_XTA),
        entropy=stats.masked_sum(nothing_XTA if entropy_XTA is None else entropy_XTA, valid_XTA),
        ratio_max=jnp.max(jnp.where(valid_XTA, ratio_XTA, 0.0)),
        gap_max=jnp.max(jnp.abs(log_ratio_XTA)),
    )
    return jnp.sum(weight_XT * loss_XT), jax.lax.stop_gradient(tally)


def clipped(ratio: Array, advantage: Array, cfg: GRPOConfig) -> tuple[Array, Array]:
    """Clipped objective min(r A, clip(r) A), and where the clip is what counts.

    The minimum is pessimistic on both sides: it stops a rise above 1 + high when A > 0 and
    a fall below 1 - low when A < 0, and never the way back. With ``dual_clip`` the
    objective of A < 0 is at least c A (Ye et al., 2019, arXiv 1912.09729).
    """
    free = ratio * advantage
    bounded = jnp.clip(ratio, 1.0 - cfg.clip_low, 1.0 + cfg.clip_high) * advantage
    objective = jnp.minimum(free, bounded)
    if cfg.dual_clip:
        objective = jnp.where(advantage < 0, jnp.maximum(objective, cfg.dual_clip * advantage), objective)
    return objective, objective != free


def k3(log_ratio: Array) -> Array:
    """exp(x) - 1 - x of x = log q/p of a sample from p: unbiased for KL(p || q), never negative."""
    return jnp.expm1(log_ratio) - log_ratio


def categorical_kl(log_p: Array, log_q: Array) -> Array:
    """Exact KL(p || q) over the last axis of two arrays of log-probabilities."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def surrogate(
    logp_BNTA: Array,
    old_logp_BNTA: Array,
    advantage_B: Array,
    valid_BNT: Array,
    keep_B: Array,
    cfg: GRPOConfig,
    *,
    ref_logp_BNTA: Array | None = None,
    kl_BNTA: Array | None = None,
    entropy_BNTA: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The GRPO loss of whole rollouts, and its metrics.

    Args:
      logp_BNTA, old_logp_BNTA: as in ``chunk_loss``.
      advantage_B, valid_BNT, keep_B: from ``advantages``, ``valid_mask``, ``group_filter``.
      cfg: the settings; ``cfg.group`` only for counting groups.
      ref_logp_BNTA: sampled tokens under the reference policy; the k3 estimate is used.
      kl_BNTA: exact divergence instead (``categorical_kl``), preferred where logits are at hand.
      entropy_BNTA: entropy of each token's distribution.

    Raises:
      ValueError: when a regulariser is on and what it needs is missing, or B is no multiple of the group.
    """
    rows, chunks = valid_BNT.shape[:2]
    if kl_BNTA is None and ref_logp_BNTA is not None:
        kl_BNTA = k3(ref_logp_BNTA - logp_BNTA)

    def flat(x: Array) -> Array:
        return x.reshape(rows * chunks, *x.shape[2:])

    loss, tally = chunk_loss(
        flat(logp_BNTA),
        flat(old_logp_BNTA),
        jnp.repeat(advantage_B, chunks),
        flat(weights(valid_BNT, keep_B, cfg)),
        cfg,
        None if kl_BNTA is None else flat(kl_BNTA),
        None if entropy_BNTA is None else flat(entropy_BNTA),
    )
    return loss, tally.summary() | {"loss": loss, "kept_groups": kept_groups(keep_B, cfg.group)}


def kept_groups(keep_B: Array, group: int) -> Array:
    """How many groups the filter left; 0 means there is nothing to learn from."""
    return jnp.sum(jnp.any(_grouped(keep_B, group), axis=1), dtype=jnp.float32)


def _none_before(flag_BS: Array) -> Array:
    count_BS = flag_BS.astype(jnp.int32)
    return jnp.cumsum(count_BS, axis=1) - count_BS == 0


def _grouped(x_B: Array, group: int) -> Array:
    """(B,) as (groups, G): a group is G consecutive rows."""
    if x_B.shape[0] % group:
        raise ValueError(f"grpo: expected a multiple of group={group} trajectories, got {x_B.shape[0]}")
    return x_B.reshape(-1, group)


def _wanted(x_XTA: Array | None, name: str) -> Array:
    if x_XTA is None:
        raise ValueError(f"grpo: GRPOConfig.{name} is on but {name}_XTA was not given (kl needs a reference policy)")
    return x_XTA
