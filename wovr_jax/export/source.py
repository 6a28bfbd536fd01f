"""Where a policy comes from: a run folder or imported weights, with everything that belongs to its actions.

Both are only read. Weights come leaf by leaf and as often as they are asked for, so that an export never holds
more than one copy of them and a leaf.
"""

from __future__ import annotations

import dataclasses
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
from wovr_jax.policy import processing, release, vla
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.processing import Processing
from wovr_jax.policy.tokenizer import Tokenizer
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.weights import native
from wovr_jax.weights.safetensors import Fact

BASE, DEMONSTRATIONS = "sft", "demonstrations"
"""Stages of a run: its base policy, and the episodes whose statistics its actions have."""


class SourceError(ValueError):
    """A folder or file that holds no policy that can be exported; the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy and what its actions depend on.

    Attributes:
      name: what a reader calls it, e.g. ``"runs/pace, grpo-2"``.
      cfg: the network.
      facts: dotted path -> shape and dtype of every leaf.
      leaves: path and value of every leaf, one after another.
      statistics: the content of ``dataset_statistics.json``.
      key: the entry of it that the policy was trained with.
      tokens: instruction -> (L,) int32 prompt tokens.
      prompt: the same as the recipe has it, see ``robot.prompter``.
      frame: (H, W, 3) of the camera's frames, uint8.
      image: what is done to them before the network.
      temperature: of the sampling in training.
      recorded: folder of episodes to replay.
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

    @property
    def codec(self) -> Codec:
        """Between tokens and environment actions."""
        return Codec.from_statistics(self.statistics[self.key]["action"])

    def weights(self) -> dict[str, jax.Array]:
        """All leaves on the device, by dotted path."""
        return {name: jax.device_put(leaf) for name, leaf in self.leaves()}

    def recipe(self) -> dict[str, Any]:
        """The content of ``recipe.json``: everything around the network that decides an action."""
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
        }


def from_run(folder: str | os.PathLike, round_: int | None = None, episodes: str | os.PathLike | None = None) -> Policy:
    """The policy of a run folder.

    Args:
      folder: the run.
      round_: which policy: 0 is the base policy, k the policy after k rounds. By default the last one.
      episodes: to replay; by default the newest that the run collected.

    Raises:
      SourceError: no run folder, or no such policy in it.
    """
    folder = pathlib.Path(folder).expanduser().absolute()
    settings = _settings(folder)
    stage = _stage(folder, round_)
    cfg = config.from_dict(VLAConfig, settings["policy"], f"{folder / 'config.json'}: policy")
    suite = (settings.get("libero") or {}).get("suite", "")
    words, key = Tokenizer.libero() if suite else Tokenizer.tabletop(), suite or "tabletop"
    if words.vocab_size != cfg.vocab_size:
        raise SourceError(
            f"{folder}: its policy has {cfg.vocab_size} token ids, the embedded tokenizer {words.vocab_size}. "
            "Only runs with the embedded tokenizer can be exported from their folder."
        )
    demonstrations = folder / "stages" / DEMONSTRATIONS / "episodes"
    like = vla.network(cfg).shapes()
    facts = {name: Fact(tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in dotted(like).items()}
    host = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)

    def leaves() -> Iterator[tuple[str, np.ndarray]]:
        held = dotted(checkpoint.restore(folder / "stages" / stage / "policy", host))
        for name in facts:
            yield name, held.pop(name)  # no longer held here once it is somewhere else

    return Policy(
        name=f"{folder.name}, {stage}",
        cfg=cfg,
        facts=facts,
        leaves=leaves,
        statistics=normalize.statistics(disk.read(demonstrations), key),
        key=key,
        tokens=words.prompt,
        prompt={"kind": "words", **dataclasses.asdict(words)},
        frame=tuple(disk.manifest(demonstrations)["frame"]),
        image=Processing.rlinf(cfg.dino.image),
        temperature=float(settings["temperature"]),
        recorded=pathlib.Path(episodes or _recorded(folder) or demonstrations).expanduser().absolute(),
    )


def from_import(
    card: str | os.PathLike,
    episodes: str | os.PathLike,
    *,
    key: str | None = None,
    instructions: Sequence[str] = (),
    temperature: float = 1.6,
) -> Policy:
    """An imported policy, with the tokenizer and statistics of its release.

    Args:
      card: its ``policy.json``, with ``policy.rest`` beside it.
      episodes: recorded by the robot or simulator it is for; they tell the size of the camera's frames.
      key: of the statistics; needed where the release has several.
      instructions: that the policy will be asked for, besides those of the episodes.
      temperature: of the sampling in training (WoVR and RLinf: 1.6).

    Raises:
      SourceError: what the import kept is not there.
      FileError, EpisodesError, StatisticsError: of the files themselves.
    """
    card = pathlib.Path(card).expanduser().absolute()
    cfg, weights, _ = native.open_native(card, verify=True)
    if not isinstance(cfg, VLAConfig):
        raise SourceError(f"{card} is a {type(cfg).__name__}, not a policy.")
    files = card.with_name(folder_name(card.stem)) / FILES
    if not files.is_dir():
        raise SourceError(f"{files} is missing: it holds the release's tokenizer and statistics. Import it again.")
    told = disk.manifest(episodes)
    asked = [*(task["instruction"] for task in told["tasks"].values()), *instructions]
    tokens, prompt = _table(files, cfg, asked)
    name, entry = _statistics(files, key)
    return Policy(
        name=f"{card.parent.name}/{card.name}",
        cfg=cfg,
        facts={path.replace("/", "."): fact for path, fact in weights.facts.items()},
        leaves=lambda: ((path.replace("/", "."), weights.read(path)) for path in weights.facts),
        statistics={name: entry},
        key=name,
        tokens=tokens,
        prompt=prompt,
        frame=tuple(told["frame"]),
        image=processing.of_recipe(cfg.recipe, cfg.dino.image),
        temperature=temperature,
        recorded=pathlib.Path(episodes).expanduser().absolute(),
    )


def _table(files: pathlib.Path, cfg: VLAConfig, asked: Sequence[str]) -> tuple[Callable, dict[str, Any]]:
    """Prompt tokens of the instructions, all as wide as the longest, and how a recipe says them."""
    width = max(len(release.ReleaseTokenizer(files, cfg).encode(text)) for text in asked)
    tokens = release.ReleaseTokenizer(files, cfg, width).prompt
    rows = {" ".join(text.lower().split()): tokens(text).tolist() for text in asked}
    return tokens, {"kind": "table", "length": width, "rows": rows}


def _statistics(files: pathlib.Path, key: str | None) -> tuple[str, dict[str, Any]]:
    """Name and content of an entry of the release's statistics."""
    entry = release.statistics(files, key)
    own = files / release.STATISTICS
    held = read_json(own if own.is_file() else files / release.CONFIG)
    table = held if own.is_file() else held["norm_stats"]
    return next(name for name, there in table.items() if there == entry), entry


