"""Checks the contract of a bundle: it acts as the policy does, or it is not written.

Recorded frames go through the policy, as training and evaluation run it (``vla.policy``), and through the bundle,
as a robot opens it (``Robot.load``): instructions as text, frames as the camera gave them, greedy and sampled.
Tokens and actions have to be equal in every slot. Weights are then compared bit by bit, because recorded frames
do not exercise all of them: no instruction has every word.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import safetensors

from wovr_jax.core.disk import read_json
from wovr_jax.data.episodes import EpisodeSource
from wovr_jax.data.senses import ONE_CAMERA, Senses
from wovr_jax.export.program import look
from wovr_jax.export.robot import RECIPE, STATISTICS, WEIGHTS, Answer, Robot
from wovr_jax.export.source import Policy
from wovr_jax.policy import vla
from wovr_jax.weights import native

CLOSE = 1e-5
"""Largest difference of two actions that count as equal. Their range is 2, and decoding is a few float32 steps, which
two compiled programs may round differently."""
CLOSE_LOGP = 1e-3
"""The same for log-probabilities, which are sums over a network's whole width."""


class ContractError(ValueError):
    """Tells where a bundle first does something else than its policy."""


@dataclasses.dataclass(frozen=True)
class Recorded:
    """K recorded frames to replay.

    Attributes:
      frame_KHWC: uint8, as the camera gave them.
      instruction_K: what the robot was asked to do.
      where_K: episode and step of each frame, for messages.
    """

    frame_KHWC: np.ndarray
    instruction_K: tuple[str, ...]
    where_K: tuple[str, ...]


