"""What tells a lie: counts and areas of rollouts by hand, and nothing said where there is too little."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from wovr_jax.audit import detection, lies
from wovr_jax.audit.lies import Rollouts

CHUNKS = 3


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals of fewer resamples, which are as good for what is asked here."""
    monkeypatch.setattr(detection, "DRAWS", 50)


def make(count: int = 200, seed: int = 0, **changes: np.ndarray) -> Rollouts:
    """Rollouts of which half are paid in their second chunk and two fifths of those fail; ``loud`` is higher there in
    the second chunk, and lower in the third, which nobody is paid for. ``quiet`` says nothing."""
    rng = np.random.default_rng(seed)
    paid_K, true_K = np.arange(count) % 2 == 0, np.arange(count) % 5 > 1
    lie_K = paid_K & ~true_K
    loud_KN = rng.normal(size=(count, CHUNKS))
    loud_KN[:, 1] += 3.0 * lie_K
    loud_KN[:, 2] += 9.0 * ~lie_K
    live_KN = np.ones((count, CHUNKS), bool)
    live_KN[::4, 2] = False
    parts = {
        "sign": {
            "loud": loud_KN,
            "quiet": rng.normal(size=(count, CHUNKS)),
            "margin": rng.normal(size=count),
            "refreshed_frames": np.repeat(1.0 * lie_K[:, None], CHUNKS, 1),
            "refreshed_verdict": 1.0 * lie_K,
        },
        "live_KN": live_KN,
        "astray_KN": live_KN & (loud_KN > 1.0),
        "paid_K": paid_K,
        "true_K": true_K,
        "paid_in_K": np.where(paid_K, 1, CHUNKS - 1),
        "episode_K": np.arange(count) // 2,
    }
    return Rollouts(**parts | changes)


def test_counts_areas_and_gates() -> None:
    made = lies.summarize_lies(make())
    assert (made["rollouts"], made["paid"], made["lies"]) == (200, 100, 40) and made["precision"] == 0.6
    assert made["chunks"] == 550 and made["astray"] == int(make().astray_KN.sum())
    signs = made["signs"]
    # The worst chunk up to the payment, and not the one after it, which would turn it round.
    loud = signs["loud"]
    assert loud["paid"]["value"] > 0.9 and loud["paid"]["low"] > 0.8 and loud["astray"]["value"] == 1.0
    assert 0.35 < signs["quiet"]["paid"]["value"] < 0.65 and signs["margin"]["astray"] is None
    assert loud["gates"][0] == pytest.approx(0.667, abs=0.02) and loud["gates"][-1] > 0.9
    assert signs["mix"]["paid"]["value"] > 0.85 and "mix_before" not in signs
    assert list(signs)[-1] == "mix", "the table ends with it"


def test_hindsight_is_shown_and_no_part_of_the_mix() -> None:
    rollouts = make()
    signs = lies.summarize_lies(rollouts)["signs"]
    assert signs["refreshed_verdict"]["paid"]["value"] == signs["refreshed_frames"]["paid"]["value"] == 1.0
    deaf = {name: value * 0 if name == "loud" else value for name, value in rollouts.sign.items()}
    assert lies.summarize_lies(make(sign=deaf))["signs"]["mix"]["paid"]["value"] < 0.65


def test_a_mix_of_the_world_before_judges_this_one() -> None:
    signs = lies.summarize_lies(make(seed=1), make(seed=2))["signs"]
    assert signs["mix_before"]["paid"]["value"] > 0.85 and signs["mix_before"]["astray"] is None
    # What only one of the two worlds has is no part of it.
    more = make(seed=1)
    with_twin = make(seed=1, sign={**more.sign, "twin_verdict": more.sign["margin"]})
    again = lies.summarize_lies(with_twin, make(seed=2))["signs"]
    assert again["mix_before"] == signs["mix_before"] and "twin_verdict" in again
    # Of the one before nothing was learned if all that it paid was true.
    honest = make(true_K=np.ones(200, bool))
    assert "mix_before" not in lies.summarize_lies(make(seed=1), honest)["signs"]


@pytest.mark.parametrize("paid", [0, 4])
def test_nothing_is_said_of_a_few(paid: int) -> None:
    made = lies.summarize_lies(make(paid_K=np.arange(200) < paid))
    assert made["paid"] == paid and "mix" in made["signs"], "chunks are many"
    loud = made["signs"]["loud"]
    assert loud["paid"] == {"value": None, "low": None, "high": None} and loud["astray"]["value"] == 1.0
    assert (loud["gates"] is None) == (paid == 0) and (made["precision"] is None) == (paid == 0)


def test_rollouts_are_kept(tmp_path: pathlib.Path) -> None:
    rollouts = make()
    rollouts.save(tmp_path / lies.FILE)
    back = Rollouts.load(tmp_path / lies.FILE)
    assert lies.summarize_lies(back) == lies.summarize_lies(rollouts)