def dotted(params: dict[Any, Any]) -> dict[str, Any]:
    """Dotted path -> leaf of nested parameters."""
    return {path.replace("/", "."): leaf for path, leaf in native.flatten(params).items()}


def _settings(folder: pathlib.Path) -> dict[str, Any]:
    try:
        settings = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder} is not a run folder: its config.json cannot be read ({error}).") from error
    if not isinstance(settings, dict) or not {"policy", "temperature"} <= settings.keys():
        raise SourceError(f"{folder / 'config.json'} is not the configuration of a run: it has no policy in it.")
    return settings


def _stage(folder: pathlib.Path, round_: int | None) -> str:
    """The stage that made the policy of a round."""
    done = {mark.parent.name for mark in folder.glob("stages/*/done.json")}
    there = {0: BASE} if BASE in done else {}
    there |= {int(name.removeprefix("grpo-")): name for name in done if re.fullmatch(r"grpo-\d+", name)}
    if not there or (round_ is not None and round_ not in there):
        wanted = "a policy" if round_ is None else f"a policy of round {round_}"
        has = ", ".join(f"round {k} ({there[k]})" for k in sorted(there)) or "no finished policy"
        raise SourceError(f"{folder}: expected {wanted}, found {has}. Let the run go on, or choose another.")
    return there[max(there) if round_ is None else round_]


def _recorded(folder: pathlib.Path) -> pathlib.Path | None:
    """The newest true rollouts of a run; none before its first collection."""
    done = sorted(folder.glob("stages/collect-*/done.json"), key=lambda mark: int(mark.parent.name.split("-")[1]))
    return done[-1].parent / "episodes" if done else None
