"""Plays the laboratory with the embedded table in the place of a robot: shows tasks, drives policies, labels.

    python launch/tools/table_robot.py show recordings/tabletop/demonstrations --episodes 28
    python launch/tools/table_robot.py drive ws://127.0.0.1:8000 --wanted runs/robot-tabletop/wanted.json
    python launch/tools/table_robot.py measure runs/robot-tabletop/policies/base runs/robot-tabletop/policies/grpo-2

``show`` writes demonstrations, as a person would give them. ``drive`` is the robot's own program: it asks the policy
server for actions, moves, and has the server record (launch/serve.py --record), until the run has what its
``wanted.json`` says; then somebody who sees the table labels each episode, ``--wrong`` of them wrongly. Evaluations
begin in the same placements for every policy, collections in new ones. ``measure`` rolls policies out in placements of
its own, which no recording has: how good they truly are. Sizes are those of configs/robot.py:tabletop
unless --size and --horizon say otherwise; with --senses the table has a camera in the hand and tells its state too.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import operator
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

from launch import command, flags

if TYPE_CHECKING:
    import numpy as np

    from notebooks.robot_client import Client
    from wovr_jax.sim.tabletop.table import TabletopConfig
    from wovr_jax.types import Episode

LAYOUTS = {"demonstrations": 0, "collect": 1_000_000, "evaluate": 9_000_000, "measure": 9_500_000}
"""First placement of each purpose; each collection has a hundred thousand of its own."""
BATCH = 64
TOLD_FROM, TOLD_BY = (1.0, 1.0, 0.0), (0.4, 0.4, 1.0)
"""From the state that the table's own strip shows to that of ``sense``."""


def main() -> None:
    """Shows, drives or measures."""
    args = parse()
    with command.explain_errors("Stopped. Episodes that ended are kept.", place=getattr(args, "url", None)):
        {"show": show, "drive": drive, "measure": measure}[args.act](args)


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = command.Parser(__doc__)
    acts = parser.add_subparsers(dest="act", required=True)
    parsers = {name: acts.add_parser(name, doc=__doc__) for name in ("show", "drive", "measure")}
    parsers["show"].add_argument("folder", type=pathlib.Path, help="gets the demonstrations")
    parsers["drive"].add_argument("url", help="of the policy server")
    parsers["drive"].add_argument("--wanted", type=pathlib.Path, required=True, help="wanted.json of the run")
    parsers["drive"].add_argument("--wrong", type=float, default=0.0, help="share of wrong labels (default 0)")
    parsers["measure"].add_argument(
        "bundles", type=pathlib.Path, nargs="+", help="exported policies, the first one first"
    )
    parsers["measure"].add_argument("--temperature", type=float, default=0.0, help="of its sampling (default 0)")
    for name, episodes in (("show", 28), ("measure", 256)):
        words = f"how many (default {episodes})"
        parsers[name].add_argument("--episodes", type=flags.positive, default=episodes, help=words)
    for one in parsers.values():
        one.add_argument("--size", type=flags.positive, default=32, help="pixels of a frame (default 32)")
        one.add_argument("--horizon", type=flags.positive, default=24, help="steps of an episode (default 24)")
        words = "a second camera and the state, for configs/robot.py:tabletop,senses"
        one.add_argument("--senses", action="store_true", help=words)
        one.add_argument("--seed", type=int, default=0, help="of placements and of wrong labels (default 0)")
    return parser.parse_args()


def table(args: argparse.Namespace) -> TabletopConfig:
    """Returns the table that plays the robot."""
    from wovr_jax.sim.tabletop.table import TabletopConfig

    return TabletopConfig(size=args.size, horizon=args.horizon, wrist=args.senses)


def sense(state: Any) -> Any:
    """Returns the robot's state as a robot tells it: x and y in metres of a table of 0.8 m, fingers from -1 to 1."""
    import jax.numpy as jnp

    from wovr_jax.sim.tabletop import table as tabletop

    return (tabletop.sense(state) + jnp.asarray(TOLD_FROM)) * jnp.asarray(TOLD_BY)


def show(args: argparse.Namespace) -> None:
    """Writes demonstrations, none of them flawed."""
    import jax
    import numpy as np

    from wovr_jax.data import episodes as disk
    from wovr_jax.sim import embedded
    from wovr_jax.sim.tabletop.expert import ExpertConfig

    seeds = LAYOUTS["demonstrations"] + args.seed + np.arange(args.episodes)
    shown = embedded.play_demonstrations(seeds, jax.random.key(args.seed), ExpertConfig(flawed_share=0.0), table(args))
    recorded = (take_apart(episode, args) for episode in shown) if args.senses else shown
    facts = disk.write(args.folder, recorded, meta={"robot": "the embedded table"})
    print(f"{args.folder}: {facts['episodes']} demonstrations, {facts['successes']} of them succeed")


