"""An episode in two worlds: chunk by chunk it is what the scan of training plays, and what the simulator does."""

from __future__ import annotations

import dataclasses
import pathlib

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.play.small import EPISODES, SIM, make_run
from wovr_jax.core.pixels import to_uint8
from wovr_jax.data import starts as start_states
from wovr_jax.play import session as sessions
from wovr_jax.play.programs import Programs
from wovr_jax.play.session import Session, SessionError, measure_distance
from wovr_jax.play.source import open_run
from wovr_jax.policy.tokenizer import Tokenizer
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.run import programs as run_programs
from wovr_jax.sim import embedded
from wovr_jax.sim.relay.table import RelayConfig
from wovr_jax.sim.tabletop.expert import ExpertConfig
from wovr_jax.types import NULL_ACTION

NOISE = 5


def draw_actions(chunks: int, seed: int = 0) -> np.ndarray:
    action_NTA = np.random.default_rng(seed).uniform(-1, 1, (chunks, 8, 7)).astype(np.float32)
    action_NTA[..., 6] = np.where(action_NTA[..., 6] > 0, 1, -1)
    return action_NTA


@pytest.mark.parametrize("row", [0, EPISODES + 3])
def test_chunks_are_those_of_the_scan(programs: Programs, row: int) -> None:
    source, action_NTA = programs.source, draw_actions(3)
    session = Session(programs)
    session.begin(row, 0, NOISE)
    chunks = [session.step(action_TA) for action_TA in action_NTA]
    # The same start, actions and key in the one scan of training.
    start = start_states.gather(source.starts, np.asarray([row]), jnp.asarray(source.prompt_KL))
    replay = run_programs.replay(source.world_cfg, source.recipe.reward)
    assert source.judge is not None
    scan = replay(source.world, source.judge.params, start, jnp.asarray(action_NTA[None]), jax.random.key(NOISE))
    frame_NTHWC = np.stack([chunk.imagined_THWC for chunk in chunks])
    # A rounding may fall on the other side in another program.
    np.testing.assert_allclose(frame_NTHWC.astype(int), to_uint8(scan.video_BNTHWC)[0].astype(int), atol=1)
    np.testing.assert_allclose(np.stack([chunk.prob_T for chunk in chunks]), scan.prob_BNT[0], atol=1e-4)
    assert np.ptp(frame_NTHWC.astype(int), axis=(0, 1)).max() > 20  # and something happens in them


@pytest.mark.parametrize("row", [1, EPISODES + 2])
def test_the_true_side_is_the_simulator(programs: Programs, row: int) -> None:
    table, action_NTA = programs.source.starts, draw_actions(2)
    session = Session(programs)
    begun = session.begin(row, 0, NOISE)
    chunks = [session.step(action_TA) for action_TA in action_NTA]
    first = embedded.replay(*(jnp.asarray(x[[row]]) for x in (table.seed_K, table.played_KSA, table.step_K)), SIM)
    states_BS = jax.vmap(lambda s, a: embedded.roll(s, a, SIM))(first, jnp.asarray(action_NTA.reshape(1, 16, 7)))
    suite = embedded.suite_of(SIM)
    want_SHWC = to_uint8(jax.vmap(lambda s: suite.render(s, SIM))(jax.tree.map(lambda x: x[0], states_BS)))
    got_SHWC = np.concatenate([chunk.true_THWC for chunk in chunks])
    np.testing.assert_allclose(got_SHWC.astype(int), want_SHWC.astype(int), atol=1)
    assert begun.step == int(table.step_K[row]) and begun.keyframe == (row >= EPISODES)
    np.testing.assert_array_equal(begun.imagined_HWC, table.memory_KMHWC[row, -1])
    assert begun.closed == bool(table.action_KMA[row, -1, -1] > 0)


