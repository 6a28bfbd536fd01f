"""For scripts of tests that may be one of several processes: imported, it finds the others, as launch/train.py does.

This has to come before anything is computed. Without JAX_NUM_PROCESSES and its like nothing happens.
"""

from __future__ import annotations

import atexit
import contextlib

from wovr_jax.core import processes

_OPEN = contextlib.ExitStack()
_OPEN.enter_context(processes.join())
atexit.register(_OPEN.close)  # before JAX's own end, which was registered earlier
