"""LIBERO as the true environment of a run, with a fake in the place of its workers."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.sim.libero.fake_libero import TASKS
from wovr_jax.core.config import ConfigError, from_dict, to_dict
from wovr_jax.data import episodes as disk
from wovr_jax.data import starts as start_states
from wovr_jax.data.episodes import EpisodesError
from wovr_jax.data.starts import StartsConfig
from wovr_jax.policy import vla
from wovr_jax.policy.tokenizer import Tokenizer
from wovr_jax.policy.train import SFTConfig
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.run.bind import open_environment
from wovr_jax.run.recipe import CollectConfig, DreamConfig, EvaluateConfig, Recipe
from wovr_jax.run.stages.episodes import read_in_turn, summarize_kinds
from wovr_jax.sim.arena import Acting, Actor, Groups
from wovr_jax.sim.libero import arena as libero_arena
from wovr_jax.sim.libero import rollout
from wovr_jax.sim.libero.arena import Libero
from wovr_jax.sim.libero.setup import LiberoError
from wovr_jax.sim.libero.tasks import DRAWN, LiberoConfig, SceneConfig, Trial, draw_seed
from wovr_jax.sim.libero.witness import LiberoWitness
from wovr_jax.world.model import WorldConfig

WORDS = Tokenizer.libero()
STEPS = 16


def small_policy():
    """The fake policy with LIBERO's words."""
    cfg = VLAConfig.fake()
    llm = dataclasses.replace(cfg.llm, rows=WORDS.vocab_size + 64)
    return dataclasses.replace(cfg, llm=llm, vocab_size=WORDS.vocab_size, pad=WORDS.pad)


def recipe(**libero):
    settings = {"suite": "libero_object", "steps": STEPS, "scene": SceneConfig(16, wrist=False), "inits": (0, 3)}
    return Recipe(
        small_policy(),
        WorldConfig.fake(),
        RewardConfig.fake(tasks=10),
        temperature=1.0,
        collect=CollectConfig(demonstrations=6, validation=2, first=4, again=4, batch=4),
        libero=LiberoConfig(**settings | libero),
    )


def open_libero(**libero) -> Libero:
    """The arena of a recipe."""
    arena = open_environment(recipe(**libero)).arena
    assert isinstance(arena, Libero)
    return arena


def acting(act=None, sample=None) -> Acting:
    """A policy of plain functions; those that nobody should ask are missing."""
    return Acting(act, sample, None, vla.AXES)  # pyright: ignore[reportArgumentType]


def actor(push=0.5):
    """A policy that pushes right, each row by what its seed says; it notes what it was asked."""
    asked = []

    def act(params, frame_BHWC, prompt_BL, key, seed_B, temperature):
        asked.append((frame_BHWC, prompt_BL, np.asarray(seed_B), temperature))
        action_BTA = np.zeros((len(frame_BHWC), 8, 7), np.float32)
        action_BTA[..., 0] = (push + np.asarray(seed_B) % 7 / 10)[:, None]
        return action_BTA

    return Actor(acting(act), dict, jax.random.key(0), 1.0, "base"), asked


def test_the_door_to_libero_is_a_setting(fake_libero):
    environment = open_environment(recipe())
    arena = environment.arena
    assert isinstance(arena, Libero) and arena.name == "libero_object" and arena.steps == STEPS
    assert arena.instructions == ("pick up the milk", "pick up the butter")
    assert arena.prompt_KL.shape == environment.prompt_KL.shape == (2, WORDS.length)


# ---------------------------------------------------------------- where episodes begin


def test_training_never_begins_where_evaluation_does(fake_libero):
    arena = open_libero()
    measured = arena.trials("evaluate", 10)
    assert [(t.task.index, t.init, t.seed) for t in measured] == [
        *((task, init, 0) for init in range(3) for task in range(2)),
        # Beyond the official states each has its own layout.
        *((n % 2, DRAWN, 9_000_000 + n) for n in range(4)),
    ]
    other = open_environment(dataclasses.replace(recipe(), seed=5)).arena
    assert isinstance(other, Libero) and other.trials("evaluate", 10) == measured  # whatever the seed of the run
    purposes = ("demonstrations", "collect-0", "collect-1", "online")
    trained = [t for purpose in purposes for t in arena.trials(purpose, 6)]
    assert {t.init for t in trained} == {DRAWN} and len({t.seed for t in trained}) == 24
    assert not {t.seed for t in trained} & {t.seed for t in measured if t.init == DRAWN}
    official = open_libero(train_inits=(3, 5)).trials("collect-0", 5)
    assert [t.init for t in official] == [3, 3, 4, 4, 3] and len({t.seed for t in official}) == 5


