"""The whole loop on the embedded table: base policy, world model, imagined GRPO, refresh, GRPO again.

Command:   python launch/train.py --config=configs/pace.py
Hardware:  two CPU cores, 6 GB of memory; no downloads
Expect:    see docs/tabletop.md for times and success rates

Settings that are not listed here keep the defaults of ``wovr_jax.recipe.Recipe``; a key ``size`` names a
size of a network, and keys beside it change that size.
"""

from configs import common


def get_config(preset: str = ""):
    settings = common.settings(
        job="pace",
        name="pace",
        seed=0,
        temperature=1.0,
        policy={"size": "tabletop"},
        world={"size": "tabletop", "flow": {"steps": 5}, "anchor": True, "memory": 4, "noisy_context": True},
        reward={"size": "tabletop"},
        expert={"flaw": "early_release", "flawed_share": 0.3},
        collect={"demonstrations": 768, "first": 768, "again": 384, "retold": 384},
        sft={"optimizer": "muon", "steps": 400, "batch": 32, "lr": 5e-3, "early": 3},
        world_train={
            "optimizer": "muon",
            "steps": 1500,
            "batch": 32,
            "lr": 8e-3,
            "b2": 0.98,
            "weighting": "uniform",
            "start_share": 0.25,
        },
        refresh={"steps": 300, "lr": 3e-3},
        reward_train={"steps": 400, "batch": 64, "lr": 2e-3, "positive": 0.3, "extra": 0.4, "rule": "rate"},
        starts={"share": 0.5, "rule": "before_failure", "before": 6, "event": "any", "each": 2},
        dream={
            "groups": 12,
            "chunks": 3,
            "updates": (12, 12),
            "rates": (1.0, 1 / 3),
            "world": "learned",
            "reward": "learned",
        },
        learner={
            "lr": 3e-4,
            "warmup": 6,
            "epochs": 1,
            "minibatches": 2,
            "microbatch": 48,
            "temperature": 1.0,
            "weight_decay": 0.0,
            "grpo": {"group": 8, "clip_low": 0.2, "clip_high": 0.28, "kl": 0.0},
        },
        evaluate={"episodes": 512, "compare": 128, "videos": 3},
    )
    return common.with_preset(settings, preset, {"smoke": smoke})


def smoke(settings):
    """Every stage with almost nothing in it, to see a machine run them all; the numbers mean nothing."""
    settings.collect.update(demonstrations=32, first=32, again=16, retold=16)
    settings.sft.steps = settings.world_train.steps = settings.reward_train.steps = settings.refresh.steps = 10
    settings.dream.update(groups=2, updates=(1, 1))
    settings.evaluate.update(episodes=32, compare=16, videos=1)
