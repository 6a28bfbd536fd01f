"""What each part of the world model contributes (WoVR, table 4): six small models a seed, three seeds, one table.

The full model, and without the anchor, with one memory frame, without noisy context, with actions through AdaLN only
and through cross-attention only, on scripted episodes of 128 steps that never come to rest. Held-out episodes are
played again from their first frame; the table says how far chunks 1, 4 and 16 are from what happened.

Command:   python launch/study.py --config=configs/world_study.py[:strolls|:smoke]
Hardware:  one CPU core, 4 GB of memory
Expect:    see docs/world_model.md for the time and the table; every training is resumable
"""

from configs import common, pace


def get_config(preset: str = ""):
    settings = pace.get_config()
    settings.job = settings.name = "world_study"
    settings.variants = ()
    settings.sim = common.settings(horizon=128)
    settings.expert = common.settings(noise=0.3, flip=0.03)
    settings.collect.update(demonstrations=96, batch=32)
    settings.evaluate.compare = 32
    # The noise whose worth is asked is WoVR's, and nothing that WoVR does not have stands beside it.
    settings.world_train.update(steps=500, start_share=0.1, stride=2, latents="disk", shift=0, context_sigma=5 / 24)
    return common.with_preset(settings, preset, {"strolls": strolls, "senses": senses, "smoke": smoke})


def strolls(settings):
    """The full model alone, for 1,500 steps, on episodes most of which walk at random: it has seen every command
    everywhere, and launch/study.py probe can ask it."""
    settings.variants = ("full",)
    settings.expert.stroll_share = 0.7
    settings.collect.demonstrations = 192
    settings.world_train.steps = 1500


def senses(settings):
    """Another table: one model for two cameras and the robot's state, beside one for each camera."""
    pace.senses(settings)
    settings.job = settings.name = "senses_study"
    settings.sim.horizon = 128


def smoke(settings):
    """Every variant with almost nothing in it, to see a machine run them all; the numbers mean nothing."""
    settings.seeds = (0,)
    settings.collect.update(demonstrations=4, batch=4)
    settings.evaluate.compare = 2
    settings.world_train.steps = 5