def test_shared_states_are_refused_unless_asked_for():
    with pytest.raises(ValueError, match=r"initial states 2 to 2 are both trained on and measured on"):
        LiberoConfig(inits=(0, 3), train_inits=(2, 5))
    assert LiberoConfig(inits=(0, 3), train_inits=(2, 5), overlap=True).overlap


def test_a_greedy_policy_is_not_counted_twice_from_one_state(fake_libero, tmp_path, monkeypatch):
    arena, (policy, _) = open_libero(), actor()
    greedy = dataclasses.replace(policy, temperature=0.0)
    measured = arena.measure(tmp_path / "greedy", 10, greedy)
    assert measured.kind_B == ["official"] * 6 + ["drawn"] * 4
    kinds = summarize_kinds({"sampled": measured, "greedy": measured})
    assert {kind: rates["greedy"]["n"] for kind, rates in kinds.items()} == {"official": 6, "drawn": 4}
    assert sum(rates["sampled"]["successes"] for rates in kinds.values()) == measured.success_B.sum()
    # Published evaluations begin again in the same states; where a seed moves nothing, greedy trials are then equal.
    monkeypatch.setattr(libero_arena, "draws_fixtures", lambda task: task.index == 0)
    settings = recipe(beyond="official")
    again = open_environment(dataclasses.replace(settings, evaluate=EvaluateConfig(episodes=6, compare=1))).arena
    assert isinstance(again, Libero)
    assert [(t.task.index, t.init, t.seed) for t in again.trials("evaluate", 8)][5:] == [
        (1, 2, 0),
        (0, 0, 1),
        (1, 0, 1),
    ]
    again.check_evaluation(7)
    with pytest.raises(LiberoError, match=r"begins 1 of 8 trials where another began.*evaluate\.episodes=6"):
        again.check_evaluation(8)
    with pytest.raises(LiberoError, match="a greedy policy would do the same again"):
        open_environment(dataclasses.replace(settings, evaluate=EvaluateConfig(episodes=8, compare=1)))


# ---------------------------------------------------------------- what cannot be


def test_what_libero_cannot_do_is_refused_in_words(fake_libero):
    settings = to_dict(recipe())
    for change, says in (
        ({"dream": to_dict(DreamConfig(world="true"))}, "which LIBERO and a robot are not; use 'learned' for both"),
        ({"dream": to_dict(DreamConfig(world="true", reward="true"))}, "'true' for both with starts.share=0"),
        ({"dream": to_dict(DreamConfig(world="shadow", reward="true"))}, "which LIBERO and a robot are not"),
        ({"libero": settings["libero"] | {"steps": 20}}, "libero.steps: expected a multiple of the policy's chunk, 8"),
        ({"libero": settings["libero"] | {"suite": "spatial"}}, "expected one of .libero_spatial"),
        ({"sft": to_dict(SFTConfig(steps=0))}, "name its weights with policy_weights"),
    ):
        with pytest.raises(ConfigError, match=says):
            from_dict(Recipe, settings | change)
    with pytest.raises(ConfigError, match="are not those of the environment's words"):
        open_environment(dataclasses.replace(recipe(), policy=VLAConfig.fake()))
    with pytest.raises(LiberoError, match="libero_object has tasks 0 to 1, and 2 was asked for"):
        open_libero(tasks=(2,))


# ---------------------------------------------------------------- online RL


