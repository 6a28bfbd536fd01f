"""Opens the policy of a run folder or of imported weights, with everything that its actions depend on.

Both are only read. Weights come leaf by leaf and as often as they are asked for, so that an export never holds
more than one copy of them and a leaf.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from wovr_jax.bridge.rest import FILES, folder_name
from wovr_jax.core import checkpoint, config
from wovr_jax.core.disk import read_json
from wovr_jax.data import episodes as disk
from wovr_jax.data import normalize
from wovr_jax.data.senses import ONE_CAMERA, Senses, make_senses
from wovr_jax.policy import processing, vla
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.processing import Processing
from wovr_jax.policy.tokenizer import ReleaseTokenizer, Tokenizer
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.weights import native
from wovr_jax.weights.safetensors import Fact
from wovr_jax.weights.source import open_native

BASE, DEMONSTRATIONS = "sft", "demonstrations"
"""Names of a run's stages: its base policy, and the episodes whose statistics scale its actions."""


class SourceError(ValueError):
    """Tells why a folder or file holds no policy that can be exported, and what is missing."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy and what its actions depend on.

    Attributes:
      name: its name for readers, e.g. ``"pace, grpo-2"``.
      cfg: the network.
      facts: dotted path -> shape and dtype of every leaf.
      leaves: gives path and value of every leaf, one after another, as often as it is called.
      statistics: the content of ``dataset_statistics.json``.
      key: the entry of ``statistics`` that the policy was trained with.
      tokens: instruction -> (L,) int32 prompt tokens.
      prompt: ``tokens`` as the recipe describes it, see ``robot.make_prompter``.
      frame: (H, W, 3), the shape of the uint8 frames that it takes, a camera's or mosaics of its senses.
      image: what is done to a frame before the network.
      temperature: temperature of the sampling in training.
      recorded: folder of episodes to replay.
      senses: what it takes of a robot.
    """

    name: str
    cfg: VLAConfig
    facts: dict[str, Fact]
    leaves: Callable[[], Iterator[tuple[str, np.ndarray]]]
    statistics: dict[str, Any]
    key: str
    tokens: Callable[[str], np.ndarray]
    prompt: dict[str, Any]
    frame: tuple[int, int, int]
    image: Processing
    temperature: float
    recorded: pathlib.Path
    senses: Senses = ONE_CAMERA

    @property
    def codec(self) -> Codec:
        """The codec between tokens and environment actions."""
        return Codec.from_statistics(self.statistics[self.key]["action"])

    def weights(self) -> dict[str, jax.Array]:
        """Returns all leaves on the device, by dotted path."""
        return {name: jax.device_put(leaf) for name, leaf in self.leaves()}

    def recipe(self) -> dict[str, Any]:
        """Returns the content of ``recipe.json``: everything around the network that decides an action."""
        height, width, _ = self.frame
        return {
            "image": {"height": height, "width": width, "dtype": "uint8", **dataclasses.asdict(self.image)},
            "prompt": self.prompt,
            "sequence": self.cfg.recipe,
            "action": {
                "key": self.key,
                "chunk": self.cfg.chunk,
                "dim": self.cfg.action_dim,
                "gripper": self.codec.gripper,
                "convention": "environment: six deltas, then the gripper, -1 open and +1 closed",
            },
            "trained_at_temperature": self.temperature,
        } | ({} if self.senses.plain else {"senses": dataclasses.asdict(self.senses)})


