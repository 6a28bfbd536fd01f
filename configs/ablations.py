"""What each part of WoVR contributes: the loop without it, three seeds, one table (WoVR, tables 4 and 5).

Without the anchor, with one memory frame, without noisy context, without keyframe starts, without the success
mask, without PACE, and online GRPO with the same true budget.

Command:   python launch/study.py --config=configs/ablations.py
Expect:    hours; every run is resumable, and stages that a variant cannot change are made once for each seed
"""

from configs import pace


def get_config(preset: str = ""):
    settings = pace.get_config(preset)
    settings.job = settings.name = "ablations"
    settings.update(variants=(), outcomes=())
    return settings
