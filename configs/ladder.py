"""The ladder: where does a loop that does not learn break? One learned part more on each rung, three seeds.

    (a) true world, true reward      is the policy trainable at all?
    (c) learned world, true reward   do imagined frames mislead the policy?
    (d) true world, learned reward   does the classifier mislead it?
    (e) all learned                  the loop itself

Rung (b), the imagined budget in the true world, is (a) at the same number of updates, which is how it is run here.

Command:   python launch/train.py --config=configs/ladder.py
"""

from configs import pace


def get_config(preset: str = ""):
    settings = pace.get_config(preset)
    settings.job = settings.name = "ladder"
    settings.dream.updates = (sum(settings.dream.updates),)
    return settings
