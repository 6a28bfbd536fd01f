"""Reads weights of Wan2.2, RLinf, diffusers and OpenVLA-OFT into this project's form, and writes them back.

    python launch/import_weights.py FILE_OR_FOLDER --out weights/wan            import everything that is there
    python launch/import_weights.py FILE_OR_FOLDER --check                      say what is there and whether it fits
    python launch/import_weights.py weights/wan/dit.json --to rlinf --out back  write back in an outside format
    python launch/import_weights.py weights/vla/policy.json --to openvla --out robot
    python launch/import_weights.py RELEASE --adapter merge --out weights/vla    base weights and lora_adapter/ in one
    python launch/import_weights.py weights/vla/lora.json --to peft --out adapter a PEFT folder

What is read: safetensors, alone or in shards with an index, and what torch saves: .pt (RLinf's full_weights.pt), .pth,
.bin, .ckpt (which needs torch, and is never loaded with code in it). Wrappers that a training left in the names
(module., _orig_mod.) are taken off. What a file is, is recognised by the names in it:

    part    format     files
    dit     rlinf      model-00001.safetensors of RLinf-Wan-LIBERO-*: conditioned on actions
            wan        diffusion_pytorch_model*.safetensors of Wan2.2-TI2V-5B, DiffSynth-Studio's
            diffusers  the folder transformer/ of Wan2.2-TI2V-5B-Diffusers
    vae     wan        Wan2.2_VAE.pth
            diffusers  the folder vae/
    policy  openvla    the folder of an OpenVLA-OFT release: model*.safetensors and config.json
    reward  rlinf      resnet_rm.pth, taskemb_resnet_rm.pth

What is written: <part>.safetensors and <part>.json in --out, with the numbers exactly as they
were. Nothing is guessed: a tensor that is missing, left over, doubled, of another shape or dtype
stops the import before it begins, and all such tensors are listed. A transformer conditioned on
text loses its text path and gets fresh action modules, unless --text keeps it as it is. What a
policy does not use of its release, tensors and files, is kept in <part>.rest and written back.

LoRA adapters (PEFT) in lora_adapter/ of a release, or in --adapter-folder, are left alone unless --adapter says merge
(into the weights, in float32) or keep (as lora.json, to be trained on). openvla-oft writes its adapters beside weights
that hold them already: do not merge those. --to peft also takes the folder stages/sft/adapters of a run.

An import ends with what it believed, dropped and kept, and a warning for each thing that looks odd; the same is in
<part>.json. --strict makes warnings refusals.

Weights are converted one parameter at a time; memory stays well below the size of the file.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from launch import command

if TYPE_CHECKING:
    from wovr_jax.bridge.adapters import Adapters
    from wovr_jax.bridge.importer import Import


def main() -> None:
    """Imports, checks or exports what the command line names; everything wrong ends in one message on stderr."""
    args = parse()

    # Only now: importing jax takes seconds, a misspelt flag none.
    from wovr_jax.core.machine import peak_rss_gb

    began = time.perf_counter()
    stopped = "Stopped. What was complete stays, nothing is half written."
    with command.explain_errors(stopped, place=args.out or args.source, kept="Nothing was left half written."):
        if args.to:
            export(args)
        else:
            import_all(args)
    print(f"{time.perf_counter() - began:.1f} s, peak memory {peak_rss_gb():.2f} GiB")


def parse() -> argparse.Namespace:
    """Reads the command line; combinations that mean nothing are refused."""
    parser = command.Parser(__doc__)
    parser.add_argument("source", type=pathlib.Path, help="file, index or folder; with --to a .json to export")
    parser.add_argument("--out", type=pathlib.Path, metavar="FOLDER", help="where to write; made if it is not there")
    parser.add_argument("--check", action="store_true", help="only say what would be imported")
    parser.add_argument(
        "--part", choices=("dit", "vae", "policy", "reward"), action="append", help="import this part only"
    )
    parser.add_argument("--name", help="of the files written, when one part is imported; default: the part")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument("--text", action="store_true", help="keep a text-conditioned transformer as it is")
    parser.add_argument("--seed", type=int, default=0, help="of fresh action modules (default 0)")
    parser.add_argument("--heads", type=int, help="attention heads, where they are not a release's and no file tells")
    recipes = "of a policy: oft has a stop token behind the action slots (default rlinf: none)"
    parser.add_argument("--recipe", choices=("rlinf", "oft"), default="rlinf", help=recipes)
    parser.add_argument("--images", type=int, default=1, help="pictures that a policy sees at once (default 1)")
    parser.add_argument(
        "--state", action="store_true", help="a policy that takes the robot's state: proprio_projector--*.pt"
    )
    parser.add_argument("--adapter", choices=("merge", "keep"), help="what to do with a policy's LoRA adapters")
    parser.add_argument(
        "--adapter-folder", type=pathlib.Path, metavar="FOLDER", help="default: lora_adapter/ of the release"
    )
    parser.add_argument("--strict", action="store_true", help="refuse what would only be warned of")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="cast; default: as in the file")
    parser.add_argument(
        "--to", choices=("wan", "rlinf", "diffusers", "openvla", "peft"), help="write back in this format"
    )
    parser.add_argument("--shard-gb", type=float, metavar="GB", help="with --to: split into files of at most this size")
    args = parser.parse_args()
    if args.check == bool(args.out):
        parser.error("give either --out FOLDER to write, or --check to only look")
    if args.to and (args.check or args.part or args.name or args.text or args.dtype or args.adapter or args.strict):
        parser.error("--to goes with --out, --shard-gb and --overwrite only")
    if args.shard_gb is not None and (not args.to or args.shard_gb <= 0):
        parser.error("--shard-gb is a size above 0, for --to")
    if args.adapter_folder and not args.adapter:
        parser.error("--adapter-folder goes with --adapter merge or --adapter keep")
    args.source = args.source.expanduser()
    return args


def import_all(args: argparse.Namespace) -> None:
    """Imports every part that the source holds. In a folder, what is no known weights is passed over and named."""
    from wovr_jax.bridge import formats, importer
    from wovr_jax.bridge.sources import FileError, find, open_source
    from wovr_jax.weights.source import is_native

    # Everything is read and checked before the first file is written.
    ready, passed = [], []
    for path in find(args.source):
        try:
            if is_native(path.with_suffix(".json")):
                raise FileError(
                    f"{path} is imported already; give {path.with_suffix('.json')} and --to to write it back."
                )
            source = open_source(path)
            kind = formats.detect(source)
        except FileError as error:
            # A folder may hold anything beside weights; a file that was named has to be weights.
            if args.source.is_file():
                raise
            passed.append(str(error))
            continue
        if not args.part or kind.part in args.part:
            ready.append(importer.read_import(source, **reading_options(args, kind.part, path.parent)))
    for message in passed:
        print(f"passed over: {message}", file=sys.stderr)
    if (args.adapter or args.state or args.images > 1) and not any(part.kind.part == "policy" for part in ready):
        raise FileError(f"{args.source}: pictures, state and adapters are a policy's, and there is none.")
    if args.heads and not any(part.kind.part in ("dit", "policy") for part in ready) and ready:
        raise FileError(f"{args.source}: --heads is a transformer's or a policy's, and there is none.")
    if not ready:
        wanted = f" of {', '.join(args.part)}" if args.part else ""
        raise FileError(f"{args.source}: found no weights{wanted}.")
    # Two files of one part would write one file of ours.
    parts = [part.kind.part for part in ready]
    if len(set(parts)) < len(parts):
        files = "\n  ".join(f"{part.kind}: {part.source.name}" for part in ready)
        raise FileError(f"{args.source} holds a part more than once; name the file that is meant.\n  {files}")
    if args.name and len(ready) > 1:
        raise FileError(f"--name is for one part, and {args.source} holds {', '.join(parts)}; add --part.")
    # Merged adapters are in the weights already; these stay files of their own.
    loose = open_adapters(args, ready) if args.adapter == "keep" else None
    odd = [text for opened in (*ready, *([loose] if loose else [])) for text in opened.warnings()]
    if args.strict and odd:
        listed = "\n  ".join(odd)
        raise FileError(f"{args.source}: --strict refuses what looks odd. Nothing was written.\n  {listed}")
    written = write_all(args, ready, loose) if args.out else []
    for part in ready:
        print("\n  ".join(part.report()))
    if loose:
        print(loose.report("kept as lora.json, not merged"))
    for text in odd:
        print(f"warning: {text}")
    print("\n".join(map(str, written or ["nothing was written: --check only looks"])))


def write_all(args: argparse.Namespace, ready: list[Import], loose: Adapters | None) -> list[pathlib.Path]:
    """Writes every part, and adapters of their own, and returns the json of each."""
    from wovr_jax.bridge import adapters, importer, rest
    from wovr_jax.core.tables import progress_bar

    for name in [args.name or part.kind.part for part in ready] + (["lora"] if loose else []):
        check_free(args, f"{name}.json", f"{name}.safetensors", rest.folder_name(name))
    check_space(args, sum(part.bytes for part in ready))
    written = []
    for part in ready:
        with progress_bar(part.kind.part, part.bytes) as progress:
            written.append(importer.write_import(part, args.out, args.name, progress))
    return [*written, *([adapters.write_native(loose, args.out)] if loose else [])]


def reading_options(args: argparse.Namespace, part: str, folder: pathlib.Path) -> dict[str, Any]:
    """What the command line says of a part that lies in ``folder``, for ``read_import``."""
    options = {"heads": args.heads, "text": args.text, "seed": args.seed, "dtype": args.dtype, "recipe": args.recipe}
    if part == "policy":  # the other parts know no pictures, no robot's state and no adapters
        merge = (args.adapter_folder or folder / "lora_adapter") if args.adapter == "merge" else None
        options |= {"images": args.images, "state": args.state, "merge": merge}
    return options


def open_adapters(args: argparse.Namespace, ready: list[Import]) -> Adapters:
    """Opens adapters that are to be kept, and checks them against the policy they belong to."""
    from wovr_jax.bridge import adapters

    (policy,) = (part for part in ready if part.kind.part == "policy")
    return adapters.open_peft(args.adapter_folder or policy.folder / adapters.FOLDER, policy.cfg)


def export(args: argparse.Namespace) -> None:
    """Writes imported weights in an outside format."""
    from wovr_jax.bridge import adapters, exporter, formats
    from wovr_jax.core.tables import progress_bar
    from wovr_jax.weights.source import open_native

    # Adapters are not weights of ours with a table of their own: they have their own writer.
    if args.to == "peft":
        check_free(args, adapters.WEIGHTS, adapters.CONFIG)
        print("\n".join(map(str, adapters.export(args.source, args.out))))
        return
    # Verified, because what goes out is used where nobody can check it against the import.
    cfg, source, _ = open_native(args.source, verify=True)
    kind = formats.named(cfg, args.to)
    if kind.part == "policy" and args.out.is_dir():  # a folder of its own, with names that the release chose
        check_free(args, *(path.name for path in args.out.iterdir()))
    check_free(args, *exporter.export_names(cfg, kind))
    size = sum(fact.nbytes for fact in source.facts.values())
    check_space(args, size)
    # Decimal gigabytes, as the hubs count them.
    most = None if args.shard_gb is None else int(args.shard_gb * 1e9)
    with progress_bar(f"{kind.part} to {args.to}", size) as progress:
        written = exporter.write_export(args.source, args.to, args.out, shard_bytes=most, progress=progress)
    print("\n".join(map(str, written)))


def check_free(args: argparse.Namespace, *names: str) -> None:
    """Refuses to replace files without --overwrite."""
    existing = sorted({str(args.out / name) for name in names if (args.out / name).exists()})
    if existing and not args.overwrite:
        command.refuse(f"{', '.join(existing)}: there already. Name another folder with --out, or add --overwrite.")


def check_space(args: argparse.Namespace, size: int) -> None:
    """Refuses to begin what the disk cannot hold."""
    # The folder may not be there yet; its disk is that of the first one above it that is.
    folder = args.out.expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        command.refuse(f"{args.out}: {size / 1e9:.1f} GB are to be written and {free / 1e9:.1f} GB are free.")


if __name__ == "__main__":
    main()
