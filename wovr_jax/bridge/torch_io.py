"""Files that ``torch.save`` wrote, the only door to torch; it is imported when one is opened or written.

They are called .pth, .pt, .bin or .ckpt. Such a file is a pickle and could run any program. Loading is restricted to
tensors and plain containers, always; a file that needs more is refused.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from wovr_jax.bridge import strangers
from wovr_jax.weights.safetensors import Fact, FileError

CONTAINERS = ("model_state_dict", "state_dict", "model", "module", "weights", "params")
"""Where a training checkpoint keeps the weights, the first that is there; else the only dict of tensors in it."""
EXTRA = "_extra_state"
"""End of names under which a module keeps something that is no tensor."""

_BFLOAT16 = np.dtype(jnp.bfloat16)


class Checkpoint(NamedTuple):
    """A state dict on disk.

    Attributes:
      tensors: name -> torch tensor, mapped from the file where it allows that.
      container: the key under which the state dict lay, or None; where it lay deeper, keys joined by "/".
      others: what lay beside it.
      warnings: what looks odd, in sentences without their subject.
    """

    tensors: dict[str, Any]
    container: str | None
    others: list[str]
    warnings: list[str]


def load(path: str | os.PathLike) -> Checkpoint:
    """Opens a state dict.

    Raises:
      FileError: no such file, torch missing, content that a file of weights does not need.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file.")
    strangers.refuse(path)
    content, torch = _load(path), _torch(path)

    def weights_in(value: Any) -> dict[str, Any]:
        """The tensors of a state dict; nothing for anything else."""
        held = {str(name): t for name, t in value.items() if not str(name).endswith(EXTRA)} if _is_dict(value) else {}
        return held if all(isinstance(tensor, torch.Tensor) for tensor in held.values()) else {}

    # A release is the state dict itself; a training script saves it with the epoch and the optimizer beside it.
    way, others, warnings = [], [], []
    while _is_dict(content) and content and not weights_in(content) and len(way) < 3:
        inside = [key for key, value in content.items() if _is_dict(value) and _holds(value, weights_in)]
        key = next((key for key in (*CONTAINERS, *inside[: len(inside) == 1]) if key in inside), None)
        if key is None:
            if inside:
                listed = ", ".join(map(str, inside))
                raise FileError(f"{path} holds several sets of weights: {listed}. Save the one that is meant alone.")
            break
        # An average of the weights is weights too, and often the better ones.
        if more := [str(name) for name in inside if name != key and weights_in(content[name])]:
            warnings += [f"holds tensors under {', '.join(more)} too; what is read is {key}"]
        others += sorted(str(name) for name in content if name != key)
        way.append(str(key))
        content = content[key]
    tensors = weights_in(content)
    if not tensors:
        raise FileError(
            f"{path} does not hold a dict of tensors, plain or under {' or '.join(CONTAINERS)}.{strangers.READABLE}"
        )
    others += sorted(str(name) for name in content if str(name).endswith(EXTRA))
    return Checkpoint(tensors, "/".join(way) or None, others, warnings)


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping)


def _holds(value: Any, weights_in: Callable[[Any], dict[str, Any]], depth: int = 2) -> bool:
    """Returns whether a value is a state dict, or has one below it. An optimizer's state has numbers for names."""
    if weights_in(value):
        return any("." in name or not name.isdigit() for name in weights_in(value))
    below = value.items() if depth else ()
    return any(
        _is_dict(inner) and not str(name).isdigit() and _holds(inner, weights_in, depth - 1) for name, inner in below
    )


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
    for key in reversed(container.split("/") if container else []):
        content = {key: content}
    _torch(path).save(content, path)


def _load(path: pathlib.Path) -> Any:
    torch = _torch(path)
    # Released reward classifiers name a function of the script that trained them. Nothing of it is needed.
    inert = [(_nothing, "__main__.train")]
    for mapped in (True, False):  # files of torch before 1.6 cannot be mapped
        try:
            with torch.serialization.safe_globals(inert):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except (OSError, MemoryError) as error:  # of the disk or the machine, and no fault of the file
            raise FileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or repr(error)}.") from error
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
    return f"it is damaged, or not a file that torch wrote. Copy or download it again.{strangers.READABLE}"


def _nothing(*_: object, **__: object) -> None:
    """Stands where a checkpoint names a function of somebody's script."""


def _torch(path: str | os.PathLike = "a .pt or .pth file") -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError as error:
        raise FileError(
            f"{path}: reading or writing .pth or .pt needs torch, which is not installed: pip install torch. "
            f"Or have it written as safetensors, where torch is.{strangers.READABLE}"
        ) from error
    return torch
