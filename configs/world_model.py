"""A single stage of the loop, with the stages it needs: the world model, from the base policy's rollouts.

Command:   python launch/train.py --config=configs/world_model.py[:preset]
Settings:  those of configs/pace.py, presets included
"""

from configs import pace


def get_config(preset: str = ""):
    settings = pace.get_config(preset)
    settings.job = settings.name = "world_model"
    return settings