def choose_frames(folder: str | os.PathLike, count: int, chunk: int, senses: Senses = ONE_CAMERA) -> Recorded:
    """Returns ``count`` frames from the beginnings of chunks, spread over a folder's episodes and their length.

    Args:
      folder: the episodes; those of a run are mosaics already, where it has several senses.
      count: how many frames.
      chunk: actions of a chunk.
      senses: what the policy takes.

    Raises:
      EpisodesError: episodes without what the policy senses.
    """
    source = EpisodeSource(folder)
    frames, instructions, where = [], [], []
    for i, index in enumerate(np.linspace(0, len(source) - 1, count).round().astype(int)):
        episode = source[index]
        height, width = episode.frame_SHWC.shape[1:3]
        if width != senses.width(height):
            episode = senses.compose_episode(episode, f"{folder}, episode {index}")
        # The i-th frame is from the i-th chunk, in turn, so that grasps and releases occur and not only first frames.
        step = chunk * (i % max(len(episode.action_SA) // chunk, 1))
        frames.append(episode.frame_SHWC[step])
        instructions.append(episode.instruction)
        where.append(f"episode {index}, step {step}, {episode.instruction!r}")
    return Recorded(np.stack(frames), tuple(instructions), tuple(where))


def check(folder: pathlib.Path, policy: Policy, frames: Recorded, batch: int = 16) -> dict[str, Any]:
    """Compares a bundle with its policy; returns what was compared and how far apart it was, for the manifest.

    Args:
      folder: the bundle.
      policy: the policy that it was made from.
      frames: the frames to replay.
      batch: frames at once.

    Raises:
      ContractError: at the first difference.
    """
    # Greedy answers check the network; sampled ones also that seeds and temperature enter in the same way.
    temperatures = (0.0, policy.temperature)
    wanted = [_by_policy(policy, frames, temperature, batch) for temperature in temperatures]
    # Only now: the policy's own weights are freed, and the device need not hold both.
    robot = Robot.load(folder)
    measured = {}
    for temperature, want in zip(temperatures, wanted, strict=True):
        got = _by_robot(robot, frames, temperature, batch)
        how = f"sampled at temperature {temperature:g}" if temperature else "greedy"
        measured[how] = compare(how, frames, want, got)
    for name, content in ((RECIPE, policy.recipe()), (STATISTICS, policy.statistics)):
        # Through JSON, as the file gives it back: tuples are lists then.
        if read_json(folder / name) != json.loads(json.dumps(content)):
            raise ContractError(f"{name} does not say what the policy says. Nothing was written.")
    _compare_weights(folder / WEIGHTS, policy)
    return {
        "frames": len(frames.where_K),
        "recorded": policy.recorded.parent.name,
        "platform": jax.default_backend(),
        "differences": measured,
    }


def compare(how: str, frames: Recorded, want: Answer, got: Answer) -> dict[str, float]:
    """Returns the largest differences of two answers to the same frames.

    Args:
      how: how the tokens were drawn, for messages.
      frames: the K frames.
      want: the policy's answer.
      got: the bundle's answer.

    Raises:
      ContractError: with the number of slots that differ, the largest difference and the first slot.
    """
    # Written as "not close" and not as "far", so that NaN is a difference.
    far_KTA = np.abs(want.action_BTA - got.action_BTA)
    # A token decides its action, so equal actions with other tokens are luck of a coarse statistic.
    wrong_KTA = (want.token_BTA != got.token_BTA) | ~(far_KTA <= CLOSE)
    if wrong_KTA.any():
        k, t, a = np.argwhere(wrong_KTA)[0]
        raise ContractError(
            f"{how}: the bundle's actions are not the policy's in {wrong_KTA.sum()} of {wrong_KTA.size} slots, by up "
            f"to {np.nanmax(far_KTA):.3g}. They part first at frame {k} ({frames.where_K[k]}), step {t} of the chunk, "
            f"dimension {a}: policy {want.action_BTA[k, t, a]:.6g} (token {want.token_BTA[k, t, a]}), "
            f"bundle {got.action_BTA[k, t, a]:.6g} (token {got.token_BTA[k, t, a]}). Nothing was written."
        )
    # Tokens can agree by luck where one is much likelier than all others; its log-probability then still differs.
    logp = float(np.abs(want.logp_BTA - got.logp_BTA).max())
    if not logp <= CLOSE_LOGP:
        raise ContractError(
            f"{how}: the actions agree, the log-probabilities differ by up to {logp:.3g}, more than {CLOSE_LOGP}: "
            "this is not the same network. Nothing was written."
        )
    return {"action": float(far_KTA.max()), "logp": logp}


def _by_policy(policy: Policy, frames: Recorded, temperature: float, batch: int) -> Answer:
    """Returns the answers of the policy as it was trained; its weights are freed afterwards."""
    params = native.unflatten({name.replace(".", "/"): leaf for name, leaf in policy.weights().items()})

    @jax.jit
    def act(params: Any, frame_BHWC: Any, prompt_BL: Any, seed_B: Any) -> Any:
        run = vla.policy(policy.cfg, params, policy.codec, temperature)
        seen, state_BR = look(policy.cfg, policy.image, frame_BHWC)
        return run(seen, prompt_BL, jax.vmap(jax.random.key)(seed_B), state_BR)

    def answer(frame_BHWC: np.ndarray, instructions: tuple[str, ...], seed_B: np.ndarray) -> Answer:
        # By the policy's own tokenizer, not by the recipe's table, so that the table is checked too.
        prompt_BL = np.stack([policy.tokens(text) for text in instructions])
        token, logp, action = jax.device_get(act(params, frame_BHWC, prompt_BL, seed_B))
        return Answer(action, token, logp)

    return _in_batches(answer, frames, batch)


def _by_robot(robot: Robot, frames: Recorded, temperature: float, batch: int) -> Answer:
    """Returns the answers of an opened bundle."""

    def answer(frame_BHWC: np.ndarray, instructions: tuple[str, ...], seed_B: np.ndarray) -> Answer:
        return robot.act(frame_BHWC, instructions, seeds=seed_B, temperature=temperature)

    return _in_batches(answer, frames, batch)


def _in_batches(answer: Callable[..., Answer], frames: Recorded, batch: int) -> Answer:
    """Returns the answers to all frames, with seed k for frame k.

    Args:
      answer: ``answer(frame_BHWC, instructions, seed_B)``.
      frames: the K frames.
      batch: frames at once.
    """
    count = len(frames.where_K)
    # All batches have one size, the last one filled up from the beginning, so that one program is compiled.
    parts = []
    for low in range(0, count, batch):
        row_B = np.arange(low, low + min(batch, count)) % count
        texts = tuple(frames.instruction_K[row] for row in row_B)
        parts.append(answer(frames.frame_KHWC[row_B], texts, row_B.astype(np.uint32)))
    # (batch, T, A) of each part -> (K, T, A), without the rows that filled the last batch up.
    whole = [np.concatenate([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(Answer)]
    return Answer(*(array[:count] for array in whole))


def _compare_weights(file: pathlib.Path, policy: Policy) -> None:
    """Compares every leaf of the bundle with the policy's, bit by bit."""
    with safetensors.safe_open(file, framework="numpy") as weights:
        left = set(weights.keys())
        for name, leaf in policy.leaves():
            held = weights.get_tensor(name) if name in left else None
            if held is None or held.dtype != leaf.dtype or held.shape != leaf.shape:
                raise ContractError(f"weights: {name} is not in the bundle as the policy has it. Nothing was written.")
            # As bytes: -0 and 0 are equal as numbers, and NaN is not equal to itself.
            wrong = np.asarray(leaf).reshape(-1).view(np.uint8) != held.reshape(-1).view(np.uint8)
            if wrong.any():
                count = np.unique(np.flatnonzero(wrong) // leaf.dtype.itemsize).size
                raise ContractError(
                    f"weights: {name} differs from the policy's in {count} of {leaf.size} numbers, which no recorded "
                    "frame shows. Nothing was written."
                )
            left.remove(name)
    # What the program does not name it does not use, but a reader of the file would take it for the policy's.
    if left:
        raise ContractError(f"weights: {min(left)} is in the bundle and not in the policy. Nothing was written.")
