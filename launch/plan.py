"""Does it fit, and how long would it take? The programs of a run, compiled for devices that need not be there.

    python launch/plan.py --config=configs/pace.py:libero_spatial --topology=v5p:2x2x4 --config.mesh.fsdp=16
    python launch/plan.py --config=configs/pace.py:libero_spatial,lora --topology=h200 --phases=update
    python launch/plan.py --config=configs/pace.py:libero_spatial --topology=v5e   on its smallest slice, found here
    python launch/plan.py --config=configs/pace.py --measure=5              on the devices that are here

It needs libtpu, which comes with "jax[tpu]" and compiles without a TPU; a program of the full-size networks takes it
minutes. The phases are world (a step of the world model's training), imagine (the rollouts of one iteration of RL) and
update (the policy's update on them). With one that does not fit comes what may be changed. Memory is what the compiler
says; hours are computed from the operations of a phase at --efficiency of the devices' peak, and leave out the
true simulator, data, and everything that is no matrix product.
"""

from __future__ import annotations

import os
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from absl import app, flags

from launch import train as door

_TOPOLOGY = flags.DEFINE_string("topology", "here", "v5e:4x4, v5p:2x2x4, h200, h100:8; v5e: its smallest slice; here.")
_PHASES = flags.DEFINE_list("phases", None, "Some of world, imagine, update; default all.")
_EFFICIENCY = flags.DEFINE_float("efficiency", 0.4, "Share of the peak that the hours are computed with.")
_MEASURE = flags.DEFINE_integer("measure", 0, "Also run each phase so often on what is here.", lower_bound=0)
GIB = 2**30

ADVICE = {
    "world": "a larger mesh.fsdp, a smaller world_train.batch, or adapters (configs/world_model.py:lora)",
    "imagine": "a larger mesh.fsdp, fewer dream.groups, or a smaller world.vae_rows",
    "update": "a larger mesh.fsdp, a smaller learner.microbatch, or adapters (the preset lora)",
}
"""What makes a phase smaller."""


def main(argv: Sequence[str]) -> None:
    """Compiles phase after phase and prints a paragraph for each."""
    settings, _ = door.asked(argv)
    if _TOPOLOGY.value != "here":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # or libtpu looks for the machine that it would be on
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # its lock is for a chip, and here is none

    from wovr_jax.core import config
    from wovr_jax.plan import chips, measure
    from wovr_jax.plan.need import need, smallest
    from wovr_jax.plan.phases import PHASES
    from wovr_jax.run.recipe import Recipe

    names = _PHASES.value or list(PHASES)
    if unknown := set(names) - set(PHASES):
        door.refuse(f"--phases: expected some of {', '.join(PHASES)}, got {', '.join(sorted(unknown))}.")
    if _MEASURE.value and _TOPOLOGY.value != "here":
        door.refuse(f"--measure runs the programs, so it needs --topology=here, got {_TOPOLOGY.value}.")
    try:
        recipe = config.from_dict(Recipe, settings)
        fixed = None if _TOPOLOGY.value in chips.SLICES else chips.topology(_TOPOLOGY.value)
        if fixed:
            print(_head(fixed, recipe), flush=True)
        needs, runs = [], []
        for name in names:
            begin = time.perf_counter()
            if fixed:
                where, found = fixed, need(name, recipe, fixed)
            else:
                chosen, where, found = smallest(name, recipe, _TOPOLOGY.value)
                print(f"\n{_head(where, chosen)}")
            print(_paragraph(found, where, time.perf_counter() - begin), flush=True)
            needs.append(found)
            if _MEASURE.value:
                runs.append(measure.measured(name, recipe, where, _MEASURE.value))
                print(_against(found, where, runs[-1]), flush=True)
        if fixed and len(needs) > 1:
            print(_largest(needs, runs))
    except ValueError as error:
        if not type(error).__module__.startswith("wovr_jax."):
            raise
        door.refuse(str(error))


def _head(where, recipe) -> str:
    mesh = recipe.mesh
    memory = f"{where.chip.gib:g} GiB each" if where.chip.gib else "memory not known"
    stand_in = "" if where.exact else "\nTemporary memory is that of the TPU compiler: an estimate for these devices."
    return (
        f"{where.name}: {len(where.devices)} devices, {memory}; mesh data {mesh.data}, fsdp {mesh.fsdp}, "
        f"tensor {mesh.tensor}{stand_in}"
    )


def _paragraph(need, where, compiling: float) -> str:
    verdict = "" if not where.chip.gib else " fits" if need.fits(where) else " DOES NOT FIT"
    parts = [*need.held.items(), *((f"{name} (idle)", size) for name, size in need.beside.items())]
    held = ", ".join(f"{name} {_size(size)}" for name, size in [*parts, ("temporary", need.temporary)])
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(need.collectives.items())) or "none"
    lines = [
        f"\n{need.name}: {_size(need.peak)} a device{verdict}",
        f"  memory       {held}",
        f"  collectives  {kinds}",
        f"  work         {need.flops / 1e12:,.4g} Tflop{_hours(need, where)}; compiled in {compiling:.0f} s",
    ]
    if need.refused:
        lines.append(f"  compiler     {need.refused.splitlines()[0][:300]}")
    if "DOES" in verdict:
        lines.append(f"  try          {ADVICE[need.name]}")
    return "\n".join(lines)


def _hours(need, where) -> str:
    if not where.chip.tflops:
        return ""
    seconds = need.seconds(where, _EFFICIENCY.value)
    hours = seconds * need.times / 3600
    return f", {seconds:.3g} s at {_EFFICIENCY.value:.0%} of the peak, {need.times:,} times in a run: {hours:,.3g} h"


def _against(need, where, found) -> str:
    low, middle, high = (pick(found.seconds) for pick in (min, statistics.median, max))
    rate = need.flops / middle / 1e12
    share = rate / (len(where.devices) * where.chip.tflops) if where.chip.tflops else 0
    of_peak = f", {share:.0%} of the peak" if share else ""
    return (
        f"  measured     {_size(found.bytes)}, the plan says {_size(need.alone)}: {need.alone / found.bytes - 1:+.1%}\n"
        f"  {len(found.seconds)} runs       {middle:.3g} s each [{low:.3g}, {high:.3g}], {rate:.3g} Tflop/s{of_peak}"
    )


def _largest(needs, runs) -> str:
    """Where a run has its peak. Measured is each program alone, so that is what it is held against."""
    need = max(needs, key=lambda need: need.peak)
    line = f"\nlargest: {need.name}, {_size(need.peak)} a device"
    if runs:
        plan, found = max(need.alone for need in needs), max(run.bytes for run in runs)
        line += f"; the highest peak measured is {_size(found)}, planned {_size(plan)}: {plan / found - 1:+.1%}"
    return line


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


if __name__ == "__main__":
    app.run(main, flags_parser=door.parse)
