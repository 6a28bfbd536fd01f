"""The scripted expert's own program, as a run calls it, with the fake LIBERO in the place of the real one.

FAKE_EXPERT in the environment lets it fail (``refuse``) or wait (``wait``) before it begins.
"""

from __future__ import annotations

import os
import pathlib
import sys
import time

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[3])


def main() -> None:
    """Puts the fake in its place and runs the program."""
    from launch.tools import demonstrate_libero
    from tests.sim.libero.fake_libero import TASKS, FakePool
    from wovr_jax.sim.libero import arena as libero
    from wovr_jax.sim.libero.setup import LiberoError

    class Expert(FakePool):
        """Says that it began, and goes on as it was told."""

        def __init__(self, workers, scene):
            super().__init__(workers, scene)
            print("expert", file=sys.stderr, flush=True)
            if os.environ.get("FAKE_EXPERT") == "refuse":
                raise LiberoError("the milk is sour.")
            if os.environ.get("FAKE_EXPERT") == "wait":
                time.sleep(900)

    libero.Pool, libero.tasks = Expert, lambda _: TASKS
    libero.setup.fingerprint = lambda renderer: {"renderer": renderer}
    demonstrate_libero.main()


if __name__ == "__main__":
    main()