def test_a_layout_is_its_seed_and_noise_is_its_own(programs: Programs) -> None:
    action_TA = draw_actions(1)[0]

    def play(layout: int, noise: int) -> tuple[np.ndarray, sessions.Chunk]:
        session = Session(programs)
        return session.begin(None, layout, noise).imagined_HWC, session.step(action_TA)

    (picture, a), (same, b), (other, _) = play(3, 0), play(3, 1), play(4, 0)
    np.testing.assert_array_equal(picture, same)
    assert (picture != other).any()
    np.testing.assert_array_equal(a.true_THWC, b.true_THWC)
    assert (a.imagined_THWC != b.imagined_THWC).any()
    np.testing.assert_array_equal(play(3, 1)[1].imagined_THWC, b.imagined_THWC)


def test_the_same_moves_again(programs: Programs) -> None:
    session, action_NTA = Session(programs), draw_actions(2)
    session.begin(2, 0, 1)
    before = [session.step(action_TA) for action_TA in action_NTA]
    begun = session.again(2)
    np.testing.assert_array_equal(begun.action_NTA, action_NTA)
    after = [session.step(action_TA) for action_TA in begun.action_NTA]
    np.testing.assert_array_equal([c.true_THWC for c in before], [c.true_THWC for c in after])
    assert (before[1].imagined_THWC != after[1].imagined_THWC).any() and after[0].n == 0


def test_the_policy_sees_the_world_that_it_is_shown(programs: Programs) -> None:
    def drive(sees: sessions.Eye, temperature: float, noise: int = 3) -> list[np.ndarray]:
        session = Session(programs)
        session.begin(0, 0, noise)
        return [session.act(sees, temperature).action_TA for _ in range(2)]

    imagined, true = drive("imagined", 1.0), drive("true", 1.0)
    # Both begin at one picture, and part with the worlds.
    np.testing.assert_array_equal(imagined[0], true[0])
    assert (imagined[1] != true[1]).any()
    np.testing.assert_array_equal(drive("imagined", 0.0, 1)[0], drive("imagined", 0.0, 2)[0])
    assert (drive("imagined", 1.0, 1)[0] != drive("imagined", 1.0, 2)[0]).any()


def test_nothing_is_compiled_while_somebody_plays(programs: Programs) -> None:
    programs.warm()
    steps = (programs._imagine, programs._act, programs._step, programs._reset, programs._replay)
    before = [step._cache_size() for step in steps]
    assert before == [1] * 5
    session = Session(programs)
    for row in (0, EPISODES, None):
        session.begin(row, 9, 9)
        for temperature in (0.0, 0.7):
            session.act("true", temperature)
            session.act("imagined", temperature)
    assert [step._cache_size() for step in steps] == before


