"""What a LIBERO task asks for, from the name of its files.

The benchmark takes an instruction from the file's name; the sentence inside a task's bddl file is another one.
"""

from __future__ import annotations

import re


def from_file_name(stem: str) -> str:
    """``"put the wine bottle on top of the cabinet"`` for ``put_the_wine_bottle_on_top_of_the_cabinet``.

    The scene that libero_10 and libero_90 put before it, and ``_demo`` after it in data files, are left out.
    """
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", stem.removesuffix("_demo")).replace("_", " ")
