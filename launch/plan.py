"""Does it fit, and how long would it take? The programs of a run, compiled for devices that need not be there.

    python launch/plan.py --config=configs/pace.py:libero_spatial --topology=v5p:2x2x4 --config.mesh.fsdp=16
    python launch/plan.py --config=configs/pace.py:libero_spatial,one_h200 --topology=h200
    python launch/plan.py --config=configs/pace.py:libero_spatial --topology=v5e   on its smallest slice, found here
    python launch/plan.py --config=configs/pace.py --measure=5              on the devices that are here
    python launch/plan.py --config=configs/pace.py --json                   for a program: bytes and seconds

It needs libtpu, which comes with "jax[tpu]" and compiles without a TPU; a program of the full-size networks takes it
minutes. The phases are sft (a step of the base policy's imitation), world (a step of the world model's training),
imagine (the rollouts of one iteration of RL) and update (the policy's update on them). With one that does not fit comes
what may be changed. Memory is what the compiler says; hours are computed from the operations of a phase at --efficiency
of the devices' peak, and leave out the true simulator, data, and everything that is no matrix product.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from launch import command, terminal

if TYPE_CHECKING:
    from wovr_jax.plan.chips import Topology
    from wovr_jax.plan.measure import Measured
    from wovr_jax.plan.need import Need
    from wovr_jax.run.recipe import Recipe

GIB = 2**30

ADVICE = {
    "sft": "a larger mesh.fsdp, a smaller sft.batch, or adapters (configs/sft.py:lora_rlinf)",
    "world": "a larger mesh.fsdp, a smaller world_train.batch, or adapters (configs/world_model.py:lora)",
    "imagine": "a larger mesh.fsdp, fewer dream.groups, or a smaller world.vae_rows",
    "update": "a larger mesh.fsdp, a smaller learner.microbatch, or adapters (the preset lora)",
}
"""What makes a phase smaller."""


def main() -> None:
    """Compiles phase after phase and prints a paragraph for each."""
    parser = command.Parser(__doc__)
    command.add_config(parser, run=False)
    parser.add_argument("--topology", default="here", help="v5e:4x4, v5p:2x2x4, h200, h100:8; v5e: its smallest slice")
    parser.add_argument("--phases", help="some of sft,world,imagine,update; default: all but those of what is given")
    parser.add_argument("--efficiency", type=float, default=0.4, help="share of the peak for the hours (default 0.4)")
    parser.add_argument("--measure", type=int, default=0, metavar="N", help="run each phase N times on what is here")
    parser.add_argument("--json", action="store_true", help="for a program: nothing but JSON on stdout")
    request = command.read(parser)
    options = request.options
    if not 0 < options.efficiency <= 1:
        parser.error(f"--efficiency is a share above 0 and at most 1, got {options.efficiency}")
    if options.measure < 0:
        parser.error(f"--measure is at least 0, got {options.measure}")
    if options.measure and options.topology != "here":
        parser.error(f"--measure runs the programs, so it needs --topology=here, got {options.topology}")
    if options.topology != "here":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # or libtpu looks for the machine that it would be on
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # its lock is for a chip, and here is none
    with command.explain_errors("Stopped."):
        # Only now: importing jax takes seconds, a misspelt flag none.
        from wovr_jax.core import config
        from wovr_jax.plan.phases import PHASES, list_phases
        from wovr_jax.run.recipe import Recipe

        recipe = config.from_dict(Recipe, request.settings)
        phases = options.phases.split(",") if options.phases else list_phases(recipe)
        if unknown := set(phases) - set(PHASES):
            parser.error(f"--phases: expected some of {', '.join(PHASES)}, got {', '.join(sorted(unknown))}")
        plan(recipe, phases, options)


def plan(recipe: Recipe, phases: list[str], options: Any) -> None:
    """Prints what each phase needs on the devices of ``--topology``, or on the smallest slice of its kind."""
    from wovr_jax.plan import chips, measure
    from wovr_jax.plan.need import find_smallest_slice, need

    # A kind of chip alone, v5e, leaves the size of the slice open: each phase finds its own.
    fixed = None if options.topology in chips.SLICES else chips.topology(options.topology)

    def say(text: str) -> None:
        if not options.json:
            print(text, flush=True)

    if fixed:
        say(_head(fixed, recipe))
    needs, runs, rows = [], [], []
    for phase in phases:
        begin = time.perf_counter()
        if fixed:
            where, required, sharded = fixed, need(phase, recipe, fixed), recipe
        else:
            sharded, where, required = find_smallest_slice(phase, recipe, options.topology)
            say(f"\n{_head(where, sharded)}")
        say(_paragraph(required, where, options.efficiency, time.perf_counter() - begin))
        needs.append(required)
        rows.append(_row(required, where, sharded, options.efficiency))
        if options.measure:
            runs.append(measure.measure_phase(phase, recipe, where, options.measure))
            rows[-1] |= {"measured": runs[-1]._asdict()}
            say(_against(required, where, runs[-1]))
    if fixed and len(needs) > 1:
        say(_largest(needs, runs))
    if options.json:
        terminal.print_json({"efficiency": options.efficiency, "phases": rows})


def _row(need: Need, where: Topology, recipe: Recipe, efficiency: float) -> dict[str, Any]:
    """Returns a phase for a program: bytes on each device, seconds of one run of it, operations of all devices."""
    known = bool(where.chip.gib)
    return {
        "phase": need.name,
        "topology": where.name,
        "devices": len(where.devices),
        "mesh": dataclasses.asdict(recipe.mesh),
        "exact": where.exact,
        "peak": need.peak,
        "memory": where.chip.gib * GIB if known else None,
        "fits": need.fits(where) if known else None,
        "held": need.held,
        "idle": need.beside,
        "temporary": need.temporary,
        "collectives": need.collectives,
        "flop": need.flops,
        "seconds": need.seconds(where, efficiency),
        "times": need.times,
        "refused": need.refused,
    }


def _head(where: Topology, recipe: Recipe) -> str:
    mesh = recipe.mesh
    # A GPU that is not there is planned with the TPU compiler; only a TPU, or what is here, is planned exactly.
    memory = f"{where.chip.gib:g} GiB each" if where.chip.gib else "memory not known"
    stand_in = "" if where.exact else "\nTemporary memory is that of the TPU compiler: an estimate for these devices."
    return (
        f"{where.name}: {len(where.devices)} devices, {memory}; mesh data {mesh.data}, fsdp {mesh.fsdp}, "
        f"tensor {mesh.tensor}{stand_in}"
    )


def _paragraph(need: Need, where: Topology, efficiency: float, compiling: float) -> str:
    fits = need.fits(where)
    # Whether it fits is a question only where the memory is known.
    verdict = f" {terminal.paint(*(('fits', 'green') if fits else ('DOES NOT FIT', 'red')))}" if where.chip.gib else ""
    # Held is what the phase reads; idle is what a run keeps in memory meanwhile for the other phases.
    parts = [*need.held.items(), *((f"{name} (idle)", size) for name, size in need.beside.items())]
    held = ", ".join(f"{name} {_size(size)}" for name, size in [*parts, ("temporary", need.temporary)])
    hours = _hours(need, where, efficiency)
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(need.collectives.items())) or "none"
    lines = [
        f"\n{need.name}: {_size(need.peak)} a device{verdict}",
        f"  memory       {held}",
        f"  collectives  {kinds}",
        f"  work         {need.flops / 1e12:,.4g} Tflop{hours}; compiled in {compiling:.0f} s",
    ]
    if need.refused:  # a compiler that finds no room says so instead of an executable
        lines.append(f"  compiler     {need.refused.splitlines()[0][:300]}")
    if where.chip.gib and not fits:
        lines.append(f"  try          {ADVICE[need.name]}")
    return "\n".join(lines)


def _hours(need: Need, where: Topology, efficiency: float) -> str:
    if not where.chip.tflops:
        return ""
    # One number for all phases: what share of the peak a program reaches is not known before it runs.
    seconds = need.seconds(where, efficiency)
    hours = seconds * need.times / 3600
    return f", {seconds:.3g} s at {efficiency:.0%} of the peak, {need.times:,} times in a run: {hours:,.3g} h"


def _against(need: Need, where: Topology, run: Measured) -> str:
    # The median, with the extremes beside it: other work on the machine makes some runs slow.
    low, middle, high = (pick(run.seconds) for pick in (min, statistics.median, max))
    rate = need.flops / middle / 1e12  # Tflop/s of all devices together
    share = rate / (len(where.devices) * where.chip.tflops) if where.chip.tflops else 0
    of_peak = f", {share:.0%} of the peak" if share else ""
    return (
        f"  measured     {_size(run.bytes)}, the plan says {_size(need.alone)}: {need.alone / run.bytes - 1:+.1%}\n"
        f"  {len(run.seconds)} runs       {middle:.3g} s each [{low:.3g}, {high:.3g}], {rate:.3g} Tflop/s{of_peak}"
    )


def _largest(needs: list[Need], runs: list[Measured]) -> str:
    """Where a run has its peak. Measured is each program alone, so that is what it is held against."""
    # Phases run one after another, so a run needs what its largest phase needs.
    need = max(needs, key=lambda need: need.peak)
    line = f"\nlargest: {need.name}, {_size(need.peak)} a device"
    if runs:
        planned, peak = max(need.alone for need in needs), max(run.bytes for run in runs)
        line += f"; the highest peak measured is {_size(peak)}, planned {_size(planned)}: {planned / peak - 1:+.1%}"
    return line


def _size(size: int) -> str:
    # Sizes of the embedded table are megabytes, those of the releases hundreds of gigabytes.
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
