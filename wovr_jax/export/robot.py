"""Opens a robot bundle: frames and instructions go in, environment actions come out.

::

    bundle/
      manifest.json            size and SHA-256 of every other file, versions, what the contract measured
      policy.stablehlo         the whole policy as one program, written by jax.export for cpu, cuda and tpu
      weights.safetensors      its first argument, one tensor a leaf
      dataset_statistics.json  its second, the quantiles that turn tokens into actions, as OpenVLA's file of that name
      recipe.json              frame size, prompt tokens, chunk, gripper, temperature of training

Network, image processing and action codec are inside the program. This file therefore needs jax, numpy,
safetensors and flatbuffers, and of this package only the tokenizer, which is numpy: a robot's computer can
install ``wovr_jax`` without its dependencies.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors
from jax import export as jax_export

from wovr_jax.policy.tokenizer import Tokenizer

# A change of any of these names, or of a key in a JSON file, is a new SCHEMA: bundles lie on robots for years.
FORMAT, SCHEMA = "wovr_jax robot bundle", 1
MANIFEST, PROGRAM, WEIGHTS = "manifest.json", "policy.stablehlo", "weights.safetensors"
STATISTICS, RECIPE = "dataset_statistics.json", "recipe.json"
FILES = (PROGRAM, WEIGHTS, STATISTICS, RECIPE)

Program = Callable[..., Any]
"""``program(weights, statistics, frame_BHWC, prompt_BL, seed_B, temperature) -> {action, token, logp}``, see
``export.program``."""


class BundleError(ValueError):
    """Tells what is wrong with a bundle (missing, damaged, too new), or with what it was asked to act on."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a policy answers to B frames, as numpy arrays on the host: T actions of A numbers for each frame.

    Attributes:
      action_BTA: float32 environment actions: six deltas, then the gripper, -1 open and +1 closed.
      token_BTA: int32 in [0, 256), the tokens that the actions were decoded from.
      logp_BTA: float32 log-probability of each token, at the temperature of the sampling; at temperature 1 where the
        likeliest token was taken.
    """

    action_BTA: np.ndarray
    token_BTA: np.ndarray
    logp_BTA: np.ndarray


class Robot:
    """A policy that is ready to act.

    Args:
      program: the policy; it is compiled here, once for each batch size.
      weights: name -> leaf, on the device or the host.
      statistics: the content of ``dataset_statistics.json``.
      recipe: the content of ``recipe.json``.
      about: facts on the policy for whoever asks; a bundle's manifest.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, Any],
        statistics: Mapping[str, Any],
        recipe: Mapping[str, Any],
        about: Mapping[str, Any],
    ):
        self.recipe, self.about = dict(recipe), dict(about)
        self.statistics = dict(statistics)
        # An opened program is not compiled yet, whichever way it came.
        self._program = jax.jit(program)
        # Flat and by name: the program was exported with a dictionary as its first argument.
        self._weights = dict(weights)
        self._quantiles = jax.device_put(quantiles(statistics, recipe["action"]["key"]))
        # A robot asks for the same few instructions thousands of times.
        self._prompt = functools.lru_cache(maxsize=256)(make_prompter(recipe["prompt"]))

    @classmethod
    def load(cls, folder: str | os.PathLike, *, verify: bool = True) -> Robot:
        """Opens a bundle and puts its weights on the device.

        Args:
          folder: the bundle.
          verify: whether to compare every file's SHA-256 too, which reads all of it.

        Raises:
          BundleError: naming the file that is missing, changed or not understood.
        """
        folder = pathlib.Path(folder).expanduser()
        manifest = check(folder, verify=verify)
        program = jax_export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
        # A program names its platforms "cuda" and "rocm"; jax calls the backend of both "gpu".
        platforms = set(program.platforms) | ({"gpu"} if {"cuda", "rocm"} & set(program.platforms) else set())
        if jax.default_backend() not in platforms:
            raise BundleError(
                f"{folder / PROGRAM} runs on {', '.join(program.platforms)}, this machine's device is "
                f"{jax.default_backend()}. Export it with that platform, or set JAX_PLATFORMS."
            )
        # Leaf by leaf to the device, so that the host never holds all of them.
        with safetensors.safe_open(folder / WEIGHTS, framework="numpy") as file:
            weights = {name: jax.device_put(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (no mapping)
        statistics, recipe = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (STATISTICS, RECIPE))
        return cls(program.call, weights, statistics, recipe, manifest)

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(H, W, 3), the shape of the uint8 frames that the policy takes: a camera's, or mosaics of its senses."""
        image = self.recipe["image"]
        return image["height"], image["width"], 3

    @property
    def camera_shape(self) -> tuple[int, int, int]:
        """(H, W, 3), the shape of a camera's uint8 frames."""
        height, width, _ = self.frame_shape
        # Of several senses they are a part of a mosaic, and square.
        return height, (height if "senses" in self.recipe else width), 3

    @property
    def chunk_shape(self) -> tuple[int, int]:
        """(T, A), the shape of a chunk of actions."""
        return self.recipe["action"]["chunk"], self.recipe["action"]["dim"]

    def act(
        self,
        frame_BHWC: np.ndarray,
        instructions: Sequence[str],
        *,
        seeds: Sequence[int] | np.ndarray | None = None,
        temperature: float = 0.0,
    ) -> Answer:
        """Returns a chunk of actions for each frame.

        Args:
          frame_BHWC: uint8 frames of ``frame_shape``.
          instructions: an instruction for each frame.
          seeds: a seed in [0, 2**32) for each frame; equal seeds draw equal actions in any batch. By default 0, 1, ...
          temperature: 0 takes the likeliest tokens, anything above samples.

        Raises:
          BundleError: frames, instructions or seeds that do not fit.
        """
        frame_BHWC = np.asarray(frame_BHWC)
        batch = len(instructions)
        if frame_BHWC.dtype != np.uint8 or frame_BHWC.shape != (batch, *self.frame_shape) or not batch:
            raise BundleError(
                f"frames: expected uint8 {[batch, *self.frame_shape]} for {batch} instructions, "
                f"got {frame_BHWC.dtype} {list(frame_BHWC.shape)}."
            )
        # Fixed by default, so that the same question has the same answer.
        asked_B = np.arange(batch) if seeds is None else np.asarray(seeds)
        if asked_B.shape != (batch,):
            raise BundleError(f"seeds: expected {batch}, one a frame, got shape {list(asked_B.shape)}.")
        # A conversion would wrap -1 and cut 0.5, and draw for another seed without a word.
        if asked_B.dtype.kind not in "iu" or not (asked_B.min() >= 0 and asked_B.max() < 2**32):
            raise BundleError(f"seeds: expected whole numbers from 0 to 2**32 - 1, got {asked_B.tolist()}.")
        seed_B = asked_B.astype(np.uint32)
        prompt_BL = np.stack([self.prompt(text) for text in instructions])
        answer = self._program(
            self._weights, self._quantiles, frame_BHWC, prompt_BL, seed_B, np.float32(max(temperature, 0.0))
        )
        # One transfer for the three arrays.
        host = jax.device_get(answer)
        return Answer(host["action"], host["token"], host["logp"])

    def prompt(self, instruction: str) -> np.ndarray:
        """Returns the prompt tokens of an instruction, (L,) int32.

        Raises:
          BundleError: for an instruction that the policy has no tokens for.
        """
        try:
            return self._prompt(instruction)
        except ValueError as error:
            raise BundleError(str(error)) from error

    def hash_weights(self) -> str:
        """Returns the SHA-256 of all weights with their names, dtypes and shapes, the same from a bundle and a run."""
        digest = hashlib.sha256()
        for name in sorted(self._weights):
            # Leaf by leaf to the host: all of them at once may not fit.
            leaf = np.ascontiguousarray(self._weights[name])
            digest.update(f"{name} {leaf.dtype.name} {list(leaf.shape)}".encode())
            digest.update(leaf.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def warm(self, batch: int = 1) -> None:
        """Compiles for a batch size, so that the first real frames do not wait for it."""
        length = self.recipe["prompt"]["length"]
        # Any frame and any prompt will do; 1 is the begin token, which every prompt has.
        frame, prompt = np.zeros((batch, *self.frame_shape), np.uint8), np.ones((batch, length), np.int32)
        seed = np.zeros(batch, np.uint32)
        jax.block_until_ready(self._program(self._weights, self._quantiles, frame, prompt, seed, np.float32(0.0)))


def quantiles(statistics: Mapping[str, Any], key: str) -> dict[str, np.ndarray]:
    """Returns q01 and q99, (A,) float32, and mask, (A,) bool, of an entry of ``dataset_statistics.json``.

    Raises:
      BundleError: when the entry is missing or lacks them.
    """
    try:
        action = statistics[key]["action"]
        low, high = (np.asarray(action[name], np.float32) for name in ("q01", "q99"))
        # As in OpenVLA: without a mask every dimension is scaled.
        return {"q01": low, "q99": high, "mask": np.asarray(action.get("mask", [True] * len(low)), bool)}
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{STATISTICS}: the entry {key!r} lacks the action's q01 and q99 ({error!r}).") from error


def make_prompter(recipe: Mapping[str, Any]) -> Callable[[str], np.ndarray]:
    """Returns a function from an instruction to its prompt tokens, (L,) int32.

    Args:
      recipe: the recipe's ``prompt``. Its kind ``words`` takes any instruction in the words of the embedded tokenizer;
        ``table`` takes the instructions that the bundle was made for, with the tokens of the release's own tokenizer.
    """
    # Other lengths or words would shift every token's position, so all three come from the recipe.
    if recipe["kind"] == "words":
        return Tokenizer(tuple(recipe["words"]), recipe["length"], recipe["action_bins"]).prompt
    # A table: the release's tokenizer needs transformers, which a robot need not have.
    rows = {text: np.asarray(row, np.int32) for text, row in recipe["rows"].items()}

    def look_up(instruction: str) -> np.ndarray:
        # The rows' keys are in lower case with single spaces, see ``export.source``.
        row = rows.get(" ".join(instruction.lower().split()))
        if row is None:
            known = "; ".join(list(rows)[:10]) + ("; ..." if len(rows) > 10 else "")
            raise ValueError(f"instruction {instruction!r}: this policy was exported for {len(rows)}: {known}.")
        return row

    return look_up


def check(folder: pathlib.Path, *, verify: bool) -> dict[str, Any]:
    """Checks that a bundle's files are complete and as they were written; returns its manifest.

    Args:
      folder: the bundle.
      verify: whether to compare SHA-256 sums; otherwise only sizes.

    Raises:
      BundleError: naming the file that is missing, changed or not understood.
    """
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder} is not a robot bundle: there is no {MANIFEST} in it.")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, schema = manifest["files"], manifest["schema"]
    except (ValueError, TypeError, KeyError) as error:
        raise BundleError(f"{folder / MANIFEST} does not describe a robot bundle ({error!r}).") from error
    if manifest.get("format") != FORMAT or schema > SCHEMA:
        # A newer schema may mean something else by an old name, so it is not tried.
        raise BundleError(
            f"{folder / MANIFEST}: expected format {FORMAT!r} with schema up to {SCHEMA}, got "
            f"{manifest.get('format')!r} with {schema}. Update wovr_jax, or export the bundle again."
        )
    for name in FILES:
        path, expected = folder / name, files.get(name)
        if expected is None or not path.is_file():
            raise BundleError(f"{path} is missing, or the manifest does not list it. Copy the whole bundle again.")
        # The size first: it costs nothing, and a cut-off copy is the usual fault.
        if path.stat().st_size != expected["bytes"] or (verify and file_facts(path) != expected):
            raise BundleError(f"{path} is not the file that was exported: its size or SHA-256 is not the manifest's.")
    return manifest


def file_facts(path: pathlib.Path) -> dict[str, Any]:
    """Returns size and SHA-256 of a file, as the manifest has them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
