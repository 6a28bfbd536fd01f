"""One LIBERO environment in one process: reset, step, observe; and the loop that serves it to another process.

Runs in processes that ``pool.Pool`` starts. It imports no jax, so that a worker holds what the simulator needs and
no more, and libero only when it builds its first environment.

Frames come out as OpenVLA's LIBERO data hold them: turned by 180 degrees (openvla-oft:
experiments/robot/libero/libero_utils.py). The simulator's rows run upwards, so a turned frame is upright and mirrored
left to right; that is the protocol, for both cameras.

robosuite samples what a step shows one physics step before the control step ends, because its clock adds up 2 ms steps
in floating point (robosuite: utils/observables.py), and draws every camera in every step. To see the same pixels
without that cost, the cameras here are observables like its own that draw only in the steps whose frame is wanted.
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
from wovr_jax.sim.libero.setup import LiberoError
from wovr_jax.sim.libero.tasks import DRAWN, EvaluationProtocol, SceneConfig, Task, Trial, read_init_states

CAMERA, WRIST_CAMERA = "agentview", "robot0_eye_in_hand"
ARM_NOISE = 0.02
"""Standard deviation, in radians, of the arm's joints about their rest at the beginning of a drawn layout. It is
robosuite's default, and what the official initial states have. LIBERO's environment itself draws none."""
PLACEMENTS = 100
"""Random placements of a scene's fixtures that a reset tries."""


class Observations(NamedTuple):
    """What T control steps showed.

    Attributes:
      frame_FHWC: uint8 frames of the table's camera: F = T, 1 or 0, for all, the last or none of the steps.
      wrist_FHWC: the same frames of the camera in the hand, or None.
      state_TD: (T, 8) float32 after each step: position of the hand in metres, its rotation as axis times angle in
        radians, and the two finger joints in metres.
      success_T: bool, whether the goal held after each step.
    """

    frame_FHWC: np.ndarray
    wrist_FHWC: np.ndarray | None
    state_TD: np.ndarray
    success_T: np.ndarray


