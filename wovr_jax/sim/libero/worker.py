"""One LIBERO environment in one process: reset, step, look; and the loop that serves it to another process.

Runs in processes that ``pool.Pool`` starts. It imports no jax, so that a worker holds what the simulator needs and
no more, and libero only when it builds its first environment.

Frames come out as OpenVLA's LIBERO data hold them: turned by 180 degrees. The simulator's rows run upwards, so a turned
frame is upright and mirrored left to right; that is the protocol, for both cameras.

robosuite samples what a step shows one physics step before the control step ends (its clock adds up 2 ms steps), and
draws every camera in every step. To see the same pixels without that cost, the cameras here are observables like its
own that draw only in the steps whose frame is wanted.
"""

from __future__ import annotations

import logging
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from wovr_jax.sim.libero import setup
from wovr_jax.sim.libero.settings import SceneConfig
from wovr_jax.sim.libero.setup import LiberoError
from wovr_jax.sim.libero.tasks import DRAWN, Protocol, Task, Trial, init_states

CAMERA, WRIST_CAMERA = "agentview", "robot0_eye_in_hand"
ARM_NOISE = 0.02
"""Radians by which the joints of the arm are off at the beginning, one standard deviation: robosuite's default, and
what the official initial states have. LIBERO's environment itself draws none."""


class Seen(NamedTuple):
    """What one or more control steps showed.

    Attributes:
      frame_FHWC: uint8 frames of the table's camera: all, the last or none, as asked.
      wrist_FHWC: the same from the hand, or None.
      state_TD: (T, 8) float32 after each step: hand position, rotation as axis times angle, finger joints.
      success_T: bool after each step.
    """

    frame_FHWC: np.ndarray
    wrist_FHWC: np.ndarray | None
    state_TD: np.ndarray
    success_T: np.ndarray


class Scene:
    """The environment of one task in this process.

    Raises:
      LiberoError: when a file of its assets is not there.
    """

    def __init__(self, task: Task, cfg: SceneConfig):
        from libero.libero.envs.env_wrapper import ControlEnv  # pyright: ignore[reportMissingImports]

        self.task, self.cfg = task, cfg
        self.states = init_states(task)
        self.cameras = ((CAMERA, WRIST_CAMERA) if cfg.wrist else (CAMERA,)) if cfg.size else ()
        try:
            self.env = ControlEnv(
                bddl_file_name=str(task.bddl_file),
                use_camera_obs=False,
                has_offscreen_renderer=False,
                ignore_done=True,
                hard_reset=cfg.hard_reset,
            )
        except ValueError as error:  # MuJoCo's, and the only place where it says which file
            if "opening file" not in str(error):
                raise
            raise LiberoError(
                f"{task.name} cannot be built, its assets are not complete: {error}. Bring that file, or leave the "
                f"task out (tasks=...).\n  export {setup.ASSETS}=<folder that has it>"
            ) from error
        self.wanted = False
        self.pictures = {name: np.zeros((cfg.size, cfg.size, 3), np.uint8) for name in self.cameras}
        for camera in self.cameras:
            self.env.env.add_observable(self._camera(camera))

    def reset(self, trial: Trial, protocol: Protocol) -> Seen:
        """The trial's initial state, fixtures placed by its seed, after the protocol's no-op steps.

        Raises:
          LiberoError: when the task has no such initial state.
        """
        if trial.init != DRAWN and not 0 <= trial.init < len(self.states):
            raise LiberoError(
                f"{self.task.name} has initial states 0 to {len(self.states) - 1}, and {trial.init} was asked for."
            )
        # Fixtures are not part of an initial state; their place is drawn at every reset, and so is all the rest.
        self.env.seed(trial.seed)
        self._shake(ARM_NOISE if trial.init == DRAWN else 0.0)
        self._place()
        if self.cfg.size:
            self._make_context()
        begun = self.env.get_sim_state() if trial.init == DRAWN else self.states[trial.init]
        self._observe(self.env.set_init_state(begun))
        self.success = bool(self.env.check_success())
        noop_A = np.array([0.0] * 6 + [protocol.settle_gripper])
        for left in reversed(range(protocol.settle)):
            self.step(noop_A, draw=left == 0)
        return self._seen([self.pictures.copy()], [self.state_D], [self.success])

    def _shake(self, magnitude: float) -> None:
        """How far the next reset moves the arm: the robot's own setting, and that of the next one which is built."""
        noise = {"magnitude": magnitude, "type": "gaussian"}
        inner = self.env.env
        inner.robot_configs[0]["initialization_noise"] = inner.robots[0].initialization_noise = noise

    def _place(self, tries: int = 100) -> None:
        """The environment's reset, again while its random placement finds no room."""
        from robosuite.utils.errors import RandomizationError  # pyright: ignore[reportMissingImports]

        # The wrapper's own reset() swallows every exception and tries for ever.
        for _ in range(tries):
            try:
                self.env.env.reset()
                return
            except RandomizationError:
                continue
        raise LiberoError(f"{self.task.name}: no placement of its fixtures found in {tries} tries.")

    def step(self, action_A: np.ndarray, draw: bool = False) -> bool:
        """One action, held for ``hold`` control steps of 1/20 s; whether the goal holds after any of them.

        ``draw`` brings ``pictures`` up to date: as they are in the last one.
        """
        self.success = False
        for left in reversed(range(self.cfg.hold)):
            self.wanted = draw and left == 0
            observation, _, done, _ = self.env.step(np.asarray(action_A, np.float64))
            self.wanted = False
            self._observe(observation)
            self.success |= bool(done)
        return self.success

    def play(self, action_TA: np.ndarray, draw: str, stop: bool) -> Seen:
        """Steps through a chunk.

        Args:
          action_TA: (T, 7) environment actions.
          draw: frames after ``"all"`` steps, the ``"last"``, or ``"none"``.
          stop: whether to end at the first success. The last frame is then missing if another was to be drawn.
        """
        pictures, states, wins = [], [], []
        for number, action_A in enumerate(action_TA, 1):
            drawn = draw == "all" or (draw == "last" and number == len(action_TA))
            wins.append(self.step(action_A, drawn))
            states.append(self.state_D)
            if drawn:
                pictures.append(self.pictures.copy())
            if stop and wins[-1]:
                break
        return self._seen(pictures, states, wins)

    def _seen(self, pictures: list[dict[str, np.ndarray]], states: list[np.ndarray], wins: list[bool]) -> Seen:
        nothing = np.zeros((0, self.cfg.size, self.cfg.size, 3), np.uint8)
        frames = {
            camera: np.stack([one[camera] for one in pictures]) if pictures else nothing for camera in self.cameras
        }
        return Seen(frames.get(CAMERA, nothing), frames.get(WRIST_CAMERA), np.stack(states), np.array(wins))

    def _camera(self, name: str) -> Any:
        """An observable that draws when a frame is wanted, and is sampled when robosuite's own are."""
        from robosuite.utils.observables import Observable, sensor  # pyright: ignore[reportMissingImports]

        @sensor(modality="image")
        def picture(_: Any) -> np.ndarray:
            if self.wanted:
                size = self.cfg.size
                drawn = self.env.sim.render(width=size, height=size, camera_name=name)
                self.pictures[name] = np.ascontiguousarray(drawn[::-1, ::-1])
            return self.pictures[name]

        return Observable(name=f"{name}_frame", sensor=picture, sampling_rate=self.env.env.control_freq)

    @property
    def sim_state(self) -> np.ndarray:
        """(1 + nq + nv,) time, positions and velocities."""
        return self.env.get_sim_state()

    def close(self) -> None:
        """Frees the environment and its renderer."""
        self.env.close()

    def _observe(self, observation: dict[str, np.ndarray]) -> None:
        from robosuite.utils.transform_utils import quat2axisangle  # pyright: ignore[reportMissingImports]

        parts = (
            observation["robot0_eef_pos"],
            quat2axisangle(observation["robot0_eef_quat"].copy()),
            observation["robot0_gripper_qpos"],
        )
        self.state_D = np.concatenate(parts).astype(np.float32)

    def _make_context(self) -> None:
        """A renderer for the model of this reset, as the environment itself would make it."""
        from robosuite.utils.binding_utils import MjRenderContextOffscreen  # pyright: ignore[reportMissingImports]

        sim = self.env.sim
        if sim._render_context_offscreen is not None:
            return
        fast = self.cfg.drawing == "fast"
        if fast:
            sim.model.vis.quality.offsamples = 0
        context = MjRenderContextOffscreen(sim, device_id=-1)
        context.vopt.geomgroup[0], context.vopt.geomgroup[1] = 0, 1  # collision shapes off, visual ones on
        if fast:
            import mujoco  # pyright: ignore[reportMissingImports]

            reflection = mujoco.mjtRndFlag.mjRND_REFLECTION  # pyright: ignore[reportAttributeAccessIssue]
            context.scn.flags[reflection] = 0


