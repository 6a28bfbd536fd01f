"""A scripted expert for LIBERO's pick-and-place tasks, its noise and its named flaws.

It reads the simulator's state and speaks the benchmark's own actions, so what it plays is a demonstration like any
other: hover, go down, close, lift, carry, lower, open; and again when the thing slipped or nothing was scored. A flaw
makes it fail in one coarse way that a policy can unlearn.

The controller moves its goal by the action times 5 cm and 0.5 rad each step, and with a constant action the hand moves
at about 1.5 cm a step. Lengths are metres, angles radians.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from wovr_jax.sim.libero import grasp
from wovr_jax.sim.libero.grasp import Heights
from wovr_jax.sim.libero.settings import SUITES, LiberoExpertConfig
from wovr_jax.sim.libero.setup import LiberoError
from wovr_jax.sim.libero.tasks import Protocol, Trial
from wovr_jax.sim.libero.worker import Bench, Scene, Seen

OPEN, CLOSE = -1.0, 1.0
GAIN, TURN_GAIN = 20.0, 2.0
SLIPPED = 0.06


class PickAndPlace:
    """The expert in one episode.

    Args:
      scene: after its reset.
      flaw: one of ``FLAWS``.
      rng: draws what the flaw leaves open.

    Raises:
      LiberoError: for a task that is not "put one thing onto or into another", or a thing that cannot be taken hold of.
    """

    def __init__(self, scene: Scene, flaw: str, rng: np.random.Generator, cfg: LiberoExpertConfig):
        self.env, self.flaw = scene.env.env, flaw
        goals = self.env.parsed_problem["goal_state"]
        if len(goals) != 1 or goals[0][0] not in ("on", "in"):
            raise LiberoError(f"the expert puts one thing onto or into another; {scene.task.name} asks for {goals}.")
        self.relation, self.thing, self.goal = goals[0]
        self.release = rng.uniform(cfg.release_low, cfg.release_high)
        self.empty = flaw == "missed_grasp"  # goes through the motions with nothing in its hand
        self._look()
        if flaw == "wrong_object":
            self.thing = self._another(rng)
        self._plan()

    def act(self) -> np.ndarray:
        """(7,) the clean action for this moment."""
        self.age += 1
        hand_3, _ = self._hand()
        held = self.phase in ("up", "carry", "lower") and not self.empty
        if held and np.linalg.norm(self._place(self.thing) - hand_3 - self.held_at_3) > SLIPPED:
            self._begin(self._afterwards)
        return getattr(self, f"_{self.phase}")(hand_3)

    @property
    def finished(self) -> bool:
        """Whether it has stopped for good."""
        return self.phase == "rest" and self.age > 10

    # --- what it sees -----------------------------------------------------------------------

    @property
    def _model(self):
        return self.env.sim.model._model

    @property
    def _data(self):
        return self.env.sim.data._data

    def _hand(self) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) of the grip point and rotation (3, 3) of the hand."""
        site = self.env.robots[0].eef_site_id
        return self._data.site_xpos[site].copy(), self._data.site_xmat[site].reshape(3, 3).copy()

    def _place(self, name: str) -> np.ndarray:
        """Position (3,) of a thing or a region."""
        if name in self.env.obj_body_id:
            return self._data.xpos[self.env.obj_body_id[name]].copy()
        return self.env.sim.data.get_site_xpos(name).copy()

    def _look(self) -> None:
        """The hand's rotation at rest, straight down, and the bearing of its fingers."""
        _, rotation_33 = self._hand()
        self.rest_33 = np.round(rotation_33)
        left, right = (
            next(self._data.xpos[i] for i in range(self._model.nbody) if self._model.body(i).name.endswith(finger))
            for finger in ("leftfinger", "rightfinger")
        )
        self.finger_bearing = np.arctan2(*(left - right)[1::-1])

    def _another(self, rng: np.random.Generator) -> str:
        """Something else that can be taken hold of: the other of two equal things, else any."""
        kind = self.thing.rstrip("0123456789")
        others = [name for name in self.env.objects_dict if name != self.thing and not self.goal.startswith(name)]
        rng.shuffle(others)
        for name in sorted(others, key=lambda name: not name.startswith(kind)):
            if self._grasps(name)[0]:
                return name
        raise LiberoError(f"there is nothing to mistake {self.thing} for.")

    # --- plans ------------------------------------------------------------------------------

    def _grasps(self, name: str):
        body = self.env.obj_body_id[name]
        points = grasp.shape_points(self._model, self._data, body)
        holder = next(i for i in sorted(grasp.descendants(self._model, body)) if self._model.body_geomnum[i])
        around = Heights(self._model, self._data, holder, self.env.robots[0]._ref_joint_pos_indexes[0])
        found = grasp.grasps(points, self._place(name), around, self.finger_bearing, rim="bowl" in name)
        return found, points, around

    def _plan(self) -> None:
        """Chooses the grasp, and how high to carry."""
        found, points, around = self._grasps(self.thing)
        if not found:
            raise LiberoError(f"{self.thing} is wider than the hand opens, whichever way it is taken.")
        self.grasp = found[0]
        self.height = self.grasp.height
        top = points[:, 2].max()
        if self.flaw == "missed_grasp":
            self.height = top + grasp.TIP + 0.015
        start_3, goal_3 = self._place(self.thing), self._place(self.goal)
        self.foot = points[:, 2].min() - start_3[2]
        way = [
            start_3[:2] + share * (goal_3 - start_3)[:2] + np.array([x, y])
            for share in np.linspace(0, 1, 12)
            for x in (-0.06, 0, 0.06)
            for y in (-0.06, 0, 0.06)
        ]
        near = [goal_3[:2] + np.array([x, y]) for x in (-0.01, 0, 0.01) for y in (-0.01, 0, 0.01)]
        self.way_top, self.goal_top = around.highest(way, top + 0.6), around.highest(near, top + 0.6)
        self.from_2 = start_3[:2]
        self._begin("above")

    def _begin(self, phase: str) -> None:
        self.phase, self.age = phase, 0

    @property
    def _grip(self) -> float:
        """Of a hand that carries."""
        return OPEN if self.empty and self.flaw == "early_release" else CLOSE

    @property
    def _afterwards(self) -> str:
        """What follows when the thing is not held any more: another try, or nothing for a flawed one."""
        return "retry" if self.flaw == "none" else "rest"

    # --- motion -----------------------------------------------------------------------------

    def _wanted_33(self) -> np.ndarray:
        cos, sin = np.cos(self.grasp.yaw), np.sin(self.grasp.yaw)
        return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1.0]]) @ self.rest_33

    def _turn(self) -> np.ndarray:
        """(3,) rotation still to be made, axis times angle."""
        return rotation_vector(self._wanted_33() @ self._hand()[1].T)

    def _towards(self, goal_3: np.ndarray, grip: float, gain: float = GAIN, fastest: float = 1.0) -> np.ndarray:
        move_3 = np.clip((goal_3 - self._hand()[0]) * gain, -fastest, fastest)
        return np.concatenate([move_3, np.clip(self._turn() * TURN_GAIN, -1, 1), [grip]])

    def _thing_at(self, hand_3: np.ndarray) -> np.ndarray:
        """Where the thing is, or where one that holds nothing believes it is."""
        return hand_3 + self.held_at_3 if self.empty else self._place(self.thing)

    def _above(self, hand_3: np.ndarray) -> np.ndarray:
        goal_3 = np.append(self._place(self.thing)[:2] + self.grasp.offset_2, self.height + 0.09)
        far = np.linalg.norm((hand_3 - goal_3)[:2])
        if far > 0.06:  # first sideways, then down: neighbours stand around
            goal_3[2] = max(goal_3[2], min(hand_3[2], goal_3[2] + 0.08), self.height + 0.12)
        there = far < 0.012 and np.linalg.norm(self._turn()) < 0.12 and abs(hand_3[2] - goal_3[2]) < 0.03
        if there or self.age > 70:
            self._begin("down")
        return self._towards(goal_3, OPEN)

    def _down(self, hand_3: np.ndarray) -> np.ndarray:
        if abs(hand_3[2] - self.height) < 0.006 or self.age > 30:
            self._begin("close")
        goal_3 = np.append(self._place(self.thing)[:2] + self.grasp.offset_2, self.height)
        return self._towards(goal_3, OPEN, gain=22.0)

    def _close(self, hand_3: np.ndarray) -> np.ndarray:
        if self.age >= 11:
            self.held_at_3 = self._place(self.thing) - hand_3
            self.lift_2 = hand_3[:2]
            self._begin("up")
        return self._towards(np.append(hand_3[:2], self.height), CLOSE)

    def _up(self, hand_3: np.ndarray) -> np.ndarray:
        underside = self._thing_at(hand_3)[2] + self.foot - hand_3[2]
        self.carry_height = max(self.way_top + 0.035 - underside, self.height + 0.06)
        if hand_3[2] > self.carry_height - 0.02 or self.age > 40:
            self._begin("carry")
        # Straight up, and gently at first: a rim that is pulled sideways or jerked slips out of the fingers.
        fastest = 0.4 if self.age < 8 else 1.0
        return self._towards(np.append(self.lift_2, self.carry_height), CLOSE, fastest=fastest)

    def _carry(self, hand_3: np.ndarray) -> np.ndarray:
        thing_3, goal_3 = self._thing_at(hand_3), self._place(self.goal)
        left = np.linalg.norm((thing_3 - goal_3)[:2])
        whole = np.linalg.norm(goal_3[:2] - self.from_2)
        # Nearer than this, what is let go may slide to where it should have been put.
        if self.flaw == "early_release" and not self.empty and left < max((1 - self.release) * whole, 0.10):
            self._begin("drop")
        elif left < 0.012 or self.age > 80:
            self._begin("lower")
        return self._towards(np.append(goal_3[:2] + (hand_3 - thing_3)[:2], self.carry_height), self._grip)

    def _drop(self, hand_3: np.ndarray) -> np.ndarray:
        """Lets go on the way, and goes on as if nothing had happened: that the thing does not arrive is told by the
        fingers, and not by an arm that stops, which a world model would rather learn from."""
        # A hand that moved on at once would drag the thing along between its open fingers, where some get stuck.
        if np.linalg.norm(self._place(self.thing) - hand_3 - self.held_at_3) > SLIPPED:
            self.empty = True
            self._begin("carry")
        elif self.age > 25:
            self._begin("rest")
        return np.array([0, 0, 0, 0, 0, 0, OPEN])

    def _lower(self, hand_3: np.ndarray) -> np.ndarray:
        thing_3, goal_3 = self._thing_at(hand_3), self._place(self.goal)
        # The thing's origin when its underside is this far above the plate, or the floor of the basket.
        aim = self.goal_top - self.foot + (0.010 if self.relation == "on" else 0.035)
        if thing_3[2] < aim + 0.006 or self.age > 30:
            self._begin("open")
        goal_3 = np.append(goal_3[:2] + (hand_3 - thing_3)[:2], hand_3[2] + aim - thing_3[2])
        return self._towards(goal_3, self._grip, fastest=0.7)

    def _open(self, hand_3: np.ndarray) -> np.ndarray:
        if self.age > 8:
            self._begin("leave")
        return np.array([0, 0, 0, 0, 0, 0, OPEN])

    def _leave(self, hand_3: np.ndarray) -> np.ndarray:
        if self.age > 10:
            self._begin("rest" if self.env._check_success() else self._afterwards)
        return np.array([0, 0, 0.5, 0, 0, 0, OPEN])

    def _retry(self, hand_3: np.ndarray) -> np.ndarray:
        if self.age > 12:
            self._plan()
        return np.array([0, 0, 0.8, 0, 0, 0, OPEN])

    def _rest(self, hand_3: np.ndarray) -> np.ndarray:
        return np.array([0, 0, 0, 0, 0, 0, OPEN])


