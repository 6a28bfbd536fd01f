"""A robot's side of the policy server, without JAX: numpy, websockets and msgpack.

    python notebooks/robot_client.py ws://127.0.0.1:8000 --prompt "pick up the red block and put it on the plate"
    python notebooks/robot_client.py ws://127.0.0.1:8000 --prompt "..." --record     (a server with --record FOLDER)

Copy this file to the robot's computer. ``Client.act`` sends one camera frame and gets a chunk of actions; a robot
plays the chunk, or its first steps, and asks again. What the actions mean is in ``Client.metadata``. ``Client.start``,
``step`` after each action that was executed, and ``end`` have the server write the episode.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect


class Client:
    """A connection to the server, open for a ``with`` block; one that broke is made anew by the next request.

    Args:
      url: such as ``ws://127.0.0.1:8000``.
      api_key: where the server wants one.
      timeout: seconds to wait for an answer.

    Raises:
      OSError, TimeoutError, websockets.WebSocketException: no server there, or none that takes this key.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 30.0):
        self.url, self.timeout = url, timeout
        header = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        # Frames do not compress in the time that a robot has; a chunk of many actions may be long. No answer to a ping
        # is missed: this program may stand still for minutes, in a debugger or while a simulator starts.
        self._how = {"additional_headers": header, "compression": None, "max_size": None, "ping_timeout": None}
        self.recorded: dict[str, Any] = {}

    def __enter__(self) -> Client:
        self._open = connect(self.url, **self._how)
        self._socket = self._open.__enter__()
        self.metadata = self._receive()  # the server speaks first
        return self

    def __exit__(self, *error: object) -> None:
        self._open.__exit__(*error)

    def act(self, image: np.ndarray, prompt: str, **more: Any) -> np.ndarray:
        """Actions (chunk, 7) float32 for a uint8 image (H, W, 3) and an instruction.

        Raises:
          RuntimeError: with the server's words, when it cannot act on this observation.
        """
        # A frame cut out of a larger one is not contiguous, and its bytes would be those of the larger one.
        observation = {"observation/image": np.ascontiguousarray(image), "prompt": prompt, **more}
        message = msgpack.packb(observation, default=_pack_array)
        try:
            reply = self._ask(message)
        except ConnectionClosed:  # the server began anew, or the network broke; it keeps nothing of a client
            self.recorded = {"state": "lost", "why": "the connection broke"}
            self.__enter__()
            reply = self._ask(message)
        self.timing = reply["server_timing"]
        return reply["actions"]

    def start(self, image: np.ndarray, prompt: str, **more: Any) -> None:
        """Begins to record an episode with its first frame; more: ``wrist_image``, ``state``, ``layout``, ``by``."""
        self.steps, self.recorded = 0, {}
        self._record(record="start", prompt=prompt, image=image, **more)

    def step(self, image: np.ndarray, action: np.ndarray, **more: Any) -> None:
        """Records an action that was executed and the frame that it led to; more: as ``start``, ``person=True``."""
        self.steps += 1
        # Several steps may come in one message; here each comes alone.
        more = {name: value if name == "person" else np.asarray(value)[None] for name, value in more.items()}
        arrays = {"image": np.asarray(image)[None], "action": np.asarray(action, np.float32)[None]}
        self._record(record="step", step=self.steps, **arrays, **more)

    def end(self, outcome: str) -> str:
        """Ends the episode: ``success``, ``failure`` or ``discard``. ``written`` comes back when it is on the disk."""
        self._record(record=outcome, **({} if outcome == "discard" else {"steps": self.steps}))
        return self.recorded["state"]

    def _record(self, **message: Any) -> None:
        """Sends a message of the recording. An episode that is lost does not stop the robot: ``recorded`` says why."""
        if self.recorded.get("state") == "lost":
            return
        arrays = {k: np.ascontiguousarray(v) if isinstance(v, np.ndarray) else v for k, v in message.items()}
        try:
            # The answer to an end comes when all frames are compressed, which takes some seconds.
            self.recorded = self._ask(msgpack.packb(arrays, default=_pack_array), 20 * self.timeout)["record"]
        except ConnectionClosed:  # the server has dropped the episode, and a new connection knows nothing of it
            self.recorded = {"state": "lost", "why": "the connection broke"}
            self.__enter__()
        if self.recorded["state"] == "lost":
            print(f"this episode will not be recorded: {self.recorded['why']}")

    def _ask(self, message: bytes, timeout: float | None = None) -> dict[str, Any]:
        self._socket.send(message)
        return self._receive(timeout)

    def _receive(self, timeout: float | None = None) -> dict[str, Any]:
        data = self._socket.recv(timeout=timeout or self.timeout)
        if isinstance(data, str):  # answers are bytes; a text is a refusal
            raise RuntimeError(f"the policy server says: {data}")
        return msgpack.unpackb(data, object_hook=_unpack_array)


# openpi's encoding of an array: a map with these four keys, which are bytes and not text.
def _pack_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    raise TypeError(f"cannot send {type(value).__name__}")


def _unpack_array(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" in value:
        return np.frombuffer(value[b"data"], value[b"dtype"]).reshape(value[b"shape"])
    return value


def main() -> None:
    """Asks for a few chunks on made-up frames, says how long they took, and has them recorded where that is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="such as ws://127.0.0.1:8000")
    parser.add_argument("--prompt", required=True, help="the instruction")
    parser.add_argument("--api-key", help="where the server wants one")
    parser.add_argument("--record", action="store_true", help="record it as an episode, and ask what it came to")
    args = parser.parse_args()
    with Client(args.url, args.api_key) as client:
        print(client.metadata)
        shape = client.metadata["image"]["height"], client.metadata["image"]["width"], 3
        camera = np.random.default_rng(0)  # a robot sends its camera's frames here
        frame = camera.integers(0, 256, shape, np.uint8)
        if args.record:
            client.start(frame, args.prompt)
        for _ in range(3):
            began = time.perf_counter()
            actions = client.act(frame, args.prompt)
            print(f"{1000 * (time.perf_counter() - began):.1f} ms, first action {np.round(actions[0], 3)}")
            for action in actions:  # a robot plays it here
                frame = camera.integers(0, 256, shape, np.uint8)
                if args.record:
                    client.step(frame, action)
        if args.record:
            ends = {"s": "success", "f": "failure"}
            print(client.end(ends.get(input("s: it succeeded, f: it failed, anything else: forget it  "), "discard")))


if __name__ == "__main__":
    try:
        main()
    except (OSError, RuntimeError) as error:  # no server there yet (it takes a while to start), or one that refuses
        sys.exit(f"{error}")