def from_run(folder: str | os.PathLike, round_: int | None = None, episodes: str | os.PathLike | None = None) -> Policy:
    """Returns the policy of a run folder.

    Args:
      folder: the run.
      round_: which policy: 0 is the base policy, k the policy after k rounds. By default the last one.
      episodes: the episodes to replay; by default the newest that the run collected.

    Raises:
      SourceError: when it is no run folder, there is no such policy in it, or the release that it began with is gone.
    """
    folder = pathlib.Path(folder).expanduser().absolute()
    settings = _read_settings(folder)
    stage = find_stage(folder, round_)
    # Only the parts that are needed are read of config.json, so that a run of an older recipe can still be exported.
    cfg = config.from_dict(VLAConfig, settings["policy"], f"{folder / 'config.json'}: policy")
    # The vocabulary depends on the environment, and so does the entry's name in the statistics.
    libero, robot = settings.get("libero") or {}, settings.get("recorded") or {}
    key = libero.get("suite") or robot.get("name") or ("relay" if settings.get("relay") else "tabletop")
    demonstrations = folder / "stages" / DEMONSTRATIONS / "episodes"
    recorded = pathlib.Path(episodes or _newest_rollouts(folder) or demonstrations).expanduser().absolute()
    # A run that begins with a release need not have demonstrations, nor any episode where its start states are given.
    bounds = None
    if demonstrations.is_dir():
        manifest = disk.manifest(demonstrations)
        (height, width, channels), bounds = manifest["frame"], manifest["meta"].get("proprio")
    else:
        height, width, channels = libero["scene"]["size"], libero["scene"]["size"], 3
    senses = make_senses(cfg.images, cfg.proprio, width - cfg.images * height if cfg.proprio else 0, bounds)
    if release := libero.get("release") or robot.get("release"):
        asked = robot["instructions"] if robot else _list_instructions(libero["suite"], recorded)
        tokens, prompt = _make_table(_find_release(folder, release), cfg, asked)
    else:
        tokens, prompt = _use_words(folder, cfg, "libero" if libero else robot.get("words", key))
    if libero.get("release"):
        key, entry = _find_statistics(_find_release(folder, libero["release"]), key)
        statistics = {key: entry}
    else:
        # Computed again as the run did it: from the demonstrations, never from later episodes.
        statistics = normalize.statistics(disk.read(demonstrations), key)
    shapes = vla.network(cfg).shapes()
    facts = {name: Fact(tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in flatten_dotted(shapes).items()}
    # Numpy arrays as templates bring the checkpoint to the host; empty ones cost no memory until they are written.
    host = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)

    def leaves() -> Iterator[tuple[str, np.ndarray]]:
        held = flatten_dotted(checkpoint.restore(folder / "stages" / stage / "policy", host))
        for name in facts:
            # Given away: once a leaf is on the device or the disk, the host's memory of it is free.
            yield name, held.pop(name)

    return Policy(
        name=f"{folder.name}, {stage}",
        cfg=cfg,
        facts=facts,
        leaves=leaves,
        statistics=statistics,
        key=key,
        tokens=tokens,
        prompt=prompt,
        frame=(height, width, channels),
        image=Processing.rlinf(cfg.dino.image),
        temperature=float(settings["temperature"]),
        recorded=recorded,
        senses=senses,
    )


def _list_instructions(suite: str, recorded: pathlib.Path) -> Sequence[str]:
    """Returns the instructions of a suite; where LIBERO is not installed, those that recorded episodes show."""
    from wovr_jax.sim.libero.arena import instructions  # whoever exports a robot's policy need not have all of it
    from wovr_jax.sim.libero.setup import LiberoError

    try:
        return instructions(suite)
    except LiberoError:
        if not recorded.is_dir():
            raise
        return [task["instruction"] for task in disk.manifest(recorded)["tasks"].values()]


def _find_release(folder: pathlib.Path, release: str) -> pathlib.Path:
    """Returns the folder of the release that a run began with; a relative one begins where the command is given."""
    if not (files := pathlib.Path(release).expanduser()).is_dir():
        raise SourceError(
            f"{folder} began with the release whose tokenizer lies in {release}, and that folder is not here. Give the "
            "command where the run was started, or put the folder back."
        )
    return files


def _use_words(folder: pathlib.Path, cfg: VLAConfig, name: str) -> tuple[Callable, dict[str, Any]]:
    """Returns prompt tokens in the package's own words of that name, as a function and as a recipe has them."""
    words = getattr(Tokenizer, name)()
    if words.vocab_size != cfg.vocab_size:
        raise SourceError(
            f"{folder}: its policy has {cfg.vocab_size} token ids, the embedded tokenizer {words.vocab_size}, and its "
            "settings name no release (libero.release, recorded.release) whose tokenizer has as many."
        )
    return words.prompt, {"kind": "words", **dataclasses.asdict(words)}