def test_a_group_begins_alike_acts_apart_and_ends_at_its_first_success(fake_libero):
    arena, groups = open_libero(), Groups(groups=2, size=3, chunks=2)

    def sample(params, frame_BHWC, prompt_BL, key, seed_B):
        """Tokens that say which row acted, and a push that they decide."""
        token_BTA = np.tile(np.asarray(seed_B % 7, np.int32)[:, None, None], (1, 8, 7))
        action_BTA = np.zeros((len(frame_BHWC), 8, 7), np.float32)
        action_BTA[..., 0] = np.asarray(seed_B % 7)[:, None] / 6
        return token_BTA, -token_BTA / 10.0, action_BTA

    policy = Actor(acting(sample=sample), dict, jax.random.key(0), 1.0)
    fake_libero.losing = {(0, DRAWN, arena.trials("online", 4)[2].seed)}
    first, second = (arena.explore(number, policy, groups) for number in range(2))
    assert first.frame_BNHWC.shape == (6, 2, 16, 16, 3) and first.token_BNTA.shape == (6, 2, 8, 7)
    assert first.task_B.tolist() == [0, 0, 0, 1, 1, 1] and (first.prompt_BL == arena.prompt_KL[first.task_B]).all()
    begin = first.frame_BNHWC[:, 0]
    assert (begin[:3] == begin[0]).all() and len({bytes(np.asarray(row[0, 0])) for row in first.token_BNTA}) > 2
    assert not fake_libero.losing  # a worker was lost, and its trial begun again
    places = [0.15 + 0.02 * (sum((t.task.index, t.init, t.seed)) % 5) for t in arena.trials("online", 4)]
    for rolled, x0 in ((first, np.repeat(places[:2], 3)), (second, np.repeat(places[2:], 3))):
        # The square moves by a hundredth in each step for each unit of the token, and the goal is beyond the middle.
        moved = np.asarray(rolled.token_BNTA[..., 0]).reshape(6, 16).cumsum(1) / 100
        held = np.asarray(rolled.success_BNT).reshape(6, 16)
        np.testing.assert_array_equal(held.any(1), (x0[:, None] + moved > 0.5 + 1e-6).any(1))
        for row in np.flatnonzero(held.any(1)):
            assert (
                held[row].argmax() == (x0[row] + moved[row] > 0.5 + 1e-6).argmax()
                and held[row, held[row].argmax() :].all()
            )
        played = ~np.pad(held, ((0, 0), (1, 0)))[:, :-1].reshape(6, 2, 8)[..., 0]
        assert (np.asarray(rolled.logp_BNTA)[~played] == 0).all() and held.any()
    again = arena.explore(1, policy, groups)
    jax.tree.map(np.testing.assert_array_equal, again, second)


# ---------------------------------------------------------------- episodes


def test_demonstrations_are_recorded_once_and_kept(fake_libero, tmp_path):
    arena = open_libero()
    facts = arena.demonstrate(tmp_path, jax.random.key(0), 6, 2)
    made, held = disk.read(tmp_path / "episodes"), disk.read(tmp_path / "validation")
    steps = sum(len(episode.action_SA) for episode in [*made, *held])
    assert (len(made), len(held)) == (6, 2) and facts == {"episodes": 8, "successes": 6, "true_steps": steps}
    assert [one.task for one in made] == [0, 0, 0, 1, 1, 1] and {one.origin["init"] for one in made} == {DRAWN}
    assert {one.origin["flaw"] for one in made if not one.success_S.any()} == {"early_release"}
    first = tmp_path / "episodes" / "manifest.json"
    written = first.stat().st_mtime_ns
    arena.demonstrate(tmp_path, jax.random.key(0), 6, 2)  # as after an interruption before the stage was marked
    assert first.stat().st_mtime_ns == written
    open_libero(steps=24).demonstrate(tmp_path, jax.random.key(0), 6, 2)
    assert first.stat().st_mtime_ns > written  # other settings, other episodes
    assert fake_libero.opened == 0  # nothing was simulated in this process


def test_what_the_experts_program_refuses_reaches_the_user(fake_libero, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FAKE_EXPERT", "refuse")
    with pytest.raises(LiberoError, match=r"ended with exit status 1; what it said stands above\..*the same command"):
        open_libero().demonstrate(tmp_path, jax.random.key(0), 6, 2)
    assert "the milk is sour." in capfd.readouterr().err
    monkeypatch.delenv("FAKE_EXPERT")
    assert open_libero().demonstrate(tmp_path, jax.random.key(0), 6, 2)["episodes"] == 8
    assert "validation: 100%" in capfd.readouterr().err  # progress stays to be seen


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_the_experts_program_ends_with_the_run_that_called_it(tmp_path, stop):
    code = (
        "import pathlib, sys, jax; from tests.sim.libero import fake_libero, test_arena; "
        "from wovr_jax.sim.libero import arena; arena.DEMONSTRATE = fake_libero.DEMONSTRATE; "
        "arena.tasks = lambda _: fake_libero.TASKS; "
        "test_arena.open_libero().demonstrate(pathlib.Path(sys.argv[1]), jax.random.key(0), 6, 2)"
    )
    environment = os.environ | {"FAKE_EXPERT": "wait", "PYTHONPATH": str(pathlib.Path(__file__).parents[3])}
    # Where the tests run in the background of a shell, SIGINT is ignored, and children inherit that.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); " + code
    # A group of its own, which Ctrl-C reaches as a whole.
    how = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment, **how) as run:
        assert any(line.startswith("expert") for line in run.stderr)  # it has begun
        (os.killpg if stop == signal.SIGINT else os.kill)(run.pid, stop)
        # The expert holds this pipe too, and would for a quarter of an hour: it is at its end when both are gone.
        begin, said = time.monotonic(), run.stderr.read()
    assert time.monotonic() - begin < 450  # however busy the machine is
    assert run.returncode == -stop and ("KeyboardInterrupt" in said) == (stop == signal.SIGINT)


