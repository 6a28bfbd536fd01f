"""Run by test_processes.py as each of two processes that JAX_* name: how processes agree, and how they fail.

python tests/core/process_cases.py agree        prints what each came to, a line of JSON
python tests/core/process_cases.py fail         process 0 refuses something while the other waits for it
python tests/core/process_cases.py late         process 0 takes longer than the other may wait
python tests/core/process_cases.py history FOLDER    both save one state, which is cut over the devices of both
"""

from __future__ import annotations

import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from wovr_jax.core import checkpoint, processes, sharding
from wovr_jax.core.history import CheckpointConfig, History

STEPS, AHEAD = 12, 2


def agree() -> None:
    """A loop whose steps need both processes; one of them is asked to stop, later the other one is, too late."""
    told = processes.once(lambda: {"by": processes.index()}, "tell")
    stops = []
    for asked in ({1: 4}, {0: 6, 1: 5}, {1: STEPS - 1}):
        agreed = processes.Agreement(AHEAD)
        for step in range(1, STEPS + 1):
            if step > AHEAD:
                processes.meet(f"take step {step - AHEAD}")  # as the oldest step in flight is waited for
            wishes = {"SIGTERM"} if step >= asked.get(processes.index(), STEPS) else set()
            if due := agreed.last(wishes) if step == STEPS else agreed(step, wishes):
                stops.append([step, *due])
                break
            time.sleep(0.01 * processes.index())
    print(json.dumps([told, stops]))


def fail() -> None:
    """Only process 0 sees the fault."""
    if processes.first():
        time.sleep(1)
        raise ValueError("the folder is of another run")
    processes.meet("never")


def late() -> None:
    processes.WAIT_S = 1
    processes.once(lambda: time.sleep(3), "fetch the milk")


def history(folder: str) -> None:
    """Saves three states, damages the newest, goes on from the one before it, and saves that step again."""
    with sharding.use(sharding.MeshConfig(fsdp=4)) as mesh:
        assert mesh is not None
        at = NamedSharding(mesh, PartitionSpec("fsdp"))
        like = {"kernel": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=at)}
        fill = jax.jit(lambda number: {"kernel": jnp.full(4, number)}, out_shardings={"kernel": at})
        kept = History(folder, CheckpointConfig())
        for step in (1, 2, 3):
            kept.save(step, fill(float(step)), {"step": step})
        kept.wait()
        saved = kept.steps()
        if processes.first():
            file = next(pathlib.Path(folder).glob(f"00000003/{checkpoint.ITEM}/ocdbt.process_1/d/*"))
            file.write_bytes(file.read_bytes()[::-1])
        processes.meet("damage a file")
        result = kept.restore(like)
        assert result is not None
        state, facts = result
        kept.save(3, state, {"step": 3})
        kept.wait()
        whole = multihost_utils.process_allgather(state["kernel"], tiled=True).tolist()
        print(json.dumps({"saved": saved, "step": facts["step"], "kernel": whole, "then": kept.steps()}))


if __name__ == "__main__":
    with processes.join():
        case, *words = sys.argv[1:]
        {"agree": agree, "fail": fail, "late": late, "history": history}[case](*words)
