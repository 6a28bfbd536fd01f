"""A scripted expert for LIBERO's pick-and-place tasks, its noise and its named flaws.

It reads the simulator's state and gives the benchmark's own actions, so what it plays is a demonstration like any
other: hover, go down, close, lift, carry, lower, open; and again when the object slipped or the goal does not hold. A
flaw makes it fail in one coarse way that a policy can unlearn.

robosuite's OSC_POSE controller moves its goal by the action times 5 cm and 0.5 rad each control step of 1/20 s
(robosuite: controllers/config/osc_pose.json), and with a constant action of 1 the hand moves at about 1.5 cm a step.
Lengths are metres, angles radians, durations control steps.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from wovr_jax.sim.libero import grasp
from wovr_jax.sim.libero.grasp import Heights
from wovr_jax.sim.libero.setup import LiberoError
from wovr_jax.sim.libero.tasks import CLOSE, OPEN, SUITES, EvaluationProtocol, LiberoExpertConfig, Trial
from wovr_jax.sim.libero.worker import Observations, Scene, WorkerState

GAIN, TURN_GAIN = 20.0, 2.0
"""Action for each metre and each radian still to go. Times the controller's 5 cm and 0.5 rad both are 1, so near the
goal the command is exactly what is left."""
SLIPPED = 0.06
"""An object that has moved this far in the hand is lost, in metres."""


class PickAndPlace:
    """The expert in one episode: a state machine whose phases are the methods ``_above`` to ``_rest``.

    Args:
      scene: the scene after its reset.
      flaw: a ``tasks.Flaw``.
      rng: draws what the flaw leaves open.
      cfg: where the flaws happen.

    Raises:
      LiberoError: for a task that is not "put one object onto or into another", or an object that cannot be grasped.
    """

    def __init__(self, scene: Scene, flaw: str, rng: np.random.Generator, cfg: LiberoExpertConfig):
        self.env, self.flaw = scene.env.env, flaw
        goals = self.env.parsed_problem["goal_state"]
        if len(goals) != 1 or goals[0][0] not in ("on", "in"):
            raise LiberoError(f"the expert puts one thing onto or into another; {scene.task.name} asks for {goals}.")
        self.relation, self.object, self.goal = goals[0]
        self.release = rng.uniform(cfg.release_low, cfg.release_high)
        # Whether it goes through the motions with nothing in its hand.
        self.empty = flaw == "missed_grasp"
        _, rotation_33 = self._hand()
        # The hand points straight down at rest; rounding takes off what noise the arm began with.
        self.rest_33 = np.round(rotation_33)
        left_3, right_3 = (
            next(self._data.xpos[i] for i in range(self._model.nbody) if self._model.body(i).name.endswith(finger))
            for finger in ("leftfinger", "rightfinger")
        )
        delta_x, delta_y, _ = left_3 - right_3
        self.finger_bearing = np.arctan2(delta_y, delta_x)
        if flaw == "wrong_object":
            self.object = self._choose_other(rng)
        self._plan()

    def act(self) -> np.ndarray:
        """Returns the clean action for this moment, (7,)."""
        self.age += 1
        hand_3, _ = self._hand()
        held = self.phase in ("up", "carry", "lower") and not self.empty
        if held and self._slipped(hand_3):
            self._enter(self._phase_after_loss)
        return getattr(self, f"_{self.phase}")(hand_3)

    @property
    def finished(self) -> bool:
        """Whether it has stopped for good."""
        return self.phase == "rest" and self.age > 10

    # --- what it reads from the simulator ---------------------------------------------------

    @property
    def _model(self):
        return self.env.sim.model._model

    @property
    def _data(self):
        return self.env.sim.data._data

    def _hand(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns position (3,) of the grip point and rotation (3, 3) of the hand."""
        site = self.env.robots[0].eef_site_id
        return self._data.site_xpos[site].copy(), self._data.site_xmat[site].reshape(3, 3).copy()

    def _position(self, name: str) -> np.ndarray:
        """Returns the position (3,) of an object or a region."""
        if name in self.env.obj_body_id:
            return self._data.xpos[self.env.obj_body_id[name]].copy()
        return self.env.sim.data.get_site_xpos(name).copy()

    def _slipped(self, hand_3: np.ndarray) -> bool:
        """Returns whether the object is no longer where the hand took hold of it."""
        return bool(np.linalg.norm(self._position(self.object) - hand_3 - self.held_at_3) > SLIPPED)

    def _choose_other(self, rng: np.random.Generator) -> str:
        """Returns the name of another object that can be grasped: the other of two equal ones, else any."""
        kind = self.object.rstrip("0123456789")
        others = [name for name in self.env.objects_dict if name != self.object and not self.goal.startswith(name)]
        rng.shuffle(others)
        for name in sorted(others, key=lambda name: not name.startswith(kind)):
            if self._grasps(name)[0]:
                return name
        raise LiberoError(f"there is nothing to mistake {self.object} for.")

    # --- plans ------------------------------------------------------------------------------

    def _grasps(self, name: str) -> tuple[list[grasp.Grasp], np.ndarray, Heights]:
        """Returns the grasps of an object, best first, the points (P, 3) that span it, and the scene around it."""
        body = self.env.obj_body_id[name]
        points = grasp.shape_points(self._model, self._data, body)
        # Rays leave out one body only: the first of the object's that has a shape.
        holder = next(i for i in sorted(grasp.descendants(self._model, body)) if self._model.body_geomnum[i])
        around = Heights(self._model, self._data, holder, self.env.robots[0]._ref_joint_pos_indexes[0])
        ways = grasp.grasps(points, self._position(name), around, self.finger_bearing, rim="bowl" in name)
        return ways, points, around

    def _plan(self) -> None:
        """Chooses the grasp, and how high to carry."""
        ways, points, around = self._grasps(self.object)
        if not ways:
            raise LiberoError(f"{self.object} is wider than the hand opens, whichever way it is taken.")
        self.grasp = ways[0]
        self.height = self.grasp.height
        top = points[:, 2].max()
        if self.flaw == "missed_grasp":
            # The tips close 1.5 cm above the object.
            self.height = top + grasp.TIP + 0.015
        start_3, goal_3 = self._position(self.object), self._position(self.goal)
        # From the object's origin down to its underside, so negative.
        self.foot = points[:, 2].min() - start_3[2]
        path = [
            start_3[:2] + share * (goal_3 - start_3)[:2] + np.array([x, y])
            for share in np.linspace(0, 1, 12)
            for x in (-0.06, 0, 0.06)
            for y in (-0.06, 0, 0.06)
        ]
        near = [goal_3[:2] + np.array([x, y]) for x in (-0.01, 0, 0.01) for y in (-0.01, 0, 0.01)]
        self.path_top, self.goal_top = around.highest(path, top + 0.6), around.highest(near, top + 0.6)
        self.from_2 = start_3[:2]
        self._enter("above")

    def _enter(self, phase: str) -> None:
        self.phase, self.age = phase, 0

    @property
    def _carrying_grip(self) -> float:
        """The gripper's command while the hand carries; open once an early release has happened."""
        return OPEN if self.empty and self.flaw == "early_release" else CLOSE

    @property
    def _phase_after_loss(self) -> str:
        """The phase after an object is lost or misplaced: another try, or the end for a flawed demonstration."""
        return "retry" if self.flaw == "none" else "rest"

    # --- motion -----------------------------------------------------------------------------

    def _rotation_left(self) -> np.ndarray:
        """Returns the rotation still to be made, (3,) axis times angle in the world's frame."""
        cos, sin = np.cos(self.grasp.yaw), np.sin(self.grasp.yaw)
        goal_33 = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1.0]]) @ self.rest_33
        return rotation_vector(goal_33 @ self._hand()[1].T)

    def _move_to(self, goal_3: np.ndarray, grip: float, gain: float = GAIN, fastest: float = 1.0) -> np.ndarray:
        """Returns the action (7,) towards a position (3,) and the grasp's rotation; ``fastest`` is an action's size."""
        move_3 = np.clip((goal_3 - self._hand()[0]) * gain, -fastest, fastest)
        return np.concatenate([move_3, np.clip(self._rotation_left() * TURN_GAIN, -1, 1), [grip]])

    def _held_position(self, hand_3: np.ndarray) -> np.ndarray:
        """Returns where the object is; with an empty hand, where it would be if the hand held it."""
        return hand_3 + self.held_at_3 if self.empty else self._position(self.object)

    def _above(self, hand_3: np.ndarray) -> np.ndarray:
        goal_3 = np.append(self._position(self.object)[:2] + self.grasp.offset_2, self.height + 0.09)
        distance = np.linalg.norm((hand_3 - goal_3)[:2])
        if distance > 0.06:
            # First sideways, then down: the hand would hit neighbours.
            goal_3[2] = max(goal_3[2], min(hand_3[2], goal_3[2] + 0.08), self.height + 0.12)
        turned = np.linalg.norm(self._rotation_left()) < 0.12
        if (distance < 0.012 and turned and abs(hand_3[2] - goal_3[2]) < 0.03) or self.age > 70:
            self._enter("down")
        return self._move_to(goal_3, OPEN)

    def _down(self, hand_3: np.ndarray) -> np.ndarray:
        if abs(hand_3[2] - self.height) < 0.006 or self.age > 30:
            self._enter("close")
        goal_3 = np.append(self._position(self.object)[:2] + self.grasp.offset_2, self.height)
        return self._move_to(goal_3, OPEN, gain=22.0)

    def _close(self, hand_3: np.ndarray) -> np.ndarray:
        # The fingers need this long to close; lifted earlier, the object stays behind.
        if self.age >= 11:
            self.held_at_3 = self._position(self.object) - hand_3
            self.lift_2 = hand_3[:2]
            self._enter("up")
        return self._move_to(np.append(hand_3[:2], self.height), CLOSE)

    def _up(self, hand_3: np.ndarray) -> np.ndarray:
        # The object's underside clears what is on the way by 3.5 cm; the hand is above it by `-underside`.
        underside = self._held_position(hand_3)[2] + self.foot - hand_3[2]
        self.carry_height = max(self.path_top + 0.035 - underside, self.height + 0.06)
        if hand_3[2] > self.carry_height - 0.02 or self.age > 40:
            self._enter("carry")
        # Straight up, and gently at first: a rim that is pulled sideways or jerked slips out of the fingers.
        fastest = 0.4 if self.age < 8 else 1.0
        return self._move_to(np.append(self.lift_2, self.carry_height), CLOSE, fastest=fastest)

    def _carry(self, hand_3: np.ndarray) -> np.ndarray:
        object_3, goal_3 = self._held_position(hand_3), self._position(self.goal)
        left = np.linalg.norm((object_3 - goal_3)[:2])
        distance = np.linalg.norm(goal_3[:2] - self.from_2)
        # Nearer than 10 cm, an object that is let go may slide to where it should have been put.
        if self.flaw == "early_release" and not self.empty and left < max((1 - self.release) * distance, 0.10):
            self._enter("drop")
        elif left < 0.012 or self.age > 80:
            self._enter("lower")
        return self._move_to(np.append(goal_3[:2] + (hand_3 - object_3)[:2], self.carry_height), self._carrying_grip)

    def _drop(self, hand_3: np.ndarray) -> np.ndarray:
        """Lets go on the way, then carries on with an empty hand.

        Only the fingers then tell that the object does not arrive. An arm that stopped would tell it too, and a world
        model would learn from the arm instead of the fingers.
        """
        # A hand that moved on at once would drag the object along between its open fingers, where some get stuck.
        if self._slipped(hand_3):
            self.empty = True
            self._enter("carry")
        elif self.age > 25:
            self._enter("rest")
        return np.array([0, 0, 0, 0, 0, 0, OPEN])

    def _lower(self, hand_3: np.ndarray) -> np.ndarray:
        object_3, goal_3 = self._held_position(hand_3), self._position(self.goal)
        # Height of the object's origin when its underside is 1 cm above the plate, or 3.5 cm above the basket's floor.
        aim = self.goal_top - self.foot + (0.010 if self.relation == "on" else 0.035)
        if object_3[2] < aim + 0.006 or self.age > 30:
            self._enter("open")
        goal_3 = np.append(goal_3[:2] + (hand_3 - object_3)[:2], hand_3[2] + aim - object_3[2])
        return self._move_to(goal_3, self._carrying_grip, fastest=0.7)

    def _open(self, hand_3: np.ndarray) -> np.ndarray:
        if self.age > 8:
            self._enter("leave")
        return np.array([0, 0, 0, 0, 0, 0, OPEN])

    def _leave(self, hand_3: np.ndarray) -> np.ndarray:
        if self.age > 10:
            self._enter("rest" if self.env._check_success() else self._phase_after_loss)
        return np.array([0, 0, 0.5, 0, 0, 0, OPEN])

    def _retry(self, hand_3: np.ndarray) -> np.ndarray:
        if self.age > 12:
            self._plan()
        return np.array([0, 0, 0.8, 0, 0, 0, OPEN])

    def _rest(self, hand_3: np.ndarray) -> np.ndarray:
        return np.array([0, 0, 0, 0, 0, 0, OPEN])


