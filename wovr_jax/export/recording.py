"""The recording of one client: follows its messages, and puts together the episode that they tell.

    client                                                              server
    {record: start, image, prompt, ...}                             ->  {record: {state: recording, name, steps: 0}}
    an observation                                                  ->  its actions, which are noted as proposed
    {record: step, step: 1, image (n, H, W, 3), action (n, 7), ...} ->  {record: {state: recording, name, steps: n}}
    {record: success, steps: S}, or failure                         ->  {record: {state: written, name, outcome, steps}}
    {record: discard}                                               ->  {record: {state: discarded, name}}

A step is an action and the frame that it led to: the frame of the start and S steps are an episode. Several steps may
come in one message. Each message says the number of its first step, and the end says how many there were, so that no
episode has a gap. What is not as expected is refused in words and changes nothing; the client may send it again. An
episode that cannot be kept (the disk is full) is answered with ``{state: lost, name, why}``, and the robot goes on
being served.

An episode belongs to its connection. When that ends first, the episode is dropped: nobody has said what it came to, and
nobody could say what the robot did meanwhile.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from typing import Any

import numpy as np

from wovr_jax.export import record_messages
from wovr_jax.export.record_messages import KINDS, Begun
from wovr_jax.export.recorder import Recorder, RecordError, Take, number_layout
from wovr_jax.types import Episode


@dataclasses.dataclass
class Progress:
    """An episode that goes on.

    Attributes:
      take: its frames.
      begun: its start.
      task: number of its instruction.
      began: when, in UTC.
      seconds: of each frame.
      bytes: of its frames.
      states: of each frame, where there are any.
      executed, person: of each step: the action, and whether a person steered.
      proposed: step, from 0 -> the action that the policy chose for it.
      asked: steps done when the policy was asked.
    """

    take: Take
    begun: Begun
    task: int
    began: datetime.datetime
    seconds: list[float]
    bytes: int = 0
    states: list[np.ndarray] = dataclasses.field(default_factory=list)
    executed: list[np.ndarray] = dataclasses.field(default_factory=list)
    person: list[bool] = dataclasses.field(default_factory=list)
    proposed: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    asked: list[int] = dataclasses.field(default_factory=list)


class Recording:
    """The recording of one connection, an episode after another.

    Args:
      recorder: writes them.
      frame: (H, W, 3), the shape of the policy's frames, which those of the recording have.
    """

    def __init__(self, recorder: Recorder, frame: tuple[int, int, int]):
        self.recorder, self.frame = recorder, frame
        self._now: Progress | None = None
        self._last = "this connection began none"

    async def follow(self, message: dict[Any, Any]) -> dict[str, Any]:
        """Follows a message that has the key ``record``, and returns the reply.

        Raises:
          RecordError: the message is not as expected; nothing has changed.
        """
        kind, now = message["record"], self._now
        if not isinstance(kind, str) or kind not in KINDS:
            raise RecordError(f"'record': expected one of {', '.join(KINDS)}, got {str(kind)[:40]!r}")
        if kind == "start":
            return self._begin(message)
        if now is None:
            raise RecordError(f"{kind}: no episode is being recorded ({self._last}); {{'record': 'start'}} begins one")
        if kind == "step":
            return _reply("lost", now.take, why=now.take.lost) if now.take.lost else self._go_on(message, now)
        if kind == "discard":
            self.recorder.lose(now.take, "it was discarded")
            return self._end(now, "discarded")
        first = record_messages.read_end(message, len(now.executed)) if not now.take.lost else None
        return await self._write(now, kind, first)

    def propose(self, action_TA: np.ndarray) -> None:
        """Notes what the policy answered to an observation: (T, 7) actions for the steps that come next."""
        if now := self._now:
            first = len(now.executed)
            now.asked.append(first)
            now.proposed |= {first + i: action_A for i, action_A in enumerate(action_TA)}

    def leave(self) -> None:
        """Drops an episode that has not ended, because its client is gone."""
        if now := self._now:
            self.recorder.lose(now.take, "its client left before its end")
            self._end(now, "dropped", why=now.take.lost, steps=len(now.executed))

    def _begin(self, message: dict[Any, Any]) -> dict[str, Any]:
        if (now := self._now) and not now.take.lost:
            raise RecordError(
                f"start: {now.take.name} is still being recorded, {len(now.executed)} steps; success, failure or "
                "discard ends it"
            )
        begun = record_messages.read_start(message, self.frame)
        task = self.recorder.number_task(begun.instruction, begun.task)
        if now:
            self._end(now, "lost", why=now.take.lost)
        take, began = self.recorder.begin(), datetime.datetime.now(datetime.UTC)
        seconds = [time.time() if begun.time is None else begun.time]
        now = self._now = Progress(take, begun, task, began, seconds)
        now.states += [] if begun.state_D is None else [begun.state_D]
        self._keep(now, begun.frame_HWC[None], None if begun.wrist_HWC is None else begun.wrist_HWC[None])
        return _reply("recording", take, steps=0)

    def _go_on(self, message: dict[Any, Any], now: Progress) -> dict[str, Any]:
        """Adds the steps of a message: all of them, or none."""
        done = len(now.executed)
        steps = record_messages.read_steps(message, now.begun, done, now.seconds[-1])
        count, action_NA = len(steps.frame_NHWC), steps.action_NA
        if action_NA is None:
            if lacking := [step for step in range(done, done + count) if step not in now.proposed]:
                raise RecordError(f"'action': none, and the policy proposed none for step {lacking[0] + 1}")
            action_NA = np.stack([now.proposed[step] for step in range(done, done + count)])
        if done + count > self.recorder.cfg.max_steps:
            self.recorder.lose(now.take, f"it is longer than {self.recorder.cfg.max_steps} steps, the most here")
            return _reply("lost", now.take, why=now.take.lost)
        now.executed += list(action_NA)
        now.person += [steps.person] * count
        now.states += [] if steps.state_ND is None else list(steps.state_ND)
        now.seconds += [time.time()] * count if steps.time_N is None else steps.time_N.tolist()
        self._keep(now, steps.frame_NHWC, steps.wrist_NHWC)
        if now.take.lost:
            return _reply("lost", now.take, why=now.take.lost)
        return _reply("recording", now.take, steps=len(now.executed))

    def _keep(self, now: Progress, frame_NHWC: np.ndarray, wrist_NHWC: np.ndarray | None) -> None:
        """Sends frames on their way to the disk."""
        frames = {"frame": frame_NHWC} | ({} if wrist_NHWC is None else {"wrist": wrist_NHWC})
        now.bytes += sum(frame.nbytes for frame in frames.values())
        if now.bytes > (most := self.recorder.cfg.max_bytes):
            self.recorder.lose(now.take, f"its frames are more than {most / 2**20:.0f} MiB, the most here")
        else:
            self.recorder.append(now.take, frames)

    async def _write(self, now: Progress, outcome: str, first: int | None) -> dict[str, Any]:
        """Has an episode written, and says whether it was."""
        # Whatever this connection meets while the disk is busy, its client has said how the episode ended.
        self._now = None
        if not now.take.lost:
            await self.recorder.write(now.take, lambda: _make(now, outcome, first, self.recorder.policy))
        if now.take.lost:
            return self._end(now, "lost", why=now.take.lost)
        return self._end(now, "written", outcome=outcome, steps=len(now.executed))

    def _end(self, now: Progress, state: str, **more: Any) -> dict[str, Any]:
        """Tells how an episode ended, and returns the reply that says so."""
        self._now = None
        about = "".join(f", {key} {value}" for key, value in more.items())
        self._last = f"the last was {now.take.name}: {state}{about}"
        self.recorder.tell(f"recording {now.take.name}: {state}{about}")
        return _reply(state, now.take, **more)


def _reply(state: str, take: Take, **more: Any) -> dict[str, Any]:
    return {"record": {"state": state, "name": take.name, **more}}


def _make(now: Progress, outcome: str, first: int | None, policy: dict[str, Any]) -> Episode:
    """Returns the episode, whose frames stay on the disk; called in the recorder's thread."""
    action_SA = np.stack(now.executed)
    label_SA = action_SA.copy()
    for step, action_A in now.proposed.items():
        # Where a person took over, what they did is what is to be imitated.
        if step < len(label_SA) and not now.person[step]:
            label_SA[step] = action_A
    success_S = np.zeros(len(action_SA) + 1, bool)
    if outcome == "success":
        success_S[-1 if first is None else first :] = True
    origin = policy | {
        "outcome": outcome,
        "began": now.began.isoformat(),
        "by": now.begun.by,
        "clock": "server" if now.begun.time is None else "client",
        "seconds": [round(second - now.seconds[0], 4) for second in now.seconds],
        "asked": now.asked,
        "changed": int((action_SA != label_SA).any(1).sum()),
    }
    frame_SHWC = now.take.read("frame")
    assert frame_SHWC is not None  # the start has one
    return Episode(
        frame_SHWC=frame_SHWC,
        action_SA=action_SA,
        label_SA=label_SA,
        success_S=success_S,
        instruction=now.begun.instruction,
        task=now.task,
        seed=number_layout(now.take.name) if now.begun.layout is None else now.begun.layout,
        # Without the policy it is a demonstration of whoever moved the arm.
        actor=str(policy["policy"]) if now.asked else "human",
        wrist_SHWC=now.take.read("wrist"),
        state_SD=np.stack(now.states) if now.states else None,
        origin=origin | ({"intervened": "person"} if now.asked and any(now.person) else {}),
    )
