"""What a released policy's folder says beside its weights: its tokenizer and its action statistics.

The tokenizer is read by transformers from the folder's own files, without a network and without running the folder's
code. An imported policy keeps these files in ``policy.rest/files``.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np

from wovr_jax.core.disk import read_json
from wovr_jax.data import normalize
from wovr_jax.policy.actions import BINS, Codec
from wovr_jax.policy.tokenizer import PROMPT, SPACE, flush_right
from wovr_jax.policy.vla import VLAConfig

STATISTICS, CONFIG = "dataset_statistics.json", "config.json"


class ReleaseTokenizer:
    """Prompts in the ids of a release; the same methods as ``tokenizer.Tokenizer``.

    Args:
      folder: holds ``tokenizer.json`` and ``tokenizer_config.json``.
      cfg: the policy, whose ids the tokenizer must have.
      length: width L of a prompt (RLinf: 128).

    Raises:
      ValueError: no tokenizer in the folder, or one of another vocabulary.
    """

    def __init__(self, folder: str | os.PathLike, cfg: VLAConfig, length: int = 128):
        from transformers import PreTrainedTokenizerFast  # seconds, and only released policies need it

        self.length, self.pad, self.stop, self.vocab_size = length, cfg.pad, cfg.stop, cfg.vocab_size
        if not (pathlib.Path(folder) / "tokenizer.json").is_file():
            raise ValueError(f"{folder}: expected a tokenizer.json in it; copy the tokenizer's files of the release")
        self._inner = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        self._space, self.bos = (self._inner.convert_tokens_to_ids(token) for token in (SPACE, "<s>"))
        ids = {"<s>": self.bos, "</s>": self._inner.convert_tokens_to_ids("</s>"), SPACE: self._space}
        # Ids of text lie below the 256 of actions, which the policy's own config places at the end.
        first_action = self.vocab_size - BINS
        if None in ids.values() or ids["</s>"] != cfg.stop or max(ids.values()) >= first_action:
            raise ValueError(
                f"{folder}: this tokenizer is not the policy's: expected <s>, {SPACE!r} and </s> = {cfg.stop} among "
                f"the ids below {first_action}, got {ids}"
            )

    def encode(self, task: str) -> list[int]:
        """Returns the token ids of the whole prompt, begin to lone space."""
        # The policy was trained with one lone space behind the colon, which not every tokenizer gives: openvla too adds
        # id 29871 where it is missing.
        ids = self._inner(PROMPT.format(task=task.lower()), add_special_tokens=False)["input_ids"]
        return [self.bos, *ids, *([] if ids[-1] == self._space else [self._space])]

    def prompt(self, task: str) -> np.ndarray:
        """Returns (L,) int32, as ``Tokenizer.prompt`` does.

        Raises:
          ValueError: for a prompt longer than ``length``.
        """
        return flush_right(self.encode(task), self.length, self.pad, task)

    def prompts(self, tasks: tuple[str, ...] | list[str]) -> np.ndarray:
        """Returns (len(tasks), L) int32: a table to be indexed by task."""
        return np.stack([self.prompt(task) for task in tasks])


def statistics(folder: str | os.PathLike, key: str | None = None) -> dict[str, Any]:
    """Reads the statistics ``key`` (``unnorm_key``) of a release: ``action``, and ``proprio`` where it has them.

    ``dataset_statistics.json`` counts, or ``norm_stats`` of ``config.json`` where there is none. A plain suite name
    also finds its ``_no_noops`` entry; without a key there must be one entry.

    Raises:
      StatisticsError: no statistics, no such key (the message lists those there are), or a malformed entry.
    """
    table, config = pathlib.Path(folder) / STATISTICS, pathlib.Path(folder) / CONFIG
    # The file of its own comes first: fine-tuning writes it anew and leaves the norm_stats of the base model in place.
    if table.is_file():
        return normalize.entry(normalize.table(table), key, str(table))
    norm_stats = read_json(config).get("norm_stats") if config.is_file() else None
    if not norm_stats:
        raise normalize.StatisticsError(f"{folder}: neither {STATISTICS} nor norm_stats in {CONFIG} is there")
    return normalize.entry(norm_stats, key, f"norm_stats of {config}")


def codec(folder: str | os.PathLike, key: str | None = None) -> Codec:
    """Returns what lies between the tokens of a release and environment actions, by the statistics ``key``.

    Raises:
      StatisticsError: as :func:`statistics`.
    """
    return Codec.from_statistics(statistics(folder, key)["action"])