def rotation_vector(rotation_33: np.ndarray) -> np.ndarray:
    """Returns axis times angle (3,) of a rotation (3, 3) of less than half a turn."""
    # trace(R) = 1 + 2 cos(angle), and R - R^T = 2 sin(angle) times the axis' cross-product matrix.
    angle = np.arccos(np.clip((np.trace(rotation_33) - 1) / 2, -1, 1))
    skew = rotation_33 - rotation_33.T
    axis_3 = np.array([skew[2, 1], skew[0, 2], skew[1, 0]])
    length = np.linalg.norm(axis_3)
    return axis_3 / length * angle if angle > 1e-6 and length > 1e-9 else np.zeros(3)


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """What the expert did in one trial.

    Attributes:
      observed: the moment after the reset, then each step.
      action_SA: (S, 7) actions as executed, with noise.
      label_SA: (S, 7) the expert's own actions, without noise.
      flaw: the flaw that it had, a ``tasks.Flaw``.
    """

    observed: list[Observations]
    action_SA: np.ndarray
    label_SA: np.ndarray
    flaw: str


def demonstrate(
    state: WorkerState, trial: Trial, protocol: EvaluationProtocol, cfg: LiberoExpertConfig, draw: str
) -> Demonstration:
    """Plays one trial; it ends after the success, when a flawed expert has stopped, or at the horizon.

    Args:
      state: the worker's.
      trial: where the episode begins.
      protocol: how it begins, and its horizon.
      cfg: how it is made.
      draw: ``"all"`` frames or ``"none"``.
    """
    scene = state.open_scene(trial.task)
    observed = [scene.reset(trial, protocol)]
    # A seed's entries may not be negative, and DRAWN is -1.
    rng = np.random.default_rng(
        [cfg.seed, SUITES.index(trial.task.suite), trial.task.index, trial.init % 2**32, trial.seed]
    )
    flaw = cfg.flaw if rng.random() < cfg.flawed_share else "none"
    expert = PickAndPlace(scene, flaw, rng, cfg)
    actions, labels, after = [], [], 0
    while len(actions) < protocol.horizons[trial.task.suite] and after <= cfg.linger and not expert.finished:
        labels.append(expert.act())
        # As in DART, the executed action strays and the label says what would have been right (Laskey et al. 2017).
        # The gripper gets no noise: half a command is none.
        noise_A = np.append(cfg.noise * rng.standard_normal(6), 0.0)
        actions.append(np.clip(labels[-1] + noise_A, -1.0, 1.0))
        observed.append(scene.play(actions[-1][None], draw, stop=False))
        # Steps since the first success.
        after += bool(after or observed[-1].success_T.any())
        state.heartbeat()
    return Demonstration(observed, np.stack(actions), np.stack(labels), flaw)
