"""Rollouts of any program's world model, audited with the measures of this one.

The folder holds a file ``episode-<anything>.npz`` for each pair of rollouts, of the same actions from the same first
frame. All have the same keys but for the optional ones::

    true              uint8 (S + 1, H, W, 3): what happened; frame 0 is the observation before the first action
    imagined          uint8, the same shape: what the world model made of it; its frame 0 is that of ``true``
    action            optional, float (S, A): what was played; it is only checked against the frames
    true_success      optional, one bool or one a frame (S + 1): whether the task was done
    imagined_success  optional, the same, as the world model's judge says
    policy            optional, the name of whoever chose the actions
    chosen_in         optional, "truth" or "imagination": which frames it saw when it chose them

``numpy.savez_compressed(folder / "episode-000.npz", true=..., imagined=..., policy="base")`` writes one. What is not
there cannot be asked for, and the page says so. Where the actions were chosen in imagination, a failure that the judge
calls a success is one that a policy would have been paid for; where they were chosen in truth, it is a misjudgement.
"""

from __future__ import annotations

import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from wovr_jax.audit import ranking
from wovr_jax.audit.closed_loop import summarize_closed_loop
from wovr_jax.audit.horizon import summarize_horizon
from wovr_jax.audit.pictures import SIDE, compare_frames
from wovr_jax.audit.trust import rank
from wovr_jax.audit.verdicts import count_verdicts
from wovr_jax.core.disk import write_json
from wovr_jax.evaluate import summarize_outcomes
from wovr_jax.report import page
from wovr_jax.report.results import describe_run

CHUNK = 8
PATTERN = "episode-*.npz"
PLACES = ("truth", "imagination")
KEYS = ("true", "imagined", "action", "true_success", "imagined_success", "policy", "chosen_in")
ALL = "all"
"""The one level of the ranking: rollouts from elsewhere do not say at which temperature they were sampled."""


class ForeignError(ValueError):
    """A folder or a file that is not as the format says; the message names it, what was expected and what came."""


class Pair(NamedTuple):
    """Two rollouts of the same actions.

    Attributes:
      errors: of each step, see ``pictures.compare_frames``; (S,) each.
      true, imagined: success; None where the file does not say.
      policy: who chose the actions; empty where nobody says.
      chosen_in: one of ``PLACES``; empty where nobody says.
    """

    errors: dict[str, np.ndarray]
    true: bool | None
    imagined: bool | None
    policy: str
    chosen_in: str


def audit(folder: pathlib.Path, out: pathlib.Path, chunk: int = CHUNK) -> tuple[dict[str, Any], pathlib.Path]:
    """Audits a folder of rollouts; writes ``results.json`` and the page into ``out``.

    Args:
      folder: with the episodes.
      out: made when missing.
      chunk: steps of a chunk, by which the curves count.

    Returns:
      The results, and the path of the page.

    Raises:
      ForeignError: see there.
    """
    pairs = read_pairs(folder)
    about = {"name": f"rollouts of {folder.resolve().name}", "job": "audit", "seed": 0}
    results = describe_run(about) | {"trust": summarize(pairs, chunk)}
    del results["seed"]  # nothing was drawn
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", results)
    return results, page.write(out)


def read_pairs(folder: pathlib.Path) -> list[Pair]:
    """Reads the episodes of a folder one after another; of their frames only the errors are kept.

    Raises:
      ForeignError: no folder, no episodes, or one that is not as the format says.
    """
    if not folder.is_dir():
        raise ForeignError(f"{folder}: expected a folder of {PATTERN}, and there is no such folder.")
    paths = sorted(folder.glob(PATTERN))
    if not paths:
        there = sorted(path.name for path in folder.iterdir())
        listed = ", ".join(there[:5]) + ", ..." * (len(there) > 5) if there else "nothing"
        raise ForeignError(f"{folder}: expected files {PATTERN}, got {listed}. docs/trust.md has the format.")
    return [read_pair(path) for path in paths]


