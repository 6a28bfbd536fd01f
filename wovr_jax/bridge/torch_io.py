"""``.pth`` files, the only door to torch; it is imported when one is opened or written.

A ``.pth`` is a pickle and could run any program. Loading is restricted to tensors and plain
containers, always; a file that needs more is refused.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from wovr_jax.weights.safetensors import Fact, FileError, refuse_pointer

CONTAINERS = ("model_state_dict", "state_dict")
"""Where a training checkpoint keeps the weights."""

_BFLOAT16 = np.dtype(jnp.bfloat16)


class Checkpoint(NamedTuple):
    """A state dict on disk.

    Attributes:
      tensors: name -> torch tensor, mapped from the file where it allows that.
      container: the key under which the state dict lay, or None.
      others: what lay beside it.
    """

    tensors: dict[str, Any]
    container: str | None
    others: list[str]


def load(path: str | os.PathLike) -> Checkpoint:
    """Opens a state dict.

    Raises:
      FileError: no such file, torch missing, content that a file of weights does not need.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file.")
    refuse_pointer(path)
    content = _load(path)
    # A release is the state dict itself; a training script saves it with the epoch and the optimizer beside it.
    container = next(
        (key for key in CONTAINERS if isinstance(content, dict) and isinstance(content.get(key), dict)), None
    )
    others = sorted(str(key) for key in content if key != container) if container else []
    tensors = content[container] if container else content
    torch = _torch(path)
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise FileError(f"{path} does not hold a dict of tensors, plain or under {' or '.join(CONTAINERS)}.")
    return Checkpoint(dict(tensors), container, others)


def fact(tensor: Any) -> Fact:
    """Returns shape and dtype of a torch tensor, in numpy's terms; a dtype numpy lacks becomes void."""
    name = str(tensor.dtype).removeprefix("torch.")
    known = {"bfloat16": _BFLOAT16, "float8_e4m3fn": np.dtype(jnp.float8_e4m3fn), "bool": np.dtype(np.bool_)}
    try:
        return Fact(tuple(tensor.shape), known.get(name) or np.dtype(name))
    except TypeError:  # the plan refuses it by name, with all other faults of the file
        return Fact(tuple(tensor.shape), np.dtype(np.void))


def to_numpy(tensor: Any) -> np.ndarray:
    """Returns the same bits as a numpy array, which shares memory with the tensor."""
    torch = _torch()
    tensor = tensor.detach()  # a parameter asks for a gradient, which numpy cannot give
    if tensor.dtype is torch.bfloat16:  # numpy has no such dtype of its own
        return tensor.view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.numpy()


def from_numpy(array: np.ndarray) -> Any:
    """Returns the same bits as a torch tensor with memory of its own."""
    torch = _torch()
    # A copy: torch would share the memory, which belongs to the leaf that is let go before the file is written.
    array = np.array(array, order="C")
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def save(path: str | os.PathLike, tensors: Iterable[tuple[str, np.ndarray]], container: str | None = None) -> None:
    """Writes a state dict; torch's format wants all of it in memory."""
    content: dict[str, Any] = {name: from_numpy(array) for name, array in tensors}
    _torch(path).save({container: content} if container else content, path)


def _load(path: pathlib.Path) -> Any:
    torch = _torch(path)
    # Released reward classifiers name a function of the script that trained them. Nothing of it is needed.
    inert = [(_nothing, "__main__.train")]
    for mapped in (True, False):  # files of torch before 1.6 cannot be mapped
        try:
            with torch.serialization.safe_globals(inert):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # torch raises many kinds; each ends here
            if not mapped or "weights_only" in str(error) or "Weights only" in str(error):
                raise FileError(f"{path} cannot be read as weights only: {_reason(error)}") from error
    raise AssertionError("unreachable")


def _reason(error: Exception) -> str:
    """Says why torch refused; not in its own words, which advise to load the file all the same."""
    asked = re.search(r"GLOBAL ([\w.]+)", str(error))
    if asked:
        return (
            f"it asks for {asked[1]}, and Python objects are never loaded. Where it comes from a training script of "
            "yours, save the state dict alone: torch.save(model.state_dict(), ...)."
        )
    return "it is damaged, or not a file that torch wrote. Copy or download it again."


def _nothing(*_: object, **__: object) -> None:
    """Stands where a checkpoint names a function of somebody's script."""


def _torch(path: str | os.PathLike = "a .pth file") -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError as error:
        raise FileError(
            f"{path}: reading or writing .pth needs torch, which is not installed: pip install torch."
        ) from error
    return torch
