"""Draws a GIF: a policy acts on what it imagines, and the true simulator does the same beside it.

    python launch/play.py --measure 1        # makes runs/play, of the package's networks
    python launch/tools/moving_picture.py runs/play --out docs/imagined.gif

Three layouts of the evaluation, one after another: two in which imagination and truth both succeed, of different tasks,
and between them one in which imagination succeeds and truth does not, the one of them whose last frames differ most.
The policy takes its most likely actions.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from wovr_jax.play.session import Session

# Python puts this file's folder first on the path; the packages lie two above it.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

from launch import command

AMONG = 48
"""Layouts that are looked through."""
CHUNKS = 3
SCALE, GAP, HEAD, FOOT = 8, 12, 30, 30
FRAME_MS, HOLD_MS, COLOURS = 90, 1800, 255
PAPER, INK, TRUE, IMAGINED = (255, 255, 255), (60, 64, 72), (176, 106, 0), (32, 96, 200)


class Played(NamedTuple):
    """An episode in both worlds: its task, (S + 1, H, W, 3) uint8 frames, and whether success was seen up to each."""

    instruction: str
    true_SHWC: np.ndarray
    imagined_SHWC: np.ndarray
    true_S: np.ndarray
    believed_S: np.ndarray


def main() -> None:
    """Plays the layouts, chooses three, writes the picture, and prints what was drawn."""
    parser = command.Parser(__doc__)
    parser.add_argument("run", type=pathlib.Path, help="a run folder on the embedded table")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the GIF to write")
    args = parser.parse_args()
    with command.explain_errors("Stopped.", place=args.out):
        from wovr_jax.play.programs import Programs
        from wovr_jax.play.session import Session
        from wovr_jax.play.source import open_run
        from wovr_jax.sim.arena import layouts

        source = open_run(args.run)
        if source.suite != "tabletop" or source.judge is None:
            command.refuse(f"{args.run}: expected a run on the embedded table with its judge.")
        session, threshold = Session(Programs(source)), source.judge.threshold
        seeds = layouts(source.recipe.seed, "evaluate", AMONG).tolist()
        chosen = choose(args.run, [play(session, seed, threshold) for seed in seeds])
        draw(args.out, chosen)
        print(f"{args.out}: {'; '.join(one.instruction for one in chosen)}")


def play(session: Session, seed: int, threshold: float) -> Played:
    """Plays a layout to its end: the policy sees imagined frames only."""
    import numpy as np

    begun = session.begin(None, seed, 0)
    chunks = [session.act("imagined", 0.0) for _ in range(CHUNKS)]

    def join(first: object, parts: Sequence[object]) -> np.ndarray:
        return np.concatenate([np.asarray(first)[None], *map(np.asarray, parts)])

    believed = [np.asarray(chunk.prob_T) > threshold for chunk in chunks]
    return Played(
        begun.instruction,
        join(begun.true_HWC, [chunk.true_THWC for chunk in chunks]),
        join(begun.imagined_HWC, [chunk.imagined_THWC for chunk in chunks]),
        np.logical_or.accumulate(join(False, [chunk.truth_T for chunk in chunks])),
        np.logical_or.accumulate(join(False, believed)),
    )


def choose(run: pathlib.Path, played: Sequence[Played]) -> list[Played]:
    """Returns a success, a lie and a success of another task."""
    import numpy as np

    def differ(one: Played) -> float:
        return float(np.abs(one.true_SHWC[-1].astype(int) - one.imagined_SHWC[-1]).mean())

    won = [one for one in played if one.true_S[-1] and one.believed_S[-1]]
    lies = sorted((one for one in played if one.believed_S[-1] and not one.true_S[-1]), key=differ)
    another = [one for one in won if one.instruction != won[0].instruction]
    if not (lies and another):
        command.refuse(f"{run}: of {len(played)} layouts {len(won)} succeed in both worlds and {len(lies)} are lies.")
    print(f"{len(won)} of {len(played)} layouts succeed in both worlds, {len(lies)} in imagination only")
    return [won[0], lies[-1], another[0]]


def draw(out: pathlib.Path, chosen: Sequence[Played]) -> None:
    """Writes the episodes as one GIF that begins again."""
    import numpy as np
    from PIL import Image

    from wovr_jax.core.disk import replace_file

    pages, times = [], []
    for one in chosen:
        pages += [Image.fromarray(page) for page in draw_frames(one)]
        times += [FRAME_MS] * (len(one.true_S) - 1) + [HOLD_MS]
    # One palette, or colours would flicker; by the root of how many pixels have each, or a small block would lose its.
    shades, counts = np.unique(
        np.concatenate([np.asarray(page).reshape(-1, 3) for page in pages]), axis=0, return_counts=True
    )
    palette = Image.fromarray(shades.repeat(np.ceil(np.sqrt(counts)).astype(int), axis=0)[None]).quantize(COLOURS)
    pages = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    with replace_file(out) as fresh, fresh.open("wb") as file:
        pages[0].save(file, "GIF", save_all=True, append_images=pages[1:], duration=times, loop=0, optimize=True)


def draw_frames(one: Played) -> Iterator[np.ndarray]:
    """Yields an episode's pictures: the task above, both worlds beside each other, verdicts under them."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    side = one.true_SHWC.shape[1] * SCALE
    large, small = ImageFont.load_default(17), ImageFont.load_default(15)
    for step in range(len(one.true_S)):
        page = Image.new("RGB", (2 * side + GAP, HEAD + side + FOOT), PAPER)
        pen = ImageDraw.Draw(page)
        pen.text((0, 5), one.instruction, INK, large)
        worlds = (
            ("true", TRUE, one.true_SHWC, one.true_S),
            ("imagined", IMAGINED, one.imagined_SHWC, one.believed_S),
        )
        for column, (name, colour, frame_SHWC, done_S) in enumerate(worlds):
            left = column * (side + GAP)
            picture = Image.fromarray(frame_SHWC[step]).resize((side, side), Image.Resampling.NEAREST)
            page.paste(picture, (left, HEAD))
            last = step == len(done_S) - 1
            verdict = ": success" if done_S[step] else ": failure" if last else ""
            pen.text((left, HEAD + side + 7), name + verdict, colour, small)
        yield np.asarray(page)


if __name__ == "__main__":
    main()
