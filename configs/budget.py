"""How many true episodes does imagination save? True success against true episodes, three seeds, one picture.

For each of ``budgets``: one round of imagined GRPO after a collection of so many episodes of the base policy, always
with the same number of updates, and online GRPO whose learner rolls so many episodes itself. Online RL has no point at
budgets that its iterations (12 groups of 8 episodes) do not divide.

Command:   python launch/study.py --config=configs/budget.py[:preset of configs/pace.py] --config.budgets=48,96,192
Expect:    about a run of the first round of configs/pace.py for each budget and seed
"""

from configs import pace


def get_config(preset: str = ""):
    settings = pace.get_config(preset)
    settings.job = settings.name = "budget"
    settings.update(variants=(), outcomes=())
    settings.budgets = (48, 96, 192, 384, 768)
    settings.dream.updates = settings.dream.updates[:1]
    return settings
