"""A robot that nobody simulates: recorded demonstrations in, a better policy out.

The run stops where it wants episodes of a policy, and says which, how many and into which folder; the same command goes
on when they are there (docs/robot_lab.md).

Command:   python launch/train.py --config=configs/robot.py:tabletop
Hardware:  as the preset's
Presets:   tabletop (the embedded table plays the robot, so that the way can be tried without one), senses after it (a
           camera in the hand and the robot's state), tiny last (networks too small to learn); franka (released
           networks), one_h100 or one_h200 after it. A robot of your own begins as franka with its own ``recorded``.
"""

from configs import common, pace


def get_config(preset: str = ""):
    settings = pace.get_config()
    settings.name = "robot"
    settings.recorded = common.settings(
        folder="recordings",  # demonstrations, collect-0, evaluate-0 and so on lie in it
        name="robot",
        instructions=(),  # what the robot may be asked to do
        success="",  # what counts as a success, in a sentence
        words="libero",
        size=256,
        steps=512,
        hz=10.0,
        last=1,
    )
    # A person's time: one collection for the first world, a smaller one for its refresh, greedy evaluations.
    settings.collect.update(demonstrations=24, validation=4, first=100, again=50)
    settings.dream.update(updates=(8, 8))
    settings.evaluate = common.settings(episodes=30, compare=30, videos=3, closed=0, temperatures=())
    presets = {"tabletop": tabletop, "senses": senses, "tiny": tiny, "franka": franka}
    return common.with_preset(settings, preset, presets | {"one_h100": pace.one_h100, "one_h200": pace.one_h200})


def franka(settings):
    """A Franka Panda at full size: ten demonstrations, 100 and 50 rollouts, 30 evaluation episodes a policy.

    The policy is a released OpenVLA-OFT, fine-tuned with adapters on the demonstrations; the world model begins as
    Wan2.2-TI2V-5B. Task, pictures and frequency are an example: say your own with ``recorded``. How many steps and
    updates so little data can carry was not measured.

    Command:   python launch/import_weights.py Openvla-oft-SFT-libero-spatial-traj1 --out weights/policy
               python launch/import_weights.py Wan2.2-TI2V-5B --out weights/wan
               python launch/train.py --config=configs/robot.py:franka,one_h200
    Hardware:  one H100 or H200 with that preset, eight GPUs of 80 GB without; not run
    Expect:    the paper: 61.7 % of the episodes before, 91.7 % after, mean of two tasks. Not measured here.
    """
    pace.full_size(settings)
    settings.recorded.update(
        folder="recordings/franka",
        name="franka",
        instructions=("pick up the banana and put it on the plate",),
        success="the banana lies on the plate, and the fingers are open",
        release="weights/policy/policy.rest/files",
        steps=256,
    )
    settings.policy_weights = "weights/policy/policy.json"
    settings.collect.update(demonstrations=10, validation=2, batch=16, retold=96)
    adapters = common.settings(size="rlinf", rank=32)
    settings.sft.update(lora=adapters, optimizer="adamw", lr=5e-4, steps=1_000, batch=32, early=1, frozen=())
    settings.world_train.update(steps=8_000, validate_every=1_000)
    settings.refresh.steps = 2_000
    settings.reward_train.update(steps=4_000, stride=2)
    settings.dream.update(groups=32, updates=(60, 40))


def tabletop(settings):
    """The embedded table in the place of a robot; launch/tools/table_robot.py moves it and calls the policy server.

    Command:   python launch/train.py --config=configs/robot.py:tabletop
    Hardware:  two CPU cores, 6 GB of memory; no downloads
    """
    settings.recorded.update(
        folder="recordings/tabletop",
        name="tabletop",
        instructions=tuple(
            f"pick up the {colour} block and put it on the plate" for colour in ("red", "green", "blue")
        ),
        success="the block lies on the plate, and the fingers are open",
        words="tabletop",
        size=32,
        steps=24,
    )
    settings.collect.update(first=192, again=192)
    settings.evaluate.update(episodes=64, compare=64)


def senses(settings):
    """After tabletop: world model and policy have a second camera, in the hand, and the robot's state.

    launch/tools/table_robot.py moves that table with --senses.
    """
    table = settings.recorded
    pace.senses(settings)
    table.update(folder=f"{table.folder}-senses", views=2, state=3, strip=16)


def tiny(settings):
    """After tabletop: networks too small to learn, and few episodes; every stage in a minute or two."""
    closed = settings.evaluate
    pace.tiny(settings)
    settings.evaluate = closed
    settings.recorded.update(folder="recordings/tiny", size=16, steps=16)
    settings.collect.update(demonstrations=12, validation=4, first=8, again=8, retold=8, batch=8)
    settings.dream.update(updates=(2, 2))
    settings.evaluate.update(episodes=8, compare=8, videos=1)