def take_apart(episode: Episode, args: argparse.Namespace) -> Episode:
    """Returns an episode as a robot records it: each camera by itself, and the state beside them."""
    import jax
    import numpy as np

    from wovr_jax.sim import embedded

    first = embedded.reset_batch(np.array([episode.seed]), table(args))
    later = embedded.roll(jax.tree.map(operator.itemgetter(0), first), episode.action_SA, table(args))
    states = jax.tree.map(lambda a, b: np.concatenate([a, b]), first, later)
    pictures = {
        "frame_SHWC": episode.frame_SHWC[:, :, : args.size],
        "wrist_SHWC": episode.frame_SHWC[:, :, args.size :],
    }
    return dataclasses.replace(episode, **pictures, state_SD=np.asarray(jax.vmap(sense)(states), np.float32))


def drive(args: argparse.Namespace) -> None:
    """Moves as the policy server says and has it recorded, until the run has what it wants; then labels."""
    from notebooks.robot_client import Client

    wanted = json.loads(args.wanted.read_text(encoding="utf-8"))
    kind, _, number = wanted["stage"].partition("-")
    # The same placements for every policy that is measured, new ones for each collection.
    first = LAYOUTS[kind] + args.seed + (0 if kind == "evaluate" else 100_000 * int(number))
    ended: list[tuple[str, int | None]] = []
    with Client(args.url) as client:
        for layout, state in placements(args, first, [(task["there"], task["wanted"]) for task in wanted["tasks"]]):
            name, success = play(client, args, layout, state)
            if not name:
                continue  # the client has said why it was lost; the run will ask for it again
            ended.append((name, success))
            how = "failure" if success is None else "success"
            print(f"episode {len(ended)} of {wanted['missing']}: {how}", flush=True)
    label(pathlib.Path(wanted["folder"]), ended, args)


def placements(args: argparse.Namespace, first: int, counts: list[tuple[int, int]]) -> Iterator[tuple[int, Any]]:
    """Yields numbers and states of placements.

    Args:
      args: the table.
      first: number of the first placement that may come.
      counts: of each task, which of its placements come: from the first number up to the second.
    """
    import jax
    import numpy as np

    from wovr_jax.sim import embedded
    from wovr_jax.sim.tabletop import table as tabletop

    reset = jax.jit(lambda seed_B: embedded.reset_batch(seed_B, table(args)))
    met = [0] * len(counts)
    while any(seen < high for seen, (_, high) in zip(met, counts, strict=True)):
        layout_B = np.arange(first, first + BATCH, dtype=np.int32)
        states = reset(layout_B)
        for row, task in enumerate(np.asarray(tabletop.task_of(states)).tolist()):
            if counts[task][0] <= met[task] < counts[task][1]:
                yield int(layout_B[row]), jax.tree.map(operator.itemgetter(row), states)
            met[task] += 1
        first += BATCH


def play(client: Client, args: argparse.Namespace, layout: int, state: Any) -> tuple[str, int | None]:
    """Plays and records an episode; returns the recording's name and the first frame of its success, or None.

    The name is empty where the episode could not be kept.
    """
    import numpy as np

    from wovr_jax.sim.tabletop import table as tabletop

    move, look = moves(table(args))
    prompt, first, done = tabletop.INSTRUCTIONS[int(tabletop.task_of(state))], None, 0
    frame, more, _ = look(state)
    client.start(frame, prompt, layout=layout, by="the embedded table", **more)
    while done < args.horizon:
        # Draws of an episode depend on its placement alone, however often the server is started.
        actions = client.act(frame, prompt, seed=(layout * 1000 + done) % 2**32, **more)
        for action in actions[: args.horizon - done]:
            state = move(state, np.asarray(action))
            frame, more, success = look(state)
            done += 1
            client.step(frame, action, **more)
            first = done if first is None and success else first
    written = client.end("failure" if first is None else "success") == "written"
    return client.recorded["name"] if written else "", first


