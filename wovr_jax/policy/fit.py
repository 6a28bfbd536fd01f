"""A supervised fine-tuning from beginning to end: trained, judged on held-out episodes meanwhile, adapters put down."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from wovr_jax.core import checkpoint, config
from wovr_jax.core.log import Log
from wovr_jax.data import batches
from wovr_jax.policy import adapters
from wovr_jax.policy import train as sft
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.train import PolicyAdapters, SFTConfig, SFTState
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.train import loop
from wovr_jax.types import Array, Episode, Params


def fit(
    cfg: VLAConfig,
    train: SFTConfig,
    params: Params,
    demos: Sequence[Episode],
    held: Sequence[Episode],
    codec: Codec,
    prompt_KL: Array,
    key: Array,
    *,
    log: Log | None = None,
    folder: pathlib.Path,
) -> tuple[Params, dict[str, Any]]:
    """The policy after ``train.steps`` steps from ``params``, adapters merged, and facts: how it does on ``held``.

    The checkpoint in ``folder`` holds what is trained and the optimiser's state, and a fit that was interrupted goes
    on from it. Adapters are also kept alone, in ``folder / "adapters"`` with what they belong to.

    Args:
      cfg: the network.
      train: how to train it.
      params: where to start.
      demos: to imitate.
      held: to be judged on, every ``train.validate_every`` steps (0: never) and at the end; one sample a chunk.
      codec: between tokens and environment actions.
      prompt_KL: prompt tokens of every task.
      key: of batches and fresh adapters.
      log: receives the curves.
      folder: of the checkpoint.
    """
    chunks = batches.sft_chunks(demos, cfg.chunk, early=train.early)
    data = sft.demonstrations(chunks, codec, prompt_KL)
    state, step = sft.make(cfg, train, params, data, key)
    apart = sft.demonstrations(batches.sft_chunks(held, cfg.chunk, stride=cfg.chunk), codec, prompt_KL)
    measure = sft.validation(cfg, train, params, codec, apart)

    def judged(state: SFTState) -> dict[str, float]:
        return {name: float(value) for name, value in measure(state).items()}

    def judge(done: int, state: SFTState) -> dict[str, float] | None:
        due = train.validate_every and done % train.validate_every == 0
        return judged(state) if due or done == train.steps else None

    state = loop.fit("sft", state, step, train.steps, log=log, folder=folder, on_step=judge)
    if train.lora:
        about = PolicyAdapters(cfg, adapters.resolved(cfg, train.lora, train.frozen))
        checkpoint.save(folder / "adapters", state.trained, config.to_dict(about))
    return sft.weights(cfg, train, params, state), {"chunks": len(data.token_BTA)} | judged(state)
