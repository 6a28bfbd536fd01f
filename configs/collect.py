"""A single stage of the loop, with the stages it needs: true rollouts of the base policy.

Command:   python launch/train.py --config=configs/collect.py[:preset]
Settings:  those of configs/pace.py, presets included
"""

from configs import pace


def get_config(preset: str = ""):
    settings = pace.get_config(preset)
    settings.job = settings.name = "collect"
    return settings
