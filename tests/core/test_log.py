"""What a run says: scalars on disk that survive kills, and tables of text."""

from __future__ import annotations

import contextlib

import jax.numpy as jnp
import pytest

from wovr_jax.core.log import Log, read_metrics
from wovr_jax.core.tables import text_table


def test_log_writes_lines_and_rewinds(tmp_path):
    with contextlib.closing(Log(tmp_path)) as log:
        for step in (10, 20, 30):
            log.scalars("sft", step, {"loss": jnp.float32(1 / step), "rate": float("nan")})
        log.scalars("grpo", 30, {"loss": 2})
        log.rewind("sft", 20)
    lines = read_metrics(tmp_path)
    assert [(line["stage"], line["step"]) for line in lines] == [("sft", 10), ("sft", 20), ("grpo", 30)]
    assert lines[0]["loss"] == pytest.approx(0.1) and lines[0]["rate"] is None
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    log = Log(tmp_path, tensorboard=False)
    log.scalars("sft", 1, {"loss": 1})
    with log.path.open("a") as file:
        file.write('{"stage": "sft", "st')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    log.rewind("sft", 0)
    assert read_metrics(tmp_path) == []


def test_reserved_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="reserved"):
        Log(tmp_path, tensorboard=False).scalars("sft", 1, {"step": 3})


def test_a_table_has_columns_of_equal_width_and_a_rule_under_its_head():
    rows = [("stage", "steps"), ("sft", "0"), ("collect-0", "9,216")]
    assert text_table(rows).splitlines() == ["stage      steps", "-" * 16, "sft            0", "collect-0  9,216"]
    # Words at the end of a line are not padded; the rule is as long as the longest line.
    words = text_table([("task", "asks for"), ("0", "put it on the plate"), ("10", "open it")], left=(1,))
    assert words.splitlines() == ["task  asks for", "-" * 25, "   0  put it on the plate", "  10  open it"]
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        text_table([("a", "b"), ("c",)])
