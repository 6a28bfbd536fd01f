"""Does the loop earn its keep? PACE beside everything cheaper, and beside online RL, three seeds, one table.

    the base trained twice as long          nothing but more of the same: no true episode
    imitation of its own successes          the episodes of both collections, all from the base; no world, no reward
    imagined GRPO, first round              the first collection only
    no refresh, as many updates             all updates in the first world
    no refresh, whole budget first          the same; the episodes of all collections and the steps of all
                                            trainings go into that world
    as WMPO                                 the same budget in one frozen world: no anchor, no keyframes, no mask,
                                            advantages over the deviation, groups that agree left out; judge and
                                            world model are ours
    as RISE                                 the same budget in one frozen world: a chunk at a time, from starts and from
                                            anywhere in failed episodes, valued by a model of progress
                                            (wovr_jax/studies/progress.py)
    no keyframe starts                      PACE from episode starts only
    online GRPO at 1, 2 and 4 times         true rollouts of the learner instead of collections
    as VLA-RL                               PPO on as many: a critic, and sub-goals pay (wovr_jax/studies/ppo.py)

Every policy is measured as sampled, greedy and between the two, and each row says how many true episodes it took.

Command:   python launch/study.py --config=configs/baselines.py[:preset of configs/pace.py]
Expect:    about nine runs of configs/pace.py for each seed; every run is resumable, and stages that a variant cannot
           change are made once for each seed
"""

from configs import pace


def get_config(preset: str = ""):
    settings = pace.get_config(preset)
    settings.job = settings.name = "baselines"
    settings.update(variants=(), outcomes=())
    return settings
