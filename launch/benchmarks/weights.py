"""Time and memory of importing a transformer or a policy of full size, on a file made up for it.

    python launch/benchmark.py import --folder /tmp/import            10 GB in, out and back: 31 GB of disk
    python launch/benchmark.py import --folder /tmp/import --part policy   15 GB: 46 GB of disk
    python launch/benchmark.py import --folder /tmp/import --part policy --no-load   with less memory than the file
    python launch/benchmark.py import --folder /tmp/import --layers 2  a quick look

A bfloat16 file with the names and shapes of RLinf's or OpenVLA-OFT's release is written, imported, loaded into
memory and written back, each in a process of its own. Peak memory is printed as a share of the
file's size, and whether the file that comes back has every byte of the first. What was made is
deleted at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from launch.command import ROOT
from launch.flags import positive

if TYPE_CHECKING:
    from wovr_jax.bridge import formats
    from wovr_jax.policy.vla import VLAConfig
    from wovr_jax.world.dit import DiTConfig

LOADED = """
import sys
from wovr_jax.core.machine import peak_rss_gb
from wovr_jax.weights import native
cfg, params = native.load(sys.argv[1])
print(f"peak memory {peak_rss_gb():.2f} GiB")
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this measurement."""
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--part", choices=("dit", "policy"), default="dit")
    parser.add_argument(
        "--layers", type=positive, help="of the transformer or the language model; default: as released"
    )
    parser.add_argument("--no-load", action="store_true", help="leave out loading all of it into memory")


def run(args: argparse.Namespace) -> None:
    """Runs the four steps and prints a line for each."""
    args.folder.mkdir(parents=True)
    try:
        measure(args.folder, network_config(args.part, args.layers), load=not args.no_load)
    finally:
        shutil.rmtree(args.folder)  # tens of gigabytes, also after a failure


def network_config(part: str, layers: int | None) -> DiTConfig | VLAConfig:
    """Returns the released network's settings, with another number of layers if one is given."""
    from wovr_jax.policy.vla import VLAConfig
    from wovr_jax.world.dit import DiTConfig

    if part == "dit":
        return DiTConfig.ti2v_5b(**({} if layers is None else {"layers": layers}))
    cfg = VLAConfig.openvla_7b()
    return cfg if layers is None else dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, depth=layers))


def measure(folder: pathlib.Path, cfg: DiTConfig | VLAConfig, *, load: bool) -> None:
    """Makes a file in ``folder``, takes it in and out, and says what that took."""
    from wovr_jax.bridge import formats

    kind = next(kind for kind in formats.FORMATS if kind.part == formats.part_of(cfg))
    file = folder / "release" / kind.file
    file.parent.mkdir()
    # A policy is recognised by its config.json, the other parts by the names in the file.
    if kind.part == "policy":
        text = {"model_type": "llama", "num_attention_heads": 32}
        (file.parent / "config.json").write_text(
            json.dumps({"model_type": "openvla", "text_config": text}), encoding="utf-8"
        )
    began = time.perf_counter()
    write_random(file, cfg, kind)
    size = file.stat().st_size
    print(f"made      {size / 1e9:6.2f} GB in {time.perf_counter() - began:.0f} s")
    # Each step in a process of its own: the peak memory of a process never goes down.
    door = str(ROOT / "launch" / "import_weights.py")
    time_process("imported", size, door, str(file), "--out", str(folder / "ours"))
    card = str(folder / "ours" / f"{kind.part}.json")
    if load:
        time_process("loaded", size, "-c", LOADED, card)
    time_process("exported", size, door, card, "--to", kind.name, "--out", str(folder / "back"), "--shard-gb", "100")
    # Through our form and back every byte is the same, or a table is wrong.
    same = digest(file) == digest(folder / "back" / file.name)
    print(f"the file that came back {'has every byte' if same else 'DIFFERS'} of the first")
    if not same:
        sys.exit(1)


def write_random(path: pathlib.Path, cfg: DiTConfig | VLAConfig, kind: formats.Format) -> None:
    """Writes a file with the release's names and shapes and random weights."""
    import numpy as np

    from wovr_jax.bridge import formats
    from wovr_jax.weights import writer
    from wovr_jax.weights.plan import plan_export
    from wovr_jax.weights.safetensors import Fact

    dtype = np.dtype("bfloat16")
    ours = {name: Fact(shape, dtype) for name, shape in formats.shapes(cfg).items()}
    table = formats.table_of(cfg, kind)
    kept = {name: Fact(shape, dtype) for name, shape in table.kept.items()}
    facts = {**plan_export("made up", table, ours, kept).tensor, **kept}
    # One block of noise, shifted for each tensor: drawing 15 GB would take longer than what is measured.
    noise = (0.02 * np.random.default_rng(0).standard_normal(1 << 20, np.float32)).astype(dtype)

    def draw() -> Iterator[tuple[str, Any]]:
        for i, (name, fact) in enumerate(facts.items()):
            yield name, np.resize(np.roll(noise, 7919 * i), fact.shape)

    writer.write(path, facts, draw(), {"format": "pt"})


def time_process(what: str, size: int, *command: str) -> None:
    """Runs a process that prints its peak memory last, and compares that with ``size``."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True, text=True)
    # Printed in GiB, compared with bytes.
    peak = float(done.stdout.rsplit("peak memory", 1)[1].split()[0]) * 2**30
    seconds = time.perf_counter() - began
    print(
        f"{what:9s} {size / 1e9:6.2f} GB in {seconds:.0f} s, peak memory {peak / 1e9:.2f} GB: {peak / size:.2f} of it"
    )


def digest(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