def test_demonstrations_may_come_from_a_folder(fake_libero, tmp_path):
    open_libero().demonstrate(tmp_path / "a", jax.random.key(0), 6, 2)
    where = str(tmp_path / "a" / "episodes")
    facts = open_libero(demonstrations=where).demonstrate(tmp_path / "b", jax.random.key(0), 3, 1)
    assert facts["episodes"] == 4 and facts["true_steps"] > 0  # those to be judged on too
    assert [one.task for one in disk.read(tmp_path / "b" / "episodes")] == [0, 1, 0]
    for arena, says in (
        (
            open_libero(demonstrations=where),
            "has 6 episodes of the tasks asked for; collect.demonstrations=6 and collect.validation=2 need 8",
        ),
        (open_libero(demonstrations=where, scene=SceneConfig(32)), "the run has 32"),
    ):
        with pytest.raises(EpisodesError, match=says):
            arena.demonstrate(tmp_path / "c", jax.random.key(0), 6, 2)


def test_collection_runs_to_the_end_and_labels_every_frame(fake_libero, tmp_path):
    arena, (policy, _) = open_libero(), actor()
    facts = arena.collect(tmp_path / "made", "collect-0", 4, policy)
    made = disk.read(tmp_path / "made")
    assert facts == {"episodes": 4, "successes": 4, "true_steps": 4 * STEPS}
    assert [one.task for one in made] == [0, 0, 1, 1]  # a worker keeps its scene ...
    assert [one.task for one in read_in_turn(tmp_path / "made")] == [0, 1, 0, 1]  # ... a reader gets some of every task
    for one in made:
        assert one.frame_SHWC.shape == (STEPS + 1, 16, 16, 3) and one.actor == "base" and one.seed >= 1_000_000
        first = int(one.success_S.argmax())  # the square is seen where it is said to be
        assert 0 < first < STEPS and one.success_S[first:].all()
    held = dataclasses.replace(arena.cfg.scene, hold=2)
    twice = open_libero(scene=held).collect(tmp_path / "held", "collect-0", 4, policy)
    assert twice["true_steps"] == 8 * STEPS  # a held action is two steps of the simulator


def test_interventions_take_the_gripper_in_their_share_of_a_collection_only(fake_libero, tmp_path):
    wanted, policy = (arena := open_libero(intervened_share=0.5)).trials("collect-0", 40), actor()[0]
    found = [rollout.draw_intervention(trial, 0.5, STEPS) for trial in wanted]
    assert 10 < sum(one is not None for one in found) < 30
    assert {one.gripper for one in filter(None, found)} == {-1.0, 1.0}
    arena.collect(tmp_path / "made", "collect-0", 40, policy)
    made = {one.seed: one for one in disk.read(tmp_path / "made")}
    for trial, one in zip(wanted, found, strict=True):
        step_S, action_SA = np.arange(STEPS), made[trial.seed].action_SA
        # On the disk too: whoever looks for the policy's own failures has to know.
        assert made[trial.seed].origin.get("intervened") == (one.kind if one else None)
        gripper, first, end = one[1:] if one else (0.0, 0, 0)
        assert np.array_equal(action_SA[:, 6], np.where((step_S >= first) & (step_S < end), gripper, 0.0))
        assert (action_SA[:, 0] > 0).all()  # the arm stays the policy's
    (part,) = list(LiberoWitness(arena).play(4, policy))[:1]
    assert not np.asarray(part.rollout.action_BNTA)[..., 6].any()  # what is measured and compared is the policy alone
    with pytest.raises(ValueError, match="intervened_share.*1.5"):
        recipe(intervened_share=1.5)


