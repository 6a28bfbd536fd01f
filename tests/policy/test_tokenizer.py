"""The prompt, its ids and its padding."""

import numpy as np
import pytest

from wovr_jax.policy.tokenizer import SPACE, Tokenizer
from wovr_jax.sim.tabletop.table import INSTRUCTIONS

TOKENIZER = Tokenizer.tabletop()


def test_prompt_is_openvlas():
    words = [TOKENIZER.words[i] for i in TOKENIZER.encode("Pick up the RED block")]
    want = ["<s>", "In", ":", "What", "action", "should", "the", "robot", "take", "to"]
    want += ["pick", "up", "the", "red", "block", "?", "\n", "Out", ":", SPACE]
    assert words == want


def test_vocabulary_has_the_layout_of_the_release():
    assert TOKENIZER.words[:3] == ("<unk>", "<s>", "</s>")
    assert len(set(TOKENIZER.words)) == len(TOKENIZER.words)
    assert TOKENIZER.vocab_size == len(TOKENIZER.words) + 256 == TOKENIZER.pad


def test_pads_lie_between_begin_and_the_rest():
    row = TOKENIZER.prompt("pick up the red block")
    assert row.shape == (TOKENIZER.length,) and row.dtype == np.int32
    assert row[0] == TOKENIZER.bos and TOKENIZER.words[row[-1]] == SPACE
    pads = np.flatnonzero(row == TOKENIZER.pad)
    np.testing.assert_array_equal(pads, np.arange(1, 1 + TOKENIZER.length - 20))


def test_every_instruction_of_the_table_fits_and_differs():
    table = TOKENIZER.prompts(INSTRUCTIONS)
    assert table.shape == (len(INSTRUCTIONS), TOKENIZER.length)
    assert len(np.unique(table, axis=0)) == len(INSTRUCTIONS)


def test_unknown_words_and_long_prompts_are_named():
    with pytest.raises(ValueError, match=r"unknown \['mauve'\]"):
        TOKENIZER.prompt("pick up the mauve block")
    with pytest.raises(ValueError, match="at most 26"):
        TOKENIZER.prompt("pick up " + "the red block " * 8)
