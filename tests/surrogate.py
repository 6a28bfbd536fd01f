"""The GRPO loss of whole rollouts in one call: what the learner computes piece by piece, for tests to compare with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wovr_jax import grpo
from wovr_jax.grpo import GRPOConfig

Array = jax.Array


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
      logp_BNTA, old_logp_BNTA: as in ``grpo.chunk_loss``.
      advantage_B, valid_BNT, keep_B: from ``advantages``, ``valid_mask``, ``group_filter``.
      cfg: the settings; ``cfg.group`` only for counting groups.
      ref_logp_BNTA: sampled tokens under the reference policy; the k3 estimate is used.
      kl_BNTA: exact divergence instead (``categorical_kl``), preferred where logits are at hand.
      entropy_BNTA: entropy of each token's distribution.
    """
    rows, chunks = valid_BNT.shape[:2]
    if kl_BNTA is None and ref_logp_BNTA is not None:
        kl_BNTA = grpo.k3(ref_logp_BNTA - logp_BNTA)

    def flatten(x: Array) -> Array:
        return x.reshape(rows * chunks, *x.shape[2:])  # (B, N, ...) -> (X, ...)

    loss, tally = grpo.chunk_loss(
        flatten(logp_BNTA),
        flatten(old_logp_BNTA),
        jnp.repeat(advantage_B, chunks),
        flatten(grpo.weights(valid_BNT, keep_B, cfg)),
        cfg,
        None if kl_BNTA is None else flatten(kl_BNTA),
        None if entropy_BNTA is None else flatten(entropy_BNTA),
    )
    return loss, tally.summary() | {"loss": loss, "kept_groups": grpo.kept_groups(keep_B, cfg.group)}
