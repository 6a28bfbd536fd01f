"""Opens the true environment of a run, and gives it the policy's words and the policy as plain functions."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from wovr_jax.core.config import ConfigError
from wovr_jax.policy import release, vla
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.tokenizer import Tokenizer
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.sim.arena import Arena
from wovr_jax.sim.libero.tasks import LiberoConfig
from wovr_jax.sim.tabletop.arena import Tabletop
from wovr_jax.sim.tabletop.expert import ExpertConfig
from wovr_jax.sim.tabletop.table import TabletopConfig
from wovr_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Environment:
    """The true environment and what a policy has to know of it.

    Attributes:
      arena: the environment.
      prompt_KL: (tasks, L) int32 prompt tokens of every instruction, on the device.
      codec: of a released policy; None where the demonstrations' statistics say what actions are like.
    """

    arena: Arena
    prompt_KL: Array
    codec: Codec | None


def open_table(sim: TabletopConfig, expert: ExpertConfig, *, seed: int, batch: int, memory: int) -> Environment:
    """The embedded table.

    Args:
      sim, expert: the simulator, and who demonstrates.
      seed: of the run.
      batch: episodes rolled at once.
      memory: memory frames of a start state.
    """
    prompt_KL = jnp.asarray(Tokenizer.tabletop().prompts(Tabletop.instructions))
    arena = Tabletop(sim, expert, seed=seed, batch=batch, memory=memory, prompt_KL=prompt_KL)
    return Environment(arena, prompt_KL, None)


def open_libero(cfg: LiberoConfig, policy: VLAConfig, *, seed: int, batch: int, memory: int) -> Environment:
    """The real LIBERO.

    Args:
      cfg: suite, tasks, scene, workers.
      policy: whose vocabulary the instructions have to be in.
      seed, batch, memory: as for :func:`open_table`.

    Raises:
      LiberoError: LIBERO is not installed, or a task that the suite does not have.
      ConfigError: a policy whose vocabulary is not that of the instructions.
      ShardingError: several processes whose devices do not suit simulators of their own, see ``sim.libero.actors``.
    """
    # Imported here, so that whoever runs on the table need not have LIBERO.
    from wovr_jax.sim.libero import actors
    from wovr_jax.sim.libero import arena as libero

    prompt_KL, codec = _libero_words(cfg, policy, libero.instructions(cfg.suite))
    arena = libero.Libero(cfg, seed=seed, batch=batch, chunk=policy.chunk, memory=memory, prompt_KL=prompt_KL)
    actors.check_mesh(vla.network(policy).shapes(), vla.AXES)
    return Environment(arena, jnp.asarray(prompt_KL), codec)


def _libero_words(
    cfg: LiberoConfig, policy: VLAConfig, instructions: tuple[str, ...]
) -> tuple[np.ndarray, Codec | None]:
    """Prompts and action statistics of the released policy, or prompts in the package's own words."""
    if cfg.release:
        prompts = release.ReleaseTokenizer(cfg.release, policy).prompts(instructions)
        return prompts, release.codec(cfg.release, cfg.suite)
    words = Tokenizer.libero()
    if (policy.vocab_size, policy.pad) != (words.vocab_size, words.pad):
        raise ConfigError(
            f"config.policy: vocab_size {policy.vocab_size} and pad {policy.pad} are not those of LIBERO's words, "
            f"{words.vocab_size} and {words.pad}; use size='libero_small', or name the folder of the policy's own "
            "tokenizer with libero.release=..."
        )
    return words.prompts(instructions), None
