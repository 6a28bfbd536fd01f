"""Full size on one H100 or H200 in eight minutes: what is measured first is what is asked for most.

    python launch/benchmark.py gpu --out=results                             everything, as far as the time goes
    python launch/benchmark.py gpu --out=results --minutes=5 --steps=update,beside    what was left out the first time
    python launch/benchmark.py gpu --out=results --dry                       the same code on a CPU at a small size

Steps: matrix (the device's measured peak), first (a chunk of 8 rows and a transformer's step: after about two minutes),
chunk (1, 32 and 64 rows: frames a second, share of the peak, memory), parts (at 8 rows), conv (convolutions native and
folded), attention (xla and cudnn), vae_rows, update (GRPO on adapters), beside (diffusers under torch.compile, where
torch with CUDA and diffusers are there). A step that would not fit into what is left of --minutes is left out and said
to be. gpu.json, gpu.md (ready for docs/performance.md) and gpu.html are written after every part, so a run that is cut
keeps what it had. Programs of a step are compiled side by side before any of them is timed.

Needed are jax with CUDA (0.10.2 or newer) and the packages of ``NEEDS``; those that are missing are named before
anything begins. No weights and no data are read. Onto a machine without a network packages travel as wheels, made where
there is one, for the Python and the platform of the other (--only-binary=:all: --python-version 3.12 --platform ...):

    pip download --no-deps -d .whl ml_collections grain array-record portpicker av==18.1.0
    pip install --no-index --no-deps --target site .whl/*.whl                there, and then PYTHONPATH=site

These five, 40 MB, are what an image with CUDA, jax, flax, optax and orbax may lack; diffusers, 6 MB, needs torch beside
it. Where jax is missing too, jax[cuda13] is downloaded without --no-deps: gigabytes, with all of CUDA's libraries.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from launch import command
from launch.benchmarks import parts
from launch.flags import positive

if TYPE_CHECKING:
    from launch.benchmarks.session import Session

FULL, DRY = "configs/pace.py:libero_spatial,lora", "configs/pace.py:tiny,lora"
NEEDS = {
    "jax": "jax[cuda13]",
    "flax": "flax",
    "optax": "optax",
    "orbax": "orbax-checkpoint",
    "grain": "grain",
    "array_record": "array-record",
    "chex": "chex",
    "portpicker": "portpicker",
    "ml_collections": "ml_collections",
    "absl": "absl-py",
    "safetensors": "safetensors",
    "av": "av==18.1.0",
    "tqdm": "tqdm",
}
"""Module -> the package that brings it."""
PAPER = 23.0
"""New frames a second of WoVR's world model at full size, on a GPU."""
ITERATION = {"dream.groups": 4, "dream.chunks": 2}
"""Of the update at full size: 32 rollouts of two chunks are 64 samples, of which a second can be extrapolated."""


