"""The ledger books true steps, imagined frames and seconds by stage."""

from __future__ import annotations

import json

from wovr_jax.run.ledger import Account, Ledger


def test_ledger_books_by_stage():
    ledger = Ledger()
    ledger.add("collect", true_steps=240, seconds=1.5)
    ledger.add("grpo-1", imagined_frames=1000)
    ledger.add("collect", true_steps=10)
    assert ledger["collect"] == Account(250, 0, 1.5)
    assert ledger["grpo-1"].true_steps == 0 and ledger["never"].true_steps == 0
    assert ledger.total() == Account(250, 1000, 1.5) and Ledger().total() == Account()
    written = json.loads(json.dumps(ledger.to_dict()))
    assert list(written) == ["collect", "grpo-1"] and written["grpo-1"]["imagined_frames"] == 1000
