"""Draws what a finished run of the embedded table changed, and what it did not: before, imagined, true.

    python launch/tools/before_and_after.py runs/pace --out docs/before_and_after.png

Two layouts of the evaluation in which the base policy fails: one in which the last policy succeeds, in imagination and
in truth, and one in which it succeeds in imagination only. Of all such layouts those are drawn whose difference is the
easiest to see: the true ends of the two policies, or what was imagined and what was true. Three rows of frames each,
every second step: the base in the true simulator; the last policy in the last world model, where it sees imagined
frames only; and the truth under the actions that it chose there.
"""

from __future__ import annotations

import pathlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wovr_jax.types import Imagined, Start

# Python puts this file's folder first on the path; the packages lie two above it.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

from launch import command

AMONG = 64
"""Layouts that are looked through."""
KINDS = {"mended": (True, True), "paid in vain": (True, False)}
"""Success of the last policy in imagination, and in truth."""
SCALE, GAP = 3, 2


def main() -> None:
    """Loads the run, plays, writes the picture, and prints what came of each layout."""
    parser = command.Parser(__doc__)
    parser.add_argument("run", type=pathlib.Path, help="a finished run folder of configs/pace.py")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the PNG to write")
    args = parser.parse_args()
    with command.explain_errors("Stopped.", place=args.out):
        # Only now: importing jax takes seconds, a misspelt flag none.
        import jax
        import jax.numpy as jnp
        import numpy as np

        from wovr_jax import pace
        from wovr_jax.core import config, pixels
        from wovr_jax.core.disk import read_json
        from wovr_jax.imagine import imagine, predicate
        from wovr_jax.policy import vla
        from wovr_jax.reward import classifier
        from wovr_jax.run.bind import open_environment
        from wovr_jax.run.folder import Run
        from wovr_jax.run.reader import read_recipe
        from wovr_jax.run.stages.policy import fit_codec
        from wovr_jax.sim import embedded
        from wovr_jax.sim.arena import layouts
        from wovr_jax.world import model

        recipe = read_recipe(read_json(args.run / "config.json"))
        # Opened for more than it has, a run would begin to train.
        last = args.run / "stages" / f"grpo-{recipe.rounds}" / "done.json"
        if recipe.outside or recipe.relay or not last.exists():
            command.refuse(f"{args.run}: expected a run on the embedded table with all its rounds finished.")
        run = Run(args.run, config.to_dict(recipe))
        made = pace.pace(recipe, run, pace.Job(f"grpo-{recipe.rounds}", measured=()))
        assert made.vae is not None
        environment, codec = open_environment(recipe), fit_codec("tabletop", made.demonstrations)
        cfg, judge, key = made.vae.value[0], made.rewards[-1].value, jax.random.key(recipe.seed)
        seeds, chunks = layouts(recipe.seed, "evaluate", AMONG), recipe.dream.chunks
        truth = embedded.world(recipe.embedded)
        start = embedded.make_starts(jnp.asarray(seeds), environment.prompt_KL, recipe.embedded, cfg.slots)

        def play(policy, world, score, start):
            act = vla.policy(recipe.policy, policy, codec, recipe.temperature)
            return imagine(act, world, score, start, key, chunks=chunks, video=True)

        base = jax.jit(lambda policy: play(policy, truth, predicate, start))(made.policies[0].value)
        after = jax.jit(
            lambda policy, world, reward: play(
                policy, model.world(cfg, world), classifier.score(recipe.reward, reward), start
            )
        )(made.policies[-1].value, made.worlds[-1].value, judge.params)
        followed = jax.jit(
            lambda action_BNTA: imagine(action_BNTA, truth, predicate, start, key, chunks=chunks, video=True)
        )(after.action_BNTA)

        rows = choose(args.run, seeds, start, judge.threshold, base, after, followed)
        picture = np.concatenate(rows)
        pixels.image(args.out, picture.repeat(SCALE, axis=0).repeat(SCALE, axis=1))
        run.close()


def choose(
    run: pathlib.Path, seeds: Any, start: Start, threshold: float, base: Imagined, after: Imagined, followed: Imagined
) -> list[Any]:
    """Returns rows of frames: a layout of each of ``KINDS``, before, imagined and true."""
    import numpy as np

    from wovr_jax.core import pixels

    failed_B = ~np.asarray(base.success_BNT).any((1, 2))
    believed_B = (np.asarray(after.prob_BNT) > threshold).any((1, 2))
    true_B = np.asarray(followed.success_BNT).any((1, 2))
    rows, end_B = [], [np.asarray(film.video_BNTHWC)[:, -1, -1] for film in (base, after, followed)]
    for kind, (believed, true) in KINDS.items():
        found = np.flatnonzero(failed_B & (believed_B == believed) & (true_B == true))
        # What the last frames differ in: between the policies where both are true, between the worlds where one is not.
        apart_B = np.square(end_B[2] - end_B[0 if true else 1]).mean(axis=(1, 2, 3))
        found = found[np.argsort(-apart_B[found], kind="stable")]
        if not found.size:
            command.refuse(f"{run}: of {AMONG} layouts none is {kind}.")
        print(f"{kind}: {found.size} of {failed_B.sum()} layouts in which the base fails; drawn: {seeds[found[0]]}")
        for film in (base, after, followed):
            steps = np.asarray(film.video_BNTHWC[found[0]]).reshape(-1, *film.video_BNTHWC.shape[3:])
            frames = pixels.to_uint8(np.concatenate([np.asarray(start.anchor_BHWC[found[0]])[None], steps])[::2])
            frames = np.pad(frames, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255)
            rows.append(np.concatenate(list(frames), axis=1))
        rows.append(np.full((GAP, *rows[-1].shape[1:]), 255, np.uint8))
    return rows[:-1]


if __name__ == "__main__":
    main()