def test_a_draw_depends_on_the_trial_and_not_on_its_batch(fake_libero, tmp_path):
    policy, asked = actor()
    one, three = (open_libero(workers=workers) for workers in (1, 3))
    alone = one.measure(tmp_path / "one", 5, policy)
    sizes = {len(frame) for frame, *_ in asked}
    together = three.measure(tmp_path / "three", 5, policy)
    assert sizes == {1} and {len(frame) for frame, *_ in asked[-2:]} == {3}
    assert np.array_equal(alone.success_B, together.success_B) and alone.steps == together.steps
    first = Trial(TASKS[0], 0, 0)
    assert draw_seed(first, 0) in asked[0][2] and draw_seed(first, 0) != draw_seed(first, 1)


# ---------------------------------------------------------------- the truth


def start_table(episodes):
    """Resets and moments in the middle of episodes."""
    cfg = StartsConfig(rule="uniform", each=3)
    return start_states.join(start_states.initial(episodes), start_states.keyframes(episodes, cfg, 0, steps=STEPS))


@pytest.mark.parametrize("train_inits", [(), (4, 7)])
def test_actions_followed_from_a_start_state_do_what_they_did(fake_libero, tmp_path, train_inits):
    arena, (policy, _) = open_libero(train_inits=train_inits), actor(push=0.1)
    arena.collect(tmp_path / "made", "collect-0", 12, policy)
    episodes = disk.read(tmp_path / "made")
    table = start_table(episodes)
    # Through the disk, and in an order of its own, tasks mixed.
    start_states.save(tmp_path / "starts", table)
    table = start_states.load(tmp_path / "starts")
    row_K = np.arange(len(table))[::-1]
    sources = [(episodes[table.episode_K[row]], int(table.step_K[row])) for row in row_K]
    assert max(step for _, step in sources) > 2 and len({episode.task for episode, _ in sources}) == 2
    # To the end of the episode, and some that would push the square home.
    actions = np.ones((len(sources), STEPS, 7), np.float32)
    for action_SA, (episode, step) in zip(actions, sources, strict=True):
        action_SA[: STEPS - step] = episode.action_SA[step:]
    fake_libero.losing = {(0, episodes[0].origin["init"], episodes[0].seed)}
    success_KS, frame_KSHWC = LiberoWitness(arena).follow(table, row_K, actions, film=True)
    assert not fake_libero.losing  # a worker was lost, and its row begun again
    # The square only goes right: a success holds on. What would be played after the end of an episode is not.
    truth_KS = np.stack([np.pad(episode.success_S[step + 1 :], (0, step), "edge") for episode, step in sources])
    np.testing.assert_array_equal(success_KS, truth_KS)
    assert success_KS.dtype == bool and success_KS.any() and not success_KS.all()
    np.testing.assert_array_equal(LiberoWitness(arena).follow(table, row_K, actions)[0], success_KS)
    # Filmed from the start state on to the first success, where the film stands still.
    for frame_SHWC, won_S, (episode, step) in zip(frame_KSHWC, success_KS, sources, strict=True):
        length = min(int(won_S.argmax()) + 1 if won_S.any() else STEPS, STEPS - step)
        np.testing.assert_array_equal(frame_SHWC[:length], episode.frame_SHWC[step + 1 :][:length])
        assert (frame_SHWC[length:] == frame_SHWC[length - 1]).all()


def test_a_start_state_of_unknown_origin_is_not_followed(fake_libero, tmp_path):
    open_libero().collect(tmp_path / "made", "collect-0", 4, actor()[0])
    table = start_states.initial(disk.read(tmp_path / "made"))
    # As tables of before say it, and as those of others do.
    old = dataclasses.replace(table, init_K=np.full(4, start_states.BY_SEED, np.int32))
    actions = np.zeros((1, 8, 7), np.float32)
    assert LiberoWitness(open_libero()).follow(old, np.array([1]), actions)[0].shape == (1, 8)  # the seed says it all
    foreign = dataclasses.replace(table, init_K=np.full(4, start_states.UNKNOWN, np.int32))
    for arena, rows in ((open_libero(train_inits=(4, 7)), old), (open_libero(), foreign)):
        with pytest.raises(LiberoError, match="start state 1 does not say from which initial state"):
            LiberoWitness(arena).follow(rows, np.array([1]), actions)


