"""The settings of a whole run: one frozen dataclass, nested, filled from ``configs/*.py``."""

from __future__ import annotations

import dataclasses
from typing import Literal

from wovr_jax.core.history import CheckpointConfig
from wovr_jax.core.sharding import MeshConfig
from wovr_jax.data import starts as start_states
from wovr_jax.learner import LearnerConfig
from wovr_jax.policy.train import SFTConfig
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.reward.train import RewardTrainConfig
from wovr_jax.sim.libero.tasks import LiberoConfig
from wovr_jax.sim.tabletop.expert import ExpertConfig
from wovr_jax.sim.tabletop.table import TabletopConfig
from wovr_jax.world.model import WorldConfig
from wovr_jax.world.train import WorldTrainConfig
from wovr_jax.world.vae.train import VAETraining


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """True-simulator trajectories: the budget that WoVR spends (1,500 then 1,000 in the paper).

    Attributes:
      demonstrations: scripted episodes for the base policy; they are not part of the budget.
      validation: more of them that the base policy is judged on and never trained on.
      first: episodes of the base policy, for the first world model and reward.
      again: episodes of the evolved policy, for each refresh.
      retold: newest of them (and a third as many demonstrations) that the world model retells for
        the training of the reward.
      batch: episodes rolled at once.
    """

    demonstrations: int = 768
    validation: int = 32
    first: int = 384
    again: int = 256
    retold: int = 192
    batch: int = 128


@dataclasses.dataclass(frozen=True)
class RefreshConfig:
    """What a refresh of the world model changes in its training (PACE).

    Attributes:
      steps, lr: fewer and smaller than in the first training.
    """

    steps: int = 400
    lr: float = 5e-4


@dataclasses.dataclass(frozen=True)
class StartsConfig:
    """Where imagined rollouts begin.

    Attributes:
      share: of the groups that begin at keyframes (KIR); 0 switches KIR off.
      rule, before, least, event, each: see ``data.starts.keyframes``.
    """

    share: float = 1 / 3
    rule: str = "before_failure"
    before: int = 6
    event: str = "any"
    each: int = 2
    least: int = 1

    def __post_init__(self) -> None:
        start_states.check_rule(self.rule, self.least, self.before, self.event)  # not after hours of other stages


