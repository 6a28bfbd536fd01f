"""The instruction in the words of the policy: prompt template, vocabulary, token ids.

The vocabulary has the layout of OpenVLA's: special ids first (unknown 0, begin 1, stop 2), then words,
then 256 action ids as the last of the ``vocab_size`` real ids, then padding rows of which the first is
the pad id (OpenVLA: 32000 real ids, actions 31744..31999, pad 32000, 32064 rows). Here the words are a
small embedded list; a release brings its own tokenizer (``ReleaseTokenizer``) and feeds the same ``prompt_BL``.

A robot carries this file without the network's: it imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re

import numpy as np

PROMPT = "In: What action should the robot take to {task}?\nOut:"
"""The prompt of OpenVLA (openvla: prismatic/extern/hf/modeling_prismatic.py); a lone-space token follows it."""

SPACE = "\u2581"
"""The lone-space token that ends every prompt (id 29871 in Llama's vocabulary)."""

_SPECIAL = ("<unk>", "<s>", "</s>")
_TEMPLATE_WORDS = (SPACE, "\n", ":", "?", "In", "Out", "What", "action", "should", "the", "robot", "take", "to")
# Ids are places in these lists: a word is put at the end of the last one, or every checkpoint would read other words.
_TASK_WORDS = """
a and at away basket behind beside between black block blue bottom bowl box center close cube cup down drawer drop
from front grasp green in it left lift middle move next of on open orange pick place plate purple push put red
release right slide square stack table top tray turn up white with yellow
"""
_LIBERO_WORDS = """
alphabet back bbq book both bottle butter cabinet caddy cheese chocolate compartment cookie cream dressing frying
inside juice ketchup microwave milk moka mug off pan pot pots pudding rack ramekin salad sauce shelf soup stove them
tomato under wine wooden
"""
_RELAY_WORDS = "button press then"
# A line break, a colon and a question mark are words of their own; all else is cut at spaces.
_PIECE = re.compile(r"\n|[:?]|[^\s:?]+")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A word-level tokenizer. Word ``i`` of ``words`` has token id ``i``.

    Attributes:
      words: the vocabulary without action and pad ids; starts with unknown, begin, stop.
      length: width L of ``prompt``; shorter prompts are padded.
      action_bins: how many action ids follow the words.
    """

    words: tuple[str, ...] = (*_SPECIAL, *_TEMPLATE_WORDS, *_TASK_WORDS.split())
    length: int = 26
    action_bins: int = 256

    @classmethod
    def tabletop(cls) -> Tokenizer:
        """The words of the embedded table's instructions, and some more."""
        return cls()

    @classmethod
    def relay(cls) -> Tokenizer:
        """The words of the table, and those that only ``sim.relay`` says."""
        return cls((*cls.words, *_RELAY_WORDS.split()))

    @classmethod
    def libero(cls) -> Tokenizer:
        """The words of LIBERO's instructions, all five suites."""
        return cls((*cls.words, *_LIBERO_WORDS.split()), length=34)

    @property
    def bos(self) -> int:
        """Id that begins every prompt."""
        return 1

    @property
    def stop(self) -> int:
        """Id of the stop token (the ``oft`` recipe puts it behind the action slots)."""
        return 2

    @property
    def vocab_size(self) -> int:
        """Real ids: words and action ids; the pad id is the next one."""
        return len(self.words) + self.action_bins

    @property
    def pad(self) -> int:
        """Padding id, the first row after the real ids."""
        return self.vocab_size

    def encode(self, task: str) -> list[int]:
        """Returns the token ids of the whole prompt: begin, template with ``task`` in lower case, lone space.

        Raises:
          ValueError: when a word is not in the vocabulary.
        """
        # Refused, not mapped to "unknown": a policy would be trained on an instruction that it cannot read.
        index = {word: i for i, word in enumerate(self.words)}
        pieces = _PIECE.findall(PROMPT.format(task=task.lower())) + [SPACE]
        if unknown := sorted({piece for piece in pieces if piece not in index}):
            raise ValueError(
                f"instruction {task!r}: expected words of the policy's vocabulary, got unknown {unknown}; "
                "reword it or add the words to wovr_jax/policy/tokenizer.py (this changes the token ids)"
            )
        # The begin id is not in the text; the lone space at its end is where the first action is read.
        return [self.bos] + [index[piece] for piece in pieces]

    def prompt(self, task: str) -> np.ndarray:
        """Returns (L,) int32: begin, padding, then the rest flush right, so the action slots follow it directly.

        Raises:
          ValueError: for an unknown word or a prompt longer than ``length``.
        """
        return flush_right(self.encode(task), self.length, self.pad, task)

    def prompts(self, tasks: tuple[str, ...] | list[str]) -> np.ndarray:
        """Returns (len(tasks), L) int32: a table to be indexed by task."""
        return np.stack([self.prompt(task) for task in tasks])


class ReleaseTokenizer:
    """Prompts in the ids of a release; the same methods as ``Tokenizer``.

    They are read by transformers from the folder's own files, without a network and without running the folder's code.
    An imported policy keeps these files in ``policy.rest/files``.

    Args:
      folder: holds ``tokenizer.json`` and ``tokenizer_config.json``.
      vocab_size, stop, pad: of the policy, whose ids the tokenizer must have.
      length: width L of a prompt (RLinf: 128).

    Raises:
      ValueError: no tokenizer in the folder, or one of another vocabulary.
    """

    def __init__(self, folder: str | os.PathLike, vocab_size: int, *, stop: int, pad: int, length: int = 128):
        from transformers import PreTrainedTokenizerFast  # seconds, and only released policies need it

        self.length, self.pad, self.stop, self.vocab_size = length, pad, stop, vocab_size
        if not (pathlib.Path(folder) / "tokenizer.json").is_file():
            raise ValueError(f"{folder}: expected a tokenizer.json in it; copy the tokenizer's files of the release")
        self._inner = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        self._space, self.bos = (self._inner.convert_tokens_to_ids(token) for token in (SPACE, "<s>"))
        ids = {"<s>": self.bos, "</s>": self._inner.convert_tokens_to_ids("</s>"), SPACE: self._space}
        # Ids of text lie below the 256 of actions, which the policy's own config places at the end.
        first_action = vocab_size - Tokenizer.action_bins
        if None in ids.values() or ids["</s>"] != stop or max(ids.values()) >= first_action:
            raise ValueError(
                f"{folder}: this tokenizer is not the policy's: expected <s>, {SPACE!r} and </s> = {stop} among "
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


def flush_right(ids: list[int], length: int, pad: int, task: str) -> np.ndarray:
    """Returns (length,) int32: the begin id, pads, then the rest of the prompt at the right end.

    Raises:
      ValueError: for a prompt longer than ``length``.
    """
    if len(ids) > length:
        raise ValueError(
            f"instruction {task!r}: prompt has {len(ids)} tokens, expected at most {length}; "
            "shorten it or raise the tokenizer's length"
        )
    # One width for all tasks, so one compiled program; the network masks the pads and counts no position for them.
    row = np.full(length, pad, np.int32)
    row[0] = ids[0]
    row[length - len(ids) + 1 :] = ids[1:]
    return row