def test_an_interrupted_evaluation_goes_on_and_ends_alike(fake_libero, tmp_path):
    arena, (policy, asked) = open_libero(workers=1), actor()
    calm = arena.measure(tmp_path / "calm" / "sampled", 6, policy)
    count, act = len(asked), policy.acting.act

    def dies(*arguments):
        if len(asked) >= count + 5:
            raise KeyboardInterrupt
        return act(*arguments)

    broken = dataclasses.replace(policy, acting=acting(dies))
    with pytest.raises(KeyboardInterrupt):
        arena.measure(tmp_path / "rough" / "sampled", 6, broken)
    before = len(asked)
    rough = arena.measure(tmp_path / "rough" / "sampled", 6, policy)
    assert np.array_equal(rough.success_B, calm.success_B) and rough.steps == calm.steps
    assert len(asked) - before < count  # what was done was not done again
    assert calm.subgoals == {} and calm.steps < 6 * STEPS  # a trial ends with its success
    greedy = dataclasses.replace(policy, temperature=0.0)
    arena.measure(tmp_path / "rough" / "sampled", 6, greedy)
    assert len(list((tmp_path / "rough").iterdir())) == 2  # another temperature keeps lines of its own


def test_a_trial_without_a_verdict_stops_the_measurement_and_is_played_again(fake_libero, tmp_path, monkeypatch):
    arena, (policy, _) = open_libero(), actor()
    with monkeypatch.context() as broken:
        always = type("Always", (set,), {"discard": lambda self, _: None})({(0, 1, 0)})
        broken.setattr(fake_libero, "losing", always)
        with pytest.raises(LiberoError, match=r"1 of 6 trials came to no verdict; .* was lost 3 times: it died"):
            arena.measure(tmp_path / "sampled", 6, policy)
    mended = arena.measure(tmp_path / "sampled", 6, policy)
    assert np.array_equal(mended.success_B, arena.measure(tmp_path / "calm", 6, policy).success_B)


def test_a_simulator_that_never_starts_is_said_after_one_trial(fake_libero, tmp_path, monkeypatch):
    always = type("Always", (), {"__contains__": lambda self, _: True, "discard": lambda self, _: None})()
    monkeypatch.setattr(fake_libero, "losing", always)
    arena, (policy, _) = open_libero(), actor()
    with pytest.raises(LiberoError, match=r"the simulator does not start \(.*: it died\)\.\n  python launch/doctor.py"):
        arena.measure(tmp_path / "sampled", 6, policy)


def test_rollouts_for_imagination_are_the_measured_ones_to_the_end(fake_libero, tmp_path):
    arena, (policy, _) = open_libero(), actor(push=0.1)
    fake_libero.losing = {(0, 1, 0)}
    measured = arena.measure(tmp_path / "sampled", 6, policy)
    fake_libero.losing = {(1, 0, 0)}
    first, last = LiberoWitness(arena).play(6, policy)
    assert (first.count, last.count) == (4, 2) and last.rollout.task_B.shape == (4,)  # padded to one compiled shape
    truth = np.concatenate([first.rollout.truth_BNT, last.rollout.truth_BNT[:2]])
    assert np.array_equal(truth.any((1, 2)), measured.success_B)
    assert first.rollout.video_BNTHWC.shape == (4, 2, 8, 16, 16, 3) and first.rollout.video_BNTHWC.dtype == np.float32
    assert first.start.memory_BMHWC.shape[1] == WorldConfig.fake().slots and first.start.sim is None
    np.testing.assert_array_equal(first.rollout.frame_BNHWC[:, 0], first.start.anchor_BHWC)
    np.testing.assert_array_equal(first.rollout.frame_BNHWC[:, 1], first.rollout.video_BNTHWC[:, 0, -1])


def test_a_trial_that_no_worker_finishes_stops_the_comparison(fake_libero, monkeypatch):
    monkeypatch.setattr(fake_libero, "losing", type("Always", (set,), {"discard": lambda self, _: None})({(0, 1, 0)}))
    arena, (policy, _) = open_libero(), actor()
    with pytest.raises(LiberoError, match="was lost 3 times: it died"):
        list(LiberoWitness(arena).play(6, policy))
