"""Does anything tell a lie of imagination before the truth is known? Every sign against what came true.

A policy plays in the world that taught it, as it does when it learns, and the true simulator follows the actions that
it chose there. Two kinds of lies are then known: a chunk that has diverged, and a rollout that is paid though it fails.
For each sign (``signs``) the answer is how often a lie looks worse than a truth, and what share of the paid rollouts
would be true if the most suspicious were not paid.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wovr_jax.audit import detection, signs
from wovr_jax.audit.closed_loop import draw_distinct, roll_in_world
from wovr_jax.audit.detection import Mix, measure_auroc, measure_precision, with_interval
from wovr_jax.audit.horizon import average_chunks, is_astray
from wovr_jax.audit.inverse import InverseConfig
from wovr_jax.audit.pictures import compare_frames
from wovr_jax.audit.signs import Known
from wovr_jax.core import processes, sharding
from wovr_jax.core.disk import replace_file
from wovr_jax.core.pixels import to_float
from wovr_jax.data import starts as start_states
from wovr_jax.data.starts import Starts
from wovr_jax.policy.actions import Codec
from wovr_jax.run import programs
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.programs import Improvement
from wovr_jax.run.stages.episodes import Keys
from wovr_jax.run.stages.reward import Judge
from wovr_jax.sim.witness import Witness
from wovr_jax.types import Array, Imagined, Params
from wovr_jax.world.model import WorldConfig

COVERAGES = (0.9, 0.75, 0.5)
"""Shares of the paid rollouts that a gate goes on paying."""
TWIN, REFRESHED = "twin", "refreshed"
"""Other worlds that are asked: one that was trained on the same episodes with other draws, and the one of the next
round, which has seen this policy; that one is known in hindsight only, and no part of the mix."""
MIX, MIX_BEFORE = "mix", "mix_before"
"""A logistic mix of all signs, held out by episode; and the one that was fitted on the world before."""
FILE = "rollouts.npz"
SURE = 1e-6
"""Probabilities nearer to 0 or 1 than this are as sure as it gets."""


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """What K rollouts of N chunks looked like, and what came true.

    Attributes:
      sign: name -> (K, N), those of ``signs`` and ``<other>_frames``, how far another world's frames are from these; or
        (K,), of a rollout as a whole: ``margin``, how little its best frame is above the judge's threshold,
        ``second_noise``, the same under another noise, and ``<other>_verdict``, the same in another world.
      live_KN: which chunks lie before the end of the true episode.
      astray_KN: which of them have diverged from the truth (``horizon.is_astray``).
      paid_K, true_K: success for the judge, and in truth.
      paid_in_K: the chunk of the first frame that is paid; the last one where none is.
      episode_K: the true episode that a rollout began in; those of one are alike.
    """

    sign: Mapping[str, np.ndarray]
    live_KN: np.ndarray
    astray_KN: np.ndarray
    paid_K: np.ndarray
    true_K: np.ndarray
    paid_in_K: np.ndarray
    episode_K: np.ndarray

    def save(self, path: pathlib.Path) -> None:
        """Writes all of it, a column each; of several processes the first one does."""
        if not processes.first():
            return
        columns: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "sign"}
        columns |= {f"sign_{name}": value for name, value in self.sign.items()}
        with replace_file(path) as fresh, fresh.open("wb") as file:
            np.savez_compressed(file, **columns)

    @classmethod
    def load(cls, path: pathlib.Path) -> Rollouts:
        """Reads what ``save`` wrote."""
        with np.load(path) as file:
            sign = {name.removeprefix("sign_"): file[name] for name in file.files if name.startswith("sign_")}
            return cls(sign, **{name: file[name] for name in file.files if not name.startswith("sign_")})


def find_lies(
    run: Run,
    round_: int,
    world_round: int,
    witness: Witness,
    count: int,
    batch: int,
    cfg: Improvement,
    codec: Callable[[], Codec],
    prompt_KL: Array,
    policy: Product[Params],
    starts: Product[Starts],
    vae: Product[tuple[WorldConfig, Params]],
    world: Product[Params],
    reward: Product[Judge],
    known: Product[tuple[InverseConfig, Known]],
    others: Mapping[str, Product[Params]],
    key: Keys,
) -> Product[Rollouts]:
    """The signs of a policy's rollouts in the learned world, and which of them told a lie.

    Args:
      run: the folder that the stage ``lies-<round>-in-world-<round>`` is kept in; ``-with-twin`` where one is asked.
      round_, world_round: rounds of the policy and of the world model.
      witness: the true environment.
      count: rollouts from episode starts, and from keyframes, each from another one; fewer where there are fewer.
      batch: rollouts at once.
      cfg: the policy and the judge, chunks of a rollout and temperature.
      codec: gives the codec between actions and tokens.
      prompt_KL: (tasks, L) prompt tokens of every task.
      policy: plain weights.
      starts: where rollouts begin.
      vae: the world model's settings, and its VAE.
      world, reward: the learned world and its judge.
      known: what the signs compare with.
      others: ``TWIN`` and ``REFRESHED``, or one of them, or none.
      key: of the run, by name.
    """
    name = f"lies-{round_}-in-world-{world_round}" + ("-with-twin" if TWIN in others else "")

    def make(folder: pathlib.Path) -> dict[str, Any]:
        table, judge, truth, world_cfg = starts.value, reward.value, known.value, vae.value[0]
        roll, replay = roll_in_world(cfg, codec(), world_cfg), programs.replay(world_cfg, cfg.reward)
        row_K, parts = draw_distinct(table, key(name, "rows"), count), []
        for low in range(0, len(row_K), batch):
            # The last batch is filled up with its own rows, so that one program does.
            row_B, noise = np.resize(row_K[low : low + batch], batch), key(name, low)
            start = start_states.gather(table, jnp.asarray(row_B), prompt_KL)
            action_BNTA = roll(policy.value, world.value, judge.params, start, noise).action_BNTA

            def play(params: Params, k: Array, of: tuple = (judge.params, start, action_BNTA)) -> Imagined:
                return replay(params, *of, k)

            # The same noise gives the same rollout again, now with its frames; another one gives a second opinion.
            seen, again = play(world.value, noise), play(world.value, key(name, low, "second"))
            sign = signs.read(world_cfg, truth[0])(world.value, truth[1], start, action_BNTA, seen.video_BNTHWC, noise)
            probs = {"margin": seen.prob_BNT, "second_noise": again.prob_BNT}
            for other, params in others.items():
                told = play(params.value, noise)
                sign[f"{other}_frames"], probs[f"{other}_verdict"] = _differ(seen, told), told.prob_BNT
            parts.append(sharding.host((sign, probs, action_BNTA, seen.video_BNTHWC, start.memory_BMHWC[:, -1])))
        joined = jax.tree.map(lambda *column: np.concatenate(column)[: len(row_K)], *parts)
        rollouts = _meet_truth(witness, table, row_K, judge.threshold, *joined)
        rollouts.save(folder / FILE)
        return {
            "episodes": len(row_K),
            "true_steps": len(row_K) * witness.steps * witness.hold,
            "imagined_frames": (3 + len(others)) * joined[2][..., 0].size,
        }

    return run.stage(name, make, lambda folder: Rollouts.load(folder / FILE))


def _meet_truth(
    witness: Witness,
    table: Starts,
    row_K: np.ndarray,
    threshold: float,
    sign: dict[str, np.ndarray],
    probs: dict[str, np.ndarray],
    action_KNTA: np.ndarray,
    video_KNTHWC: np.ndarray,
    first_KHWC: np.ndarray,
) -> Rollouts:
    """Has the true simulator follow the actions, and says what was a lie."""
    count, chunks, steps = (prob_KNT := probs["margin"]).shape
    true_KS, film_KSHWC = witness.follow(table, row_K, action_KNTA.reshape(count, chunks * steps, -1), film=True)
    assert film_KSHWC is not None
    seen_KSHWC = video_KNTHWC.reshape(count, chunks * steps, *first_KHWC.shape[1:])
    compared = compare_frames(jnp.asarray(first_KHWC), jnp.asarray(to_float(film_KSHWC)), jnp.asarray(seen_KSHWC))
    left_K = witness.steps - np.asarray(table.step_K)[row_K]
    live_KNT = (np.arange(chunks * steps) < left_K[:, None]).reshape(prob_KNT.shape)
    live_KN = live_KNT.any(axis=2)
    error_KN, still_KN = (average_chunks(compared[of], live_KNT) for of in ("error", "still"))
    paid_KN = ((prob_KNT > threshold) & live_KNT).any(axis=2)
    best = {name: np.where(live_KNT, prob, 0.0).max(axis=(1, 2)) for name, prob in probs.items()}
    return Rollouts(
        sign=sign | {name: _odds(threshold) - _odds(best_K) for name, best_K in best.items()},
        live_KN=live_KN,
        astray_KN=is_astray(error_KN, still_KN, live_KN),
        paid_K=paid_KN.any(axis=1),
        true_K=(true_KS & live_KNT.reshape(true_KS.shape)).any(axis=1),
        paid_in_K=np.where(paid_KN.any(axis=1), paid_KN.argmax(axis=1), chunks - 1),
        episode_K=np.asarray(table.episode_K)[row_K],
    )


@jax.jit
def _differ(seen: Imagined, told: Imagined) -> Array:
    """Returns (B, N), the root of the mean squared difference of the frames of each chunk."""
    assert seen.video_BNTHWC is not None and told.video_BNTHWC is not None
    return jnp.sqrt(jnp.square(seen.video_BNTHWC - told.video_BNTHWC).mean(axis=(2, 3, 4, 5)))


def _odds(prob: Any) -> Any:
    clipped = np.clip(np.asarray(prob, float), SURE, 1 - SURE)
    return np.log(clipped / (1 - clipped))


# ---------------------------------------------------------------- what the rollouts say


def summarize_lies(rollouts: Rollouts, before: Rollouts | None = None) -> dict[str, Any]:
    """Returns how well each sign finds each kind of lie, ready for JSON.

    Args:
      rollouts: of a world.
      before: of the world before, on whose lies a mix is fitted that judges this one; None for the first world.

    Returns:
      ``rollouts``, ``paid``, ``lies`` (those paid that fail), ``chunks`` and ``astray``, counts; ``precision`` of what
      is paid; and ``signs``, for each of them ``astray`` and ``paid``, the AUROC with its interval over episodes, and
      ``gates``, the precision at each of ``COVERAGES``. What has too few lies or truths is None.
    """
    live_KN, paid_K = rollouts.live_KN, rollouts.paid_K
    # (K, N) -> (X,): every live chunk, with its rollout's episode.
    astray_X, episode_X = rollouts.astray_KN[live_KN], np.repeat(rollouts.episode_K, live_KN.sum(axis=1))
    lie_P, episode_P = ~rollouts.true_K[paid_K], rollouts.episode_K[paid_K]
    chunks = {name: value[live_KN] for name, value in rollouts.sign.items() if value.ndim == 2}
    whole = {name: score_rollouts(rollouts, name)[paid_K] for name in rollouts.sign}
    if _enough(astray_X):
        chunks[MIX] = detection.mix_held_out(_stack(chunks), astray_X, episode_X)
    if _enough(lie_P):
        alone = dict(whole)
        whole[MIX] = detection.mix_held_out(_stack(alone), lie_P, episode_P)
        if before and _enough(lies_before := ~before.true_K[before.paid_K]):
            # Of one world there may be a twin, and of the other none yet.
            both = [name for name in alone if name in before.sign]
            fitted = _stack({name: score_rollouts(before, name)[before.paid_K] for name in both})
            whole[MIX_BEFORE] = Mix(fitted, lies_before)(_stack({name: alone[name] for name in both}))

    def describe(name: str) -> dict[str, Any]:
        score_P = whole.get(name)
        return {
            "astray": with_interval(measure_auroc, chunks[name], astray_X, episode_X) if name in chunks else None,
            "paid": None if score_P is None else with_interval(measure_auroc, score_P, lie_P, episode_P),
            "gates": None
            if score_P is None or not len(score_P)
            else [measure_precision(score_P, lie_P, coverage) for coverage in COVERAGES],
        }

    return {
        "rollouts": len(paid_K),
        "paid": len(lie_P),
        "lies": int(lie_P.sum()),
        "chunks": len(astray_X),
        "astray": int(astray_X.sum()),
        "precision": float(1.0 - lie_P.mean()) if len(lie_P) else None,
        "coverages": list(COVERAGES),
        "signs": {name: describe(name) for name in dict.fromkeys([*whole, *chunks])},
    }


def score_rollouts(rollouts: Rollouts, name: str) -> np.ndarray:
    """Returns (K,), a sign of each rollout: where chunks have it, the worst one up to the payment."""
    value = rollouts.sign[name]
    if value.ndim == 1:
        return value
    counts_KN = np.arange(value.shape[1]) <= rollouts.paid_in_K[:, None]
    return np.where(counts_KN, value, -np.inf).max(axis=1)


def _stack(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns (X, C): what is known when a rollout is paid."""
    return np.stack([score for name, score in scores.items() if not name.startswith(REFRESHED)], axis=1)


def _enough(lie_X: np.ndarray) -> bool:
    return min(int(lie_X.sum()), int((~lie_X).sum())) >= detection.FEWEST
