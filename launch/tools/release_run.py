"""Makes parts of the package of what a finished run learned: two policies, the newest world model and its classifier.

    python launch/tools/release_run.py runs/pace-seed20 --out wovr_jax/assets

They are written in float16, with what they reach beside them. configs/pace.py:pretrained begins with them, and so does
launch/play.py without a run folder. A policy's tokens mean actions by the statistics of its demonstrations, so that
preset has the run's seed.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys

# Python puts this file's folder first on the path; the packages lie two above it.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

from launch import command


def main() -> None:
    """Reads the networks of the run and writes them as ``<suite>_base``, ``_policy``, ``_world`` and ``_reward``."""
    parser = command.Parser(__doc__)
    parser.add_argument("run", type=pathlib.Path, help="a finished run folder of an embedded suite")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="FOLDER", help="where the parts are written")
    args = parser.parse_args()
    with command.explain_errors("Stopped.", place=args.out):
        # Only now: importing jax takes seconds, a misspelt flag none.
        from wovr_jax.core.disk import read_json
        from wovr_jax.play.source import open_run
        from wovr_jax.weights.native import save_asset

        last = open_run(args.run)
        recipe, judge, stages = last.recipe, last.judge, args.run / "stages"
        if last.sim is None or judge is None or not (stages / f"evaluate-{recipe.rounds}" / "done.json").exists():
            command.refuse(f"{args.run}: expected a run of an embedded suite with all its rounds measured.")

        def reach(round_: int) -> dict[str, object]:
            facts = read_json(stages / f"evaluate-{round_}" / "done.json")
            episodes = [read_json(path)["episodes"] for path in sorted(stages.glob("collect-*/done.json"))[:round_]]
            rates = {name: facts[name]["rate"] for name in ("true_success", "greedy")}
            return rates | {"layouts": facts["greedy"]["n"], "true_episodes": sum(episodes), "seed": recipe.seed}

        refreshes = last.world_round
        world = dataclasses.replace(
            recipe.world_train, steps=recipe.world_train.steps + refreshes * recipe.refresh.steps
        )
        reward = dataclasses.replace(recipe.reward_train, steps=(refreshes + 1) * recipe.reward_train.steps)
        window = last.world_cfg.slots + last.world_cfg.chunk
        # The policies saw the same true frames: those of the demonstrations. What came after was imagined.
        parts = {
            "base": (recipe.policy, open_run(args.run, round_=0).policy, recipe.sft, reach(0), 1),
            "policy": (recipe.policy, last.policy, recipe.sft, reach(recipe.rounds), 1),
            "world": (recipe.world, last.world["dit"], world, reach(recipe.rounds), window),
            "reward": (recipe.reward, judge.params, reward, reach(recipe.rounds) | {"threshold": judge.threshold}, 1),
        }
        for name, (cfg, params, training, scores, frames) in parts.items():
            name = f"{last.suite}_{name}"
            print(save_asset(name, cfg, params, training=training, scores=scores, frames=frames, folder=args.out))


if __name__ == "__main__":
    main()
