"""GRPO in the true simulator with the true predicate, at the true budget of the whole loop: the baseline of WoVR.

The budget of configs/pace.py (576 episodes in three collections) goes into online rollouts instead: six updates of 96
trajectories. With a preset of LIBERO (``:libero_small`` and so on) worker processes roll them, from layouts that the
tasks draw, and an episode ends at its first success.

Command:   python launch/train.py --config=configs/online_grpo.py[:preset]
"""

from configs import pace


def get_config(preset: str = ""):
    settings = pace.get_config(preset)
    settings.job = settings.name = "online_grpo"
    settings.dream.world = settings.dream.reward = "true"
    settings.dream.groups = settings.online_groups or settings.dream.groups
    rollouts = settings.dream.groups * settings.learner.grpo.group
    budget = settings.collect.first + (len(settings.dream.updates) - 1) * settings.collect.again
    settings.dream.updates = (max(budget // rollouts, 1),)
    settings.starts.share = 0.0
    return settings
