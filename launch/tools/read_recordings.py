"""Looks for recorded episodes on behalf of a run of a robot; people say what they recorded with launch/train.py.

    python launch/tools/read_recordings.py --for-run <what is wanted, as JSON>

A run calls this program where a stage wants episodes (``sim.recorded.arena``). If they are there, they are written as
the episode folders of the stage, and the exit status is 0. If not, the policy that is to be recorded is exported to
``<run>/policies``, what is missing is written to ``<run>/wanted.json`` and printed in words, and the status is 1.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

from launch import called, command

if TYPE_CHECKING:
    from wovr_jax.sim.recorded.gather import Policy

FRAMES = 16
"""Recorded frames on which a policy and its export are compared."""
WANTED, POLICIES = "wanted.json", "policies"


def main() -> None:
    """Looks, writes or says what is missing. What it prints are the run's words."""
    parser = command.Parser(__doc__)
    words = "what is wanted; a run gives it"
    parser.add_argument("--for-run", type=json.loads, required=True, metavar="JSON", help=words)
    asked = parser.parse_args().for_run
    with called.answer_run():
        if missing := look(asked):
            command.refuse(missing)


def look(asked: dict[str, Any]) -> str:
    """Writes what is wanted and returns nothing, or writes down what is missing and returns it in words."""
    from wovr_jax.core import config
    from wovr_jax.core.disk import write_json
    from wovr_jax.sim.recorded import gather
    from wovr_jax.sim.recorded.arena import RecordedConfig

    run, stage = pathlib.Path(asked["run"]), asked["stage"]
    cfg = config.from_dict(RecordedConfig, asked["cfg"], "recorded")
    parts = {pathlib.Path(folder): count for folder, count in asked["parts"].items()}
    policy = (
        export(run, int(stage.rpartition("-")[2]), asked["actor"], asked["temperature"]) if "actor" in asked else None
    )
    wanted = gather.Wanted(cfg, run, stage, parts, policy)
    found = gather.find(wanted)
    if len(found.places) < wanted.count:
        write_json(run / WANTED, gather.note(wanted, found))
        return gather.describe(wanted, found)
    gather.write(wanted, found)
    (run / WANTED).unlink(missing_ok=True)
    return ""


def export(run: pathlib.Path, round_: int, name: str, temperature: float) -> Policy:
    """Returns the policy of a round, exported if it is not yet."""
    from wovr_jax.core.disk import read_json, write_json
    from wovr_jax.export import bundle, source
    from wovr_jax.export.robot import MANIFEST, Robot
    from wovr_jax.sim.recorded.gather import Policy

    place = run / POLICIES / name
    note = place.with_name(f"{name}.json")
    # A stage that was made again, under other settings, made another policy.
    mark = (run / "stages" / (source.find_stage(run, round_)) / "done.json").read_bytes()
    made = hashlib.sha256(mark).hexdigest()
    known = read_json(note) if note.is_file() and (place / MANIFEST).is_file() else {}
    if known.get("made") != made:
        print(f"== the policy {name} is exported to {place}", file=sys.stderr, flush=True)
        bundle.write(source.from_run(run, round_), place, frames=FRAMES, overwrite=True)
        known = {"made": made, "weights": Robot.load(place).hash_weights()}
        write_json(note, known)
    return Policy(name, place, known["weights"], temperature)


if __name__ == "__main__":
    main()
