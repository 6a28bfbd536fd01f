"""A single stage of the loop, with the stages it needs: the world model, from the base policy's rollouts.

Every 250 steps it is measured on held-out episodes and some are imagined again from their first frame; the films,
true beside imagined, are in <run>/stages/world-0/films.

Command:   python launch/train.py --config=configs/world_model.py[:preset]
           python launch/train.py --config=configs/world_model.py:lora --config.world_weights=weights/dit.json
           python launch/train.py --config=configs/world_model.py:libero_spatial,rlinf
Settings:  those of configs/pace.py, presets included
"""

from configs import common, pace


def get_config(preset: str = ""):
    own = {"lora": lora, "rlinf": rlinf}
    names = preset.split(",")
    settings = pace.get_config(",".join(name for name in names if name not in own))
    settings.job = settings.name = "world_model"
    settings.world_weights = ""  # where the transformer starts; empty for random weights
    settings.world_train.update(
        validate_every=250,  # 0: only at the end
        latents="disk",  # kept for the next run on the same episodes; "memory" keeps none, "fly" encodes every batch
        start_cap=0,  # windows begin anywhere; the reference stops at frame 250
        stride=1,  # of the windows of an episode
        ema=0.0,  # decay of averaged weights
    )
    return common.with_preset(settings, ",".join(name for name in names if name in own), own)


def lora(settings):
    """Adapters of rank 32 on attention and feed-forward; needs world_weights. The layers that read actions are trained
    whole, since a video model brings none; nothing else is trained."""
    settings.world_train.update(lora=common.settings(size="wan", rank=32), optimizer="adamw", lr=1e-3)


def rlinf(settings):
    """After a suite: RLinf's training of its released 5B model and the numerics of its environment.

    400,000 steps of eight windows at a constant rate (``WorldTrainConfig.rlinf``), windows from the first 250 frames.
    """
    pace.rlinf(settings)
    kept = {name: settings.world_train[name] for name in ("latents", "validate_every")}
    settings.world_train = common.settings(size="rlinf", **kept)
