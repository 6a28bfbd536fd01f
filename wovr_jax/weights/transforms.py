"""Changes of layout between somebody else's tensor and our leaf: invertible, no arithmetic, so no bit changes.

The third column of a weight table (``table``).
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

Shape = tuple[int, ...]


class Transform(Protocol):
    """An invertible change of layout; no arithmetic, so no bit changes."""

    def theirs(self, shape: Shape) -> Shape:
        """Returns their shape of a tensor that is ``shape`` here.

        Raises:
          ValueError: there is none.
        """
        ...

    def forward(self, tensor: np.ndarray) -> np.ndarray:
        """Brings their layout to ours; a view where that is possible."""
        ...

    def backward(self, tensor: np.ndarray) -> np.ndarray:
        """Brings our layout to theirs; a view where that is possible."""
        ...


class Keep:
    """The same layout on both sides."""

    def theirs(self, shape: Shape) -> Shape:
        return shape

    def forward(self, tensor: np.ndarray) -> np.ndarray:
        return tensor

    def backward(self, tensor: np.ndarray) -> np.ndarray:
        return tensor


class Kernel:
    """``(O, I, *window)`` of torch to ``(*window, I, O)``: linear layers and convolutions of any rank."""

    def theirs(self, shape: Shape) -> Shape:
        # torch keeps a weight as outputs x inputs and multiplies by its mirror; here x @ kernel reads as it is written.
        if len(shape) < 2:
            raise ValueError(f"a kernel has two axes or more, not {shape}")
        return (shape[-1], shape[-2], *shape[:-2])

    def forward(self, tensor: np.ndarray) -> np.ndarray:
        return np.moveaxis(tensor, (0, 1), (-1, -2))  # (O, I, *window) -> (*window, I, O)

    def backward(self, tensor: np.ndarray) -> np.ndarray:
        return np.moveaxis(tensor, (-1, -2), (0, 1))  # (*window, I, O) -> (O, I, *window)


@dataclasses.dataclass(frozen=True)
class Ones:
    """Axes of length one that only they have: ``before`` and ``after`` ours."""

    before: int = 0
    after: int = 0

    def theirs(self, shape: Shape) -> Shape:
        return (1,) * self.before + shape + (1,) * self.after

    def forward(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(tensor.shape[self.before : tensor.ndim - self.after])  # (1.., *ours, 1..) -> ours

    def backward(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(self.theirs(tensor.shape))


@dataclasses.dataclass(frozen=True)
class Flattened:
    """``(O, *window)`` of a convolution whose windows do not overlap, to a matrix (product of the window, O)."""

    window: Shape

    def theirs(self, shape: Shape) -> Shape:
        if len(shape) != 2 or shape[0] != int(np.prod(self.window)):
            raise ValueError(f"a matrix with {int(np.prod(self.window))} rows was meant, not {shape}")
        return (shape[1], *self.window)

    def forward(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(len(tensor), -1).T  # (O, *window) -> (product of the window, O)

    def backward(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.T.reshape(self.theirs(tensor.shape))  # (product of the window, O) -> (O, *window)


KEEP, KERNEL = Keep(), Kernel()
