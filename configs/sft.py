"""A single stage of the loop, with the stages it needs: the base policy from demonstrations, and its true success.

Command:   python launch/train.py --config=configs/sft.py[:preset]
Settings:  those of configs/pace.py, presets included
"""

from configs import pace


def get_config(preset: str = ""):
    settings = pace.get_config(preset)
    settings.job = settings.name = "sft"
    return settings
