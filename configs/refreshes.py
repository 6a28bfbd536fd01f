"""How often is the world model best trained again? No to three refreshes and one on demand, three seeds, one table.

All rows collect as many true episodes, train the world model for as many steps and the policy for as many updates as
configs/pace.py; they differ in how these are spread over rounds. The triggered row ends a round as soon as more than
``dream.false_success`` of the true failures that it watches are paid; what it watches are true steps of its own.

Command:   python launch/study.py --config=configs/refreshes.py[:embedded preset of configs/pace.py]
Expect:    about four runs of configs/pace.py for each seed
"""

from configs import pace


def get_config(preset: str = ""):
    settings = pace.get_config(preset)
    settings.job = settings.name = "refreshes"
    settings.update(variants=(), outcomes=())
    # Half of what is not done is paid in a world that a policy never met, too: near misses (docs/tabletop.md).
    settings.dream.false_success = 0.5
    return settings
