"""Masked GRPO as pure array functions: success flags in, weights, advantages and a loss out.

The layout is (B, N, T): trajectories, chunks, steps of a chunk. The G members of a group are consecutive rows, so
B = groups * G with the groups outermost. A trajectory counts up to and including its first success, and each
trajectory weighs the same however long that took (WoVR, section 4.2):

    loss = - 1/B sum_i 1/T_i sum_{t <= T_i} min(r A_i, clip(r, 1 - low, 1 + high) A_i)

with r the probability ratio of a token to the policy that acted, averaged over the A
tokens of a step. Two presets: ``GRPOConfig.paper()``, which the defaults are, and ``GRPOConfig.rlinf()``
(RLinf:rlinf/algorithms/{advantages,losses}.py, rlinf/utils/utils.py). They differ in the
advantage (mean / mean and unbiased deviation), the mask (to the step / to the end of its
chunk), the reward (coefficient 5, a flickering classifier can take a success back), the
upper clip and the group filter; the length normalisation is the same but for its spelling.
The paper states neither its clip range nor whether the ratio is one of tokens or of
actions: 0.2 and tokens here. In configs/ they are ``learner.grpo={"size": "paper"}`` and ``"rlinf"``.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from wovr_jax.core.config import Between, Count, Faults, Natural, NonNegative, Positive, Share, checked

Array = jax.Array


@checked
@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """How success flags become a policy loss; the defaults are the paper's.

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
      dual_clip: c > 1 bounds the loss of negative advantages at ``c * |A|``; 0 is off.
      kl: weight of the divergence to a reference policy.
      entropy: weight of the entropy bonus.
    """

    group: Count = 8
    gamma: Share = 1.0
    coef: Positive = 1.0
    flicker: bool = False
    granularity: Literal["step", "chunk", "none"] = "step"
    normalise: Literal["mean", "mean_std"] = "mean"
    ddof: Natural = 1
    eps: Positive = 1e-6
    filter: bool = False
    filter_low: NonNegative = 0.1
    filter_high: NonNegative = 0.9
    denominator: Literal["all", "kept"] = "all"
    length: Literal["valid", "ratio", "horizon"] = "valid"
    horizon: Natural = 0
    ratio: Literal["token", "step", "chunk"] = "token"
    clip_low: Share = 0.2
    clip_high: NonNegative = 0.2
    dual_clip: Annotated[float, Between(1, low_open=True, also=(0,))] = 0.0
    kl: NonNegative = 0.0
    entropy: NonNegative = 0.0

    @classmethod
    def paper(cls, **changes: Any) -> GRPOConfig:
        """WoVR, section 4.2: no deviation, no filter, mask to the step of the first success."""
        return cls(**changes)

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
            clip_high=0.28,
        )
        return dataclasses.replace(preset, **changes)

    @classmethod
    def fake(cls, **changes: Any) -> GRPOConfig:
        """Groups of two, for tests."""
        return dataclasses.replace(cls(group=2), **changes)

    def faults(self) -> Faults:
        """Yields groups too small for what is asked of them, and a filter that no group can pass."""
        if self.normalise == "mean_std" and self.group <= self.ddof:
            yield "group", f"expected above ddof={self.ddof}: {self.group} rollouts have no deviation"
        if self.filter_low > self.filter_high:
            yield "filter_low", f"expected at most filter_high={self.filter_high}, got {self.filter_low}"


class Signal(NamedTuple):
    """What the success flags of a batch of rollouts say to the policy.

    Attributes:
      return_B: float32.
      advantage_B: float32, one number a trajectory.
      valid_BNT: bool, up to and including the first success, and before the deadline.
      keep_B: bool, False for the rows of filtered groups.
      weight_BNT: float32, the share of a step in the loss; 0 where it does not count.
    """

    return_B: Array
    advantage_B: Array
    valid_BNT: Array
    keep_B: Array
    weight_BNT: Array


def signal(success_BNT: Array, cfg: GRPOConfig, live_BNT: Array | None = None) -> Signal:
    """Computes everything that depends on the success flags only, once per batch of rollouts.

    Steps that are not in ``live_BNT``, after a trajectory's deadline, pay nothing, weigh nothing and are no part of its
    length; None where all are before it.
    """
    live_BNT = jnp.ones(success_BNT.shape, bool) if live_BNT is None else live_BNT
    return_B = returns(success_BNT, cfg.gamma, cfg.coef, cfg.flicker, live_BNT)
    valid_BNT = valid_mask(success_BNT & live_BNT, cfg.granularity) & live_BNT
    keep_B = jnp.ones(return_B.shape, bool)
    if cfg.filter:
        keep_B = group_filter(return_B, cfg.group, cfg.filter_low, cfg.filter_high)
    advantage_B = advantages(return_B, cfg.group, cfg.normalise, cfg.ddof, cfg.eps)
    return Signal(return_B, advantage_B, valid_BNT, keep_B, weights(valid_BNT, keep_B, cfg))


def valid_mask(success_BNT: Array, granularity: str = "step") -> Array:
    """Returns a mask that is True up to and including the first success, or up to the end of its chunk.

    A trajectory without success is valid throughout.
    """
    # A true episode ends there; what imagination makes of the time after it is nothing to learn from.
    if granularity == "none":
        return jnp.ones(success_BNT.shape, bool)
    if granularity == "chunk":
        done_BN = jnp.any(success_BNT, axis=2)
        return jnp.broadcast_to(_none_before(done_BN)[:, :, None], success_BNT.shape)
    return _none_before(success_BNT.reshape(success_BNT.shape[0], -1)).reshape(success_BNT.shape)


def returns(
    success_BNT: Array, gamma: float = 1.0, coef: float = 1.0, flicker: bool = False, live_BNT: Array | bool = True
) -> Array:
    """Computes the discounted return of each trajectory over its valid steps, the first step undiscounted.

    Without ``flicker`` this is ``coef * gamma**t`` at the first success t, whatever follows
    it. With it, rewards are differences of the flag and the sum runs to the end of the chunk:
    it telescopes to the flag of the last step of that chunk, or of the last one before the deadline (``live_BNT``).
    """
    batch = success_BNT.shape[0]
    # (B, N, T) -> (B, S): discounts and differences run through the boundaries of chunks, S = N * T.
    score_BS = success_BNT.reshape(batch, -1).astype(jnp.float32)
    previous_BS = jnp.pad(score_BS[:, :-1], ((0, 0), (1, 0)))
    # A flag that stays up is one success, not many: with the difference it pays when it rises and costs when it falls;
    # without, the mask ends with the first success and only that step pays.
    reward_BS = score_BS - previous_BS if flicker else score_BS
    # Only what is counted is cut at the deadline, not the flag: one that is up there is not taken back by it.
    valid_BS = (valid_mask(success_BNT, "chunk" if flicker else "step") & live_BNT).reshape(batch, -1)
    # gamma^0 for the first step: a success at once is worth coef, not gamma * coef.
    discount_S = jnp.power(jnp.float32(gamma), jnp.arange(score_BS.shape[1], dtype=jnp.float32))
    return coef * jnp.sum(discount_S[None, :] * reward_BS, axis=1, where=valid_BS)


def advantages(return_B: Array, group: int, normalise: str = "mean", ddof: int = 1, eps: float = 1e-6) -> Array:
    """Computes return minus the mean of its group (``"mean"``), or that over deviation + eps (``"mean_std"``).

    A group of equal returns gets exactly 0: rounding in its mean is not divided by eps.
    """
    return_PG = _by_group(return_B, group)
    # The group is its own baseline: rollouts of one start state differ by what the policy drew, not by the start.
    advantage_PG = return_PG - jnp.mean(return_PG, axis=1, keepdims=True)
    if normalise == "mean_std":
        advantage_PG = advantage_PG / (jnp.std(return_PG, axis=1, ddof=ddof, keepdims=True) + eps)
    # The mean of equal float32 numbers may be off by a rounding, which the division by eps would blow up.
    differ_P1 = jnp.max(return_PG, axis=1, keepdims=True) > jnp.min(return_PG, axis=1, keepdims=True)
    return jnp.where(differ_P1, advantage_PG, jnp.zeros_like(advantage_PG)).reshape(-1)


def group_filter(return_B: Array, group: int, low: float, high: float) -> Array:
    """Returns True for the rows of groups whose mean return lies in [low, high].

    Where all or none of a group succeed there is nothing to compare, and an error of the classifier weighs most.
    """
    mean_P = jnp.mean(_by_group(return_B, group), axis=1)
    return jnp.repeat((mean_P >= low) & (mean_P <= high), group)


def weights(valid_BNT: Array, keep_B: Array, cfg: GRPOConfig) -> Array:
    """Computes the share of each step in the loss; over kept rows they add up to kept / denominator rows.

    That sum holds for ``length="valid"`` (and ``"ratio"`` with a horizon of N * T).
    """
    rows, places = valid_BNT.shape[0], valid_BNT.shape[1] * valid_BNT.shape[2]
    length_B = jnp.sum(valid_BNT, axis=(1, 2), dtype=jnp.float32)
    # With a constant divisor a trajectory that succeeds early would count less, the fewer steps it took.
    if cfg.length == "valid":
        per_step_B = 1.0 / jnp.maximum(length_B, 1.0)  # none is left to a start at the deadline, and nothing counts
    elif cfg.length == "ratio":
        per_step_B = 1.0 / (jnp.maximum(length_B, 1.0) / (cfg.horizon or places)) / places
    else:
        per_step_B = jnp.full_like(length_B, 1.0 / places)
    # Over all rows, an iteration in which few groups differ has a smaller gradient; over the kept ones, as large a one.
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
    k3: Array
    kl: Array
    entropy: Array
    ratio_max: Array
    gap_max: Array

    @classmethod
    def zero(cls) -> Tally:
        """Returns the tally of no tokens."""
        return cls(*(jnp.zeros((), jnp.float32) for _ in cls._fields))

    def add(self, other: Tally) -> Tally:
        """Adds the sums and takes the larger maxima."""
        total = jax.tree.map(jnp.add, self, other)
        largest = {name: jnp.maximum(getattr(self, name), getattr(other, name)) for name in ("ratio_max", "gap_max")}
        return total._replace(**largest)

    def summary(self) -> dict[str, Array]:
        """Returns means over the tokens; the mean ratio of no tokens is 1."""
        tokens = jnp.maximum(self.tokens, 1.0)
        # A policy that took no step is the one that acted, so its ratio is 1 and not the 0 of an empty sum.
        one = jnp.where(self.tokens > 0, 0.0, 1.0)
        means = {name: getattr(self, name) / tokens for name in ("kl", "entropy")}
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
    """Computes the weighted loss of a set of chunks, X of them in any order.

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
    # Where nothing counts the ratio is exp(0): an infinite log-probability there must not reach the gradient as
    # 0 * inf.
    valid_XTA = jnp.broadcast_to((weight_XT > 0)[:, :, None], logp_XTA.shape)
    log_ratio_XTA = jnp.where(valid_XTA, logp_XTA - old_logp_XTA, 0.0)
    # The probability of a step is the product over its A tokens, that of a chunk over its T steps too: sums of logs.
    axes = {"token": (), "step": (2,), "chunk": (1, 2)}[cfg.ratio]
    ratio_XTA = jnp.broadcast_to(jnp.exp(jnp.sum(log_ratio_XTA, axis=axes, keepdims=True)), logp_XTA.shape)
    # (X,) -> (X, 1, 1): every token of a trajectory shares its advantage.
    objective_XTA, clipped_XTA = clip_objective(ratio_XTA, advantage_X[:, None, None], cfg)
    loss_XTA = -objective_XTA  # a loss falls where the objective rises
    if cfg.kl:
        loss_XTA = loss_XTA + cfg.kl * _require(kl_XTA, "kl")
    if cfg.entropy:
        # With a minus: a policy that still tries several actions is to be kept, and the loss is minimised.
        loss_XTA = loss_XTA - cfg.entropy * _require(entropy_XTA, "entropy")
    # The mean over A, so that the weight of a step does not depend on how many tokens it has.
    loss_XT = jnp.mean(jnp.where(valid_XTA, loss_XTA, 0.0), axis=2)
    # The tally counts tokens, each as much as the other; the loss above weighs them by trajectory.
    nothing_XTA = jnp.zeros_like(logp_XTA)
    tally = Tally(
        tokens=jnp.sum(valid_XTA, dtype=jnp.float32),
        ratio=jnp.sum(ratio_XTA, where=valid_XTA),
        clipped=jnp.sum(clipped_XTA.astype(jnp.float32), where=valid_XTA),
        k3=jnp.sum(k3(log_ratio_XTA), where=valid_XTA),
        kl=jnp.sum(nothing_XTA if kl_XTA is None else kl_XTA, where=valid_XTA),
        entropy=jnp.sum(nothing_XTA if entropy_XTA is None else entropy_XTA, where=valid_XTA),
        ratio_max=jnp.max(jnp.where(valid_XTA, ratio_XTA, 0.0)),
        gap_max=jnp.max(jnp.abs(log_ratio_XTA)),
    )
    return jnp.sum(weight_XT * loss_XT), jax.lax.stop_gradient(tally)


