"""The settings of a whole run: one frozen dataclass, nested, filled from ``configs/*.py``.

Everything is checked when a recipe is made, before the first stage: each number's range where it is declared, and here
what has to fit together. What a run folder holds is held against what is asked now by :func:`differences`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from wovr_jax.core import config
from wovr_jax.core.config import Between, Count, Faults, Natural, NonNegative, Positive, Seed, Share, checked
from wovr_jax.core.history import CheckpointConfig
from wovr_jax.core.sharding import MeshConfig
from wovr_jax.data.starts import StartsConfig
from wovr_jax.learner import LearnerConfig
from wovr_jax.policy import vla
from wovr_jax.policy.train import SFTConfig
from wovr_jax.policy.vla import VLAConfig
from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.reward.train import RewardTrainConfig
from wovr_jax.sim.embedded import Simulator, suite_of
from wovr_jax.sim.libero.tasks import LiberoConfig
from wovr_jax.sim.recorded.arena import RecordedConfig
from wovr_jax.sim.relay.table import RelayConfig
from wovr_jax.sim.tabletop.expert import ExpertConfig
from wovr_jax.sim.tabletop.table import TabletopConfig
from wovr_jax.types import ACTION_DIM
from wovr_jax.world.model import WorldConfig
from wovr_jax.world.train import WorldTrainConfig
from wovr_jax.world.vae.train import VAETraining

Layouts = Annotated[int, Between(0, 1_000_000)]
"""A number of start layouts for one purpose; more would run into those of the next (``sim.arena.layouts``)."""

SomeLayouts = Annotated[int, Between(1, 1_000_000)]
"""The same, of which a run needs at least one."""

COLLECTIONS = 7
"""Collections of a run: an eighth would take the layouts of online RL, a ninth those of the evaluation."""


@checked
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
      batch: episodes rolled at once, in collections, evaluations and comparisons.
    """

    demonstrations: Layouts = 768
    validation: Layouts = 32
    first: SomeLayouts = 384
    again: SomeLayouts = 256
    retold: Count = 192
    batch: Count = 128

    def faults(self) -> Faults:
        """Yields demonstrations and validation that do not fit one range of layouts."""
        if (both := self.demonstrations + self.validation) > 1_000_000:
            yield "validation", f"expected at most 1_000_000 episodes together with demonstrations, got {both}"


@checked
@dataclasses.dataclass(frozen=True)
class RefreshConfig:
    """What a refresh of the world model changes in its training (PACE).

    Attributes:
      steps, lr: fewer and smaller than in the first training.
    """

    steps: Natural = 400
    lr: Positive = 5e-4


