"""A robot's side of the policy server, without JAX: numpy, websockets and msgpack.

    python notebooks/robot_client.py ws://127.0.0.1:8000 --prompt "pick up the red block and put it on the plate"

Copy this file to the robot's computer. ``Client.act`` sends one camera frame and gets a chunk of actions; a robot
plays the chunk, or its first steps, and asks again. What the actions mean is in ``Client.metadata``.
"""

from __future__ import annotations

import argparse
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
            self.__enter__()
            reply = self._ask(message)
        self.timing = reply["server_timing"]
        return reply["actions"]

    def _ask(self, message: bytes) -> dict[str, Any]:
        self._socket.send(message)
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        data = self._socket.recv(timeout=self.timeout)
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
    """Asks for a few chunks on made-up frames and says how long they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="such as ws://127.0.0.1:8000")
    parser.add_argument("--prompt", required=True, help="the instruction")
    parser.add_argument("--api-key", help="where the server wants one")
    args = parser.parse_args()
    with Client(args.url, args.api_key) as client:
        print(client.metadata)
        shape = client.metadata["image"]["height"], client.metadata["image"]["width"], 3
        for i in range(3):
            frame = np.random.default_rng(i).integers(0, 256, shape, np.uint8)  # a robot sends its camera's frame here
            began = time.perf_counter()
            actions = client.act(frame, args.prompt)
            print(f"{1000 * (time.perf_counter() - began):.1f} ms, first action {np.round(actions[0], 3)}")


if __name__ == "__main__":
    main()
