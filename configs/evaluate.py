"""Success of a policy on the real LIBERO.

Command:   python launch/evaluate.py --config=configs/evaluate.py:libero_spatial --config.policy=runs/mine/bundle
Hardware:  a CPU for the simulator, 1 to 1.5 GB a worker; the policy's accelerator
Hours:     500 trials with one frame for a chunk of eight: see docs/libero.md
Expect:    published for OpenVLA-OFT from one demonstration a task: 0.61 spatial, 0.36 object, 0.48 goal, 0.14 libero_10

Presets: the suites (libero_spatial, libero_object, libero_goal, libero_10, libero_90); rlinf for RLinf's protocol,
which samples at temperature 1.6. Several are joined by commas: ``:libero_goal,rlinf``.
"""

from configs import common


def get_config(preset: str = ""):
    settings = common.settings(
        job="evaluate",
        policy="expert",
        suite="libero_spatial",
        tasks=(),
        inits=(0, 50),
        protocol="openvla",
        seed=0,
        temperature=0.0,
        workers=2,
        drawing="libero",
        videos=0,
        trained_on=(),
        overlap=False,
    )
    suites = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
    return common.with_preset(settings, preset, {suite: on(suite) for suite in suites} | {"rlinf": rlinf})


def on(suite):
    """The preset that chooses a suite."""

    def choose(settings):
        settings.suite = suite

    return choose


def rlinf(settings):
    """RLinf's protocol: 15 no-op steps, 512 steps, success in any of them, sampled actions."""
    settings.protocol, settings.temperature = "rlinf", 1.6
