"""Operations of a traced program: matrix products and convolutions, as often as loops run them.

The compiler's own count has the body of a loop once, whatever the number of its turns.
"""

from __future__ import annotations

import math
from typing import Any

from jax.extend import core


def count(jaxpr: core.Jaxpr) -> int:
    """Counts floating-point operations, two for each multiplication and addition; of a branch, the longer side.

    A loop of unknown length counts as one turn; the programs of this package have none.
    """
    return sum(_count_equation(eqn) for eqn in jaxpr.eqns)


def _count_equation(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        # Each output sums as many products as the contracted axes have places.
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        # Each output sums over its own kernel: the whole kernel divided by the output channels that share it out.
        kernel, out = eqn.invars[1].aval, params["dimension_numbers"].rhs_spec[0]
        return 2 * eqn.outvars[0].aval.size * (kernel.size // kernel.shape[out])
    # Everything else either holds programs of its own or is work that the matrix unit does not see.
    inner = [count(jaxpr) for jaxpr in _find_programs(params)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _find_programs(params: dict[str, Any]) -> list[core.Jaxpr]:
    """Returns the programs among the parameters of an operation."""
    # A scan has one, a branch a tuple of them; by their type, so that new operations are counted without a list here.
    values = [item for value in params.values() for item in (value if isinstance(value, tuple | list) else [value])]
    opened = [item.jaxpr if isinstance(item, core.ClosedJaxpr) else item for item in values]
    return [item for item in opened if isinstance(item, core.Jaxpr)]