@checked
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
      watch: imagined rollouts of an iteration, spread evenly over its groups, whose actions an embedded simulator
        follows, for the curves alone: how many of the failures are paid as successes. 0 for none; LIBERO cannot be
        watched so.
      select: the policy that a round ends with: its ``last``, or, by ``closed_loop``, the last one of which a smoothed
        share of at most ``false_success`` of the true failures was paid. ``triggered`` is the same, and ends the round
        as soon as that share is higher: the refresh comes then, and the next round has the updates that are left. What
        is watched costs true steps with both. A policy that is hardly ever paid passes too: look at its true success.
      false_success: see ``select``.
    """

    groups: Count = 12
    chunks: Count = 3
    updates: tuple[Natural, ...] = (12, 12)  # 0: a round that only collects and refreshes
    rates: tuple[NonNegative, ...] = (1.0,)
    world: Literal["learned", "true", "shadow"] = "learned"
    reward: Literal["learned", "true"] = "learned"
    watch: Natural = 96
    select: Literal["last", "closed_loop", "triggered"] = "last"
    false_success: Share = 0.3

    def watch_every(self, rollouts: int) -> int:
        """Returns n where every n-th of the ``rollouts`` of an iteration is watched; a true world is seen as it is."""
        return 1 if self.world != "learned" else max(rollouts // max(self.watch, 1), 1)

    def faults(self) -> Faults:
        """Yields rounds without a number, a true reward of a world without one, and a choice by what is not seen."""
        for name in ("updates", "rates"):
            if not getattr(self, name):
                yield name, "expected a number for each round, got none"
        if self.reward == "true" and self.world == "learned":
            yield "reward", "'true' needs a world that knows the truth: dream.world='shadow' or 'true'"
        if self.select != "last" and not (self.watch and self.reward == "learned"):
            yield (
                "select",
                f"{self.select!r} asks which failures a learned reward pays: watch above 0, reward='learned'",
            )


@checked
@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """True success on start states that no training stage ever sees.

    Attributes:
      episodes: per policy, on the same layouts for every policy of the run. 0, for a robot alone: nothing is measured,
        and nothing claimed.
      compare: the first so many of them are replayed in the world model, to hold its verdict against the truth.
      videos: side-by-side videos kept of each comparison, at most one an episode.
      closed: rollouts from episode starts, and as many from keyframes, that each policy plays in the learned world and
        whose actions the true simulator follows; fewer where there are not so many. 0 leaves the closed loop out.
      temperatures: at which success is measured too, beside that of training and 0 (the likeliest tokens). What a
        lower temperature repairs without any training is no merit of training.
    """

    episodes: Layouts = 512
    compare: Layouts = 256
    videos: Natural = 3
    closed: Natural = 128
    temperatures: tuple[Positive, ...] = (0.5, 0.3)

    def faults(self) -> Faults:
        """Yields a comparison with episodes that were not measured, or with none of those that were."""
        low = min(self.episodes, 1)
        if not low <= self.compare <= self.episodes:
            yield "compare", f"expected at least {low} and at most episodes={self.episodes}, got {self.compare}"


@checked
@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides a run.

    Attributes:
      policy, world, reward: the networks.
      job, name, seed: what to run, how to call it, and the seed of everything random. Layouts go by the seed's
        remainder (``sim.arena.RANGES``).
      seeds: of the runs of a study; other jobs use ``seed``.
      variants: of a study, by name, beside the full one; empty for all.
      budgets: true episodes of the points of the study ``budget``.
      online_groups: of a study, start states of an iteration of online RL, where every rollout is a true episode; 0 for
        `dream.groups`.
      outcomes: of a study, files outcomes.json of others with the same settings, whose seeds are counted too.
      assets: folder of the pretrained parts; empty for those of the package.
      vae, towers: names of the pretrained VAE and of the two vision towers (DINOv2, SigLIP). Without a name the VAE
        of ``world`` is trained on the demonstrations first, as ``vae_train`` says; towers then start at random.
      mesh: devices over which everything runs; its batches have to be multiples of ``data`` times ``fsdp``.
      checkpoints: how often a training keeps its state, and how many of them.
      policy_weights, world_weights, reward_weights: where the policy, the transformer of the world model and the
        classifier start: a json of imported weights, or the folder of a checkpoint such as `stages/world-0/dit` of a
        run; empty for random weights. What then takes no step (``world_train.steps=0``) is used as it is, in every
        round.
      start_states: a folder of start states, of `stages/starts-0/starts` of a run or ``data_prep.rlinf_starts``, used
        in every round in place of those that the run would choose; empty for the run's own.
      temperature: of the policy's sampling, in training and evaluation alike, and of the learner's log-probabilities.
      sim: the embedded table, the true environment where neither of the next two is one.
      relay: the embedded simulator with a long horizon as the true environment.
      libero: LIBERO as the true environment.
      recorded: a robot as the true environment, whose episodes people record.
      expert: who demonstrates in an embedded simulator.
      pace: whether a round after the first collects again and refreshes world model, reward and start
        states (PACE); without, every round dreams in the first ones.
    """

    policy: VLAConfig
    world: WorldConfig
    reward: RewardConfig
    job: str = "pace"
    name: str = "pace"
    seed: Seed = 0
    seeds: tuple[Seed, ...] = (0, 1, 2)
    variants: tuple[str, ...] = ()
    budgets: tuple[SomeLayouts, ...] = (48, 96, 192, 384, 768)
    online_groups: Natural = 0
    outcomes: tuple[str, ...] = ()
    assets: str = ""
    vae: str = "tabletop_vae"
    towers: tuple[str, ...] = ("tabletop_dinov2", "tabletop_siglip")
    mesh: MeshConfig = MeshConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    policy_weights: str = ""
    world_weights: str = ""
    reward_weights: str = ""
    start_states: str = ""
    temperature: Positive = 1.6
    pace: bool = True
    sim: TabletopConfig = TabletopConfig()
    expert: ExpertConfig = ExpertConfig()
    relay: RelayConfig | None = None
    libero: LiberoConfig | None = None
    recorded: RecordedConfig | None = None
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

    def faults(self) -> Faults:
        """Yields what no part can know alone: what has to be equal, to divide, or to be there."""
        yield from _fit_networks(self)
        yield from _fit_batches(self)
        yield from _fit_beginnings(self)
        yield from _fit_environment(self)

    @property
    def rounds(self) -> int:
        """Rounds of imagined RL; every round after the first begins with a refresh (PACE)."""
        return len(self.dream.updates)

    @property
    def embedded(self) -> Simulator:
        """The embedded simulator in use, where ``outside`` is None."""
        return self.sim if self.relay is None else self.relay

    @property
    def outside(self) -> LiberoConfig | RecordedConfig | None:
        """The true environment where no compiled program holds it."""
        return self.libero or self.recorded

    @property
    def steps(self) -> int:
        """Steps of a policy in an episode of the true environment."""
        return self.outside.steps if self.outside else self.embedded.horizon

    @property
    def size(self) -> int:
        """Pixels of its pictures, on a side."""
        return self.outside.size if self.outside else self.embedded.size

    @property
    def senses(self) -> tuple[int, int, int]:
        """What its frames show as mosaics (``core.pixels``): views, numbers of a state, pixels of their strip."""
        shown = self.outside or self.embedded  # LIBERO and relay show one camera
        return getattr(shown, "views", 1), getattr(shown, "state", 0), getattr(shown, "strip", 0)

    @property
    def frame(self) -> tuple[int, int]:
        """Height and width of its frames."""
        views, _, strip = self.senses
        return self.size, views * self.size + strip


