"""Makes the small pretrained parts that come with the package, for the embedded table.

    python launch/pretrain_tabletop.py vae        the causal video VAE of the world model

Each part is trained on fresh scenes of the simulator and written to wovr_jax/assets with the
settings that made it. ``--run`` keeps a checkpoint there and continues from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import jax
import jax.numpy as jnp

from wovr_jax import assets, loop
from wovr_jax.metrics import Log
from wovr_jax.runtime import enable_compile_cache, key
from wovr_jax.sim import experts, tabletop
from wovr_jax.sim.experts import ExpertConfig
from wovr_jax.sim.tabletop import TabletopConfig, TabletopState
from wovr_jax.types import Array
from wovr_jax.world import vae_train
from wovr_jax.world.vae import VAEConfig
from wovr_jax.world.vae_train import VAETraining


def vae(args: argparse.Namespace) -> None:
    """Trains the VAE, measures its latent statistics and its reconstruction of unseen windows, saves it."""
    sim, cfg = TabletopConfig(), VAEConfig.tabletop()
    training = replaced(VAETraining(), args)
    state, step = vae_train.make(cfg, training, lambda key, batch: windows(key, batch, sim))
    state = loop.fit("vae", state, step, training.steps, log=args.log, folder=args.run)
    params = state["params"]

    draw = jax.jit(windows, static_argnums=(1, 2))
    cfg = vae_train.normalised(cfg, params, (draw(key(1, "statistics", i), 64, sim) for i in range(16)))
    scores = vae_train.scores(cfg, params, [draw(key(1, "held out", i), 64, sim) for i in range(8)])
    path = assets.save_asset(
        args.name or "tabletop_vae", cfg, params, training=training, scores=scores, folder=args.out
    )
    print(f"{path}: {scores}")


def windows(key: Array, batch: int, sim: TabletopConfig, frames: int = 13, memory: int = 4) -> Array:
    """(batch, frames, size, size, 3): the anchor, ``memory`` frames up to a random moment, and those after it.

    Three actors: the expert (flawed or not), the expert under heavy noise, and a random walk;
    a policy in training does a bit of each. A sixth of the windows begin at the episode's start,
    where the memory is copies of the anchor.
    """
    k_seed, k_actor, k_kind, k_at, k_first = jax.random.split(key, 5)
    new = frames - 1 - memory
    at_B = jax.random.randint(k_at, (batch,), 0, sim.horizon - new + 1)
    at_B = jnp.where(jax.random.bernoulli(k_first, 1 / 6, (batch,)), 0, at_B)
    seed_B = jax.random.randint(k_seed, (batch,), 0, jnp.iinfo(jnp.int32).max)
    kind_B = jax.random.choice(k_kind, 3, (batch,), p=jnp.array([0.45, 0.35, 0.2]))

    def one(seed: Array, key: Array, kind: Array, at: Array) -> Array:
        states = jax.tree.map(lambda leaf: leaf[kind], _episodes(seed, key, sim))
        index_F = jnp.maximum(at + jnp.arange(1 - memory, new + 1), 0)
        index_F = jnp.concatenate([jnp.zeros(1, index_F.dtype), index_F])
        chosen = jax.tree.map(lambda leaf: leaf[index_F], states)
        return jax.vmap(lambda state: tabletop.render(state, sim))(chosen)

    return jax.vmap(one)(seed_B, jax.random.split(k_actor, batch), kind_B, at_B)


def _episodes(seed: Array, key: Array, sim: TabletopConfig) -> TabletopState:
    """The same layout played by three actors: leaves (3, horizon + 1, ...)."""
    usual = experts.demonstrate(seed, key, ExpertConfig(flawed_share=0.5), sim)[0]
    noisy = experts.demonstrate(seed, key, ExpertConfig(noise=0.7, flip=0.1), sim)[0]
    first = tabletop.reset(jax.random.key(seed), sim)
    k_push, k_jaws = jax.random.split(key)
    push = jax.random.normal(k_push, (sim.horizon // 4 + 1, 2)).repeat(4, axis=0)[: sim.horizon]
    jaws = jnp.where(jax.random.bernoulli(k_jaws, 0.4, (sim.horizon // 4 + 1,)), 1.0, -1.0).repeat(4)[: sim.horizon]
    action_SA = jnp.zeros((sim.horizon, 7)).at[:, :2].set(push).at[:, 6].set(jaws)
    random = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, tabletop.roll(first, action_SA, sim))
    return jax.tree.map(lambda *leaf: jnp.stack(leaf), usual, noisy, random)


def replaced(training: VAETraining, args: argparse.Namespace) -> VAETraining:
    """The settings with what the command line changes."""
    given = {name: getattr(args, name) for name in ("steps", "batch", "lr", "kl", "seed")}
    return dataclasses.replace(training, **{name: value for name, value in given.items() if value is not None})


PARTS = {"vae": vae}


def main() -> None:
    """Trains the part that the command line names, and writes the asset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=pathlib.Path, default=assets.FOLDER, help="where the asset is written")
    parser.add_argument("--name", help="name of the asset")
    parser.add_argument("--run", type=pathlib.Path, help="folder for checkpoint and metrics")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--kl", type=float)
    parser.add_argument("--seed", type=int)
    args = parser.parse_args()
    enable_compile_cache(ROOT / ".jax_cache")
    args.log = Log(args.run) if args.run else None
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