@functools.cache
def moves(cfg: TabletopConfig) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns ``move(state, action)`` and ``look(state) -> (uint8 frame, other senses by their names, success)``."""
    import jax
    import numpy as np

    from wovr_jax.core.pixels import to_uint8
    from wovr_jax.sim.tabletop import table as tabletop

    step = jax.jit(lambda state, action_A: tabletop.step(state, action_A, cfg))
    see = jax.jit(lambda state: (tabletop.render(state, cfg), sense(state), tabletop.success(state, cfg)))

    def look(state: Any) -> tuple[np.ndarray, dict[str, np.ndarray], bool]:
        mosaic_HWC, told_D, success = see(state)
        frame_HWC, wrist_HWC = np.split(to_uint8(mosaic_HWC), [cfg.size], axis=1)
        more = {"wrist_image": wrist_HWC, "state": np.asarray(told_D)} if cfg.wrist else {}
        return frame_HWC, more, bool(success)

    return step, look


def label(folder: pathlib.Path, ended: Sequence[tuple[str, int | None]], args: argparse.Namespace) -> None:
    """Adds what somebody who saw the episodes says of each, some of it wrong, to the labels that are there."""
    import numpy as np

    from wovr_jax.core.disk import read_json, write_json
    from wovr_jax.data.recordings import FORMAT, LABELS, SCHEMA

    path = folder / LABELS
    table = read_json(path) if path.exists() else {"format": FORMAT, "schema": SCHEMA, "labels": []}
    rng = np.random.default_rng([args.seed, len(table["labels"]), *folder.name.encode()])
    wrong = set(rng.permutation(len(ended))[: round(args.wrong * len(ended))].tolist())
    for row, (name, first) in enumerate(ended):
        won = (first is not None) != (row in wrong)
        entry = {"recording": name, "episode": 0, "outcome": "success" if won else "failure"}
        # Whoever takes a failure for a success knows no frame of it.
        entry |= {"first_success": first if won else None, "lies_from": None, "by": "table_robot"}
        entry |= {"at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        table["labels"].append(entry)
    write_json(path, table)
    print(f"{path}: {len(ended)} labels, {len(wrong)} of them wrong on purpose")


def measure(args: argparse.Namespace) -> None:
    """Prints the true success of exported policies, in the same placements, in which no run begins."""
    from wovr_jax.core import stats
    from wovr_jax.core.tables import text_table
    from wovr_jax.evaluate import summarize_outcomes
    from wovr_jax.report.tables import format_points, format_rate

    rows, first = [("policy", "success", "95 %", "gain", "95 %")], None
    for bundle in args.bundles:
        won_B = roll_out(bundle, args)
        first = won_B if first is None else first
        rate, gain = summarize_outcomes(won_B), stats.gain(won_B.tolist(), first.tolist())
        interval = f"{rate['low']:.1%} - {rate['high']:.1%}"
        points = [format_points(gain[end]) for end in ("gain", "low", "high")]
        rows.append((str(bundle), format_rate(rate["rate"]), interval, points[0], f"{points[1]} to {points[2]}"))
    print(text_table(rows))


def roll_out(bundle: pathlib.Path, args: argparse.Namespace) -> np.ndarray:
    """Returns (B,) bool, whether an exported policy succeeds from each placement."""
    import jax
    import numpy as np

    from wovr_jax.core.pixels import to_uint8
    from wovr_jax.data.senses import read_senses
    from wovr_jax.export.robot import Robot
    from wovr_jax.sim import embedded
    from wovr_jax.sim.tabletop import table as tabletop

    robot, cfg = Robot.load(bundle), table(args)
    senses = read_senses(robot.recipe)
    layout_B = LAYOUTS["measure"] + args.seed + np.arange(args.episodes, dtype=np.int32)
    state = embedded.reset_batch(layout_B, cfg)
    texts = [tabletop.INSTRUCTIONS[task] for task in np.asarray(tabletop.task_of(state)).tolist()]
    roll = jax.jit(jax.vmap(lambda state, action_TA: embedded.roll(state, action_TA, cfg)))
    see = jax.jit(jax.vmap(lambda state: (tabletop.render(state, cfg), sense(state))))
    succeed = jax.jit(jax.vmap(jax.vmap(lambda state: tabletop.success(state, cfg))))
    won_B, chunk = np.zeros(args.episodes, bool), robot.chunk_shape[0]
    for done in range(0, args.horizon, chunk):
        seed_B = (layout_B.astype(np.int64) * 1000 + done) % 2**32
        frame_BHWC, told_BD = see(state)
        views = np.split(to_uint8(frame_BHWC), [args.size], axis=2)
        seen_BHWC = senses.compose(*views, np.asarray(told_BD)) if args.senses else views[0]
        answer = robot.act(seen_BHWC, texts, seeds=seed_B, temperature=args.temperature)
        states_BT = roll(state, answer.action_BTA[:, : args.horizon - done])
        won_B |= np.asarray(succeed(states_BT)).any(axis=1)
        state = jax.tree.map(lambda leaf: leaf[:, -1], states_BT)
    return won_B


if __name__ == "__main__":
    main()
