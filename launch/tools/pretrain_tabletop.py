"""Makes the small pretrained parts that come with the package, for the embedded simulators.

    python launch/tools/pretrain_tabletop.py vae        the causal video VAE of the world model (--wrist: two cameras)
    python launch/tools/pretrain_tabletop.py dinov2     the policy's first vision tower: where every object is
    python launch/tools/pretrain_tabletop.py siglip     the second: where every object is, seen from the gripper

Each part is trained on fresh scenes of the embedded table, or with ``--suite relay`` of that simulator, and written to
wovr_jax/assets with the settings that made it. ``--run`` keeps a checkpoint there and continues from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from typing import Any

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

from launch import command, flags


def main() -> None:
    """Trains the part that the command line names, and writes the asset."""
    parser = command.Parser(__doc__)
    parser.add_argument("part", choices=("vae", "dinov2", "siglip"))
    parser.add_argument("--suite", choices=("tabletop", "relay"), default="tabletop", help="default %(default)s")
    parser.add_argument("--wrist", action="store_true", help="a VAE for both cameras of the table")
    parser.add_argument("--start", metavar="NAME", help="of a VAE of the package to begin with, in place of chance")
    parser.add_argument("--out", type=pathlib.Path, help="where the asset is written; default wovr_jax/assets")
    parser.add_argument("--name", help="name of the asset; default <suite>_<part>")
    parser.add_argument("--run", type=pathlib.Path, help="folder for checkpoint and metrics")
    parser.add_argument("--steps", type=flags.positive)
    parser.add_argument("--batch", type=flags.positive)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--kl", type=float, help="of the VAE only")
    parser.add_argument("--seed", type=int)
    args = parser.parse_args()
    # The other flags are settings of every training here.
    if (args.kl is not None or args.start) and args.part != "vae":
        parser.error("--kl is of the VAE, and so is --start")
    if args.wrist and (args.part, args.suite) != ("vae", "tabletop"):
        parser.error("--wrist is of the table's VAE")
    with command.explain_errors("Stopped. With --run the same command continues."):
        # Only now: importing jax takes seconds, a misspelt flag none.
        from wovr_jax.core.log import Log
        from wovr_jax.core.machine import enable_compile_cache
        from wovr_jax.weights import native

        enable_compile_cache(command.ROOT / ".jax_cache")
        args.log = Log(args.run) if args.run else None
        args.out = args.out or native.FOLDER
        args.name = args.name or f"{args.suite}{'_wrist' * args.wrist}_{args.part}"
        pretrain_vae(args) if args.part == "vae" else pretrain_tower(args)


def pretrain_vae(args: argparse.Namespace) -> None:
    """Trains the VAE, measures its latent statistics and its reconstruction of unseen windows, saves it."""
    import jax
    import jax.numpy as jnp

    from wovr_jax.core.disk import read_json, write_json
    from wovr_jax.core.keys import key
    from wovr_jax.sim.tabletop.scenes import draw_windows
    from wovr_jax.train import loop
    from wovr_jax.weights import native
    from wovr_jax.world.vae import train as vae_train
    from wovr_jax.world.vae.net import VAEConfig

    sim, cfg = simulator(args.suite), VAEConfig.tabletop()
    sim = dataclasses.replace(sim, wrist=True) if args.wrist else sim
    training = change(vae_train.VAETraining(), args)
    state, step = vae_train.make(cfg, training, lambda key, batch: draw_windows(key, batch, sim))
    if args.start:
        # A copy, for the step gives its state's memory away.
        state = dataclasses.replace(state, params=jax.tree.map(jnp.array, native.load_asset(args.start)[1]))
    state = loop.fit("vae", state, step, training.steps, log=args.log, folder=args.run)
    params = state.params

    draw = jax.jit(draw_windows, static_argnums=(1, 2))
    # Seed 1 draws other scenes than the training, whose seed is 0 unless the command line says otherwise.
    # Of the camera above alone: scaled by a second one too, which moves and sees more change, its latents would be
    # small, and the noise that a world model leaves in them the larger for it.
    seen = (draw(key(1, "statistics", i), 64, sim)[:: 1 + args.wrist] for i in range(16))
    cfg = vae_train.with_latent_statistics(cfg, params, seen)
    unseen = [draw(key(1, "held out", i), 64, sim) for i in range(8)]
    # Of every scene that is drawn there are as many windows as there are cameras.
    scores, frames = vae_train.scores(cfg, params, unseen), len(unseen[0]) // 64 * unseen[0].shape[1]
    path = native.save_asset(args.name, cfg, params, training=training, scores=scores, frames=frames, folder=args.out)
    if args.start:
        # What it began with has been paid for as well.
        card, before = read_json(path), native.describe(native.FOLDER / f"{args.start}.json")["seen"]
        seen = {name: count + before[name] for name, count in card["seen"].items()}
        write_json(path, card | {"began_with": args.start, "seen": seen})
    print(f"{path}: {scores}")


def pretrain_tower(args: argparse.Namespace) -> None:
    """Trains one vision tower on parsing scenes, measures it on unseen ones, saves it."""
    import jax

    from wovr_jax.core.keys import key
    from wovr_jax.policy import towers_train
    from wovr_jax.policy.backbones import TowerConfig
    from wovr_jax.sim.relay import scenes as relay
    from wovr_jax.sim.tabletop import scenes as tabletop
    from wovr_jax.train import loop
    from wovr_jax.weights import native

    sim, cfg = simulator(args.suite), getattr(TowerConfig, f"tabletop_{args.part}")()
    training, draw_scenes = getattr(towers_train.TowerTraining, args.part)(), tabletop.draw_scenes
    if args.suite == "relay":
        # More things to find: a lid and a button.
        training = dataclasses.replace(training, objects=relay.OBJECTS, attributes=relay.ATTRIBUTES)
        draw_scenes = relay.draw_scenes
    training = change(training, args)

    def scenes(key: jax.Array, batch: int) -> towers_train.Scenes:
        return towers_train.Scenes(**draw_scenes(key, batch, sim))

    state, step = towers_train.make(cfg, training, scenes, key(training.seed, args.part))
    state = loop.fit(args.part, state, step, training.steps, log=args.log, folder=args.run)
    unseen = [jax.jit(scenes, static_argnums=1)(key(1, "held out", i), 256) for i in range(4)]
    scores = towers_train.scores(cfg, training, state.params, unseen)
    # The heads were only there to train it.
    tower = state.params["tower"]
    path = native.save_asset(args.name, cfg, tower, training=training, scores=scores, frames=1, folder=args.out)
    print(f"{path}: {scores}")


def simulator(suite: str) -> Any:
    """The settings of a suite's simulator."""
    from wovr_jax.sim.relay.table import RelayConfig
    from wovr_jax.sim.tabletop.table import TabletopConfig

    return {"tabletop": TabletopConfig, "relay": RelayConfig}[suite]()


def change(training: Any, args: argparse.Namespace) -> Any:
    """The settings of a training with what the command line changes."""
    from wovr_jax.core import config

    options = {name: getattr(args, name) for name in ("steps", "batch", "lr", "kl", "seed")}
    # Through a dictionary, so that a value out of range is refused in the settings' own words.
    changes = {name: value for name, value in options.items() if value is not None}
    return config.from_dict(type(training), config.to_dict(training) | changes, args.part)


if __name__ == "__main__":
    main()