def from_import(
    card: str | os.PathLike,
    episodes: str | os.PathLike,
    *,
    key: str | None = None,
    instructions: Sequence[str] = (),
    temperature: float = 1.6,
) -> Policy:
    """Returns an imported policy, with the tokenizer and statistics of its release.

    Args:
      card: its ``policy.json``, with ``policy.rest`` beside it.
      episodes: episodes recorded by the robot or simulator that it is for; their frames have the camera's size.
      key: name of the entry of the statistics; needed where the release has several.
      instructions: what the policy will be asked for, besides the episodes' instructions.
      temperature: temperature of the sampling in training (WoVR and RLinf: 1.6).

    Raises:
      SourceError: when the files that the import kept are missing.
      FileError, EpisodesError, StatisticsError: when a file is damaged or not as expected.
    """
    card = pathlib.Path(card).expanduser().absolute()
    # Verified once, here: leaves are then read many times.
    cfg, weights, _ = open_native(card, verify=True)
    if not isinstance(cfg, VLAConfig):
        raise SourceError(f"{card} is a {type(cfg).__name__}, not a policy.")
    # Beside the card, because an import folder may be moved as a whole.
    files = card.with_name(folder_name(card.stem)) / FILES
    if not files.is_dir():
        raise SourceError(f"{files} is missing: it holds the release's tokenizer and statistics. Import it again.")
    manifest = disk.manifest(episodes)
    asked = [*(task["instruction"] for task in manifest["tasks"].values()), *instructions]
    # An instruction that no episode has can be added; others are refused by the bundle.
    tokens, prompt = _make_table(files, cfg, asked)
    name, entry = _find_statistics(files, key)
    if cfg.proprio and "proprio" not in entry:
        raise SourceError(
            f"{files}: the policy takes the robot's state, and the statistics {name!r} have no 'proprio'."
        )
    height, width, channels = manifest["frame"]
    senses = make_senses(cfg.images, cfg.proprio, height // 8 if cfg.proprio else 0, entry.get("proprio"))
    return Policy(
        name=f"{card.parent.name}/{card.name}",
        cfg=cfg,
        # Dots, as leaves are named in weights.safetensors.
        facts={path.replace("/", "."): fact for path, fact in weights.facts.items()},
        leaves=lambda: ((path.replace("/", "."), weights.read(path)) for path in weights.facts),
        statistics={name: entry},
        key=name,
        tokens=tokens,
        prompt=prompt,
        frame=(height, width if senses.plain else senses.width(height), channels),
        image=processing.of_recipe(cfg.recipe, cfg.dino.image),
        temperature=temperature,
        recorded=pathlib.Path(episodes).expanduser().absolute(),
        senses=senses,
    )


def _make_table(files: pathlib.Path, cfg: VLAConfig, asked: Sequence[str]) -> tuple[Callable, dict[str, Any]]:
    """Returns the instructions' prompt tokens, all as wide as the longest, as a function and as a recipe has them."""
    # A robot has no transformers library, so the release's tokenizer is asked now and its answers are kept.
    # RLinf pads to 128 tokens; padding changes answers by rounding only, and a shorter prompt costs less.
    released = functools.partial(ReleaseTokenizer, files, cfg.vocab_size, stop=cfg.stop, pad=cfg.pad)
    width = max(len(released().encode(text)) for text in asked)
    tokens = released(length=width).prompt
    # The keys that `robot.make_prompter` looks up.
    rows = {" ".join(text.lower().split()): tokens(text).tolist() for text in asked}
    return tokens, {"kind": "table", "length": width, "rows": rows}


def _find_statistics(files: pathlib.Path, key: str | None) -> tuple[str, dict[str, Any]]:
    """Returns name and content of an entry of the release's statistics."""
    entry = normalize.load(files, key)
    # The key may be short for the name (libero_goal for libero_goal_no_noops), and clients are told the name.
    file = files / normalize.FILE
    table = read_json(file) if file.is_file() else None
    if table is None:
        table = read_json(files / normalize.CONFIG)["norm_stats"]
    return next(name for name, candidate in table.items() if candidate == entry), entry


def flatten_dotted(params: dict[Any, Any]) -> dict[str, Any]:
    """Returns dotted path -> leaf of nested parameters."""
    return {path.replace("/", "."): leaf for path, leaf in native.flatten(params).items()}


def _read_settings(folder: pathlib.Path) -> dict[str, Any]:
    try:
        settings = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{folder} is not a run folder: its config.json cannot be read ({error}). A bundle has a manifest.json."
        ) from error
    # Any config.json parses; a run's has these two.
    if not isinstance(settings, dict) or not {"policy", "temperature"} <= settings.keys():
        raise SourceError(f"{folder / 'config.json'} is not the configuration of a run: it has no policy in it.")
    return settings


def find_stage(folder: pathlib.Path, round_: int | None) -> str:
    """Returns the name of the stage that made the policy of a round, by default of the last one."""
    # Only finished stages count: a stage in the making has a policy of some step in the middle.
    done = {mark.parent.name for mark in folder.glob("stages/*/done.json")}
    stages = {0: BASE} if BASE in done else {}
    stages |= {int(name.removeprefix("grpo-")): name for name in done if re.fullmatch(r"grpo-\d+", name)}
    if not stages or (round_ is not None and round_ not in stages):
        wanted = "a policy" if round_ is None else f"a policy of round {round_}"
        has = ", ".join(f"round {k} ({stages[k]})" for k in sorted(stages)) or "no finished policy"
        raise SourceError(f"{folder}: expected {wanted}, found {has}. Let the run go on, or choose another.")
    return stages[max(stages) if round_ is None else round_]


def _newest_rollouts(folder: pathlib.Path) -> pathlib.Path | None:
    """Returns the folder of a run's newest true rollouts, None before its first collection."""
    done = sorted(folder.glob("stages/collect-*/done.json"), key=lambda mark: int(mark.parent.name.split("-")[1]))
    return done[-1].parent / "episodes" if done else None