def clip_objective(ratio: Array, advantage: Array, cfg: GRPOConfig) -> tuple[Array, Array]:
    """Returns the clipped objective min(r A, clip(r) A), and where the clip is what counts.

    The minimum is pessimistic on both sides: it stops a rise above 1 + high when A > 0 and
    a fall below 1 - low when A < 0, and never the way back. With ``dual_clip`` the
    objective of A < 0 is at least c A (Ye et al., 2019, arXiv 1912.09729).
    """
    unclipped = ratio * advantage
    bounded = jnp.clip(ratio, 1.0 - cfg.clip_low, 1.0 + cfg.clip_high) * advantage
    objective = jnp.minimum(unclipped, bounded)
    if cfg.dual_clip:
        # r has no upper bound where A < 0, and one token that became a thousand times likelier would be the whole loss.
        objective = jnp.where(advantage < 0, jnp.maximum(objective, cfg.dual_clip * advantage), objective)
    return objective, objective != unclipped


def k3(log_ratio: Array) -> Array:
    """exp(x) - 1 - x of x = log q/p of a sample from p: unbiased for KL(p || q), never negative."""
    # expm1 keeps the digits that exp(x) - 1 loses for the small x of a policy that hardly moved.
    return jnp.expm1(log_ratio) - log_ratio


def categorical_kl(log_p: Array, log_q: Array) -> Array:
    """Exact KL(p || q) over the last axis of two arrays of log-probabilities."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def kept_groups(keep_B: Array, group: int) -> Array:
    """Counts the groups that the filter left; 0 means there is nothing to learn from."""
    return jnp.sum(jnp.any(_by_group(keep_B, group), axis=1), dtype=jnp.float32)


def _none_before(flag_BS: Array) -> Array:
    """True where no earlier place of the row is True, hence at the first one itself too."""
    count_BS = flag_BS.astype(jnp.int32)
    # The running count without the place itself: 0 up to and including the first True.
    return jnp.cumsum(count_BS, axis=1) - count_BS == 0


def _by_group(x_B: Array, group: int) -> Array:
    """Reshapes (B,) to (groups, G): a group is G consecutive rows."""
    if x_B.shape[0] % group:
        raise ValueError(f"grpo: expected a multiple of group={group} trajectories, got {x_B.shape[0]}")
    return x_B.reshape(-1, group)


def _require(x_XTA: Array | None, name: str) -> Array:
    if x_XTA is None:
        raise ValueError(f"grpo: GRPOConfig.{name} is on but {name}_XTA was not given (kl needs a reference policy)")
    return x_XTA