class Scene:
    """The environment of one task in this process.

    Raises:
      LiberoError: when a file of its assets is missing.
    """

    def __init__(self, task: Task, cfg: SceneConfig):
        from libero.libero.envs.env_wrapper import ControlEnv  # pyright: ignore[reportMissingImports]

        self.task, self.cfg = task, cfg
        self.states = read_init_states(task.init_file)
        self.cameras = ((CAMERA, WRIST_CAMERA) if cfg.wrist else (CAMERA,)) if cfg.size else ()
        try:
            # Without an offscreen renderer of its own: it would draw in every step.
            self.env = ControlEnv(
                bddl_file_name=str(task.bddl_file),
                use_camera_obs=False,
                has_offscreen_renderer=False,
                ignore_done=True,
                hard_reset=cfg.hard_reset,
            )
        except ValueError as error:
            # MuJoCo's text is the only place that names the missing file.
            if "opening file" not in str(error):
                raise
            raise LiberoError(
                f"{task.name} cannot be built, its assets are not complete: {error}. Bring that file, or leave the "
                f"task out (tasks=...).\n  export {setup.ASSETS}=<folder that has it>"
            ) from error
        self.drawing = False
        self.pictures = {name: np.zeros((cfg.size, cfg.size, 3), np.uint8) for name in self.cameras}
        for camera in self.cameras:
            self.env.env.add_observable(self._camera(camera))

    def reset(self, trial: Trial, protocol: EvaluationProtocol) -> Observations:
        """Sets the trial's initial state with fixtures placed by its seed, and takes the protocol's no-op steps.

        Raises:
          LiberoError: when the task has no such initial state.
        """
        if trial.init != DRAWN and not 0 <= trial.init < len(self.states):
            raise LiberoError(
                f"{self.task.name} has initial states 0 to {len(self.states) - 1}, and {trial.init} was asked for."
            )
        # Fixtures without joints (cabinet, stove) are not part of an initial state: each reset draws their place. One
        # seed at the start would make a trial depend on the resets before it, so every reset is seeded.
        self.env.seed(trial.seed)
        self._set_arm_noise(ARM_NOISE if trial.init == DRAWN else 0.0)
        self._reset_env()
        if self.cfg.size:
            self._make_context()
        state = self.env.get_sim_state() if trial.init == DRAWN else self.states[trial.init]
        self._observe(self.env.set_init_state(state))
        self.success = bool(self.env.check_success())
        noop_A = np.array([0.0] * 6 + [protocol.settle_gripper])
        for left in reversed(range(protocol.settle)):
            self.step(noop_A, draw=left == 0)
        return self._observations([self.pictures.copy()], [self.state_D], [self.success])

    def step(self, action_A: np.ndarray, draw: bool = False) -> bool:
        """Holds one action for ``hold`` control steps of 1/20 s; returns whether the goal holds after any of them.

        ``draw`` brings ``pictures`` up to date, with the frame of the last control step.
        """
        self.success = False
        for left in reversed(range(self.cfg.hold)):
            self.drawing = draw and left == 0
            observation, _, done, _ = self.env.step(np.asarray(action_A, np.float64))
            self.drawing = False
            self._observe(observation)
            # LIBERO's `done` is success and nothing else (libero/envs/bddl_base_domain.py).
            self.success |= bool(done)
        return self.success

    def play(self, action_TA: np.ndarray, draw: str, stop: bool) -> Observations:
        """Steps through a chunk.

        Args:
          action_TA: (T, 7) environment actions.
          draw: frames after ``"all"`` steps, the ``"last"``, or ``"none"``.
          stop: whether to end at the first success. A frame of the last step is then missing.
        """
        pictures, states, successes = [], [], []
        for number, action_A in enumerate(action_TA, 1):
            draw_now = draw == "all" or (draw == "last" and number == len(action_TA))
            successes.append(self.step(action_A, draw_now))
            states.append(self.state_D)
            if draw_now:
                pictures.append(self.pictures.copy())
            if stop and successes[-1]:
                break
        return self._observations(pictures, states, successes)

    def close(self) -> None:
        """Frees the environment and its renderer."""
        self.env.close()

    def _observations(
        self, pictures: list[dict[str, np.ndarray]], states: list[np.ndarray], successes: list[bool]
    ) -> Observations:
        none_FHWC = np.zeros((0, self.cfg.size, self.cfg.size, 3), np.uint8)
        frames = {
            camera: np.stack([picture[camera] for picture in pictures]) if pictures else none_FHWC
            for camera in self.cameras
        }
        return Observations(
            frames.get(CAMERA, none_FHWC), frames.get(WRIST_CAMERA), np.stack(states), np.array(successes)
        )

    def _observe(self, observation: dict[str, np.ndarray]) -> None:
        from robosuite.utils.transform_utils import quat2axisangle  # pyright: ignore[reportMissingImports]

        parts = (
            observation["robot0_eef_pos"],
            quat2axisangle(observation["robot0_eef_quat"].copy()),
            observation["robot0_gripper_qpos"],
        )
        self.state_D = np.concatenate(parts).astype(np.float32)

    def _camera(self, name: str) -> Any:
        """Returns an observable that draws when a frame is wanted, and is sampled when robosuite's own are."""
        from robosuite.utils.observables import Observable, sensor  # pyright: ignore[reportMissingImports]

        @sensor(modality="image")
        def picture(_: Any) -> np.ndarray:
            if self.drawing:
                size = self.cfg.size
                frame_HWC = self.env.sim.render(width=size, height=size, camera_name=name)
                # Turned by 180 degrees, see the module's docstring.
                self.pictures[name] = np.ascontiguousarray(frame_HWC[::-1, ::-1])
            return self.pictures[name]

        return Observable(name=f"{name}_frame", sensor=picture, sampling_rate=self.env.env.control_freq)

    def _set_arm_noise(self, magnitude: float) -> None:
        """Sets by how much the next reset moves the arm, in radians."""
        noise = {"magnitude": magnitude, "type": "gaussian"}
        inner = self.env.env
        # A soft reset reads the robot's setting, a hard one builds a new robot from the environment's.
        inner.robot_configs[0]["initialization_noise"] = inner.robots[0].initialization_noise = noise

    def _reset_env(self) -> None:
        """Resets the environment, again while its random placement finds no room."""
        from robosuite.utils.errors import RandomizationError  # pyright: ignore[reportMissingImports]

        # LIBERO's wrapper has a reset() of its own, which swallows every exception and tries for ever.
        for _ in range(PLACEMENTS):
            try:
                self.env.env.reset()
                return
            except RandomizationError:
                continue
        raise LiberoError(f"{self.task.name}: no placement of its fixtures found in {PLACEMENTS} tries.")

    def _make_context(self) -> None:
        """Makes a renderer for the model of this reset, as robosuite's environment would (environments/base.py)."""
        from robosuite.utils.binding_utils import MjRenderContextOffscreen  # pyright: ignore[reportMissingImports]

        sim = self.env.sim
        if sim._render_context_offscreen is not None:
            return
        fast = self.cfg.drawing == "fast"
        if fast:
            sim.model.vis.quality.offsamples = 0
        context = MjRenderContextOffscreen(sim, device_id=-1)
        # Geoms of group 0 are collision shapes, those of group 1 what is to be seen.
        context.vopt.geomgroup[0], context.vopt.geomgroup[1] = 0, 1
        if fast:
            import mujoco  # pyright: ignore[reportMissingImports]

            reflection = mujoco.mjtRndFlag.mjRND_REFLECTION  # pyright: ignore[reportAttributeAccessIssue]
            context.scn.flags[reflection] = 0


