"""A single stage of the loop, with the stages it needs: one round of imagined masked GRPO, evaluated before and after.

Command:   python launch/train.py --config=configs/grpo.py[:preset]
           python launch/train.py --config=configs/grpo.py:paper   (or :rlinf, the reference bundles of GRPO)
Settings:  those of configs/pace.py, presets included
"""

from configs import pace


def get_config(preset: str = ""):
    settings = pace.get_config(preset)
    settings.job = settings.name = "grpo"
    return settings