def read_pair(path: pathlib.Path) -> Pair:
    """Reads an episode.

    Raises:
      ForeignError: a file that is not as the format says.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ForeignError(f"{path}: expected a file that numpy.savez wrote, without objects in it: {error}") from error
    if missing := [name for name in KEYS[:2] if name not in arrays]:
        raise ForeignError(f"{path}: expected {' and '.join(missing)}, got {', '.join(arrays) or 'no array'}.")
    if unknown := sorted(set(arrays) - set(KEYS)):
        raise ForeignError(f"{path}: expected no other keys than {', '.join(KEYS)}, got {', '.join(unknown)}.")
    true, imagined = arrays["true"], arrays["imagined"]
    _check_frames(path, true, imagined)
    if "action" in arrays:
        action, steps = arrays["action"], len(true) - 1
        if action.ndim != 2 or len(action) != steps or action.dtype.kind not in "fiu" or not np.isfinite(action).all():
            raise ForeignError(
                f"{path}: action: expected finite numbers (S, A) = ({steps}, A) for {steps + 1} frames, got "
                f"{action.dtype} {action.shape}{' with NaN or infinity' if action.dtype.kind == 'f' else ''}."
            )
    errors = compare_frames(true[:1], true[None, 1:], imagined[None, 1:])
    return Pair(
        errors={name: error_BS[0] for name, error_BS in errors.items()},
        true=_read_success(path, "true_success", arrays.get("true_success"), len(true)),
        imagined=_read_success(path, "imagined_success", arrays.get("imagined_success"), len(true)),
        policy=_read_text(path, "policy", arrays.get("policy")),
        chosen_in=_read_text(path, "chosen_in", arrays.get("chosen_in"), PLACES),
    )


def summarize(pairs: Sequence[Pair], chunk: int) -> dict[str, Any]:
    """Returns the answers, as ``trust.summarize`` does of a run, and ``not_asked``: what could not be, and why."""
    judged = [pair for pair in pairs if pair.true is not None and pair.imagined is not None]
    policies, places = _summarize_policies(judged), {pair.chosen_in for pair in pairs}
    length_B = np.array([len(pair.errors["error"]) for pair in pairs])
    padded = {
        name: np.stack([np.pad(pair.errors[name], (0, length_B.max() - len(pair.errors[name]))) for pair in pairs])
        for name in ("error", "still", "ssim")
    }
    paid = None
    if judged and places == {"imagination"}:
        imagined_K, true_K = _split(judged)
        # Nobody imagined their chunks from true frames: what would be said of that is left out.
        counts = summarize_closed_loop(imagined_K, true_K, true_K, np.zeros(len(judged), bool))["all"]
        names = sorted({pair.policy for pair in judged if pair.policy})
        paid = {"policy": ", ".join(names) or "nobody says whose"} | {
            n: counts[n] for n in ("false_success", "precision")
        }
    world = {
        "name": "this world",
        "ranking": {ALL: rank(policies, ALL, 0, 0)},
        "paid": paid,
        "verdicts": count_verdicts(*_split(judged)),
        "horizon": summarize_horizon(**padded, length_B=length_B, chunk=chunk),
    }
    levels = {ALL: f"{len(pairs)} pairs of rollouts"}
    return {
        "episodes": len(pairs),
        "levels": levels,
        "policies": policies,
        "worlds": [world],
        "not_asked": _list_gaps(pairs, judged, len(policies), places),
    }


def _summarize_policies(judged: Sequence[Pair]) -> list[dict[str, Any]]:
    """Returns true and imagined success of each policy that has a name, in the order in which they come."""
    policies = []
    for name in dict.fromkeys(pair.policy for pair in judged if pair.policy):
        own = [pair for pair in judged if pair.policy == name]
        true, imagined = (
            summarize_outcomes([bool(getattr(pair, side)) for pair in own]) for side in ("true", "imagined")
        )
        policies.append({"name": name, "ladder": False, ALL: {"true": true, "imagined": [imagined]}})
    return policies


def _split(judged: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Returns imagined and true success, (K,) bool each."""
    return np.array([pair.imagined for pair in judged], bool), np.array([pair.true for pair in judged], bool)


def _list_gaps(pairs: Sequence[Pair], judged: Sequence[Pair], policies: int, places: set[str]) -> list[str]:
    """Says what could not be asked of these rollouts, and what it would take."""
    unjudged = len(pairs) - len(judged)
    gaps = []
    if unjudged:
        gaps.append(f"success of {unjudged} of {len(pairs)} episodes, without true_success or imagined_success")
    if policies < ranking.FEWEST:
        gaps.append(f"the ranking: it takes {ranking.FEWEST} policies with both successes, got {policies}")
    if places != {"imagination"}:
        gaps.append("what a policy would be paid for: it takes actions that were chosen in imagination (chosen_in)")
    gaps.append("latents, other fingers, and chunks imagined from true frames: they take the world model itself")
    return [*gaps, "LPIPS, FID and FVD: they take networks that are no part of this program"]


# ---------------------------------------------------------------- one file


def _check_frames(path: pathlib.Path, true: np.ndarray, imagined: np.ndarray) -> None:
    for name, frames in (("true", true), ("imagined", imagined)):
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) < 2:
            raise ForeignError(
                f"{path}: {name}: expected uint8 frames (S + 1, H, W, 3) of at least one step, got {frames.dtype} "
                f"{frames.shape}."
            )
    if true.shape != imagined.shape:
        raise ForeignError(f"{path}: imagined: expected the shape of true, {true.shape}, got {imagined.shape}.")
    if min(true.shape[1:3]) < SIDE:
        raise ForeignError(f"{path}: expected pictures of at least {SIDE} pixels on a side, got {true.shape[1:3]}.")


def _read_success(path: pathlib.Path, name: str, flag: np.ndarray | None, frames: int) -> bool | None:
    if flag is None:
        return None
    if flag.dtype.kind not in "bui" or flag.shape not in ((), (1,), (frames,)) or not np.isin(flag, (0, 1)).all():
        raise ForeignError(
            f"{path}: {name}: expected one bool, or one for each of {frames} frames, got {flag.dtype} {flag.shape}."
        )
    return bool(flag.any())


def _read_text(path: pathlib.Path, name: str, text: np.ndarray | None, among: Sequence[str] = ()) -> str:
    if text is None:
        return ""
    if text.dtype.kind != "U" or text.size != 1 or (among and text.item() not in among):
        kind = " or ".join(map(repr, among)) or "a text"
        got = repr(text.item()) if text.size == 1 else f"{text.dtype} {text.shape}"
        raise ForeignError(f"{path}: {name}: expected {kind}, got {got}.")
    return text.item()
