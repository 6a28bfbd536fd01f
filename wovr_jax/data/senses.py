"""What a robot senses, as the one picture that a run knows: two cameras and the state, joined to a mosaic.

Recordings keep cameras and state apart, in the robot's own units; ``core.pixels`` says what a mosaic is. This is the
only way from one to the other: for a run that reads recordings, and for the policy server that a robot asks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wovr_jax.core.pixels import make_mosaic, to_float, to_uint8
from wovr_jax.data.records import EpisodesError
from wovr_jax.types import Episode


@dataclasses.dataclass(frozen=True)
class Senses:
    """What a mosaic shows.

    Attributes:
      views: cameras, 1 or 2; the second is ``Episode.wrist_SHWC``.
      state: numbers of the robot's state.
      strip: pixels of the strip that shows them, 0 without a state.
      q01, q99: of each number of the state, in the robot's units: what is shown as -1 and 1. Beyond is cut off, as
        OpenVLA-OFT does it (``BOUNDS_Q99``).
    """

    views: int = 1
    state: int = 0
    strip: int = 0
    q01: tuple[float, ...] = ()
    q99: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        lengths = {len(self.q01), len(self.q99), self.state}
        if self.views not in (1, 2) or len(lengths) > 1 or bool(self.state) != bool(self.strip):
            raise ValueError(f"senses: expected 1 or 2 views, and bounds and a strip for a state, got {self}")

    @property
    def plain(self) -> bool:
        """Whether a picture of one camera is all there is."""
        return self.views == 1 and not self.state

    def width(self, height: int) -> int:
        """Returns the pixels of a mosaic's width."""
        return self.views * height + self.strip

    def scale(self, state_D: np.ndarray) -> np.ndarray:
        """Returns a state (..., D) in [-1, 1]."""
        # Quantiles, not extremes: one wild reading would press all others together. As actions are scaled
        # (``policy.actions``), but cut off: a joint may go beyond what training saw.
        low, high = np.asarray(self.q01, np.float32), np.asarray(self.q99, np.float32)
        return np.clip(2.0 * (state_D - low) / (high - low + 1e-8) - 1.0, -1.0, 1.0).astype(np.float32)

    def compose(self, frame_HWC: np.ndarray, wrist_HWC: np.ndarray | None, state_D: np.ndarray | None) -> np.ndarray:
        """Returns the uint8 mosaic (..., H, W, 3) of uint8 pictures (..., H, H, 3) and a state (..., D)."""
        views = [to_float(view) for view in (frame_HWC, wrist_HWC)[: self.views]]
        return to_uint8(make_mosaic(views, None if state_D is None else self.scale(state_D), self.strip))

    def compose_episode(self, episode: Episode, where: str) -> Episode:
        """Returns an episode whose frames are mosaics; its state stays beside them.

        Raises:
          EpisodesError: it lacks a camera or the state, or they are of another size.
        """
        if self.plain:
            return episode
        shape = episode.frame_SHWC.shape
        has = {
            "frame": shape[1:] == (shape[1], shape[1], 3),
            "wrist": self.views < 2 or (episode.wrist_SHWC is not None and episode.wrist_SHWC.shape == shape),
            "state": not self.state or (episode.state_SD is not None and episode.state_SD.shape[1] == self.state),
        }
        if lacking := [name for name, fine in has.items() if not fine]:
            raise EpisodesError(
                f"{where}: expected square frames of {shape[1]} pixels of {self.views} cameras and a state of "
                f"{self.state} numbers; {', '.join(lacking)} is missing or of another size."
            )
        state_SD = episode.state_SD if self.state else None
        mosaic = self.compose(episode.frame_SHWC, episode.wrist_SHWC, state_SD)
        return dataclasses.replace(episode, frame_SHWC=mosaic, wrist_SHWC=None)


ONE_CAMERA = Senses()
"""What a policy of one picture takes."""


def read_senses(recipe: Mapping[str, Any]) -> Senses:
    """Returns the senses of a bundle's ``recipe.json``; an older one knows none."""
    said = recipe.get("senses", {})
    return Senses(**said | {name: tuple(said[name]) for name in ("q01", "q99") if said})


def measure_bounds(states: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """Returns ``q01`` and ``q99`` of the numbers of states, each (S, D)."""
    low_D, high_D = np.quantile(np.concatenate(states).astype(np.float64), [0.01, 0.99], axis=0)
    return {"q01": low_D.tolist(), "q99": high_D.tolist()}


def make_senses(views: int, state: int, strip: int, bounds: Mapping[str, Any] | None) -> Senses:
    """Returns the senses with bounds as :func:`measure_bounds`, or a release's statistics of the state, have them.

    None where states are in [-1, 1] already; so are the numbers for which a release's ``mask`` is False.

    Raises:
      ValueError: bounds of another number of values.
    """
    bounds = bounds or {"q01": [-1.0] * state, "q99": [1.0] * state}
    if len(bounds["q01"]) != state:
        raise ValueError(
            f"robot state: expected {state} values, as the policy takes, got bounds of {len(bounds['q01'])}"
        )
    mask = bounds.get("mask", [True] * state)
    low, high = (
        tuple(float(x) if scaled else end for x, scaled in zip(bounds[name], mask, strict=True))
        for name, end in (("q01", -1.0), ("q99", 1.0))
    )
    return Senses(views, state, strip, low, high)
