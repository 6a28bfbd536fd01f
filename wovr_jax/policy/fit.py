"""A supervised fine-tuning from beginning to end: trained, judged on held-out chunks on the way, adapters put down."""

from __future__ import annotations

import pathlib

from wovr_jax import checkpoint, config, loop
from wovr_jax.metrics import Log
from wovr_jax.nn.functional import Params
from wovr_jax.policy import train as sft
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.train import Demonstrations, PolicyAdapters, SFTConfig, SFTState
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.types import Array


def fit(
    cfg: VLAConfig,
    train: SFTConfig,
    params: Params,
    data: Demonstrations,
    held: Demonstrations,
    codec: Codec,
    key: Array,
    *,
    log: Log | None = None,
    folder: pathlib.Path,
) -> tuple[Params, dict[str, float]]:
    """The policy after ``train.steps`` steps from ``params``, adapters merged, and how it does on ``held``.

    The checkpoint in ``folder`` holds what is trained and the optimiser's state, and a fit that was interrupted goes
    on from it. Adapters are also kept alone, in ``folder / "adapters"`` with what they belong to.

    Args:
      cfg: the network.
      train: how to train it.
      params: where to start.
      data: chunks to imitate.
      held: chunks to be judged on, every ``train.validate_every`` steps and at the end.
      codec: from tokens to environment actions, for the judgement.
      key: of batches and fresh adapters.
      log: receives the curves.
      folder: of the checkpoint.
    """
    state, step = sft.make(cfg, train, params, data, key)
    measure = sft.validation(cfg, train, params, codec, held)

    def judged(state: SFTState) -> dict[str, float]:
        return {name: float(value) for name, value in measure(state).items()}

    def judge(done: int, state: SFTState) -> dict[str, float] | None:
        return judged(state) if done % train.validate_every == 0 or done == train.steps else None

    state = loop.fit("sft", state, step, train.steps, log=log, folder=folder, on_step=judge)
    if train.lora:
        about = PolicyAdapters(cfg, sft.adapters(cfg, train))
        checkpoint.save(folder / "adapters", state.trained, config.to_dict(about))
    return sft.weights(cfg, train, params, state), judged(state)
