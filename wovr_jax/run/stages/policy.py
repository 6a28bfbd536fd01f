"""The stage that makes the base policy: supervised fine-tuning on demonstrations, judged on held-out ones."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wovr_jax.core import checkpoint, config, sharding
from wovr_jax.data import batches, normalize
from wovr_jax.policy import train as sft
from wovr_jax.policy import vla
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.train import PolicyAdapters, SFTConfig
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.stages.episodes import Demonstrations, Keys
from wovr_jax.train import loop
from wovr_jax.train.step import TrainState
from wovr_jax.types import Array, Params
from wovr_jax.weights import native


def start_policy(cfg: VLAConfig, weights: str, towers: Sequence[str], folder: pathlib.Path, key: Keys) -> Params:
    """Weights from which the policy starts, on the mesh in use.

    Args:
      cfg: the network.
      weights: a json of imported weights or the folder of a checkpoint; empty for random weights.
      towers: names of pretrained vision towers (DINOv2, SigLIP) to begin with where the weights are random.
      folder: where the towers lie.
      key: of the run, by name.

    Raises:
      ConfigError: nothing there, or weights of another network.
    """
    network = vla.network(cfg)
    if weights:
        return native.load_weights("policy_weights", weights, network.shapes(), vla.AXES)
    # The language model starts at random here; only a release brings one that was pretrained.
    params = network.init(key("policy"))
    for part, name in zip(("dino", "siglip"), towers):
        # Towers keep what they saw in pretraining: demonstrations are too few to learn to see from.
        params[part] = native.load_asset(name, folder)[1]
    return sharding.place(jax.tree.map(jnp.asarray, params), vla.AXES)


def fit_codec(name: str, demonstrations: Product[Demonstrations]) -> Codec:
    """Returns the codec between actions of the environment ``name`` and tokens, from the demonstrations' statistics."""
    return Codec.from_statistics(normalize.statistics(demonstrations.value.train, name)[name]["action"])


def fine_tune(
    run: Run,
    cfg: VLAConfig,
    train: SFTConfig,
    start: Callable[[], Params],
    codec: Callable[[], Codec],
    prompt_KL: Array,
    key: Keys,
    demonstrations: Product[Demonstrations],
    name: str = "sft",
) -> Product[Params]:
    """The base policy: ``train.steps`` steps of imitation, adapters merged; without a step, the weights as they start.

    With ``train.patience`` it is the policy of the step with the smallest loss on held-out chunks.

    The stage's checkpoint holds what is trained and the optimizer's state, and a fit that was interrupted goes on from
    it. Adapters are also kept alone, in ``adapters`` with what they belong to.

    Args:
      run: the run.
      cfg: the network.
      train: how to train it.
      start: gives the weights to start from.
      demonstrations: to imitate, and to be judged on every ``train.validate_every`` steps (0: never) and at the end.
      codec: gives the codec between tokens and environment actions.
      prompt_KL: prompt tokens of every task.
      key: of the run, by name.
      name: of the stage; that of the base policy by default.
    """
    # No stage then: nothing was made, and weights from outside are not copied into the run.
    if not train.steps:
        return Product(start).used_as(vla.for_use(cfg))

    def make(folder: pathlib.Path) -> dict[str, Any]:
        params = start()
        chunks = batches.sft_chunks(demonstrations.value.train, cfg.chunk, early=train.early)
        data = sft.demonstrations(chunks, codec(), prompt_KL)
        state, step = sft.make(cfg, train, params, data, key(name))
        # One sample a chunk: neighbouring starts of a held-out episode say nearly the same.
        held_out = batches.sft_chunks(demonstrations.value.held_out, cfg.chunk, stride=cfg.chunk)
        validate = sft.validation(cfg, train, params, codec(), sft.demonstrations(held_out, codec(), prompt_KL))

        limit = train.patience * train.validate_every

        def measure(state: TrainState) -> dict[str, float]:
            return {name: float(value) for name, value in validate(state).items()}

        def watch(done: int, state: TrainState) -> dict[str, float] | None:
            # The last step is always measured: it is the policy that goes on.
            due = train.validate_every and done % train.validate_every == 0
            if not due and done < train.steps:
                return None
            metrics = measure(state)
            if train.patience and _wait(folder / "best", done, state.params, metrics["val_loss"]) >= limit:
                raise loop.Enough(metrics)
            return metrics

        state = loop.fit(name, state, step, train.steps, log=run.log, folder=folder, on_step=watch)
        facts: dict[str, Any] = {"chunks": len(data.token_BTA)}
        if train.patience:
            state = state.replace(params=checkpoint.restore(folder / "best", state.params))
            best = checkpoint.meta(folder / "best")["step"]
            facts |= {"best_step": best, "stopped_at": min(best + limit, train.steps)}
        if train.lora:
            # Adapters mean nothing without the network and the layers that they were trained on.
            about = PolicyAdapters(cfg, sft.resolve_targets(cfg, train.lora, train.frozen))
            checkpoint.save(folder / "adapters", state.params, config.to_dict(about))
        checkpoint.save(folder / "policy", sft.merge_weights(cfg, train, params, state))
        return facts | measure(state)

    return run.stage(name, make, lambda folder: load_policy(cfg, folder)).used_as(vla.for_use(cfg))


def _wait(best: pathlib.Path, done: int, params: Params, loss: float) -> int:
    """Returns for how many steps no loss was smaller; parameters of the smallest are kept in the folder ``best``.

    The folder is all that is to know, so a training that is resumed waits for as long as an unbroken one.
    """
    seen = checkpoint.meta(best) if checkpoint.exists(best) else {"step": 0, "loss": math.inf}
    if done <= seen["step"]:
        return 0  # resumed from before the best one, it comes by the same losses again
    if loss < seen["loss"]:
        checkpoint.save(best, params, {"step": done, "loss": loss})
        return 0
    return done - seen["step"]


def load_policy(cfg: VLAConfig, folder: pathlib.Path, name: str = "policy") -> Params:
    """The policy that a stage left in its folder, on the mesh in use."""
    return checkpoint.restore(folder / name, sharding.describe(vla.network(cfg).shapes(), vla.AXES))
