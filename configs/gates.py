"""Does a policy learn better if payments that look like a lie are withheld? Gates of GRPO beside none.

    every payment of the judge                    PACE as it is
    the less suspicious half of them              distance from true latents, inverse dynamics and round trip, mean rank
    that half, the others left out                no failures, but no part of their groups
    half of them, drawn at random                 what fewer payments alone do
    those that the true simulator would pay       what a gate that finds every lie would do; the learner is told of them

Command:   python launch/study.py --config=configs/gates.py[:preset of configs/pace.py] --config.seeds="(0,1,2)"
           with --config.dream.updates="(8,)" the first round alone, in the world that lies most
Expect:    about four runs of configs/pace.py for each seed; docs/trust.md has what was measured
"""

from configs import pace


def get_config(preset: str = ""):
    settings = pace.get_config(preset)
    settings.job = settings.name = "gates"
    settings.update(variants=(), outcomes=())
    return settings
