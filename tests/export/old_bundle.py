"""The texts of a bundle as the code before the present layout wrote it."""

from __future__ import annotations

MANIFEST = """
{
 "format": "wovr_jax robot bundle",
 "schema": 1,
 "policy": "mine, grpo-1",
 "parameters": 40032,
 "platforms": ["cpu", "cuda", "tpu"],
 "versions": {"python": "3.11.7", "jax": "0.10.2", "numpy": "2.4.6", "wovr_jax": "0.1.0"},
 "files": {
  "policy.stablehlo": {"bytes": %d, "sha256": "%s"},
  "weights.safetensors": {"bytes": %d, "sha256": "%s"},
  "dataset_statistics.json": {"bytes": %d, "sha256": "%s"},
  "recipe.json": {"bytes": %d, "sha256": "%s"}
 },
 "contract": {
  "frames": 8, "recorded": "collect-0", "platform": "cpu",
  "differences": {"greedy": {"action": 0.0, "logp": 0.0}, "sampled at temperature 1.6": {"action": 0.0, "logp": 0.0}}
 }
}
"""
RECIPE = """
{
 "image": {"height": 16, "width": 16, "dtype": "uint8", "size": 16, "kernel": "cubic", "jpeg": 0, "crop": 1.0},
 "prompt": {"kind": "table", "length": 26, "rows": {"open the top drawer": %s}},
 "sequence": "rlinf",
 "action": {
  "key": "tabletop", "chunk": 8, "dim": 7, "gripper": 6,
  "convention": "environment: six deltas, then the gripper, -1 open and +1 closed"
 },
 "trained_at_temperature": 1.6
}
"""
STATISTICS = """
{"tabletop": {"action": {
 "q01": [-0.9, -0.8, -0.6, -0.4, -0.2, -0.1, -1.0], "q99": [0.9, 0.8, 0.6, 0.4, 0.2, 0.1, 1.0],
 "mask": [true, true, true, true, true, true, false]
}}}
"""
