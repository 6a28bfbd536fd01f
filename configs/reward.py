"""A single stage of the loop, with the stages it needs: the success classifier and its threshold.

Command:   python launch/train.py --config=configs/reward.py[:preset]
Settings:  those of configs/pace.py, presets included
"""

from configs import pace


def get_config(preset: str = ""):
    settings = pace.get_config(preset)
    settings.job = settings.name = "reward"
    return settings