@dataclasses.dataclass(frozen=True)
class DreamConfig:
    """One iteration of RL, and the world and the judge it happens in.

    Attributes:
      groups: start states of an iteration; each is rolled ``learner.grpo.group`` times.
      chunks: chunks of a rollout.
      updates: iterations of each round, one number a round; their count is the number of rounds.
      rates: factor on the learner's rate in each round; rounds beyond the list take its last number.
      world: ``learned``; ``true`` is online RL; ``shadow`` shows the policy learned frames
        while the simulator follows the same actions (for ``reward="true"``).
      reward: ``learned`` classifier, or the ``true`` predicate.
    """

    groups: int = 12
    chunks: int = 3
    updates: tuple[int, ...] = (12, 12)
    rates: tuple[float, ...] = (1.0,)
    world: Literal["learned", "true", "shadow"] = "learned"
    reward: Literal["learned", "true"] = "learned"

    def __post_init__(self) -> None:
        if not self.updates or not self.rates:
            raise ValueError(f"dream: expected updates and rates of the rounds, got {self.updates} and {self.rates}")
        if self.reward == "true" and self.world == "learned":
            raise ValueError("dream.reward='true' needs a world that knows the truth: dream.world='shadow' or 'true'")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """True success on start states that no training stage ever sees.

    Attributes:
      episodes: per policy, on the same layouts for every policy of the run.
      batch: episodes rolled at once.
      compare: episodes replayed in the world model to hold its verdict against the truth.
      videos: side-by-side videos kept of each comparison.
    """

    episodes: int = 512
    batch: int = 128
    compare: int = 256
    videos: int = 3


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides a run.

    Attributes:
      policy, world, reward: the networks.
      job, name, seed: what to run, how to call it, and the seed of everything random.
      seeds: of the runs of a study; other jobs use ``seed``.
      variants: of a study, by name, beside the full one; empty for all.
      assets: folder of the pretrained parts; empty for those of the package.
      vae, towers: names of the pretrained VAE and of the two vision towers (DINOv2, SigLIP). Without a name the VAE
        of ``world`` is trained on the demonstrations first, as ``vae_train`` says; towers then start at random.
      mesh: devices over which everything runs; its batches have to be multiples of ``data`` times ``fsdp``.
      checkpoints: how often a training keeps its state, and how many of them.
      policy_weights, world_weights: where the policy and the transformer of the world model start: a json of imported
        weights, or the folder of a checkpoint such as `stages/world-0/dit` of a run; empty for random weights.
      temperature: of the policy's sampling, in training and evaluation alike.
      libero: LIBERO as the true environment; None for the embedded table, which ``sim`` and ``expert`` describe.
      pace: whether a round after the first collects again and refreshes world model, reward and start
        states (PACE); without, every round dreams in the first ones.
    """

    policy: VLAConfig
    world: WorldConfig
    reward: RewardConfig
    job: str = "pace"
    name: str = "pace"
    seed: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = ()
    assets: str = ""
    vae: str = "tabletop_vae"
    towers: tuple[str, ...] = ("tabletop_dinov2", "tabletop_siglip")
    mesh: MeshConfig = MeshConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    policy_weights: str = ""
    world_weights: str = ""
    temperature: float = 1.6
    pace: bool = True
    sim: TabletopConfig = TabletopConfig()
    expert: ExpertConfig = ExpertConfig()
    libero: LiberoConfig | None = None
    collect: CollectConfig = CollectConfig()
    sft: SFTConfig = SFTConfig()
    vae_train: VAETraining = VAETraining()
    world_train: WorldTrainConfig = WorldTrainConfig()
    refresh: RefreshConfig = RefreshConfig()
    reward_train: RewardTrainConfig = RewardTrainConfig()
    starts: StartsConfig = StartsConfig()
    dream: DreamConfig = DreamConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def __post_init__(self) -> None:
        if self.learner.temperature != self.temperature:
            raise ValueError(
                f"learner.temperature is {self.learner.temperature}, temperature {self.temperature}: actor and learner "
                "must agree, or the importance ratios are wrong from the first step"
            )
        for training, weights in (("world_train", "world_weights"), ("sft", "policy_weights")):
            if getattr(self, training).lora and not getattr(self, weights):
                raise ValueError(
                    f"{training}.lora: adapters sit beside weights that know something already, and here they are "
                    f"random; name those to start from with {weights}=..., or train everything with "
                    f"{training}.lora=None"
                )

        kinds = (self.dream.world, self.dream.reward)
        if self.libero and (kinds not in (("learned",) * 2, ("true",) * 2) or ("true" in kinds and self.starts.share)):
            raise ValueError(
                f"dream.world={kinds[0]!r}, dream.reward={kinds[1]!r}, starts.share={self.starts.share} need a "
                "simulator that a compiled program can hold, which LIBERO is not; use 'learned' for both, 'true' for "
                "both with starts.share=0 (online RL), or the embedded table"
            )
        if self.libero and (self.libero.steps % self.policy.chunk or self.libero.steps < self.policy.chunk):
            raise ValueError(
                f"libero.steps: expected a multiple of the policy's chunk, {self.policy.chunk}, got {self.libero.steps}"
            )
        if not self.sft.steps and not self.policy_weights:
            raise ValueError(
                "sft.steps=0 leaves the base policy as it starts: name its weights with policy_weights=..."
            )

    @property
    def rounds(self) -> int:
        """Rounds of imagined RL; every round after the first begins with a refresh (PACE)."""
        return len(self.dream.updates)
