"""Replays recorded episodes in the world model of a run, and writes what it imagines, for a person to judge.

    python launch/tools/imagine.py runs/pace recordings --out imagined
    python launch/label.py imagined                                       key L marks from where a film lies

Each film begins with the first frame of a recording and follows its executed actions, in whole chunks, under the noise
of ``--seed``. It is an episode folder of the recording's name; its success is what the run's classifier says of the
imagined frames. Recordings that a label discards are left out.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import TYPE_CHECKING

# Python puts this file's folder first on the path; the packages lie two above it.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

from launch import command, flags

if TYPE_CHECKING:
    from wovr_jax.play.programs import Programs
    from wovr_jax.types import Episode


def main() -> None:
    """Opens the run, writes a film of each recording, and prints how many there are."""
    args = parse()
    with command.explain_errors("Stopped. Films that are written stay.", place=args.out):
        # Only now: importing jax takes seconds, a misspelt flag none.
        from wovr_jax.core import machine
        from wovr_jax.data import episodes as disk
        from wovr_jax.data.recordings import read_recordings
        from wovr_jax.play.programs import Programs
        from wovr_jax.play.source import open_run

        recordings = read_recordings(args.recordings)
        if not len(recordings):
            command.refuse(f"{args.recordings}: no recordings in it")
        programs = Programs(open_run(args.run, None, args.world))
        machine.enable_compile_cache(args.run.absolute().parent / ".jax_cache")
        wanted = list(programs.source.starts.anchor_KHWC.shape[1:])
        for place, episode in zip(recordings.places[: args.most], recordings, strict=False):
            if list(episode.frame_SHWC.shape[1:]) != wanted or len(episode.action_SA) < programs.chunk:
                command.refuse(
                    f"{place.folder}: expected frames of {wanted} and at least {programs.chunk} steps, got "
                    f"{list(episode.frame_SHWC.shape[1:])} and {len(episode.action_SA)}"
                )
            name = place.folder.name + (f"-{place.number:04d}" if place.number else "")
            disk.write(args.out / name, [imagine(programs, episode, place.folder.name, args.seed)])
            print(f"{args.out / name}", flush=True)


def imagine(programs: Programs, episode: Episode, name: str, seed: int) -> Episode:
    """Returns what the world model makes of an episode's first frame and actions."""
    import dataclasses

    import jax.numpy as jnp
    import numpy as np

    from wovr_jax.core.pixels import to_float, to_uint8
    from wovr_jax.types import NULL_ACTION
    from wovr_jax.world.model import WorldState

    source, chunk = programs.source, programs.chunk
    count = len(episode.action_SA) // chunk
    first_1HWC = jnp.asarray(to_float(episode.frame_SHWC[:1]))
    # As at the start of every rollout: nothing was played, so the memory is copies of the first frame.
    memory_1MHWC = jnp.repeat(first_1HWC[:, None], programs.memory, axis=1)
    state = WorldState(first_1HWC, memory_1MHWC, jnp.tile(jnp.float32(NULL_ACTION), (1, programs.memory, 1)))
    frames, won = [episode.frame_SHWC[:1]], [np.zeros(1, bool)]
    for n in range(count):
        action_TA = episode.action_SA[n * chunk : (n + 1) * chunk]
        state, frame_1THWC, prob_1T = programs.imagine(state, action_TA, jnp.asarray([episode.task]), seed, n)
        frames.append(to_uint8(frame_1THWC)[0])
        if source.judge is None or prob_1T is None:
            won.append(np.zeros(chunk, bool))
        else:
            won.append(np.asarray(prob_1T)[0] > source.judge.threshold)
    action_SA = episode.action_SA[: count * chunk]
    return dataclasses.replace(
        episode,
        frame_SHWC=np.concatenate(frames),
        action_SA=action_SA,
        label_SA=action_SA,
        success_S=np.concatenate(won),
        wrist_SHWC=None,
        state_SD=None,
        origin={"imagined": name, "run": source.name, "world": source.world_round, "noise": seed},
    )


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = command.Parser(__doc__)
    parser.add_argument("run", type=pathlib.Path, help="the run folder, which is only read")
    parser.add_argument("recordings", type=pathlib.Path, help="a folder of recordings, or an episode folder")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="gets a folder for each film")
    parser.add_argument("--world", type=int, metavar="K", help="round of the world model, from 0; default the newest")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--most", type=flags.positive, metavar="N", help="films; default one of each recording")
    args = parser.parse_args()
    if min(args.seed, args.world or 0) < 0:
        parser.error("--seed and --world are at least 0")
    return args


if __name__ == "__main__":
    main()
