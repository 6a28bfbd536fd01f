"""For scripts of tests that may be one of several processes: imported, it finds the others.

PROCESS_OF_TEST holds "address count index" then, and the mesh is over the devices of all. This has to come before
anything is computed. Without it nothing happens.
"""

from __future__ import annotations

import os

import jax

if given := os.environ.get("PROCESS_OF_TEST"):
    address, count, index = given.split()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(count), int(index), initialization_timeout=120)
