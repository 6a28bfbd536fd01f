"""Who consumed what: true simulator steps, imagined frames and wall seconds, stage by stage."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class Account:
    """What one stage consumed: true simulator steps, imagined frames, wall seconds."""

    true_steps: int = 0
    imagined_frames: int = 0
    seconds: float = 0.0


@dataclasses.dataclass
class Ledger:
    """Who consumed what, by stage, in the order in which the stages first appeared.

    The claim "the learner used no true simulator step" is ``ledger["grpo-1"].true_steps == 0``.
    """

    stages: dict[str, Account] = dataclasses.field(default_factory=dict)

    def __getitem__(self, stage: str) -> Account:
        return self.stages.get(stage, Account())

    def add(self, stage: str, *, true_steps: int = 0, imagined_frames: int = 0, seconds: float = 0.0) -> None:
        """Books consumption on ``stage``."""
        account = self.stages.setdefault(stage, Account())
        account.true_steps += int(true_steps)
        account.imagined_frames += int(imagined_frames)
        account.seconds += float(seconds)

    def total(self) -> Account:
        """The sum over stages."""
        return Account(*map(sum, zip(*(dataclasses.astuple(one) for one in self.stages.values()), strict=True)))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """stage -> {true_steps, imagined_frames, seconds}, ready for JSON."""
        return {stage: dataclasses.asdict(account) for stage, account in self.stages.items()}
