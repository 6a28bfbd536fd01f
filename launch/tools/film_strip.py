"""Draws one episode of the expert as a picture of twelve frames, for the documentation.

    python launch/tools/film_strip.py relay --out docs/relay.png
    python launch/tools/film_strip.py tabletop --out table.png --seed 3

They go from the first frame to that of the first success; the last one comes a chunk later.
"""

from __future__ import annotations

import pathlib
import sys

# Python puts this file's folder first on the path; the packages lie two above it.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

from launch import command

ROWS, FRAMES = 2, 12


def main() -> None:
    """Plays the episode, writes the picture, and prints what was asked and the steps that are shown."""
    parser = command.Parser(__doc__)
    parser.add_argument("suite", choices=("tabletop", "relay"))
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the PNG to write")
    parser.add_argument("--seed", type=int, default=0, help="of the layout; default %(default)s")
    args = parser.parse_args()
    with command.explain_errors("Stopped.", place=args.out):
        # Only now: importing jax takes seconds, a misspelt flag none.
        import jax
        import numpy as np

        from wovr_jax.core import pixels
        from wovr_jax.sim import embedded
        from wovr_jax.sim.tabletop.expert import ExpertConfig

        sim = next(cfg() for cfg, suite in embedded.SUITES.items() if suite.name == args.suite)
        expert = ExpertConfig(flaw="none")
        (episode,) = embedded.play_demonstrations([args.seed], jax.random.key(args.seed), expert, sim, batch=1)
        first = int(episode.success_S.argmax())
        steps = np.append(np.linspace(0, first, FRAMES - 1).round().astype(int), min(first + 8, sim.horizon))
        gap = ((0, 0), (1, 1), (1, 1), (0, 0))
        frame_KHWC = np.pad(episode.frame_SHWC[steps], gap, constant_values=255)
        # (rows * columns, H, W, C) -> (rows * H, columns * W, C)
        rows = [np.concatenate(list(row), axis=1) for row in np.split(frame_KHWC, ROWS)]
        pixels.image(args.out, np.concatenate(rows))
        print(f"{args.out}: {episode.instruction}; steps {', '.join(map(str, steps))}")


if __name__ == "__main__":
    main()