def test_an_episode_is_bounded(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MOST_CHUNKS", 2)
    session, rest_TA = Session(programs), np.tile(np.asarray(NULL_ACTION, np.float32), (8, 1))
    session.begin(0, 0, 0)
    assert [session.step(rest_TA).room for _ in range(2)] == [1, 0]
    with pytest.raises(SessionError, match="has its 2 chunks.*begin again"):
        session.step(rest_TA)
    session.begin(0, 0, 0)
    assert session.step(rest_TA).n == 0
    # Large pictures leave less room than small ones.
    monkeypatch.setattr(sessions, "EPISODE_BYTES", 1)
    assert session.most_chunks == 1


def test_what_cannot_be_done_is_said(programs: Programs) -> None:
    session = Session(programs)
    for ask in (lambda: session.again(0), lambda: session.act("true", 0.0), lambda: session.step(draw_actions(1)[0])):
        with pytest.raises(SessionError, match="no episode has begun"):
            ask()
    with pytest.raises(SessionError, match="expected 0 to 17, a start state of the run, got 18"):
        session.begin(18, 0, 0)
    session.begin(0, 0, 0)
    with pytest.raises(SessionError, match="nothing to film yet"):
        session.film()


def test_without_a_simulator_and_without_a_judge(programs: Programs) -> None:
    source = dataclasses.replace(programs.source, sim=None, judge=None)
    session = Session(Programs(source))
    with pytest.raises(SessionError, match="layouts are drawn by the true simulator"):
        session.begin(None, 0, 0)
    assert session.begin(0, 0, NOISE).true_HWC is None
    with pytest.raises(SessionError, match="there is no true simulator here"):
        session.act("true", 0.0)
    chunk = session.step(draw_actions(1)[0])
    assert (chunk.true_THWC, chunk.truth_T, chunk.apart_T, chunk.prob_T, chunk.left) == (None,) * 5
    beside = Session(programs)
    beside.begin(0, 0, NOISE)
    np.testing.assert_array_equal(chunk.imagined_THWC, beside.step(draw_actions(1)[0]).imagined_THWC)
    assert session.film()[4:8] == b"ftyp"


def test_a_film_shows_both_worlds(programs: Programs, tmp_path: pathlib.Path) -> None:
    session = Session(programs)
    session.begin(0, 0, 0)
    chunk = session.step(draw_actions(1)[0])
    (tmp_path / "film.mp4").write_bytes(session.film())
    with av.open(tmp_path / "film.mp4") as file:
        film_SHWC = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    # 16 pixels of each world and one between them, each 16 times as large; 33 x 16 is even.
    assert film_SHWC.shape == (9, 256, 33 * 16, 3)
    film_SHWC = film_SHWC[:, 8::16, 8::16].astype(int)
    assert chunk.true_THWC is not None
    # H.264 has half of the colour's pixels, so brightness is compared.
    for left, want in ((0, chunk.true_THWC), (17, chunk.imagined_THWC)):
        gap = film_SHWC[1:, :, left : left + 16].mean(-1) - want.astype(int).mean(-1)
        assert np.abs(gap).mean() < 6


def test_the_distance_sees_what_is_missing_and_forgives_an_edge() -> None:
    table = np.full((1, 32, 32, 3), 140, np.uint8)
    block, beside, elsewhere = table.copy(), table.copy(), table.copy()
    block[:, 4:10, 4:10] = beside[:, 5:11, 4:10] = elsewhere[:, 20:26, 20:26] = (220, 40, 40)
    assert measure_distance(block, block) == measure_distance(block, beside) == 0
    # A thing that is missing counts as much as one that is made up.
    assert measure_distance(block, table) == measure_distance(table, block) == 36 / 1024 > sessions.APART
    # Elsewhere it is missing in one place, and hides the table in the other.
    assert measure_distance(block, elsewhere) == (36 + 16) / 1024
    assert measure_distance(table, table + np.uint8(30)) == 0 and measure_distance(table, table + np.uint8(50)) == 1


def test_the_moment_when_imagination_left_the_truth(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    apart_NT = np.zeros((3, 8))
    apart_NT[1, 3], apart_NT[2, 0] = 2 * sessions.APART, 1.0
    course = iter(apart_NT)
    monkeypatch.setattr(sessions, "measure_distance", lambda *_: next(course))
    session = Session(programs)
    session.begin(0, 0, 0)
    # The first moment counts, and stays.
    assert [session.step(action_TA).left for action_TA in draw_actions(3)] == [None, 11, 11]
    session.begin(0, 0, 0)
    monkeypatch.setattr(sessions, "measure_distance", lambda *_: np.zeros(8))
    assert session.step(draw_actions(1)[0]).left is None


def test_relay_is_played_as_the_table_is(tmp_path: pathlib.Path) -> None:
    words, sim = Tokenizer.relay(), RelayConfig.fake()
    policy = dataclasses.replace(VLAConfig.fake(), vocab_size=words.vocab_size, pad=words.pad)
    run = make_run(tmp_path / "relay", rounds=1, sim=sim, policy=policy, relay=sim, expert=ExpertConfig(flaw="none"))
    source = open_run(run)
    session = Session(Programs(source))
    begun = session.begin(EPISODES, 0, 0)
    assert source.suite == "relay" and begun.keyframe and begun.instruction in source.instructions
    chunk, chosen = session.step(draw_actions(1)[0]), session.act("imagined", 0.0)
    assert chunk.true_THWC is not None and chunk.true_THWC.shape == chosen.imagined_THWC.shape == (8, 16, 16, 3)
