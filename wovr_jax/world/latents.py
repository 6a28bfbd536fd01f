"""Windows of episodes as latents: encoded once and held on the device, kept on disk too, or encoded when drawn.

The VAE is frozen, so a window has one encoding. ``encode_windows`` makes all of them once; ``encode_once`` also keeps
them in a checkpoint that a later run with the same VAE, frames and layout of the window finds; ``Frames`` holds pixels
only and encodes each batch as it is drawn, where latents of all windows would not fit; ``WindowStream`` reads them from
disk step by step, where the pixels would not fit either.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from wovr_jax.core import checkpoint, config, processes, sharding
from wovr_jax.core.pixels import to_float
from wovr_jax.data.batches import Windows, gather_windows
from wovr_jax.data.stream import Feed, Stream
from wovr_jax.types import NULL_ACTION, Array, Params
from wovr_jax.world.model import WorldConfig, arrange_actions, arrange_frames, networks

SCHEMA = "wovr_jax latents 1"


@struct.dataclass
class Batch:
    """Windows to train on: latents (B, f, h, w, c) and actions (B, F, A)."""

    latent_Bfhwc: Array
    action_BFA: Array


@struct.dataclass
class Latents:
    """Encoded windows on the device; I counts windows, E episodes.

    Attributes:
      latent_Ifhwc: normalised latents; the first ``starts`` windows begin an episode.
      action_IFA: their actions, arranged as the frames were.
      episode_I: int32 episode of each window.
      static_Efhwc: for each episode the latents of its first frame held for a whole window.
      starts: see above.
    """

    latent_Ifhwc: Array
    action_IFA: Array
    episode_I: Array
    static_Efhwc: Array
    starts: int = struct.field(pytree_node=False)

    @property
    def count(self) -> int:
        """How many windows there are."""
        return self.latent_Ifhwc.shape[0]

    def take(self, row_B: Array, static_B: Array) -> Batch:
        """Returns the windows of ``row_B``; where ``static_B``, the first frame held under the null action."""
        # A picture at which nothing happens: it teaches that without motion commanded nothing moves.
        still_Bfhwc = self.static_Efhwc[self.episode_I[row_B]]
        latent_Bfhwc = jnp.where(static_B[:, None, None, None, None], still_Bfhwc, self.latent_Ifhwc[row_B])
        return Batch(latent_Bfhwc, _null_where(static_B, self.action_IFA[row_B]))


@struct.dataclass
class Frames:
    """Windows that are encoded when they are drawn: pixels and the VAE on the device.

    Attributes:
      windows: episodes.
      row_I2: (episode, start) of each window; the first ``starts`` begin an episode.
      vae: weights of the frozen VAE.
      cfg: the world model.
    """

    windows: Windows
    row_I2: Array
    vae: Params
    starts: int = struct.field(pytree_node=False)
    cfg: WorldConfig = struct.field(pytree_node=False)

    @property
    def count(self) -> int:
        """How many windows there are."""
        return self.row_I2.shape[0]

    def take(self, row_B: Array, static_B: Array) -> Batch:
        """Returns windows as ``Latents.take`` does, encoded now."""
        return _encode(self.cfg, self.vae, *gather_windows(self.windows, self.row_I2[row_B]), static_B)


@struct.dataclass
class HostBatch:
    """The windows of one batch, drawn and read on the host.

    Attributes:
      frame_BFHWC: uint8.
      action_BFA: float32.
      vae: weights of the frozen VAE.
      cfg: the world model.
    """

    frame_BFHWC: Array
    action_BFA: Array
    vae: Params
    cfg: WorldConfig = struct.field(pytree_node=False)

    def take_all(self, static_B: Array) -> Batch:
        """Returns all windows as ``Latents.take`` does, encoded now."""
        return _encode(self.cfg, self.vae, to_float(self.frame_BFHWC), self.action_BFA, static_B)


@dataclasses.dataclass(frozen=True)
class WindowStream:
    """Windows that are read from disk while training goes on.

    Attributes:
      stream: the reader.
      vae: weights of the frozen VAE.
      cfg: the world model.
    """

    stream: Stream
    vae: Params
    cfg: WorldConfig

    @property
    def count(self) -> int:
        """How many windows there are."""
        return self.stream.count

    def feed(self, size: int, seed: tuple[int, ...], steps: int) -> Callable[[int], tuple[HostBatch, float]]:
        """Returns ``feed(step)``: the batch of a step, on the devices, and the seconds that were waited for it."""
        # The batch is cut over the devices by the feed; the VAE stands whole on each.
        read, vae = Feed(self.stream, size, seed, steps), sharding.whole(jax.device_put(self.vae))

        def batch(step: int) -> tuple[HostBatch, float]:
            window = read(step)
            return HostBatch(window["frame"], window["action"], vae, self.cfg), read.waited

        return batch


Resident = Latents | Frames
"""Windows on the device."""
Data = Resident | WindowStream
"""What training is given."""
Source = Resident | HostBatch
"""What the compiled step draws its batch from."""


def feed(
    sets: Sequence[Data], sizes: Sequence[int], key: Array, steps: int
) -> Callable[[Array], tuple[tuple[Source, ...], dict[str, float]]]:
    """Returns ``feed(i)``: what step ``i`` draws from, for each set, and the time that was waited for it.

    Sets on the device are the same at every step. Of streams it is their next batch, of ``sizes``; then the
    second value holds ``input_wait_ms``, which is above zero where reading is the bottleneck.
    """
    # The host's generators take the words of the key, and the number of the set, so that sets draw differently.
    seed = tuple(np.asarray(jax.random.key_data(key)).tolist())
    # What stays on the devices is copied to all of them once, not at every step.
    feeds = [
        part.feed(size, (*seed, k), steps) if isinstance(part, WindowStream) else sharding.whole(part)
        for k, (part, size) in enumerate(zip(sets, sizes, strict=False))
    ]
    streams = any(isinstance(part, WindowStream) for part in sets)

    def draw(i: Array) -> tuple[tuple[Source, ...], dict[str, float]]:
        sources, waited = zip(*(feed(int(i)) if callable(feed) else (feed, 0.0) for feed in feeds), strict=True)
        return sources, {"input_wait_ms": 1e3 * sum(waited)} if streams else {}

    return draw


def _encode(cfg: WorldConfig, vae: Params, frame_BFHWC: Array, action_BFA: Array, static_B: Array) -> Batch:
    """Encodes windows of pixels; where ``static_B``, the first frame held under the null action."""
    # Held before the encoding: the latents of a video at rest are not copies of its first latent.
    frame_BFHWC = jnp.where(static_B[:, None, None, None, None], frame_BFHWC[:, :1], frame_BFHWC)
    latent_Bfhwc = networks(cfg)[1](vae, arrange_frames(frame_BFHWC, cfg), method="encode")
    # Null first, then arranged: slots that are not remembered have the null action either way.
    return Batch(latent_Bfhwc, arrange_actions(_null_where(static_B, action_BFA), cfg))


def _null_where(static_B: Array, action_BFA: Array) -> Array:
    return jnp.where(static_B[:, None, None], jnp.asarray(NULL_ACTION)[None, None], action_BFA)


def encode_windows(
    cfg: WorldConfig, vae_params: Params, windows: Windows, *, batch: int = 32
) -> tuple[Latents, Latents]:
    """Encodes all windows: returns the training side and the held-out side.

    Args:
      cfg: decides the window's layout (anchor, memory).
      vae_params: weights of the frozen VAE.
      windows: episodes and their windows, (episode, start) rows.
      batch: windows encoded at once.

    Raises:
      ValueError: when the windows were cut for another chunk or memory length.
    """
    _check(cfg, windows)
    data = jax.device_put(windows)

    # The data are an argument: as constants, the pixels would be compiled into the program.
    @jax.jit
    def encode_batch(vae_params: Params, data: Windows, row_B2: Array, static_B: Array) -> Batch:
        return _encode(cfg, vae_params, *gather_windows(data, row_B2), static_B)

    # In batches of one shape, whose results are kept; the VAE over all windows at once would not fit.
    def encode_all(row_I2: np.ndarray, static: bool) -> Batch:
        return _in_batches(lambda row_B2: encode_batch(vae_params, data, row_B2, np.full(batch, static)), row_I2, batch)

    # One picture an episode, held for a whole window: what ``take`` gives where nothing is to move.
    begin_E2 = np.array([(episode, 0) for episode in range(len(windows.frame_ESHWC))], np.int32)
    static_Efhwc = encode_all(begin_E2, True).latent_Bfhwc

    def side(index: Any, starts: int) -> Latents:
        row_I2 = np.asarray(index)  # (windows, 2): episode and first frame; the first ``starts`` begin an episode
        done = encode_all(row_I2, False)
        return Latents(done.latent_Bfhwc, done.action_BFA, jnp.asarray(row_I2[:, 0]), static_Efhwc, starts)

    return side(windows.train_I2, windows.train_starts), side(windows.val_I2, windows.val_starts)


def frames(cfg: WorldConfig, vae_params: Params, windows: Windows) -> tuple[Frames, Frames]:
    """Puts the windows on the device as pixels: returns the training side and the held-out side.

    Raises:
      ValueError: as ``encode_windows``.
    """
    _check(cfg, windows)
    data, vae = jax.device_put((windows, vae_params))
    sides = ((data.train_I2, windows.train_starts), (data.val_I2, windows.val_starts))
    learn, held = (Frames(data, rows, vae, starts, cfg) for rows, starts in sides)
    return learn, held


def encode_once(
    folder: str | os.PathLike, cfg: WorldConfig, vae_params: Params, windows: Windows, *, batch: int = 32
) -> tuple[Latents, Latents]:
    """Does as ``encode_windows``, and keeps the result in ``folder`` under the hash of everything that decides it.

    What is damaged there is said to be so on stderr, and made again.
    """
    # One process looks and all do as it says: on a network's disk two may not see the same files.
    path = pathlib.Path(folder) / digest(cfg, vae_params, windows)[:20]
    if processes.once(path.exists, "look for latents"):
        try:
            sides, starts = checkpoint.load(path), checkpoint.meta(path)["starts"]
            sides = jax.tree.map(lambda x: jax.device_put(x[1:]), sides)
            train, held = (Latents(**arrays, starts=n) for arrays, n in zip(sides, starts, strict=True))
            return train, held
        except (OSError, ValueError) as error:
            processes.say(f"{path} cannot be used ({error}); its windows are encoded again.")
            processes.once(lambda: shutil.rmtree(path, ignore_errors=True), "remove damaged latents")
    sides = encode_windows(cfg, vae_params, windows, batch=batch)
    # On the host: each process has all of some of them. With a row before each: Orbax keeps no array without rows.
    arrays = sharding.host([{name: x for name, x in vars(side).items() if name != "starts"} for side in sides])
    arrays = jax.tree.map(lambda x: np.concatenate([np.zeros_like(x, shape=(1, *x.shape[1:])), x]), arrays)
    checkpoint.save(path, arrays, {"starts": [side.starts for side in sides]})
    return sides


def digest(cfg: WorldConfig, vae_params: Params, windows: Windows) -> str:
    """Returns the SHA-256 of the VAE, the frames and actions, the rows, and the layout of a window."""
    # The transformer is not in it: another one trains on the same latents.
    layout = {"vae": cfg.vae, "anchor": cfg.anchor, "memory": cfg.memory, "slots": windows.memory, "new": windows.new}
    layout |= {"starts": [windows.train_starts, windows.val_starts], "views": cfg.views, "state": cfg.state}
    arrays = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(vae_params)[0]}
    arrays |= {name: column for name, column in vars(windows).items() if isinstance(column, np.ndarray)}
    total = hashlib.sha256(json.dumps([SCHEMA, config.to_dict(layout)]).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        # Name, dtype and shape too: the same bytes in another shape are other data.
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def _check(cfg: WorldConfig, windows: Windows) -> None:
    if (windows.memory, windows.new) != (cfg.slots, cfg.chunk):
        raise ValueError(
            f"world training: the windows have {windows.memory} + {windows.new} frames after the anchor, "
            f"the world model {cfg.slots} + {cfg.chunk}; cut them with memory={cfg.slots}, new={cfg.chunk}"
        )


def _in_batches(function: Callable[[np.ndarray], Any], rows: np.ndarray, batch: int) -> Any:
    """Runs ``function`` over all rows in batches of one size, the last filled up with zeros: one compilation."""
    missing = -len(rows) % batch if len(rows) else batch  # no rows at all still give arrays of the right shape
    full = np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)])
    parts = [function(full[i : i + batch]) for i in range(0, len(full), batch)]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[: len(rows)], *parts)
