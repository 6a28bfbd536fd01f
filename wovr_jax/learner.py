"""Imagined -> new policy state: one jitted call does every optimizer step of an iteration.

The success flags are read once (mask, returns, advantages, filter: ``grpo.signal``). Then
the trajectories are cut into chunks, B * N samples, and each epoch goes through

    shuffle, samples that count first -> minibatches (an optimizer step each)
                                      -> microbatches (a scan that adds gradients)

Samples after a success or in filtered groups weigh nothing. They are dealt last, so whole
microbatches of them stand at the end of each minibatch and are skipped by ``lax.cond``:
shapes are static, time follows the number of valid chunks. A minibatch in which nothing
counts takes no optimizer step, so an iteration whose groups all agree leaves parameters and
optimizer untouched and says so (``skipped``, ``kept_groups``).

The policy is a callable ``logits_fn``; log-probabilities are of its logits over the
temperature that the actor sampled with, in float32 whatever the policy computes in, as the actor's were.

Letters of this file: X samples (chunks of all trajectories), x samples of a microbatch, U microbatches of a minibatch,
S optimizer steps of an iteration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from wovr_jax import grpo
from wovr_jax.core import sharding, stats
from wovr_jax.core.config import Count, Decay, Natural, NonNegative, Positive, checked
from wovr_jax.core.sharding import WHOLE, Axes
from wovr_jax.grpo import GRPOConfig
from wovr_jax.policy.vla import PolicyLoRA
from wovr_jax.train import optimizers
from wovr_jax.train.optimizers import Path
from wovr_jax.types import Array, Imagined, Params

LogitsFn = Callable[[Params, Array, Array], Array]
"""``logits_fn(params, frame_BHWC, prompt_BL) -> logits_BTAK``."""

Update = Callable[..., tuple["PolicyState", dict[str, Array]]]
"""``update(state, imagined, key, ref_params=None) -> (state, metrics)``."""


@checked
@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """How rollouts become optimizer steps; the defaults are RLinf's for LIBERO (wan_libero_*_grpo_openvlaoft.yaml).

    Attributes:
      lr: AdamW learning rate after the warm-up.
      betas, eps, weight_decay: of AdamW.
      clip_norm: largest global norm of a gradient; 0 is off.
      warmup: optimizer steps over which the rate rises linearly, the first one included.
      epochs: passes over the rollouts.
      minibatches: optimizer steps of a pass.
      microbatch: chunk-samples in one forward and backward pass.
      lora: adapters to train beside the policy, folded in when the round ends; None trains the policy itself.
      grpo: mask, advantage, clips, regularisers.
    """

    lr: Positive = 2e-5
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-5
    weight_decay: NonNegative = 0.01
    clip_norm: NonNegative = 1.0
    warmup: Natural = 0
    epochs: Count = 1
    minibatches: Count = 4
    microbatch: Count = 32
    lora: PolicyLoRA | None = None
    grpo: GRPOConfig = GRPOConfig()


@struct.dataclass
class PolicyState:
    """A policy in training.

    Attributes:
      params: all parameters, frozen ones included.
      opt_state: of the trained parameters only.
      step: int32, optimizer steps taken (skipped ones do not count).
      rate: float32, factor on the learning rate: a number in the state, so that another one compiles nothing.
      frozen: key paths of the parameters that are not trained.
    """

    params: Params
    opt_state: Any
    step: Array
    rate: Array
    frozen: frozenset[Path] = struct.field(pytree_node=False, default=frozenset())


def create(
    cfg: LearnerConfig, params: Params, frozen: frozenset[Path] = frozenset(), rate: float = 1.0, axes: Axes = WHOLE
) -> PolicyState:
    """Makes a fresh state. The parameters are copied, because updates donate the state.

    Args:
      cfg: its optimizer settings.
      params: nested dict of arrays.
      frozen: what has no gradient, no optimizer state and no update, for example
        ``optimizers.find_frozen(params, "vision")``.
      rate: factor on the learning rate.
      axes: of the network, for the mesh in use (``sharding``).

    Raises:
      ValueError: where nothing is left to train.
    """
    if len(frozen) == len(jax.tree.leaves(params)):
        raise ValueError(f"learner: all {len(frozen)} parameters are frozen, so there is nothing to train")
    params = jax.tree.map(jnp.copy, params)
    # Moments of the trained part only: of a frozen 7B model they would be 60 GB that nothing reads.
    opt_state = optimizer(cfg).init(optimizers.split_frozen(params, frozen)[0])
    state = PolicyState(params, opt_state, jnp.zeros((), jnp.int32), jnp.asarray(rate, jnp.float32), frozen)
    return sharding.place(state, axes)


def optimizer(cfg: LearnerConfig) -> optax.GradientTransformation:
    """Makes the optimizer: clipping by global norm, then AdamW with linear warm-up."""
    # The first step of a warm-up moves too, or the whole first iteration might change nothing.
    rate, (b1, b2) = optimizers.ramp_cosine(cfg.lr, cfg.warmup), cfg.betas
    return optimizers.build("adamw", rate, clip=cfg.clip_norm, b1=b1, b2=b2, eps=cfg.eps, decay=cfg.weight_decay)


def make_update(cfg: LearnerConfig, logits_fn: LogitsFn, temperature: float, axes: Axes = WHOLE) -> Update:
    """Makes the jitted ``update(state, imagined, key, ref_params=None) -> (state, metrics)``; ``state`` is donated.

    The compiled program is kept by the object that is returned: whoever goes on with another round keeps it.

    Args:
      cfg: static.
      logits_fn: the policy as a function; see ``LogitsFn``.
      temperature: that the actor sampled with. With another one every importance ratio is wrong from the first step.
      axes: of the network, as given to ``create``.

    Returns:
      ``update``. Its ``ref_params`` are the reference policy of the exact KL term, wanted when ``cfg.grpo.kl`` is
      not 0 and not looked at otherwise, as it costs a forward pass; they must not share arrays with a state
      (``create`` copies, so the parameters that a state was created from are fine). Its metrics are scalars: loss,
      policy ratio (mean, max), clip_fraction, kl (to the reference), kl_step (KL(before || after) of all steps
      together, on the samples that were learned from), entropy, grad_norm, return_mean, success, length (valid share
      of the steps), groups, kept_groups, steps (optimizer steps taken), skipped (1 when none was) and ratio_gap: the
      largest ``|log ratio|`` before the first step, which is rounding unless actor and learner disagree about
      temperature or tokens. Where the rollouts say which of them began at keyframes there are also success and the
      shares of groups that are mixed, all lost and all won among those of one kind, such as ``won_keyframe``; 0 for a
      kind of which there is none.

    Raises:
      ValueError: a temperature that is not above 0; by ``update``, a KL weight without a reference, or rollouts whose
        shapes do not fit each other.
    """
    if temperature <= 0:
        raise ValueError(f"make_update: expected the temperature that the actor sampled with, above 0, {temperature=}")
    transform = optimizer(cfg)

    def update(
        state: PolicyState, imagined: Imagined, key: Array, ref_params: Params | None = None
    ) -> tuple[PolicyState, dict[str, Array]]:
        if cfg.grpo.kl and ref_params is None:
            raise ValueError(f"GRPOConfig.kl is {cfg.grpo.kl}: update needs ref_params, the reference policy")
        reference = ref_params if cfg.grpo.kl else None
        # Advantages and weights need whole groups, so they are made before the rollouts are cut up and shuffled.
        signal = grpo.signal(imagined.success_BNT, cfg.grpo, imagined.live_BNT)
        samples = _cut_chunks(imagined, signal)
        trained, frozen = optimizers.split_frozen(state.params, state.frozen)

        def loss_fn(trained: Params, index_x: Array, counts_x: Array) -> tuple[Array, grpo.Tally]:
            sample = sharding.batch(jax.tree.map(lambda leaf: leaf[index_x], samples))
            # What fills a microbatch up is a copy of some sample, which must not count twice.
            sample = sample.replace(weight_XT=jnp.where(counts_x[:, None], sample.weight_XT, 0.0))
            params, prompt_xL = optimizers.merge_frozen(trained, frozen), imagined.prompt_BL[sample.row_X]
            return _loss(cfg, logits_fn, temperature, params, reference, sample, prompt_xL)

        def minibatch(carry: tuple, batch: tuple[Array, Array]) -> tuple[tuple, dict[str, Any]]:
            trained, opt_state, step = carry
            # batch: indices (U, x) of the samples, and whether each counts.
            grads, loss, tally = _accumulate(loss_fn, trained, *batch)
            counts = jnp.any(batch[1])

            def take_step() -> tuple[Any, Any]:
                updates, after = transform.update(grads, opt_state, trained)
                return optax.apply_updates(trained, optax.tree.scale(state.rate, updates)), after

            # A gradient of zeros is a step all the same, by momentum and weight decay.
            trained, opt_state = jax.lax.cond(counts, take_step, lambda: (trained, opt_state))
            report = {"loss": loss, "tally": tally, "grad_norm": optax.tree.norm(grads), "counts": counts}
            return (trained, opt_state, step + counts.astype(jnp.int32)), report

        def measure(total_2: Array, which: tuple[Array, Array]) -> tuple[Array, None]:
            # Tokens are samples of the policy before, which makes the k3 of their ratios one of KL(before || after).
            def add() -> Array:
                tally = loss_fn(trained, *which)[1]
                return total_2 + jnp.stack([tally.k3, tally.tokens])

            return jax.lax.cond(jnp.any(which[1]), add, lambda: total_2), None

        # Which samples count is the same in every epoch, as the flags are; the order is not.
        batches = _deal(_find_active(samples, cfg.grpo), key, cfg)
        begin = (trained, state.opt_state, state.step)
        (trained, opt_state, step), report_S = jax.lax.scan(minibatch, begin, batches)
        # (S, U, x) -> (minibatches * U, x): one epoch has every sample once.
        epoch = jax.tree.map(lambda leaf: leaf[: cfg.minibatches].reshape(-1, leaf.shape[-1]), batches)
        k3, tokens = jax.lax.scan(measure, jnp.zeros(2), epoch)[0]
        after = PolicyState(optimizers.merge_frozen(trained, frozen), opt_state, step, state.rate, state.frozen)
        metrics = _summarise(report_S, signal, imagined, cfg.grpo) | {"kl_step": k3 / jnp.maximum(tokens, 1)}
        return sharding.keep(after, axes), metrics

    return jax.jit(update, donate_argnums=0)


@struct.dataclass
class _Samples:
    """Chunks of all trajectories as one axis X = B * N; ``row_X`` is the trajectory of each."""

    frame_XHWC: Array
    row_X: Array
    token_XTA: Array
    logp_XTA: Array
    advantage_X: Array
    weight_XT: Array


def _cut_chunks(imagined: Imagined, signal: grpo.Signal) -> _Samples:
    rows, chunks, steps = imagined.success_BNT.shape
    if imagined.token_BNTA.shape[:3] != (rows, chunks, steps) or imagined.logp_BNTA.shape != imagined.token_BNTA.shape:
        raise ValueError(
            f"learner: imagined.success_BNT is {imagined.success_BNT.shape}, so token_BNTA and logp_BNTA should "
            f"both be {(rows, chunks, steps, 'A')}, got {imagined.token_BNTA.shape} and {imagined.logp_BNTA.shape}"
        )

    def flatten(x: Array) -> Array:
        return x.reshape(rows * chunks, *x.shape[2:])  # (B, N, ...) -> (X, ...)

    told_BN = imagined.advantage_BN

    return _Samples(
        frame_XHWC=flatten(imagined.frame_BNHWC),
        row_X=jnp.repeat(jnp.arange(rows), chunks),
        token_XTA=flatten(imagined.token_BNTA),
        logp_XTA=flatten(imagined.logp_BNTA),
        advantage_X=jnp.repeat(signal.advantage_B, chunks) if told_BN is None else flatten(told_BN),
        weight_XT=flatten(signal.weight_BNT),
    )


def _find_active(samples: _Samples, cfg: GRPOConfig) -> Array:
    """Returns which samples have a gradient: those with some weight, and an advantage or a regulariser."""
    # Without a regulariser an advantage of 0 makes a gradient of 0, and the forward pass can be saved.
    active_X = jnp.any(samples.weight_XT > 0, axis=1)
    return active_X if cfg.kl or cfg.entropy else active_X & (samples.advantage_X != 0)


def _deal(active_X: Array, key: Array, cfg: LearnerConfig) -> tuple[Array, Array]:
    """Returns the indices of samples (S, U, x), and whether each one counts.

    A random order with the active samples first is dealt to the minibatches like cards, so
    each gets the same number of active ones give or take one, and has them in front.
    """
    total = active_X.shape[0]
    size = -(-total // cfg.minibatches)  # samples of a minibatch, rounded up
    micro = min(cfg.microbatch, size)
    slots = -(-size // micro) * micro  # the same in whole microbatches
    padded = slots * cfg.minibatches

    def deal(y_Y: Array) -> Array:
        # Card by card: (slots * minibatches,) -> (minibatches, slots) -> (minibatches, U, x).
        return y_Y.reshape(slots, cfg.minibatches).T.reshape(-1, slots // micro, micro)

    def epoch(key: Array) -> tuple[Array, Array]:
        # Numbers below 1 for the active samples and from 1 on for the others: one sort shuffles both and parts them.
        order_X = jnp.argsort(jax.random.uniform(key, (total,)) + jnp.where(active_X, 0.0, 1.0))
        index_Y = jnp.pad(order_X, (0, padded - total))
        counts_Y = jnp.arange(padded) < jnp.sum(active_X)
        return deal(index_Y), deal(counts_Y)

    keys_E = jax.vmap(lambda e: jax.random.fold_in(key, e))(jnp.arange(cfg.epochs))
    # (epochs, minibatches, U, x) -> (S, U, x)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), jax.vmap(epoch)(keys_E))


def _accumulate(
    loss_fn: Callable, trained: Params, index_Ux: Array, counts_Ux: Array
) -> tuple[Params, Array, grpo.Tally]:
    """Sums gradient, loss and tally over microbatches; those in which nothing counts are not computed."""

    def compute(total: tuple, index_x: Array, counts_x: Array) -> tuple:
        grads, loss, tally = total
        (more, aux), slope = jax.value_and_grad(loss_fn, has_aux=True)(trained, index_x, counts_x)
        return jax.tree.map(jnp.add, grads, slope), loss + more, tally.add(aux)

    # A scan and not a vmap: one microbatch of activations is in memory at a time.
    def microbatch(total: tuple, xs: tuple[Array, Array]) -> tuple[tuple, None]:
        return jax.lax.cond(jnp.any(xs[1]), compute, lambda total, *_: total, total, *xs), None

    nothing = (jax.tree.map(jnp.zeros_like, trained), jnp.zeros((), jnp.float32), grpo.Tally.zero())
    return jax.lax.scan(microbatch, nothing, (index_Ux, counts_Ux))[0]


def _loss(
    cfg: LearnerConfig,
    logits_fn: LogitsFn,
    temperature: float,
    params: Params,
    ref_params: Params | None,
    sample: _Samples,
    prompt_xL: Array,
) -> tuple[Array, grpo.Tally]:
    """Computes the loss of one microbatch, scaled so that a minibatch estimates the loss of the whole batch."""

    def log_probs(params: Params) -> Array:
        logits_xTAK = logits_fn(params, sample.frame_XHWC, prompt_xL)
        return jax.nn.log_softmax(logits_xTAK.astype(jnp.float32) / temperature)

    all_xTAK = log_probs(params)
    # (x, T, A, K) -> (x, T, A): the log-probability of the token that was sampled.
    logp_xTA = jnp.take_along_axis(all_xTAK, sample.token_XTA[..., None], axis=-1)[..., 0]
    entropy_xTA = -jnp.sum(jnp.exp(all_xTAK) * all_xTAK, axis=-1)
    # With all K probabilities at hand the divergence is exact, where sampled tokens would only estimate it.
    kl_xTA = None if ref_params is None else grpo.categorical_kl(all_xTAK, jax.lax.stop_gradient(log_probs(ref_params)))
    loss, tally = grpo.chunk_loss(
        logp_xTA, sample.logp_XTA, sample.advantage_X, sample.weight_XT, cfg.grpo, kl_xTA, entropy_xTA
    )
    # The weights have the denominator of all samples, and a minibatch holds one of so many parts of them.
    return loss * cfg.minibatches, tally


def _summarise(report_S: dict[str, Any], signal: grpo.Signal, imagined: Imagined, cfg: GRPOConfig) -> dict[str, Array]:
    """Returns means over the optimizer steps taken, and facts of the rollouts."""
    # Means over the steps that were taken: a skipped one reports zeros, which nobody measured.
    tally_S, counts_S = report_S["tally"], report_S["counts"]
    tally = jax.lax.scan(lambda total, step: (total.add(step), None), grpo.Tally.zero(), tally_S)[0]
    steps = jnp.sum(counts_S, dtype=jnp.float32)
    return (
        tally.summary()
        | _split_by_kind(imagined, cfg.group)
        | {
            "loss": stats.masked_mean(report_S["loss"], counts_S),
            "grad_norm": stats.masked_mean(report_S["grad_norm"], counts_S),
            # Of the first step alone: the policy is then still the one that acted.
            "ratio_gap": tally_S.gap_max[0],
            "return_mean": jnp.mean(signal.return_B),
            "success": jnp.mean(jnp.any(imagined.success_BNT, axis=(1, 2)), dtype=jnp.float32),
            "length": jnp.mean(signal.valid_BNT, dtype=jnp.float32),
            "groups": jnp.float32(signal.keep_B.shape[0] // cfg.group),
            "kept_groups": grpo.kept_groups(signal.keep_B, cfg.group),
            "steps": steps,
            "skipped": (steps == 0).astype(jnp.float32),
        }
    )


def _split_by_kind(imagined: Imagined, group: int) -> dict[str, Array]:
    """Returns judged success and what became of the groups, for those that begin with an episode and at a keyframe."""
    if imagined.keyframe_B is None:
        return {}
    rate_P = jnp.mean(jnp.any(imagined.success_BNT, axis=(1, 2)).reshape(-1, group), axis=1, dtype=jnp.float32)
    key_P = imagined.keyframe_B[::group]  # all rollouts of a group begin in one state
    shares = {"success": rate_P, "mixed": (rate_P > 0) & (rate_P < 1), "lost": rate_P == 0, "won": rate_P == 1}
    return {
        f"{name}_{kind}": stats.masked_mean(share_P.astype(jnp.float32), of_P)
        for kind, of_P in (("start", ~key_P), ("keyframe", key_P))
        for name, share_P in shares.items()
    }