class WorkerState:
    """What a worker keeps between calls: the open scene, and a heartbeat to the process that it works for.

    Args:
      cfg: how scenes are built; None for a worker that builds none.
      heartbeat: called by long functions to tell that the work goes on.
    """

    def __init__(self, cfg: SceneConfig | None, heartbeat: Callable[[], None] = lambda: None):
        self.cfg, self.heartbeat = cfg, heartbeat
        self.scene: Scene | None = None

    def open_scene(self, task: Task) -> Scene:
        """Returns the scene of ``task``; another task's is closed first, since a scene takes a gigabyte."""
        if self.cfg is None:
            raise LiberoError("this worker was started without a SceneConfig.")
        if self.scene is None or self.scene.task != task:
            self.close_scene()
            self.scene = Scene(task, self.cfg)
        return self.scene

    def close_scene(self) -> None:
        """Closes the open scene, if there is one."""
        if self.scene is not None:
            self.scene.close()
            self.scene = None


def begin(state: WorkerState, trial: Trial, protocol: EvaluationProtocol) -> Observations:
    """Starts an episode in the worker."""
    return state.open_scene(trial.task).reset(trial, protocol)


def play(state: WorkerState, action_TA: np.ndarray, draw: str, stop: bool) -> Observations:
    """Goes on with the episode that ``begin`` started, see :meth:`Scene.play`."""
    if state.scene is None:
        raise LiberoError("no episode has begun in this worker.")
    return state.scene.play(action_TA, draw, stop)


def replay(
    state: WorkerState, trial: Trial, protocol: EvaluationProtocol, action_SA: np.ndarray, first: int, film: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Plays actions from the trial's beginning to the first success of those from ``first`` on, or to the horizon.

    Returns:
      (S - first,) bool, whether the goal held after each of these; it counts as held from its first success on. And
      with ``film`` as many frames (S - first, H, W, 3), the last one over and over where nothing is played.
    """
    scene = state.open_scene(trial.task)
    scene.reset(trial, protocol)
    success_S, frames = np.zeros(len(action_SA), bool), []
    for step, action_A in enumerate(action_SA[: protocol.horizons[trial.task.suite]]):
        success_S[step:] = scene.step(action_A, film) and step >= first
        frames += [scene.pictures[CAMERA]] if film and step >= first else []
        if success_S[step]:
            break
        state.heartbeat()
    return success_S[first:], np.array(frames + frames[-1:] * (len(action_SA) - first - len(frames)))


def serve(line: Connection, cfg: SceneConfig | None, renderer: str | None) -> None:
    """Runs the worker: ``(function, arguments)`` come in, ``(kind, value)`` go out, until None or a broken line."""
    # Ctrl-C reaches the whole group of processes. The main process handles it and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Libraries print; the main process's stdout is for results.
    os.dup2(2, 1)
    os.environ.pop(setup.CUDA, None)  # robosuite would read it; nothing computes here
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    state = WorkerState(cfg, heartbeat=lambda: line.send(("beat", None)))
    try:
        if cfg:
            setup.prepare(renderer)
        line.send(("ready", None))
        while (message := line.recv()) is not None:
            line.send(_answer(state, *message))
    except LiberoError as error:
        line.send(("refused", str(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the main process is gone
    state.close_scene()


def _answer(state: WorkerState, function: Callable[..., Any], arguments: tuple) -> tuple[str, Any]:
    try:
        return "done", function(state, *arguments)
    except LiberoError as error:
        return "refused", str(error)
    except (BrokenPipeError, ConnectionResetError):
        raise
    except Exception:
        # Whatever state the scene is in now, it is not trusted again.
        state.scene = None
        return "failed", traceback.format_exc()