def _fit_networks(recipe: Recipe) -> Faults:
    """Yields where policy, world model, classifier and environment do not speak of the same things."""
    policy, world, outside = recipe.policy, recipe.world, recipe.outside
    # The actions of a chunk are what the world model turns into the frames of a chunk.
    if policy.chunk != world.chunk:
        # One imagines what the other does.
        yield "world.chunk", f"expected policy.chunk={policy.chunk}, got {world.chunk}"
    for name, dim in (("policy.action_dim", policy.action_dim), ("world.dit.action_dim", world.dit.action_dim)):
        if dim != ACTION_DIM:
            yield name, f"expected the {ACTION_DIM} numbers of an action of both environments, got {dim}"
    views, state, strip = recipe.senses
    seen = {"policy.images": views, "policy.proprio": state, "world.views": views, "world.state": state}
    for name, expected in seen.items():
        part, _, field = name.partition(".")
        if (count := getattr(getattr(recipe, part), field)) != expected:
            yield name, f"expected {expected}: that is what the environment shows, got {count}"
    if unknown := set(recipe.sft.frozen) - set(vla.PARTS):
        yield "sft.frozen", f"expected parts of the policy, {', '.join(vla.PARTS)}, got {', '.join(sorted(unknown))}"

    # Rollouts are made of whole chunks, and what is left of an episode would be cut off without a word.
    where = next((name for name in ("libero", "recorded", "relay") if getattr(recipe, name) is not None), "sim")
    if recipe.steps % policy.chunk:
        name = f"{where}.{'steps' if outside else 'horizon'}"
        yield name, f"expected a multiple of the policy's chunk, {policy.chunk}, got {recipe.steps}"
    # A token of the transformer is a square of latents, and a latent one of pixels.
    side = world.vae.space * world.dit.patch
    for name, pixels in (("scene.size" if recipe.libero else "size", recipe.size), ("strip", strip or side)):
        if not pixels or pixels % side:
            what = f"expected a multiple of {side} pixels, the side of a token of the world model"
            yield f"{where}.{name}", f"{what}, got {pixels}"
    # Its bands are at least a pixel high, and its numbers of a latent's frames fill the latents of the strip.
    room = min(recipe.size, recipe.size * strip // world.vae.space**2 * world.vae.z_dim // world.vae.time)
    if state > room:
        yield f"{where}.strip", f"expected room for a state of {state} numbers, {strip} pixels have it for {room}"

    # The classifier embeds the index of a task; on LIBERO it is the index in the suite, whichever tasks are in use.
    tasks = outside.last_task + 1 if outside else len(suite_of(recipe.embedded).instructions)
    if recipe.reward.head == "task" and recipe.reward.tasks < tasks:
        yield "reward.tasks", f"expected at least the {tasks} tasks of the environment, got {recipe.reward.tasks}"
    if recipe.reward_train.swap and recipe.reward.head != "task":
        yield "reward_train.swap", f"expected 0 without reward.head='task', got {recipe.reward_train.swap}"


def _fit_batches(recipe: Recipe) -> Faults:
    """Yields batches that the mesh does not divide, and minibatches without a sample."""
    dream, learner = recipe.dream, recipe.learner
    rollouts = dream.groups * learner.grpo.group
    samples = rollouts * dream.chunks  # a sample is a chunk
    if learner.minibatches > samples:
        # With more, some would be dealt no sample and take no optimizer step.
        what = f"expected at most the {samples} samples of an iteration (groups x group x chunks)"
        yield "learner.minibatches", f"{what}, got {learner.minibatches}"
    mesh = recipe.mesh  # data and fsdp cut a batch, tensor does not
    if -1 in (mesh.data, mesh.fsdp):
        return  # what is left is known where the devices are: core.sharding refuses then
    pieces = mesh.data * mesh.fsdp
    # As the learner cuts them: a microbatch is never larger than a minibatch.
    microbatch = min(learner.microbatch, -(-samples // learner.minibatches))
    batches = {
        "collect.batch": recipe.collect.batch,
        "dream.groups": rollouts,
        "learner.microbatch": microbatch,
        "world_train.batch": recipe.world_train.batch,
        "reward_train.batch": recipe.reward_train.batch,
    }
    # What this run does not train has no batch.
    batches |= {"sft.batch": recipe.sft.batch} if recipe.sft.steps else {}
    batches |= {} if recipe.vae else {"vae_train.batch": recipe.vae_train.batch}
    for name, batch in batches.items():
        if batch % pieces:
            # Of two factors neither is to blame alone, so both are shown.
            what = f"{batch} rollouts of {learner.grpo.group} a group" if name == "dream.groups" else batch
            yield name, f"expected a multiple of {pieces}, mesh.data={mesh.data} x mesh.fsdp={mesh.fsdp}, got {what}"


def _fit_beginnings(recipe: Recipe) -> Faults:
    """Yields weights and episodes that a stage begins with and that nothing gives it."""
    for training, weights in (("world_train", "world_weights"), ("sft", "policy_weights")):
        if getattr(recipe, training).lora and not getattr(recipe, weights):
            yield (
                f"{training}.lora",
                f"adapters sit beside weights that know something already, and here they are random; name those to "
                f"start from with {weights}=..., or train everything with {training}.lora=None",
            )
    parts = {"sft": "policy", "world_train": "world", "reward_train": "reward"}
    for training, part in parts.items():
        if not getattr(recipe, training).steps and not getattr(recipe, f"{part}_weights"):
            what = f"0 leaves the {'base policy' if part == 'policy' else f'{part} model'} as it starts"
            yield f"{training}.steps", f"{what}: name its weights with {part}_weights=..."
    if not recipe.reward_train.steps and recipe.reward_train.rule != "fixed":
        what = "'fixed' for a classifier that is used as it is: there are no held-out episodes to choose on"
        yield "reward_train.rule", f"expected {what}, got {recipe.reward_train.rule!r}"
    learns = recipe.world_train.steps or recipe.reward_train.steps or not recipe.start_states
    if recipe.pace and recipe.rounds > 1 and not learns:
        what = "world model, classifier and start states are all given, and a refresh would change none of them"
        yield "pace", f"expected False: {what}"
    if len(recipe.towers) not in (0, 2):
        yield "towers", f"expected the names of two towers, DINOv2 and SigLIP, or none, got {recipe.towers}"

    # Each of these reads the demonstrations, and some only after hours of other stages.
    needs = {
        "imitation (sft.steps)": recipe.sft.steps,
        "the run's own VAE (vae)": not recipe.vae,
        "the scale of actions (libero.release)": not (recipe.libero and recipe.libero.release),
    }
    needed = ", ".join(what for what, asked in needs.items() if asked)
    if needed and not recipe.collect.demonstrations:
        yield "collect.demonstrations", f"expected at least 1, which {needed} are made of, got 0"
    if recipe.sft.steps and not recipe.collect.validation:
        yield "collect.validation", "expected at least 1, on which imitation is judged, got 0"
    # A study without a run has no table, and one that counts a run twice too narrow intervals.
    if len(set(recipe.seeds)) != max(len(recipe.seeds), 1):
        yield "seeds", f"expected the seed of at least one run, and each once, got {recipe.seeds}"
    if recipe.starts.share and recipe.starts.room >= recipe.steps:
        yield "starts.room", f"expected below the {recipe.steps} steps of an episode, got {recipe.starts.room}"
    # Without PACE there is one collection, however many rounds follow.
    if recipe.pace and recipe.rounds > COLLECTIONS:
        yield "dream.updates", f"expected at most {COLLECTIONS} rounds, each with a collection, got {recipe.rounds}"


def _fit_environment(recipe: Recipe) -> Faults:
    """Yields what LIBERO and a robot, which no compiled program can hold, cannot do, and what relay's expert cannot."""
    asked = [name for name in ("relay", "libero", "recorded") if getattr(recipe, name) is not None]
    if len(asked) > 1:
        yield asked[0], f"expected one true environment, got {len(asked)}: leave out {' or '.join(asked)}"
    if recipe.relay is not None and recipe.expert.flaw != "none" and recipe.expert.flawed_share:
        what = f"expected 0, since the expert of relay has no flaws, got {recipe.expert.flawed_share}"
        yield "expert.flawed_share", f"{what}; fewer demonstrations (collect.demonstrations) make a weaker policy"
    # Keyframes start in the middle of an episode, which a simulator on the host cannot be put into.
    dream, settings, share = recipe.dream, recipe.evaluate, recipe.starts.share
    online = (dream.world, dream.reward) == ("true", "true") and not share and recipe.libero is not None
    possible = (online or (dream.world, dream.reward) == ("learned", "learned")) and dream.select == "last"
    if recipe.outside and not possible:
        yield (
            "dream.world",
            f"dream.world={dream.world!r}, dream.reward={dream.reward!r}, starts.share={share}, "
            f"select={dream.select!r} need a simulator that a compiled program can hold, which LIBERO and a robot are "
            "not; use 'learned' for both, on LIBERO 'true' for both with starts.share=0 (online RL), select='last', or "
            "the embedded table",
        )
    if not (recipe.recorded or settings.episodes):
        yield "evaluate.episodes", "expected at least 1 where a simulator can play them, got 0"
    if recipe.recorded and (settings.closed or settings.temperatures):
        what = f"expected closed=0 and temperatures=(), got {settings.closed} and {settings.temperatures}"
        yield "evaluate", f"{what}: no robot follows what was chosen in imagination, and it is measured greedily alone"
    if recipe.recorded and not recipe.sft.steps:
        yield "sft.steps", "expected at least 1 with recorded episodes: the base policy is exported from its stage"


def differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where the settings of a run folder differ from those asked for: dotted path -> (there, asked).

    One that either does not name counts as its default.
    """
    # Not by way of from_dict: a folder may hold what would be refused today, and its differences are to be told all the
    # same.
    return config.diff(*(config.complete(Recipe, settings) for settings in (there, asked)))
