"""Makes the small pretrained parts that come with the package, for the embedded table.

    python launch/pretrain_tabletop.py vae        the causal video VAE of the world model
    python launch/pretrain_tabletop.py dinov2     the policy's first vision tower: where every object is
    python launch/pretrain_tabletop.py siglip     the second: where every object is, seen from the gripper

Each part is trained on fresh scenes of the simulator and written to wovr_jax/assets with the
settings that made it. ``--run`` keeps a checkpoint there and continues from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import jax
import jax.numpy as jnp

from wovr_jax.core.keys import key
from wovr_jax.core.log import Log
from wovr_jax.core.machine import enable_compile_cache
from wovr_jax.policy import towers_train
from wovr_jax.policy.towers_train import Scenes, TowerTraining
from wovr_jax.policy.vision import TowerConfig
from wovr_jax.sim.tabletop import expert as experts
from wovr_jax.sim.tabletop import table as tabletop
from wovr_jax.sim.tabletop.expert import ExpertConfig
from wovr_jax.sim.tabletop.table import TabletopConfig, TabletopState
from wovr_jax.train import loop
from wovr_jax.types import Array
from wovr_jax.weights import native
from wovr_jax.world.vae import train as vae_train
from wovr_jax.world.vae.net import VAEConfig
from wovr_jax.world.vae.train import VAETraining


def vae(args: argparse.Namespace) -> None:
    """Trains the VAE, measures its latent statistics and its reconstruction of unseen windows, saves it."""
    sim, cfg = TabletopConfig(), VAEConfig.tabletop()
    training = replaced(VAETraining(), args)
    state, step = vae_train.make(cfg, training, lambda key, batch: windows(key, batch, sim))
    state = loop.fit("vae", state, step, training.steps, log=args.log, folder=args.run)
    params = state.params

    draw = jax.jit(windows, static_argnums=(1, 2))
    cfg = vae_train.normalised(cfg, params, (draw(key(1, "statistics", i), 64, sim) for i in range(16)))
    scores = vae_train.scores(cfg, params, [draw(key(1, "held out", i), 64, sim) for i in range(8)])
    path = native.save_asset(
        args.name or "tabletop_vae", cfg, params, training=training, scores=scores, folder=args.out
    )
    print(f"{path}: {scores}")


def windows(key: Array, batch: int, sim: TabletopConfig, frames: int = 13, memory: int = 4) -> Array:
    """(batch, frames, size, size, 3): the anchor, ``memory`` frames up to a random moment, and those after it.

    Three actors: the expert (flawed or not), the expert under heavy noise, and a random walk;
    a policy in training does a bit of each. Half of the tables are cluttered. A sixth of the
    windows begin at the episode's start, where the memory is copies of the anchor.
    """
    k_seed, k_actor, k_kind, k_at, k_first = jax.random.split(key, 5)
    new = frames - 1 - memory
    at_B = jax.random.randint(k_at, (batch,), 0, sim.horizon - new + 1)
    at_B = jnp.where(jax.random.bernoulli(k_first, 1 / 6, (batch,)), 0, at_B)
    seed_B = jax.random.randint(k_seed, (batch,), 0, jnp.iinfo(jnp.int32).max)
    kind_B = jax.random.choice(k_kind, 6, (batch,), p=jnp.array([0.45, 0.35, 0.2]).repeat(2) / 2)

    def one(seed: Array, key: Array, kind: Array, at: Array) -> Array:
        states = jax.tree.map(lambda leaf: leaf[kind], _episodes(seed, key, sim))
        index_F = jnp.maximum(at + jnp.arange(1 - memory, new + 1), 0)
        index_F = jnp.concatenate([jnp.zeros(1, index_F.dtype), index_F])
        chosen = jax.tree.map(lambda leaf: leaf[index_F], states)
        return jax.vmap(lambda state: tabletop.render(state, sim))(chosen)

    return jax.vmap(one)(seed_B, jax.random.split(k_actor, batch), kind_B, at_B)


def _episodes(seed: Array, key: Array, sim: TabletopConfig) -> TabletopState:
    """Three actors, each without and with clutter: leaves (6, horizon + 1, ...)."""
    tables = [dataclasses.replace(sim, clutter=clutter) for clutter in (False, True)]
    played = [actor(seed, key, table) for actor in (_expert, _noisy, _random) for table in tables]
    return jax.tree.map(lambda *leaf: jnp.stack(leaf), *played)


def _expert(seed: Array, key: Array, sim: TabletopConfig) -> TabletopState:
    return experts.demonstrate(seed, key, ExpertConfig(flawed_share=0.5), sim)[0]


def _noisy(seed: Array, key: Array, sim: TabletopConfig) -> TabletopState:
    return experts.demonstrate(seed, key, ExpertConfig(noise=0.7, flip=0.1), sim)[0]


def _random(seed: Array, key: Array, sim: TabletopConfig) -> TabletopState:
    """A walk that keeps its direction and its jaws for four steps at a time."""
    first = tabletop.reset(jax.random.key(seed), sim)
    k_push, k_jaws = jax.random.split(key)
    push = jax.random.normal(k_push, (sim.horizon // 4 + 1, 2)).repeat(4, axis=0)[: sim.horizon]
    jaws = jnp.where(jax.random.bernoulli(k_jaws, 0.4, (sim.horizon // 4 + 1,)), 1.0, -1.0).repeat(4)[: sim.horizon]
    action_SA = jnp.zeros((sim.horizon, 7)).at[:, :2].set(push).at[:, 6].set(jaws)
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, tabletop.roll(first, action_SA, sim))


def tower(args: argparse.Namespace) -> None:
    """Trains one vision tower on parsing scenes, measures it on unseen ones, saves it."""
    sim, cfg = TabletopConfig(), getattr(TowerConfig, f"tabletop_{args.part}")()
    training = replaced(getattr(TowerTraining, args.part)(), args)
    state, step = towers_train.make(
        cfg, training, lambda key, batch: scenes(key, batch, sim), key(training.seed, args.part)
    )
    state = loop.fit(args.part, state, step, training.steps, log=args.log, folder=args.run)
    unseen = [jax.jit(scenes, static_argnums=(1, 2))(key(1, "held out", i), 256, sim) for i in range(4)]
    scores = towers_train.scores(cfg, training, state.params, unseen)
    name = args.name or f"tabletop_{args.part}"
    path = native.save_asset(name, cfg, state.params["tower"], training=training, scores=scores, folder=args.out)
    print(f"{path}: {scores}")


def scenes(key: Array, batch: int, sim: TabletopConfig) -> Scenes:
    """Random tables, and what is where: gripper, three colours of blocks, plate; jaws closed, colour there, held."""
    state_B = jax.vmap(lambda k: _scene(k, sim))(jax.random.split(key, batch))
    frame_BHWC = jax.vmap(lambda state: tabletop.render(state, sim))(state_B)
    position, present, attribute = jax.vmap(_parsed)(state_B)
    radius_O = jnp.array([0.065, 0.085, 0.085, 0.085, sim.plate_radius])
    as_on_disk = jnp.round((frame_BHWC + 1.0) * 127.5) / 127.5 - 1.0
    return Scenes(as_on_disk, position, present, attribute, radius_O)


def _scene(key: Array, sim: TabletopConfig) -> TabletopState:
    """One block or two; the gripper anywhere or near something, a block perhaps moved or held."""
    keys = iter(jax.random.split(key, 12))
    chance = lambda p: jax.random.bernoulli(next(keys), p)  # noqa: E731
    layout, clutter = next(keys), chance(0.6)
    one, two = (tabletop.reset(layout, dataclasses.replace(sim, clutter=both)) for both in (False, True))
    state = jax.tree.map(lambda a, b: jnp.where(clutter, b, a), one, two)
    anywhere = lambda: jax.random.uniform(next(keys), (2,), minval=0.04, maxval=0.96)  # noqa: E731
    near = lambda place: jnp.clip(place + 0.12 * jax.random.normal(next(keys), (2,)), 0.04, 0.96)  # noqa: E731

    moved = jnp.where(chance(0.5), anywhere(), near(state.plate))
    block = jnp.where(chance(0.3), moved, state.block_K2[0])
    choice = jax.random.randint(next(keys), (), 0, 4)
    gripper = jnp.stack([state.gripper, anywhere(), near(block), near(state.plate)])[choice]
    holds, closed = chance(0.35), chance(0.2)
    block_K2 = state.block_K2.at[0].set(jnp.where(holds, gripper, block))
    held = jnp.where(holds, 0, -1).astype(jnp.int32)
    return state.replace(gripper=gripper, closed=holds | closed, held=held, block_K2=block_K2)


def _parsed(state: TabletopState) -> tuple[Array, Array, Array]:
    """Position (5, 2), presence (5,) and attributes (7,) of a scene."""
    colour_P2 = jnp.full((3, 2), 0.5).at[state.colour_K].set(state.block_K2)
    there_P = jnp.zeros(3, bool).at[state.colour_K].set(jnp.all(state.block_K2 <= 1.0, axis=-1))
    held_P = (jnp.arange(3) == state.colour_K[0]) & (state.held == 0)
    position = jnp.concatenate([state.gripper[None], jnp.where(there_P[:, None], colour_P2, 0.5), state.plate[None]])
    present = jnp.concatenate([jnp.ones(1, bool), there_P, jnp.ones(1, bool)])
    return position, present, jnp.concatenate([state.closed[None], there_P, held_P])


def replaced(training: Any, args: argparse.Namespace) -> Any:
    """The settings with what the command line changes; a setting that the part does not have is an error."""
    given = {name: getattr(args, name) for name in ("steps", "batch", "lr", "kl", "seed")}
    return dataclasses.replace(training, **{name: value for name, value in given.items() if value is not None})


PARTS = {"vae": vae, "dinov2": tower, "siglip": tower}


def main() -> None:
    """Trains the part that the command line names, and writes the asset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=pathlib.Path, default=native.FOLDER, help="where the asset is written")
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