def rotation_vector(rotation_33: np.ndarray) -> np.ndarray:
    """Axis times angle (3,) of a rotation of less than half a turn."""
    angle = np.arccos(np.clip((np.trace(rotation_33) - 1) / 2, -1, 1))
    skew = rotation_33 - rotation_33.T
    axis_3 = np.array([skew[2, 1], skew[0, 2], skew[1, 0]])
    length = np.linalg.norm(axis_3)
    return axis_3 / length * angle if angle > 1e-6 and length > 1e-9 else np.zeros(3)


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """What the expert did in one trial.

    Attributes:
      seen: the first moment, then each step.
      action_SA: (S, 7) executed.
      label_SA: (S, 7) meant.
      flaw: the flaw of this one.
    """

    seen: list[Seen]
    action_SA: np.ndarray
    label_SA: np.ndarray
    flaw: str


def demonstrate(bench: Bench, trial: Trial, protocol: Protocol, cfg: LiberoExpertConfig, draw: str) -> Demonstration:
    """One trial by the expert; it ends with the success, when a flawed one has stopped, or at the horizon.

    Args:
      bench: the worker's.
      trial: where it begins.
      protocol: how it begins, and its horizon.
      cfg: how it is made.
      draw: ``"all"`` frames or ``"none"``.
    """
    scene = bench.at(trial.task)
    seen = [scene.reset(trial, protocol)]
    rng = np.random.default_rng(
        [cfg.seed, SUITES.index(trial.task.suite), trial.task.index, trial.init % 2**32, trial.seed]
    )
    flaw = cfg.flaw if rng.random() < cfg.flawed_share else "none"
    expert = PickAndPlace(scene, flaw, rng, cfg)
    actions, labels, after = [], [], 0
    while len(actions) < protocol.horizons[trial.task.suite] and after <= cfg.linger and not expert.finished:
        labels.append(expert.act())
        noise_A = np.append(cfg.noise * rng.standard_normal(6), 0.0)
        actions.append(np.clip(labels[-1] + noise_A, -1.0, 1.0))
        seen.append(scene.play(actions[-1][None], draw, stop=False))
        after += bool(after or seen[-1].success_T.any())
        bench.beat()
    return Demonstration(seen, np.stack(actions), np.stack(labels), flaw)