class Step(NamedTuple):
    """A part of the script.

    Attributes:
      needs: seconds that it takes at full size, compiling included; a guess until one has run.
      do: measures it.
    """

    needs: float
    do: Callable[[Session, argparse.Namespace], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this measurement."""
    parts.add_settings(parser, FULL)
    parser.add_argument(
        "--minutes", type=positive, default=8, help="in all; what would not fit is left out (default 8)"
    )
    parser.add_argument("--steps", type=step_names, default=list(STEPS), metavar="NAME,NAME", help="default all")
    parser.add_argument("--threads", type=positive, default=4, help="programs compiled at once (default 4)")
    parser.add_argument("--dry", action="store_true", help="at a small size, on whatever device is here")
    parser.add_argument("--out", type=pathlib.Path, default=command.ROOT / "runs" / "gpu", help="folder of the results")


def run(args: argparse.Namespace) -> None:
    """Runs the steps in their order while there is time."""
    if missing := [package for name, package in NEEDS.items() if importlib.util.find_spec(name) is None]:
        # Before a config is read, which would fail on the first of them only.
        command.refuse(
            f"Missing here: {', '.join(missing)}. Where there is a network: pip install {' '.join(missing)}; without "
            "one they travel as wheels, see launch/benchmark.py gpu --help."
        )
    if args.dry and args.config == FULL:
        args.config = DRY
    settings = parts.read_settings(args)
    # Full size leaves little room, and torch's part comes in the same process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.8")

    from launch.benchmarks import rendering
    from launch.benchmarks.session import Session

    if not (args.dry or is_ready()):
        command.refuse(
            "Expected a GPU, and jax sees none. With a card in this machine its plugin is missing: pip install "
            "'jax[cuda13]'. --dry runs the same at a small size on what is here."
        )
    how = {"repeats": 2, "seconds": 1.0} if args.dry else {"repeats": 5, "seconds": 8.0}
    # A dry run is to go through everything, however slow the machine.
    how |= {"deadline": None if args.dry else 60.0 * args.minutes}
    session = Session(settings, args.out, title=parts.command_line("gpu"), file="gpu", threads=args.threads, **how)
    session.maker()  # settings that do not fit are told before the first measurement
    print(f"{session.results['device']}\n{rendering.head_line()}", flush=True)
    # Without the peak nothing could be held against it.
    for name in dict.fromkeys(["matrix", *args.steps]):
        needs = STEPS[name].needs
        if session.left < needs:
            session.note(f"left out, {name}: needs about {needs:.0f} s, {max(session.left, 0):.0f} s were left")
            continue
        try:
            STEPS[name].do(session, args)
        except Exception as error:  # a step that cannot be done must not take the others with it
            session.note(f"left out, {name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")
    summarise(session)
    print(f"\n{args.out / 'gpu.md'}, with gpu.json and the plot gpu.html beside it")


def is_ready() -> bool:
    """Whether jax computes on a GPU."""
    import jax

    return jax.default_backend() == "gpu"


def summarise(session: Session) -> None:
    """Notes how many frames a second there are, and how many the matrix products alone would allow."""
    for row in session.results["parts"]:
        if row["part"] in ("chunk", "world") and row.get("share"):
            speed = row["frames_per_second"]
            session.note(
                f"{row['part']} at {row['batch']}: {speed:.1f} frames/s, {row['share']:.0%} of the floor of "
                f"{speed / row['share']:.0f}, {speed / PAPER:.2g} times the paper's {PAPER:.0f}"
            )


def measure_peak(session: Session, args: argparse.Namespace) -> None:
    """The matrix products' rate, against which all others are held."""
    session.measure_matrix((64, 128) if args.dry else None)


def measure_first(session: Session, args: argparse.Namespace) -> None:
    """The whole chunk and one step of the transformer."""
    batch = batches(args)[1]
    session.measure(session.maker(), [("step", batch), ("chunk", batch)])


def measure_chunks(session: Session, args: argparse.Namespace) -> None:
    """The whole chunk at the other batches, the smallest first: the largest may not fit."""
    first, _, *more = batches(args)
    session.measure(session.maker(), [("chunk", batch) for batch in (first, *more)])


def measure_parts(session: Session, args: argparse.Namespace) -> None:
    """What a chunk is made of; its step was among the first."""
    batch = batches(args)[1]
    session.measure(session.maker(), [(name, batch) for name in ("world", "decode", "policy", "encode", "reward")])


def compare_convolutions(session: Session, args: argparse.Namespace) -> None:
    """The VAE's causal convolutions in three dimensions, or their time taps folded into channels of planar ones."""
    batch = batches(args)[1]
    session.compare("world.vae.conv", ("native", "fold"), [("decode", batch), ("encode", batch)])


def compare_attention(session: Session, args: argparse.Namespace) -> None:
    """The transformer's attention; the policy's and the VAE's have no such choice."""
    session.compare("world.dit.kernel", ("xla", "cudnn"), [("step", batches(args)[1])])


def compare_rows(session: Session, args: argparse.Namespace) -> None:
    """Rows that the VAE takes at once in a chunk of more."""
    *_, batch = batches(args)[:3]
    session.compare("world.vae_rows", (max(batch // 4, 1), 0), [("world", batch)])


def measure_update(session: Session, args: argparse.Namespace) -> None:
    """One GRPO update; what the chunks have needed is let go of first."""
    session.forget()
    changes = {} if args.dry else ITERATION
    if not session.settings.get("learner", {}).get("lora"):
        session.note("update: of all weights, not of adapters; the preset lora has adapters")
    session.measure(session.maker(changes), [("update", None)])


def measure_beside(session: Session, args: argparse.Namespace) -> None:
    """diffusers' transformer and VAE on the same shapes."""
    from launch.benchmarks import rival

    if missing := rival.find_missing(args.dry):
        session.note(f"left out, beside: {missing}")
        return
    session.forget()
    recipe = session.maker().recipe
    rows = rival.measure(
        recipe.world,
        recipe.size,  # of one camera
        batches(args)[1],
        repeats=session.repeats,
        seconds=session.seconds,
        left=lambda: session.left,
        dry=args.dry,
    )
    for row in rows:
        session.results.setdefault("beside", []).append(row)
        said = row.get("error") or f"{1e3 * row['seconds']['median']:.4g} ms, compiled in {row['compile_s']:.0f} s"
        print(f"{row['part']} {row['batch']}: {said}", flush=True)
        session.save()


STEPS = {
    "matrix": Step(15, measure_peak),
    "first": Step(100, measure_first),
    "chunk": Step(150, measure_chunks),
    "parts": Step(90, measure_parts),
    "conv": Step(70, compare_convolutions),
    "attention": Step(40, compare_attention),
    "vae_rows": Step(90, compare_rows),
    "update": Step(90, measure_update),
    "beside": Step(80, measure_beside),
}
"""In the order in which they run."""


def batches(args: argparse.Namespace) -> tuple[int, ...]:
    """Returns the rows of a chunk that are measured, the second of which is that of all parts."""
    return (1, 2, 4) if args.dry else (1, 8, 32, 64)


def step_names(text: str) -> list[str]:
    """Reads ``"matrix,conv"`` as steps, in their order."""
    asked = text.split(",")
    if unknown := [name for name in asked if name not in STEPS]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(STEPS)}, got {', '.join(unknown)}")
    return [name for name in STEPS if name in asked]
