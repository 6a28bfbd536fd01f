"""The ladder: where does a loop that does not learn break? One learned part more on each rung, three seeds.

    (a) true world, true reward, twice the updates   is the policy trainable at all?
    (b) the same with the imagined budget            is the budget enough?
    (c) learned world, true reward                   do imagined frames mislead the policy?
    (d) true world, learned reward                   does the classifier mislead it?
    (e) all learned                                  the first round of the loop itself

Command:   python launch/study.py --config=configs/ladder.py
Expect:    an hour on two cores; the table is in docs/log.md
"""

from configs import pace


def get_config(preset: str = ""):
    settings = pace.get_config(preset)
    settings.job = settings.name = "ladder"
    settings.update(variants=(), outcomes=())
    settings.dream.updates = settings.dream.updates[:1]
    return settings