class Bench:
    """What a worker keeps between calls: the scene of the task at hand, and a line to its master.

    Args:
      cfg: how scenes are built; None where none will be.
      beat: called to say that work goes on.
    """

    def __init__(self, cfg: SceneConfig | None, beat: Callable[[], None] = lambda: None):
        self.cfg, self.beat = cfg, beat
        self.scene: Scene | None = None

    def at(self, task: Task) -> Scene:
        """The scene of ``task``; another task's is closed first, since one takes a gigabyte."""
        if self.cfg is None:
            raise LiberoError("this worker was started without a SceneConfig.")
        if self.scene is None or self.scene.task != task:
            self.drop()
            self.scene = Scene(task, self.cfg)
        return self.scene

    def drop(self) -> None:
        """Closes the scene."""
        if self.scene is not None:
            self.scene.close()
            self.scene = None


def begin(bench: Bench, trial: Trial, protocol: Protocol) -> Seen:
    """Starts an episode."""
    return bench.at(trial.task).reset(trial, protocol)


def play(bench: Bench, action_TA: np.ndarray, draw: str, stop: bool) -> Seen:
    """Goes on with the episode that ``begin`` started."""
    if bench.scene is None:
        raise LiberoError("no episode has begun in this worker.")
    return bench.scene.play(action_TA, draw, stop)


def serve(line: Connection, cfg: SceneConfig | None, renderer: str | None) -> None:
    """The worker's life: ``(function, arguments)`` in, ``(kind, value)`` out, until None or the line breaks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the master's to handle; it ends the workers
    os.dup2(2, 1)  # libraries print; results on stdout belong to the master
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    bench = Bench(cfg, beat=lambda: line.send(("beat", None)))
    try:
        if cfg:
            setup.prepare(renderer)
        line.send(("ready", None))
        while (message := line.recv()) is not None:
            line.send(_answer(bench, *message))
    except LiberoError as error:
        line.send(("refused", str(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the master is gone
    bench.drop()


def _answer(bench: Bench, function: Callable[..., Any], arguments: tuple) -> tuple[str, Any]:
    try:
        return "done", function(bench, *arguments)
    except LiberoError as error:
        return "refused", str(error)
    except (BrokenPipeError, ConnectionResetError):
        raise
    except Exception:
        bench.scene = None  # whatever state it is in now, it is not trusted again
        return "failed", traceback.format_exc()
