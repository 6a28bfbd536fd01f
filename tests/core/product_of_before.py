"""Run by test_history.py with four devices: a product that an earlier version wrote from two is cut over four.

python tests/core/product_of_before.py FOLDER        prints the shape on one device and the sum of what lies on all
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from wovr_jax.core import checkpoint, sharding

if __name__ == "__main__":
    with sharding.use(sharding.MeshConfig(fsdp=4)) as mesh:
        assert mesh is not None
        at = NamedSharding(mesh, PartitionSpec("fsdp"))
        like = {
            "kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=at),
            "bias": jax.ShapeDtypeStruct((4,), jnp.bfloat16, sharding=at),
        }
        kernel = checkpoint.restore(sys.argv[1], like)["kernel"]
        print(kernel.sharding.shard_shape(kernel.shape), float(kernel.sum()))
