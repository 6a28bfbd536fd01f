"""Operations of a traced program: matrix products and convolutions, as often as loops run them.

The compiler's own count has the body of a loop once, whatever the number of its turns.
"""

from __future__ import annotations

import math
from typing import Any

from jax.extend import core


def count(jaxpr: core.Jaxpr) -> int:
    """Floating-point operations, two for each multiplication and addition. Of a branch, the longer side.

    A loop of unknown length counts as one turn; the programs of this package have none.
    """
    return sum(_of(eqn) for eqn in jaxpr.eqns)


def _of(eqn: Any) -> int:
    name, given = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = given["dimension_numbers"]
        return 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, out = eqn.invars[1].aval, given["dimension_numbers"].rhs_spec[0]
        return 2 * eqn.outvars[0].aval.size * (kernel.size // kernel.shape[out])
    inner = [count(jaxpr) for jaxpr in _inside(given)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (given["length"] if name == "scan" else 1)


def _inside(given: dict[str, Any]) -> list[core.Jaxpr]:
    """Programs among the parameters of an operation."""
    values = [one for value in given.values() for one in (value if isinstance(value, tuple | list) else [value])]
    closed = [one.jaxpr if isinstance(one, core.ClosedJaxpr) else one for one in values]
    return [one for one in closed if isinstance(one, core.Jaxpr)]
